"""What a worker says of its images, for programs to read."""

from __future__ import annotations

import json

from tests.faults.fleet import UNHURRIED_S, Fleet, Submit
from tests.faults.truth import prove
from tests.support.factories import Places, put_images

IMAGES = 6


def test_each_image_has_one_line_of_json_that_tells_job_image_and_outcome(
    fleet: Fleet, places: Places, submit: Submit
) -> None:
    names = put_images(fleet.store, places, IMAGES)
    fleet.store.put(places.key(names[2]), b"<!doctype html>", content_type="image/jpeg")
    fleet.workers.start(log_format="json", lease_s=UNHURRIED_S)

    with fleet.dispatcher():
        job = submit()
        prove(fleet, job, places, names=names, reference={})
    assert fleet.workers.dismiss() == [0]

    lines = [json.loads(line) for line in fleet.workers.text().splitlines() if line.startswith("{")]
    told = [line for line in lines if line.get("action") == "image"]
    assert sorted((line["job"], line["image"], line["key"]) for line in told) == [
        (job, index, name) for index, name in enumerate(names)
    ]
    assert {line["image"]: (line["message"].partition(":")[0], line.get("code")) for line in told} == {
        index: ("failed", "not_an_image") if index == 2 else ("review", None) for index in range(IMAGES)
    }, "the stand-in's even masks are to be reviewed"
    assert all(line["seconds"] >= 0 and line["attempt"] == 1 for line in told)
    assert {line["level"] for line in told} == {"info", "warning"}

"""A worker's log lines about images, in JSON."""

from __future__ import annotations

import json

from tests.faults.fleet import Fleet, Submit
from tests.faults.invariants import assert_exact
from tests.faults.processes import LONG_LEASE_S
from tests.support.images import put_images
from tests.support.places import Places

IMAGES = 6


def test_each_image_has_one_json_line_with_job_image_and_outcome(fleet: Fleet, places: Places, submit: Submit) -> None:
    names = put_images(fleet.store, places, IMAGES)
    fleet.store.put(places.key(names[2]), b"<!doctype html>", content_type="image/jpeg")
    fleet.workers.start(log_format="json", lease_s=LONG_LEASE_S)

    with fleet.dispatcher():
        job = submit()
        assert_exact(fleet, job, places, names=names, reference={})
    assert fleet.workers.terminate() == [0]

    lines = [json.loads(line) for line in fleet.workers.log_text().splitlines() if line.startswith("{")]
    image_lines = [line for line in lines if line.get("action") == "image"]
    assert sorted((line["job"], line["image"], line["key"]) for line in image_lines) == [
        (job, index, name) for index, name in enumerate(names)
    ]
    assert {line["image"]: (line["message"].partition(":")[0], line.get("code")) for line in image_lines} == {
        index: ("failed", "not_an_image") if index == 2 else ("review", None) for index in range(IMAGES)
    }, "the stand-in's uniform masks are flagged for review"
    assert all(line["seconds"] >= 0 and line["attempt"] == 1 for line in image_lines)
    assert {line["level"] for line in image_lines} == {"info", "warning"}

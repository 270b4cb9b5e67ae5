"""The main job as a person runs it: images in S3 become cutouts and masks, each with its result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jobs.errors import JobError
from jobs.job import Job
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Store
from jobs.s3.names import source_digest
from producer.demo.local_stack import LocalStack
from producer.records import manifest
from producer.submission import submit as submit_module
from producer.submission.request import ListingFilter, Request
from tests.support.environment import Run
from tests.support.images import decode_image, put_images, sample_image
from tests.support.places import Places, fetch_output
from tests.support.waiting import wait_until
from workers.models import load
from workers.models.model_files import PACKAGED


def submit_and_wait(cutfleet: Run, places: Places, *options: str, code: int = 0) -> str:
    """Submit everything under the source and wait for exit code `code`; return the job's id."""
    ran = cutfleet("submit", places.source, "--to", places.to, "--wait", *options)
    assert ran.returncode == code, ran.stderr
    assert ran.stdout.count("\n") == 1
    return ran.stdout.strip()


def read_counts(cutfleet: Run, job: str) -> dict[str, int]:
    summary = json.loads(cutfleet("status", job, "--json").stdout)
    names = ("total", "open", "done", "failed", "skipped", "cancelled")
    return {name: summary[name] for name in names if summary[name] or name == "total"}


def count_computed(ledger: Ledger, model: str) -> int:
    """Return how many images the workers of `model` have computed, by their last heartbeats."""
    return sum(int(beat["images"]) for beat in ledger.fleet.workers().values() if beat["model"] == model)


def output_keys(store: Store, places: Places) -> set[str]:
    prefix = places.destination
    return {found.key for found in store.list_source(prefix) if not found.key.startswith("_cutfleet/")}


def test_every_image_gets_a_cutout_and_a_mask(fleet: LocalStack, cutfleet: Run, store: Store, places: Places) -> None:
    store.put(places.key("shoes/a.jpg"), sample_image(seed=1), content_type="image/jpeg")
    store.put(places.key("shoes/a.png"), sample_image(seed=2, form="PNG"), content_type="image/png")
    store.put(places.key("фото (1) é#%+.webp"), sample_image(seed=3, form="WEBP"), content_type="image/webp")
    store.put(places.key("shoes/"), b"", content_type="application/x-directory")

    job = submit_and_wait(cutfleet, places)

    relative = ["shoes/a.jpg", "shoes/a.png", "фото (1) é#%+.webp"]
    assert read_counts(cutfleet, job) == {"total": 3, "done": 3}
    assert output_keys(store, places) == {
        location.key for name in relative for location in (places.cutout(name), places.mask(name))
    }
    for name in relative:
        cutout, mask = (
            decode_image(fetch_output(store, location)) for location in (places.cutout(name), places.mask(name))
        )
        assert (cutout.mode, mask.mode) == ("RGBA", "L")
        assert cutout.size == mask.size == (160, 120)
        pixels = np.asarray(cutout)
        assert np.array_equal(pixels[..., 3], np.asarray(mask))
        assert not pixels[pixels[..., 3] == 0].any(), "colour is 0 where alpha is 0"


def test_the_metadata_of_a_cutout_names_its_origin(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places
) -> None:
    etag = store.put(places.key("a.jpg"), sample_image(), content_type="image/jpeg")

    job = submit_and_wait(cutfleet, places)

    cutout, mask = (store.head(location, role="output") for location in (places.cutout("a.jpg"), places.mask("a.jpg")))
    assert cutout is not None
    assert mask is not None
    assert cutout.metadata["cf-source"] == source_digest(places.key("a.jpg"))
    assert cutout.metadata["cf-source-etag"] == etag
    assert cutout.metadata["cf-mask-etag"] == mask.etag
    assert cutout.metadata["cf-job"] == job
    assert cutout.metadata["cf-model"] == "u2netp"
    assert cutout.metadata["cf-fingerprint"] == mask.metadata["cf-fingerprint"]


def test_existing_outputs_are_skipped_without_computing(
    fleet: LocalStack, cutfleet: Run, store: Store, ledger: Ledger, places: Places, tmp_path: Path
) -> None:
    weights = tmp_path / "own.safetensors"  # a model of this test only, so that no other images are counted
    weights.write_bytes(PACKAGED["u2netp"].read_bytes())
    model = load(str(weights)).served_name
    worker = fleet.start_worker(device="cpu", model=str(weights), slots="2")
    names = put_images(store, places, 5)
    submit_and_wait(cutfleet, places, "--model", model)

    second = submit_and_wait(cutfleet, places, "--model", model)
    store.put(places.key(names[2]), sample_image(seed=99), content_type="image/jpeg")
    third = submit_and_wait(cutfleet, places, "--model", model)
    store.put(places.mask(names[3]), b"not the mask", content_type="image/png")
    fourth = submit_and_wait(cutfleet, places, "--model", model, code=1)

    assert read_counts(cutfleet, second) == {"total": 5, "skipped": 5}
    assert read_counts(cutfleet, third) == {"total": 5, "skipped": 4, "done": 1}
    assert read_counts(cutfleet, fourth) == {"total": 5, "skipped": 4, "failed": 1}, (
        "a mask of another origin is not overwritten"
    )
    wait_until(lambda: count_computed(ledger, model) >= 7, what="the heartbeat counts every image")
    assert count_computed(ledger, model) == 7, "the first five, the replaced one, and the one with another mask"
    worker.stop()


def test_an_object_that_is_no_image_fails_with_code_and_reason(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places
) -> None:
    put_images(store, places, 3)
    store.put(places.key("page.jpg"), b"<html>404</html>", content_type="image/jpeg")
    store.put(places.key("empty.png"), b"", content_type="image/png")

    job = submit_and_wait(cutfleet, places, code=1)

    assert read_counts(cutfleet, job) == {"total": 5, "done": 3, "failed": 2}
    shown = cutfleet("status", job, "--failed").stdout
    rows = dict(line.split("\t")[:2] for line in shown.splitlines())
    assert rows == {"page.jpg": "not_an_image", "empty.png": "not_an_image"}
    assert len(output_keys(store, places)) == 6
    failures = json.loads(cutfleet("status", job, "--failed", "--json").stdout)["failures"]
    assert {(row["key"], row["code"]) for row in failures} == set(rows.items())


def test_a_closed_job_leaves_its_record_and_report(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places
) -> None:
    put_images(store, places, 2)
    store.put(places.key("x.jpg"), b"no image", content_type="image/jpeg")

    job = submit_and_wait(cutfleet, places, code=1)

    def record(name: str) -> str:
        return fetch_output(store, places.destination.below(f"_cutfleet/{job}/{name}")).decode()

    bucket = places.source_location.bucket
    assert json.loads(record("job.json"))["source"] == places.source
    summary = json.loads(record("report/summary.json"))
    assert (summary["done"], summary["failed"]) == (2, 1)
    cutout = store.head(places.cutout("p00000.jpg"), role="output")
    assert cutout is not None
    assert summary["tally"]["made"] == {cutout.metadata["cf-fingerprint"]: 2}
    assert 0 < summary["tally"]["quality"]["subject_share"] < 1
    seconds = 3 / summary["rates"]["images_per_s"]
    assert summary["rates"]["seconds"] == pytest.approx(seconds, rel=0.1, abs=0.06), "rounded to a tenth of a second"
    assert summary["rates"]["images_per_worker_s"] > 0
    assert (summary["cost"]["writes"], summary["cost"]["reads"]) == (4, 4), "PUT of mask and cutout; HEAD and GET"
    assert summary["cost"]["usd"] == pytest.approx(summary["cost"]["worker_usd"] + summary["cost"]["s3_usd"], abs=1e-3)
    assert record("report/succeeded-000000.csv").splitlines() == [
        f"{bucket},p0000{i}.jpg,,succeeded,,,done" for i in range(2)
    ]
    assert record("report/failed-000000.csv").startswith(f"{bucket},x.jpg,,failed,not_an_image,,")


@pytest.mark.parametrize("lane", ["live", "backfill"])
def test_keys_can_be_given_as_arguments_and_on_stdin(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places, lane: str
) -> None:
    names = put_images(store, places, 4)

    ran = cutfleet(
        *["submit", places.source, names[0], "-", "--to", places.to, "--lane", lane, "--wait"],
        stdin=f"{names[1]}\n\n{names[1]}\nmissing.jpg\n",
    )

    assert ran.returncode == 1
    job = ran.stdout.strip()
    assert read_counts(cutfleet, job) == {"total": 3, "done": 2, "failed": 1}
    assert cutfleet("status", job, "--failed").stdout.startswith("missing.jpg\tsource_missing\t")
    second = cutfleet("submit", places.source, *names[:2], "--to", places.to, "--lane", lane, "--wait")
    assert read_counts(cutfleet, second.stdout.strip()) == {"total": 2, "skipped": 2}, "in their current version"


def test_an_image_whose_output_names_are_too_long_fails(fleet: LocalStack, cutfleet: Run, places: Places) -> None:
    ran = cutfleet("submit", places.source, "k" * 1010 + ".jpg", "--to", places.to, "--wait")

    assert ran.returncode == 1, ran.stderr
    assert "\tname_too_long\t" in cutfleet("status", ran.stdout.strip(), "--failed").stdout


def test_the_status_of_one_image_can_be_read(fleet: LocalStack, cutfleet: Run, store: Store, places: Places) -> None:
    put_images(store, places, 1)
    store.put(places.key("x.jpg"), b"no image", content_type="image/jpeg")
    job = submit_and_wait(cutfleet, places, code=1)

    done = json.loads(cutfleet("status", str(places.key("p00000.jpg")), "--json").stdout)
    failed = json.loads(cutfleet("status", str(places.key("x.jpg")), "--json").stdout)
    unknown = json.loads(cutfleet("status", str(places.key("none.jpg")), "--json").stdout)

    assert (done["state"], done["job"], done["cutout"]) == ("done", job, str(places.cutout("p00000.jpg")))
    assert (failed["state"], failed["code"]) == ("failed", "not_an_image")
    assert unknown["state"] == "unknown"


def test_an_output_of_another_source_is_never_overwritten(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places
) -> None:
    store.put(places.key("one/a.jpg"), sample_image(seed=1), content_type="image/jpeg")
    store.put(places.key("two/a.jpg"), sample_image(seed=2), content_type="image/jpeg")
    store.put(places.cutout("other.jpg"), b"another origin", content_type="image/png")
    store.put(places.key("other.jpg"), sample_image(), content_type="image/jpeg")
    first = cutfleet("submit", f"{places.source}one/", "--to", places.to, "--wait")
    before = store.head(places.cutout("a.jpg"), role="output")

    second = cutfleet("submit", f"{places.source}two/", "--to", places.to, "--wait")
    third = cutfleet("submit", places.source, "other.jpg", "--to", places.to, "--wait")

    assert (first.returncode, second.returncode, third.returncode) == (0, 1, 1)
    for ran in (second, third):
        assert "\tname_taken\t" in cutfleet("status", ran.stdout.strip(), "--failed").stdout
    assert store.head(places.cutout("a.jpg"), role="output") == before
    assert fetch_output(store, places.cutout("other.jpg")) == b"another origin"


def test_an_interrupted_submission_can_be_resumed(
    stack: LocalStack, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (manifest, submit_module):
        monkeypatch.setattr(module, "PART_ROWS", 2)
    put_images(store, places, 5)
    store.put(
        places.key("p00001/deep.jpg"), sample_image(seed=7), content_type="image/jpeg"
    )  # SeaweedFS lists it out of key order
    request = Request(
        source=places.source_location,
        destination=places.destination,
        recipe=Recipe(),
        lane="backfill",
        name="",
        keys=None,
    )

    def stop_after_the_second_part(found: int) -> None:
        if found == 4:
            raise KeyboardInterrupt

    def resume(resumed: Request) -> Job:
        return submit_module.resume(job.id, resumed, store=store, ledger=ledger, listed=lambda _: None)

    with Ledger(stack.environment["CUTFLEET_REDIS_URL"].replace("/0", "/1"), name="without dispatcher") as ledger:
        with pytest.raises(KeyboardInterrupt):
            submit_module.submit(request, store=store, ledger=ledger, lease_s=60, listed=stop_after_the_second_part)
        (job,) = ledger.jobs.newest()
        assert (job.total, job.listed) == (4, False)
        for other in (
            dataclasses.replace(request, source=places.key("p")),
            dataclasses.replace(request, keys=("p00000.jpg",)),
            dataclasses.replace(request, only=ListingFilter(max_bytes=9)),
        ):
            with pytest.raises(JobError, match="give the same") as raised:
                resume(other)
            assert raised.value.code == "other_source"
        resumed = resume(request)

    assert (resumed.total, resumed.listed) == (6, True)
    keys = [task.key for number in range(resumed.parts) for task in manifest.read_part(store, resumed, number)]
    assert len(keys) == len(set(keys)) == 6


def test_jobs_are_listed_newest_first(fleet: LocalStack, cutfleet: Run, store: Store, places: Places) -> None:
    put_images(store, places, 1)
    older = submit_and_wait(cutfleet, places, "--name", "spring catalogue")
    newer = submit_and_wait(cutfleet, places)

    listed = [json.loads(line)["job"] for line in cutfleet("jobs", "--json").stdout.splitlines()]

    assert listed[:2] == [newer, older]
    assert "spring catalogue" in cutfleet("jobs").stdout


def test_waiting_has_a_deadline(fleet: LocalStack, cutfleet: Run, store: Store, places: Places) -> None:
    put_images(store, places, 1)
    ran = cutfleet("submit", places.source, "--to", places.to, "--model", "birefnet")

    waited = cutfleet("wait", ran.stdout.strip(), "--timeout", "0.5")

    assert ran.returncode == 0
    assert "No running worker serves model 'birefnet'" in ran.stderr
    assert waited.returncode == 3
    assert "still 1 image open" in waited.stderr

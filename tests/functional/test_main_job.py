"""The main job, as a person runs it: images in S3 become cutouts and masks, with the truth about each."""

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
from jobs.s3.client import Location, Store, source_digest
from producer.demo.local_stack import LocalStack
from producer.records import manifest
from producer.submission import submit as submission
from producer.submission.sources import Only
from tests.support.environment import Run
from tests.support.factories import Places, decode, fetch, put_images, sample_image, wait_until
from workers.models import load
from workers.models.registry import PACKAGED


def submit(cutfleet: Run, places: Places, *more: str, code: int = 0) -> str:
    """Submits everything under the source, waits, and returns the job's id."""
    ran = cutfleet("submit", places.source, "--to", places.to, "--wait", *more)
    assert ran.returncode == code, ran.stderr
    assert ran.stdout.count("\n") == 1
    return ran.stdout.strip()


def counts(cutfleet: Run, job: str) -> dict[str, int]:
    summary = json.loads(cutfleet("status", job, "--json").stdout)
    names = ("total", "open", "done", "failed", "skipped", "cancelled")
    return {name: summary[name] for name in names if summary[name] or name == "total"}


def images_predicted(ledger: Ledger, model: str) -> int:
    """How many images went through the workers of `model` so far (as of their last heartbeats)."""
    return sum(int(facts["images"]) for facts in ledger.workers().values() if facts["model"] == model)


def names_under(store: Store, uri: str) -> set[str]:
    prefix = Location.parse(uri)
    return {found.key for found in store.list_source(prefix) if not found.key.startswith("_cutfleet/")}


def test_every_image_gets_a_cutout_and_a_mask(fleet: LocalStack, cutfleet: Run, store: Store, places: Places) -> None:
    store.put(places.key("shoes/a.jpg"), sample_image(seed=1), content_type="image/jpeg")
    store.put(places.key("shoes/a.png"), sample_image(seed=2, form="PNG"), content_type="image/png")
    store.put(places.key("фото (1) é#%+.webp"), sample_image(seed=3, form="WEBP"), content_type="image/webp")
    store.put(places.key("shoes/"), b"", content_type="application/x-directory")

    job = submit(cutfleet, places)

    relative = ["shoes/a.jpg", "shoes/a.png", "фото (1) é#%+.webp"]
    assert counts(cutfleet, job) == {"total": 3, "done": 3}
    assert names_under(store, places.to) == {
        place.key for name in relative for place in (places.cutout(name), places.mask(name))
    }
    for name in relative:
        cutout, mask = (decode(fetch(store, place)) for place in (places.cutout(name), places.mask(name)))
        assert (cutout.mode, mask.mode) == ("RGBA", "L")
        assert cutout.size == mask.size == (160, 120)
        pixels = np.asarray(cutout)
        assert np.array_equal(pixels[..., 3], np.asarray(mask))
        assert not pixels[pixels[..., 3] == 0].any(), "colour hides under alpha 0"


def test_a_cutout_says_where_it_comes_from(fleet: LocalStack, cutfleet: Run, store: Store, places: Places) -> None:
    etag = store.put(places.key("a.jpg"), sample_image(), content_type="image/jpeg")

    job = submit(cutfleet, places)

    cutout, mask = (store.head(place, role="output") for place in (places.cutout("a.jpg"), places.mask("a.jpg")))
    assert cutout is not None
    assert mask is not None
    assert cutout.metadata["cf-source"] == source_digest(places.key("a.jpg"))
    assert cutout.metadata["cf-source-etag"] == etag
    assert cutout.metadata["cf-mask-etag"] == mask.etag
    assert cutout.metadata["cf-job"] == job
    assert cutout.metadata["cf-model"] == "u2netp"
    assert cutout.metadata["cf-fingerprint"] == mask.metadata["cf-fingerprint"]


def test_what_is_there_already_is_skipped_without_the_model(
    fleet: LocalStack, cutfleet: Run, store: Store, ledger: Ledger, places: Places, tmp_path: Path
) -> None:
    weights = tmp_path / "own.safetensors"  # a model of this test's own: nobody else's images are counted
    weights.write_bytes(PACKAGED["u2netp"].read_bytes())
    model = load(str(weights)).served_name
    worker = fleet.start_worker(device="cpu", model=str(weights), slots="2")
    names = put_images(store, places, 5)
    submit(cutfleet, places, "--model", model)

    again = submit(cutfleet, places, "--model", model)
    store.put(places.key(names[2]), sample_image(seed=99), content_type="image/jpeg")
    third = submit(cutfleet, places, "--model", model)
    store.put(places.mask(names[3]), b"not the mask", content_type="image/png")
    fourth = submit(cutfleet, places, "--model", model, code=1)

    assert counts(cutfleet, again) == {"total": 5, "skipped": 5}
    assert counts(cutfleet, third) == {"total": 5, "skipped": 4, "done": 1}
    assert counts(cutfleet, fourth) == {"total": 5, "skipped": 4, "failed": 1}, "a foreign mask is not overwritten"
    wait_until(lambda: images_predicted(ledger, model) >= 7)
    assert images_predicted(ledger, model) == 7, "the first five, the one replaced, the one whose mask was not its own"
    worker.stop()


def test_what_is_no_image_fails_with_code_and_reason(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places
) -> None:
    put_images(store, places, 3)
    store.put(places.key("page.jpg"), b"<html>404</html>", content_type="image/jpeg")
    store.put(places.key("empty.png"), b"", content_type="image/png")

    job = submit(cutfleet, places, code=1)

    assert counts(cutfleet, job) == {"total": 5, "done": 3, "failed": 2}
    shown = cutfleet("status", job, "--failed").stdout
    rows = dict(line.split("\t")[:2] for line in shown.splitlines())
    assert rows == {"page.jpg": "not_an_image", "empty.png": "not_an_image"}
    assert len(names_under(store, places.to)) == 6
    failures = json.loads(cutfleet("status", job, "--failed", "--json").stdout)["failures"]
    assert {(row["key"], row["code"]) for row in failures} == set(rows.items())


def test_a_closed_job_leaves_manifest_and_report(
    fleet: LocalStack, cutfleet: Run, store: Store, places: Places
) -> None:
    put_images(store, places, 2)
    store.put(places.key("x.jpg"), b"no image", content_type="image/jpeg")

    job = submit(cutfleet, places, code=1)

    def record(name: str) -> str:
        place = Location(Location.parse(places.to).bucket, f"_cutfleet/{job}/{name}")
        return fetch(store, place).decode()

    bucket = Location.parse(places.source).bucket
    assert json.loads(record("job.json"))["source"] == places.source
    summary = json.loads(record("report/summary.json"))
    assert (summary["done"], summary["failed"]) == (2, 1)
    cutout = store.head(places.cutout("p00000.jpg"), role="output")
    assert cutout is not None
    assert summary["tally"]["made"] == {cutout.metadata["cf-fingerprint"]: 2}
    assert 0 < summary["tally"]["quality"]["subject_share"] < 1
    seconds = 3 / summary["rates"]["images_per_s"]
    assert summary["rates"]["seconds"] == pytest.approx(seconds, rel=0.1, abs=0.06), "to a tenth of a second"
    assert summary["rates"]["images_per_worker_s"] > 0
    assert (summary["cost"]["writes"], summary["cost"]["reads"]) == (4, 4), "mask and cutout; looked for, and read"
    assert summary["cost"]["usd"] == pytest.approx(summary["cost"]["worker_usd"] + summary["cost"]["s3_usd"], abs=1e-3)
    assert record("report/succeeded-000000.csv").splitlines() == [
        f"{bucket},p0000{i}.jpg,,succeeded,,,done" for i in range(2)
    ]
    assert record("report/failed-000000.csv").startswith(f"{bucket},x.jpg,,failed,not_an_image,,")


@pytest.mark.parametrize("lane", ["live", "backfill"])
def test_keys_can_be_named(fleet: LocalStack, cutfleet: Run, store: Store, places: Places, lane: str) -> None:
    names = put_images(store, places, 4)

    ran = cutfleet(
        *["submit", places.source, names[0], "-", "--to", places.to, "--lane", lane, "--wait"],
        stdin=f"{names[1]}\n\n{names[1]}\nmissing.jpg\n",
    )

    assert ran.returncode == 1
    job = ran.stdout.strip()
    assert counts(cutfleet, job) == {"total": 3, "done": 2, "failed": 1}
    assert cutfleet("status", job, "--failed").stdout.startswith("missing.jpg\tsource_missing\t")
    again = cutfleet("submit", places.source, *names[:2], "--to", places.to, "--lane", lane, "--wait")
    assert counts(cutfleet, again.stdout.strip()) == {"total": 2, "skipped": 2}, "in the version that is there now"


def test_an_image_whose_results_could_have_no_name_fails(fleet: LocalStack, cutfleet: Run, places: Places) -> None:
    ran = cutfleet("submit", places.source, "k" * 1010 + ".jpg", "--to", places.to, "--wait")

    assert ran.returncode == 1, ran.stderr
    assert "\tname_too_long\t" in cutfleet("status", ran.stdout.strip(), "--failed").stdout


def test_one_image_has_a_status_of_its_own(fleet: LocalStack, cutfleet: Run, store: Store, places: Places) -> None:
    put_images(store, places, 1)
    store.put(places.key("x.jpg"), b"no image", content_type="image/jpeg")
    job = submit(cutfleet, places, code=1)

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
    store.put(places.cutout("foreign.jpg"), b"somebody's own", content_type="image/png")
    store.put(places.key("foreign.jpg"), sample_image(), content_type="image/jpeg")
    first = cutfleet("submit", f"{places.source}one/", "--to", places.to, "--wait")
    before = store.head(places.cutout("a.jpg"), role="output")

    second = cutfleet("submit", f"{places.source}two/", "--to", places.to, "--wait")
    third = cutfleet("submit", places.source, "foreign.jpg", "--to", places.to, "--wait")

    assert (first.returncode, second.returncode, third.returncode) == (0, 1, 1)
    for ran in (second, third):
        assert "\tname_taken\t" in cutfleet("status", ran.stdout.strip(), "--failed").stdout
    assert store.head(places.cutout("a.jpg"), role="output") == before
    assert fetch(store, places.cutout("foreign.jpg")) == b"somebody's own"


def test_a_stopped_submission_is_resumed(
    stack: LocalStack, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (manifest, submission):
        monkeypatch.setattr(module, "PART_ROWS", 2)
    put_images(store, places, 5)
    store.put(places.key("p00001/deep.jpg"), sample_image(seed=7), content_type="image/jpeg")  # lists out of order here
    request = submission.Request(
        source=places.source, destination=places.to, recipe=Recipe(), lane="backfill", name="", keys=None
    )

    def stop_after_the_second_part(found: int) -> None:
        if found == 4:
            raise KeyboardInterrupt

    def resume(again: submission.Request) -> Job:
        return submission.resume(job.id, again, store=store, ledger=ledger, listed=lambda _: None)

    with Ledger(stack.environment["CUTFLEET_REDIS_URL"].replace("/0", "/1"), name="no dispatcher here") as ledger:
        with pytest.raises(KeyboardInterrupt):
            submission.submit(request, store=store, ledger=ledger, lease_s=60, listed=stop_after_the_second_part)
        (job,) = ledger.jobs()
        assert (job.total, job.listed) == (4, False)
        for other in ({"source": f"{places.source}p"}, {"keys": ("p00000.jpg",)}, {"only": Only(max_bytes=9)}):
            with pytest.raises(JobError, match="give the same") as refused:
                resume(dataclasses.replace(request, **other))  # type: ignore[arg-type]  # one field each
            assert refused.value.code == "other_source"
        resumed = resume(request)

    assert (resumed.total, resumed.listed) == (6, True)
    keys = [task.key for number in range(resumed.parts) for task in manifest.read_part(store, resumed, number)]
    assert len(keys) == len(set(keys)) == 6


def test_jobs_are_listed_newest_first(fleet: LocalStack, cutfleet: Run, store: Store, places: Places) -> None:
    put_images(store, places, 1)
    older = submit(cutfleet, places, "--name", "spring catalogue")
    newer = submit(cutfleet, places)

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

"""Images that are done are skipped without a request for each, if listing and last report prove it; never wrongly."""

from __future__ import annotations

import dataclasses
import gzip
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.job import Job
from jobs.ledger import Ledger
from jobs.ledger.jobs import Jobs
from jobs.recipe import PIPELINE_VERSION, Recipe
from jobs.s3.client import Store
from jobs.s3.location import Location
from producer.demo.local_stack import LocalStack
from producer.submission.request import Request
from producer.submission.skip_index import build_skip_index, served_fingerprint
from producer.submission.submit import draft_job
from tests.faults.s3_proxy import S3Proxy
from tests.support.environment import Run
from tests.support.images import put_images, sample_image
from tests.support.places import Places, delete_object, fetch_output
from tests.support.waiting import wait_until
from workers.models import load
from workers.models.model_files import PACKAGED

COUNT = 4


@dataclasses.dataclass
class CountedRequests:
    """A worker and a command whose S3 requests are counted, and a model that no other worker serves."""

    model: str
    proxy: S3Proxy
    cutfleet: Run
    ledger: Ledger
    places: Places

    def submit(self, *options: str) -> tuple[Job, Counter[tuple[str, str]]]:
        """Submit and wait until the job is closed; return it and the number of requests by method and bucket."""
        self.proxy.asked.clear()
        env = {"CUTFLEET_S3_ENDPOINT": self.proxy.url}
        places = self.places
        ran = self.cutfleet("submit", places.source, "--to", places.to, "--model", self.model, *options, env=env)
        assert ran.returncode == 0, ran.stderr
        job = ran.stdout.strip()
        wait_until(lambda: self.ledger.jobs.get(job).closed is not None, what=f"{job} is closed")
        return self.ledger.jobs.get(job), Counter(self.proxy.asked)

    def submit_and_close_late(self) -> Job:
        """Submit; let the job close two seconds after its first outputs: listings have times in whole seconds."""
        self.proxy.asked.clear()
        places, env = self.places, {"CUTFLEET_S3_ENDPOINT": self.proxy.url}
        command = ["submit", places.source, "--to", places.to, "--model", self.model, "--sample", str(COUNT)]
        job = self.cutfleet(*command, env=env).stdout.strip()
        wait_until(lambda: self.ledger.jobs.get(job).done == COUNT, what="the sample is done")
        done = time.time()
        wait_until(lambda: time.time() > done + 2.1, what="two seconds have passed")
        wait_until(lambda: self.ledger.jobs.unpause(job), what="the paused job is unpaused")
        wait_until(lambda: self.ledger.jobs.get(job).closed is not None, what="the job is closed")
        return self.ledger.jobs.get(job)


@pytest.fixture(scope="module")
def served(fleet: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, S3Proxy]]:
    """The model, and the proxy of its worker."""
    weights = tmp_path_factory.mktemp("weights") / "counted.safetensors"
    weights.write_bytes(PACKAGED["u2netp"].read_bytes())
    with S3Proxy(fleet.s3_port) as proxy:
        worker = fleet.start_worker(device="cpu", model=str(weights), slots="2", s3_endpoint=proxy.url)
        try:
            yield load(str(weights)).served_name, proxy
        finally:
            worker.stop()


@pytest.fixture
def counted(
    served: tuple[str, S3Proxy], cutfleet: Run, ledger: Ledger, store: Store, places: Places
) -> CountedRequests:
    put_images(store, places, COUNT + 1)
    return CountedRequests(*served, cutfleet, ledger, places)


def test_a_new_image_costs_no_head_request_and_a_done_one_no_request(counted: CountedRequests, store: Store) -> None:
    places = counted.places
    first = counted.submit_and_close_late()
    asked = Counter(counted.proxy.asked)
    assert first.done == COUNT + 1
    assert asked["GET", places.source_location.bucket] == COUNT + 1
    assert asked["HEAD", places.destination.bucket] == 0, "the destination was empty: no worker needs a HEAD"

    second, asked = counted.submit()

    assert (second.skipped, second.done) == (COUNT + 1, 0)
    assert asked["HEAD", places.destination.bucket] in (0, 2), "the last output may be too new to be certain"
    assert asked["GET", places.source_location.bucket] == 0
    assert asked["HEAD", places.source_location.bucket] == 0
    summary = json.loads(fetch_output(store, _record(counted, second, "report/summary.json")))
    assert list(summary["tally"]["made"].values()) == [COUNT + 1], "its report lists every image, as the first one does"
    rows = gzip.decompress(fetch_output(store, _record(counted, second, "report/made-000000.jsonl.gz"))).splitlines()
    assert len(rows) == COUNT + 1


def test_images_with_a_changed_source_or_output_are_not_skipped(counted: CountedRequests, store: Store) -> None:
    places = counted.places
    first = counted.submit_and_close_late()
    store.put(places.key("p00000.jpg"), sample_image(seed=77), content_type="image/jpeg")
    delete_object(store, places.mask("p00001.jpg"))
    delete_object(store, places.cutout("p00002.jpg"))
    assert first.closed is not None

    def is_overwritten() -> bool:
        """Overwrite a mask; whether it is newer than the job's end by the store's clock."""
        store.put(places.mask("p00003.jpg"), b"another origin", content_type="image/png")
        mask = places.mask("p00003.jpg")
        (found,) = store.list_source(mask)
        return found.modified >= int(first.closed or 0)

    wait_until(is_overwritten, what="a mask is overwritten")
    second, _ = counted.submit()

    assert (second.total, second.done, second.failed, second.skipped) == (COUNT + 1, 3, 1, COUNT - 3)
    assert [failure.code for _, failure in counted.ledger.images.failures(second.id)] == ["name_taken"]
    cutout = store.head(places.cutout("p00000.jpg"), role="output")
    source = store.head(places.key("p00000.jpg"), role="source")
    assert cutout is not None and source is not None
    assert cutout.metadata["cf-source-etag"] == source.etag


def test_images_made_by_another_recipe_are_not_skipped(counted: CountedRequests, store: Store, tmp_path: Path) -> None:
    counted.submit()
    recipe = tmp_path / "soft.toml"
    recipe.write_text('edges = "off"\n')

    other, _ = counted.submit("--recipe", str(recipe))
    back, _ = counted.submit()

    assert (other.done, back.done) == (COUNT + 1, COUNT + 1)


def test_a_report_is_ignored_when_another_job_may_have_overwritten_its_images(
    stack: LocalStack, counted: CountedRequests, store: Store, tmp_path: Path
) -> None:
    """Job B, with another recipe, overwrites the outputs of A before A is closed; the report of A still has them."""
    places, ledger = counted.places, counted.ledger
    recipe = tmp_path / "soft.toml"
    recipe.write_text('edges = "off"\n')
    sample = ["submit", places.source, "--to", places.to, "--model", counted.model, "--sample", str(COUNT)]
    a = counted.cutfleet(*sample).stdout.strip()
    wait_until(lambda: ledger.jobs.get(a).done == COUNT, what="A has made its first images")
    b = counted.cutfleet(*sample, "--recipe", str(recipe)).stdout.strip()
    wait_until(lambda: ledger.jobs.get(b).done == COUNT, what="B has overwritten them")
    done = time.time()
    wait_until(lambda: time.time() > done + 2.1, what="two seconds have passed")
    assert ledger.jobs.unpause(a)
    wait_until(lambda: ledger.jobs.get(a).closed is not None, what="A is closed")

    class LostJobs(Jobs):
        """As after Redis has lost its data."""

        def open(self) -> list[Job]:
            return []

    class BClosesMeanwhile(Jobs):
        def open(self) -> list[Job]:
            ledger.jobs.unpause(b)
            wait_until(lambda: ledger.jobs.get(b).closed is not None, what="B is closed")
            return super().open()

    assert _hints(counted, store, stack, LostJobs) == _hints(counted, store, stack, BClosesMeanwhile) == {""}


def test_a_replayed_image_is_checked_by_a_worker(counted: CountedRequests, store: Store) -> None:
    """A replay uses the current version of the source, which the manifest does not name."""
    places, ledger = counted.places, counted.ledger
    bad = places.key("bad.jpg")
    first_etag = store.put(bad, b"no image", content_type="image/jpeg")
    first, _ = counted.submit()
    assert first.failed == 1
    store.put(bad, sample_image(seed=5), content_type="image/jpeg")
    assert counted.cutfleet("retry", first.id).returncode == 0
    wait_until(lambda: ledger.jobs.get(first.id).done == COUNT + 2, what="the replayed image is done")
    wait_until(lambda: ledger.jobs.get(first.id).closed is not None, what="the job is closed")
    assert store.put(bad, b"no image", content_type="image/jpeg") == first_etag

    second, _ = counted.submit()

    assert [(failure.key, failure.code) for _, failure in ledger.images.failures(second.id)] == [
        ("bad.jpg", "not_an_image")
    ]


def test_with_an_unreadable_record_a_submission_works_and_no_image_is_known(
    stack: LocalStack, counted: CountedRequests, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """The record may be of a job that has overwritten the outputs of the last one."""
    last = counted.submit_and_close_late()
    made = _record(counted, last, "report/made-000000.jsonl.gz")
    other = _record(counted, dataclasses.replace(last, id="20260101-000000-000000"), "job.json")
    bodies = [b"", b"[" * 100_000, b"[]", b"{}", json.dumps(last.summary() | {"created": "soon"}).encode()]
    whole = fetch_output(store, made)

    def read_hints(damaged: Location, body: bytes) -> tuple[set[str], list[bool]]:
        """Return the hints of the images, and whether each log line names the damaged object."""
        caplog.clear()
        store.put(damaged, body, content_type="application/json")
        hints = _hints(counted, store, stack, Jobs)
        return hints, [
            str(damaged) in row.getMessage() for row in caplog.records if row.name == "producer.submission.skip_index"
        ]

    assert read_hints(made, whole[:-9]) == ({""}, [True])
    assert "known" in read_hints(made, whole)[0]
    assert [read_hints(other, body) for body in bodies] == [({""}, [True])] * len(bodies)
    job, _ = counted.submit()

    assert job.skipped == COUNT + 1


def test_the_served_fingerprint_is_empty_unless_all_workers_agree(stack: LocalStack) -> None:
    recipe = Recipe(model="of-this-test")
    beat: dict[str, str | int | float] = {
        "model": "of-this-test",
        "revision": "r1",
        "input_size": "320x320",
        "pipeline": PIPELINE_VERSION,
    }
    with Ledger(stack.environment["CUTFLEET_REDIS_URL"].replace("/0", "/5"), name="own") as ledger:
        ledger.connection.call("flushdb")
        assert served_fingerprint(recipe, ledger) == ""
        ledger.fleet.heartbeat("one", beat, ttl_s=60)
        expected = recipe.fingerprint(model_revision="r1", input_size=(320, 320))
        assert served_fingerprint(recipe, ledger) == expected
        ledger.fleet.heartbeat("two", beat | {"revision": "r2"}, ttl_s=60)
        assert served_fingerprint(recipe, ledger) == ""
        ledger.fleet.heartbeat("two", beat | {"pipeline": PIPELINE_VERSION + 1}, ttl_s=60)
        assert served_fingerprint(recipe, ledger) == ""


def _record(counted: CountedRequests, job: Job, name: str) -> Location:
    return counted.places.destination.below(f"_cutfleet/{job.id}/{name}")


def _hints(counted: CountedRequests, store: Store, stack: LocalStack, jobs: type[Jobs]) -> set[str]:
    """Return the hints that a submission would get now. `jobs`: the ledger's view of the jobs."""
    places = counted.places
    request = Request(
        source=places.source_location,
        destination=places.destination,
        recipe=Recipe(model=counted.model),
        lane="backfill",
        name="",
        keys=None,
    )
    job = draft_job(request, job_id="20260101-000000-000001", store=store)
    with Ledger(stack.environment["CUTFLEET_REDIS_URL"], name="stack") as ledger:
        ledger.jobs = jobs(ledger.connection)
        with build_skip_index(job, store, ledger, at_least=COUNT, is_whole=True) as index:
            assert index is not None
            return {index.hint(row) for row in store.list_source(places.source_location)}


def test_no_image_is_known_while_a_job_with_a_recipe_of_a_later_version_is_open(
    stack: LocalStack, counted: CountedRequests, store: Store
) -> None:
    last = counted.submit_and_close_late()
    recipe = json.dumps({"model": counted.model, "of_a_later_version": 1})
    other = dataclasses.replace(last, id="20260101-000000-000002", recipe_json=recipe, closed=None)

    class HasLaterJob(Jobs):
        def open(self) -> list[Job]:
            return [other]

    assert "known" in _hints(counted, store, stack, Jobs)
    assert _hints(counted, store, stack, HasLaterJob) == {""}

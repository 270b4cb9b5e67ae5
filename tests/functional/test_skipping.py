"""What is done already is skipped without a request an image, where listing and last report tell; never wrongly."""

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
from jobs.recipe import PIPELINE_VERSION, Recipe
from jobs.s3.client import Location, Store
from producer.demo.local_stack import LocalStack
from producer.submission import skip_index as known
from producer.submission.skip_index import look_up, served_fingerprint
from producer.submission.submit import Request, draft
from tests.faults.proxy import S3Proxy
from tests.support.environment import Run
from tests.support.factories import Places, fetch, make, put_images, sample_image, wait_until
from workers.models import load
from workers.models.registry import PACKAGED

COUNT = 4


@dataclasses.dataclass
class Counted:
    """A worker and a command whose requests to S3 are counted, and a model that nobody else serves."""

    model: str
    proxy: S3Proxy
    cutfleet: Run
    ledger: Ledger
    places: Places

    def submit(self, *more: str) -> tuple[Job, Counter[tuple[str, str]]]:
        """A job, closed, and what it asked of the source's and the destination's objects."""
        self.proxy.asked.clear()
        env = {"CUTFLEET_S3_ENDPOINT": self.proxy.url}
        places = self.places
        ran = self.cutfleet("submit", places.source, "--to", places.to, "--model", self.model, *more, env=env)
        assert ran.returncode == 0, ran.stderr
        job = ran.stdout.strip()
        wait_until(lambda: self.ledger.job(job).closed is not None, what=f"{job} is closed")
        return self.ledger.job(job), Counter(self.proxy.asked)

    def submit_and_close_late(self) -> Job:
        """What was written stands there for more than a second when the job closes: listings know whole seconds."""
        self.proxy.asked.clear()
        places, env = self.places, {"CUTFLEET_S3_ENDPOINT": self.proxy.url}
        command = ["submit", places.source, "--to", places.to, "--model", self.model, "--sample", str(COUNT)]
        job = self.cutfleet(*command, env=env).stdout.strip()
        wait_until(lambda: self.ledger.job(job).done == COUNT, what="the sample is done")
        done = time.time()
        wait_until(lambda: time.time() > done + 2.1)
        wait_until(lambda: self.ledger.unpause(job), what="it was paused, and goes on")
        wait_until(lambda: self.ledger.job(job).closed is not None)
        return self.ledger.job(job)

    def asked_of(self, asked: Counter[tuple[str, str]], method: str, uri: str) -> int:
        return asked[method, Location.parse(uri).bucket]


@pytest.fixture(scope="module")
def served(fleet: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, S3Proxy]]:
    """The model, and what its worker's requests go through."""
    weights = tmp_path_factory.mktemp("weights") / "counted.safetensors"
    weights.write_bytes(PACKAGED["u2netp"].read_bytes())
    with S3Proxy(fleet.s3_port) as proxy:
        worker = fleet.start_worker(device="cpu", model=str(weights), slots="2", s3_endpoint=proxy.url)
        try:
            yield load(str(weights)).served_name, proxy
        finally:
            worker.stop()


@pytest.fixture
def counted(served: tuple[str, S3Proxy], cutfleet: Run, ledger: Ledger, store: Store, places: Places) -> Counted:
    put_images(store, places, COUNT + 1)
    return Counted(*served, cutfleet, ledger, places)


def test_what_is_new_costs_no_look_and_what_is_done_costs_no_request(counted: Counted, store: Store) -> None:
    places = counted.places
    first = counted.submit_and_close_late()
    asked = Counter(counted.proxy.asked)
    assert first.done == COUNT + 1
    assert counted.asked_of(asked, "GET", places.source) == COUNT + 1
    assert counted.asked_of(asked, "HEAD", places.to) == 0, "nothing stood there: no worker looked"

    second, asked = counted.submit()

    assert (second.skipped, second.done) == (COUNT + 1, 0)
    assert counted.asked_of(asked, "HEAD", places.to) in (0, 2), "the last one may be written too late to be sure"
    assert counted.asked_of(asked, "GET", places.source) == 0
    assert counted.asked_of(asked, "HEAD", places.source) == 0
    summary = json.loads(fetch(store, _record(counted, second, "report/summary.json")))
    assert list(summary["tally"]["made"].values()) == [COUNT + 1], "its report tells of all, as the first one's"
    rows = gzip.decompress(fetch(store, _record(counted, second, "report/made-000000.jsonl.gz"))).splitlines()
    assert len(rows) == COUNT + 1


def test_what_changed_at_either_end_is_never_skipped(counted: Counted, store: Store) -> None:
    places = counted.places
    first = counted.submit_and_close_late()
    store.put(places.key("p00000.jpg"), sample_image(seed=77), content_type="image/jpeg")
    store._s3.delete_object(Bucket=places.mask("p00001.jpg").bucket, Key=places.mask("p00001.jpg").key)
    store._s3.delete_object(Bucket=places.cutout("p00002.jpg").bucket, Key=places.cutout("p00002.jpg").key)
    assert first.closed is not None

    def overwritten() -> bool:
        """Later than the job was closed, by the store's clock."""
        store.put(places.mask("p00003.jpg"), b"somebody's own", content_type="image/png")
        mask = places.mask("p00003.jpg")
        (found,) = store.list_source(mask)
        return found.modified >= int(first.closed or 0)

    wait_until(overwritten)
    second, _ = counted.submit()

    assert (second.total, second.done, second.failed, second.skipped) == (COUNT + 1, 3, 1, COUNT - 3)
    assert [failure.code for _, failure in counted.ledger.failures(second.id)] == ["name_taken"]
    cutout = store.head(places.cutout("p00000.jpg"), role="output")
    source = store.head(places.key("p00000.jpg"), role="source")
    assert cutout is not None and source is not None
    assert cutout.metadata["cf-source-etag"] == source.etag


def test_another_recipe_is_not_what_the_report_tells_of(counted: Counted, store: Store, tmp_path: Path) -> None:
    counted.submit()
    recipe = tmp_path / "soft.toml"
    recipe.write_text('edges = "off"\n')

    other, _ = counted.submit("--recipe", str(recipe))
    back, _ = counted.submit()

    assert (other.done, back.done) == (COUNT + 1, COUNT + 1)


def test_a_row_of_a_job_that_another_one_overtook_is_not_believed(
    stack: LocalStack, counted: Counted, store: Store, tmp_path: Path
) -> None:
    """Job B, by another recipe, overwrites what A made, before A is closed; A's report says that A made it."""
    places, ledger = counted.places, counted.ledger
    recipe = tmp_path / "soft.toml"
    recipe.write_text('edges = "off"\n')
    sample = ["submit", places.source, "--to", places.to, "--model", counted.model, "--sample", str(COUNT)]
    a = counted.cutfleet(*sample).stdout.strip()
    wait_until(lambda: ledger.job(a).done == COUNT, what="A made its first images")
    b = counted.cutfleet(*sample, "--recipe", str(recipe)).stdout.strip()
    wait_until(lambda: ledger.job(b).done == COUNT, what="B made them anew")
    done = time.time()
    wait_until(lambda: time.time() > done + 2.1)
    assert ledger.unpause(a)
    wait_until(lambda: ledger.job(a).closed is not None, what="A is closed")

    class Forgot(Ledger):
        """As after Redis was lost."""

        def open_jobs(self) -> list[Job]:
            return []

    class ClosesB(Ledger):
        def open_jobs(self) -> list[Job]:
            ledger.unpause(b)
            wait_until(lambda: ledger.job(b).closed is not None, what="B is closed")
            return super().open_jobs()

    assert _hints(counted, store, stack, Forgot) == _hints(counted, store, stack, ClosesB) == {""}


def test_what_was_tried_again_is_looked_at(counted: Counted, store: Store) -> None:
    """A retry takes the version that is there then, which the manifest does not name."""
    places, ledger = counted.places, counted.ledger
    bad = places.key("bad.jpg")
    first_etag = store.put(bad, b"no image", content_type="image/jpeg")
    first, _ = counted.submit()
    assert first.failed == 1
    store.put(bad, sample_image(seed=5), content_type="image/jpeg")
    assert counted.cutfleet("retry", first.id).returncode == 0
    wait_until(lambda: ledger.job(first.id).done == COUNT + 2, what="it is done")
    wait_until(lambda: ledger.job(first.id).closed is not None)
    assert store.put(bad, b"no image", content_type="image/jpeg") == first_etag

    second, _ = counted.submit()

    assert [(failure.key, failure.code) for _, failure in ledger.failures(second.id)] == [("bad.jpg", "not_an_image")]


def test_a_record_that_can_not_be_read_stops_nobody_and_nothing_is_told(
    stack: LocalStack, counted: Counted, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose it is nobody knows: it may be of a job that overwrote what the last one made."""
    last = counted.submit_and_close_late()
    made = _record(counted, last, "report/made-000000.jsonl.gz")
    other = _record(counted, dataclasses.replace(last, id="20260101-000000-000000"), "job.json")
    bodies = [b"", b"[" * 100_000, b"[]", b"{}", json.dumps(last.summary() | {"created": "soon"}).encode()]
    whole = fetch(store, made)

    def look(damaged: Location, body: bytes) -> tuple[set[str], list[bool]]:
        """What is told of the images, and whether each line of the log names the damage."""
        caplog.clear()
        store.put(damaged, body, content_type="application/json")
        hints = _hints(counted, store, stack, Ledger)
        return hints, [
            str(damaged) in row.getMessage() for row in caplog.records if row.name == "producer.submission.skip_index"
        ]

    assert look(made, whole[:-9]) == ({""}, [True])
    assert "known" in look(made, whole)[0]
    assert [look(other, body) for body in bodies] == [({""}, [True])] * len(bodies)
    job, _ = counted.submit()

    assert job.skipped == COUNT + 1


def test_which_model_is_served_must_be_certain(stack: LocalStack) -> None:
    recipe = Recipe(model="of-this-test")
    facts = {"model": "of-this-test", "revision": "r1", "input_size": "320x320", "pipeline": PIPELINE_VERSION}
    with Ledger(stack.environment["CUTFLEET_REDIS_URL"].replace("/0", "/5"), name="alone") as ledger:
        ledger._call("flushdb")
        assert served_fingerprint(recipe, ledger) == ""
        ledger.heartbeat("one", facts, ttl_s=60)
        expected = recipe.fingerprint(model_revision="r1", input_size=(320, 320))
        assert served_fingerprint(recipe, ledger) == expected
        ledger.heartbeat("two", facts | {"revision": "r2"}, ttl_s=60)
        assert served_fingerprint(recipe, ledger) == ""
        ledger.heartbeat("two", facts | {"pipeline": PIPELINE_VERSION + 1}, ttl_s=60)
        assert served_fingerprint(recipe, ledger) == ""


def _record(counted: Counted, job: Job, name: str) -> Location:
    to = Location.parse(counted.places.to)
    return Location(to.bucket, f"{to.key}_cutfleet/{job.id}/{name}")


def _hints(counted: Counted, store: Store, stack: LocalStack, kind: type[Ledger]) -> set[str]:
    """What a submission that comes now is told of the images."""
    places = counted.places
    request = Request(
        source=places.source,
        destination=places.to,
        recipe=Recipe(model=counted.model),
        lane="backfill",
        name="",
        keys=None,
    )
    job = draft(request, job_id="20260101-000000-000001", store=store)
    with (
        kind(stack.environment["CUTFLEET_REDIS_URL"], name="here") as one,
        look_up(job, store, one, at_least=COUNT, whole=True) as known,
    ):
        assert known is not None
        return {known.hint(row) for row in store.list_source(Location.parse(places.source))}


def test_a_recipe_of_a_later_version_says_nothing_of_what_its_job_makes(
    alone: Ledger, store: Store, places: Places
) -> None:
    theirs, ours = (make(places, alone, store, count=1) for _ in range(2))
    alone._redis.hset(f"cf:job:{theirs.id}", "recipe", '{"model": "u2netp", "of_a_later_version": 1}')

    assert not known._makes_by("made", alone.job(theirs.id), ours, alone)

"""Large backfills: submissions that are killed, and exact counts of a hundred thousand images."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.job import ImageState, Job
from jobs.ledger import Ledger
from producer.demo.local_stack import LocalStack, inherited_environment
from producer.records.manifest import PART_ROWS, read_part
from tests.bench.simulated import DESTINATION, MODEL, SOURCE, Consumer, send_heartbeat
from tests.faults.s3_proxy import Fault, S3Proxy
from tests.support.environment import ROOT
from tests.support.listing_server import KEYS, LAST, assert_manifest_is_exact, serve_keys
from tests.support.waiting import wait_until

PARTS = 10


def consume(url: str, stop: threading.Event) -> None:
    """Claim and commit images until `stop` is set."""
    consumer = Consumer(url)
    while not stop.is_set():
        claims = consumer.take(50)
        consumer.finish(claims)
        if not claims:
            stop.wait(0.02)
    consumer.close()


@contextmanager
def consuming(url: str) -> Iterator[None]:
    stop = threading.Event()
    worker = threading.Thread(target=consume, args=(url, stop))
    worker.start()
    try:
        yield
    finally:
        stop.set()
        worker.join()


class BlockedManifest(S3Proxy):
    """Does not answer PUTs of the manifest part `part` and later ones."""

    part = 0

    def choose(self, method: str, path: str) -> Fault | None:
        found = re.search(r"/manifest/(\d+)", path)
        if method == "PUT" and found and int(found[1]) >= self.part:
            return Fault("hang")
        return super().choose(method, path)


def kill_while_listing(command: list[str], env: dict[str, str], ledger: Ledger, *, parts: int) -> str:
    """Run a submission and kill it when `parts` parts of the manifest are recorded; return the job's id."""
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    wait_until(lambda: any(job.parts >= parts for job in ledger.jobs.newest()), what=f"{parts} parts are recorded")
    process.kill()
    assert process.wait() != 0, "the submission was killed before it ended"
    job = ledger.jobs.newest()[0]
    assert not job.listed
    assert job.parts < PARTS
    return job.id


def test_a_submission_that_is_killed_twice_lists_every_key_once(tmp_path: Path) -> None:
    keys = [f"photos/{number:06d}.jpg" for number in range(PARTS * PART_ROWS)]
    manifest = tmp_path / "keys.csv"
    manifest.write_text("\n".join([*reversed(keys), *keys[::20]]))
    submit = [sys.executable, "-m", "producer", "submit", str(SOURCE), "--to", str(DESTINATION), "--model", MODEL]
    submit += ["--from", str(manifest)]
    with LocalStack(tmp_path / "stack") as own, own.ledger() as ledger, own.store() as store:
        own.start_dispatcher()
        store.create_bucket("out")
        send_heartbeat(ledger, node="bare", slots=500)
        env = inherited_environment() | own.environment
        with consuming(own.environment["CUTFLEET_REDIS_URL"]), BlockedManifest(own.s3_port) as s3:
            blocked = env | {"CUTFLEET_S3_ENDPOINT": s3.url}
            s3.part = 3
            job = kill_while_listing(submit, blocked, ledger, parts=3)
            wait_until(lambda: ledger.jobs.get(job).done > 0, what="images are done before the listing is complete")
            s3.part = 6
            assert kill_while_listing([*submit, "--resume", job], blocked, ledger, parts=6) == job

            subprocess.run([*submit, "--resume", job], cwd=ROOT, env=env, check=True, capture_output=True)
            wait_until(lambda: ledger.jobs.get(job).closed is not None, within_s=200, what="the job is closed")

        found = ledger.jobs.get(job)
        assert [task.key for number in range(found.parts) for task in read_part(store, found, number)] == keys
        assert (found.total, found.done, found.failed, found.skipped) == (len(keys), len(keys), 0, 0)
        assert set(ledger.images.states(job, 0, len(keys))) == {ImageState.DONE}


def test_a_submission_that_is_killed_during_its_listing_lists_every_key_once(tmp_path: Path) -> None:
    submit = [sys.executable, "-m", "producer", "submit", str(SOURCE), "--to", str(DESTINATION), "--model", MODEL]
    submit += ["--yes"]  # else the submission lists once before, to count
    stack = LocalStack(tmp_path / "stack")
    with stack as own, own.ledger() as ledger, own.store() as store, serve_keys() as source:
        own.start_dispatcher()
        store.create_bucket("out")
        send_heartbeat(ledger, node="bare", slots=500)
        env = inherited_environment() | own.environment | {"CUTFLEET_SOURCE_ENDPOINT": source.url}

        def kill_and_return(*, parts: int, pages: int) -> Job:
            """Submit or resume; kill it after `parts` recorded parts and `pages` more pages of the listing."""
            jobs = ledger.jobs.newest()
            resume = ["--resume", jobs[0].id] if jobs else []
            source.delay_s, source.blocked_prefix, began = 0.5, LAST, source.requests
            process = subprocess.Popen([*submit, *resume], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
            wait_until(
                lambda: source.requests >= began + pages and any(job.parts >= parts for job in ledger.jobs.newest()),
                what=f"{parts} parts are recorded, {pages} pages are listed",
            )
            process.kill()
            assert process.wait() != 0, "the submission was killed before it ended"
            (job,) = ledger.jobs.newest()
            assert not job.listed
            return job

        with consuming(own.environment["CUTFLEET_REDIS_URL"]):
            for parts, pages in ((0, 14), (1, 1), (1, 20)):
                job = kill_and_return(parts=parts, pages=pages).id
            source.delay_s, source.blocked_prefix = 0, ""
            subprocess.run([*submit, "--resume", job], cwd=ROOT, env=env, check=True, capture_output=True)
            wait_until(lambda: ledger.jobs.get(job).closed is not None, within_s=200, what="the job is closed")

        found = ledger.jobs.get(job)
        assert source.peak > 3, "it is listed in parallel"
        assert_manifest_is_exact(found, store)
        assert (found.done, found.failed, found.skipped) == (len(KEYS), 0, 0)
        assert set(ledger.images.states(job, 0, len(KEYS))) == {ImageState.DONE}


def test_a_hundred_thousand_images_are_counted_exactly_though_some_are_delivered_twice(tmp_path: Path) -> None:
    results = tmp_path / "rows.json"

    ran = subprocess.run(
        [sys.executable, "-m", "tests.bench.scale", "--images", "100000", "--json", str(results)],
        cwd=ROOT,
        env=inherited_environment(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    rows = {row["name"]: row["value"] for row in json.loads(results.read_text())}
    assert rows["images, every count exact"] == 100_000
    assert 4_000 < rows["delivered twice"] < 6_000
    assert rows["Redis, greatest memory"] < 64

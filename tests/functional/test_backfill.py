"""A large backfill: killed while it is submitted, and a hundred thousand images counted to the last one."""

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
from tests.bench.simulated import DESTINATION, MODEL, SOURCE, Consumer, say_alive
from tests.faults.proxy import Fault, S3Proxy
from tests.support.environment import ROOT
from tests.support.factories import wait_until
from tests.support.listing_server import KEYS, LAST, assert_exact, serving_keys

PARTS = 10


def consume(url: str, stop: threading.Event) -> None:
    """Workers whose work takes no time."""
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


class Withheld(S3Proxy):
    """Does not answer who puts this part of a manifest, or one behind it."""

    part = 0

    def choose(self, method: str, path: str) -> Fault | None:
        found = re.search(r"/manifest/(\d+)", path)
        if method == "PUT" and found and int(found[1]) >= self.part:
            return Fault("hang")
        return super().choose(method, path)


def killed_while_listing(command: list[str], env: dict[str, str], ledger: Ledger, *, parts: int) -> str:
    """Runs a submission and kills it once `parts` parts of the manifest are recorded; returns the job's id."""
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    wait_until(lambda: any(job.parts >= parts for job in ledger.jobs()), what=f"{parts} parts are recorded")
    process.kill()
    assert process.wait() != 0, "it was killed, not done"
    job = ledger.jobs()[0]
    assert not job.listed
    assert job.parts < PARTS
    return job.id


def test_a_submission_killed_twice_lists_every_key_once_and_ends_exact(tmp_path: Path) -> None:
    keys = [f"photos/{number:06d}.jpg" for number in range(PARTS * PART_ROWS)]
    listed = tmp_path / "keys.csv"
    listed.write_text("\n".join([*reversed(keys), *keys[::20]]))
    submit = [sys.executable, "-m", "producer", "submit", SOURCE, "--to", DESTINATION, "--model", MODEL]
    submit += ["--from", str(listed)]
    with LocalStack(tmp_path / "stack") as own, own.ledger() as ledger, own.store() as store:
        own.start_dispatcher()
        store.create_bucket("out")
        say_alive(ledger, node="bare", slots=500)
        env = inherited_environment() | own.environment
        with consuming(own.environment["CUTFLEET_REDIS_URL"]), Withheld(own.s3_port) as s3:
            withheld = env | {"CUTFLEET_S3_ENDPOINT": s3.url}
            s3.part = 3
            job = killed_while_listing(submit, withheld, ledger, parts=3)
            wait_until(lambda: ledger.job(job).done > 0, what="workers work before the listing is complete")
            s3.part = 6
            assert killed_while_listing([*submit, "--resume", job], withheld, ledger, parts=6) == job

            subprocess.run([*submit, "--resume", job], cwd=ROOT, env=env, check=True, capture_output=True)
            wait_until(lambda: ledger.job(job).closed is not None, within_s=200, what="the job is closed")

        found = ledger.job(job)
        assert [task.key for number in range(found.parts) for task in read_part(store, found, number)] == keys
        assert (found.total, found.done, found.failed, found.skipped) == (len(keys), len(keys), 0, 0)
        assert set(ledger.states(job, 0, len(keys))) == {ImageState.DONE}


def test_a_submission_killed_at_several_moments_of_its_listing_ends_exact(tmp_path: Path) -> None:
    submit = [sys.executable, "-m", "producer", "submit", SOURCE, "--to", DESTINATION, "--model", MODEL]
    submit += ["--yes"]  # nothing is listed beforehand
    stack = LocalStack(tmp_path / "stack")
    with stack as own, own.ledger() as ledger, own.store() as store, serving_keys() as source:
        own.start_dispatcher()
        store.create_bucket("out")
        say_alive(ledger, node="bare", slots=500)
        env = inherited_environment() | own.environment | {"CUTFLEET_SOURCE_ENDPOINT": source.url}

        def killed(*, parts: int, pages: int) -> Job:
            """Once so many parts stand in the ledger, and so many more pages were asked for."""
            known = ledger.jobs()
            more = ["--resume", known[0].id] if known else []
            source.delay_s, source.holds, began = 0.5, LAST, source.asked
            process = subprocess.Popen([*submit, *more], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
            wait_until(
                lambda: source.asked >= began + pages and any(job.parts >= parts for job in ledger.jobs()),
                what=f"{parts} parts are recorded, {pages} pages asked for",
            )
            process.kill()
            assert process.wait() != 0, "it was killed, not done"
            (job,) = ledger.jobs()
            assert not job.listed
            return job

        with consuming(own.environment["CUTFLEET_REDIS_URL"]):
            for parts, pages in ((0, 14), (1, 1), (1, 20)):
                job = killed(parts=parts, pages=pages).id
            source.delay_s, source.holds = 0, ""
            subprocess.run([*submit, "--resume", job], cwd=ROOT, env=env, check=True, capture_output=True)
            wait_until(lambda: ledger.job(job).closed is not None, within_s=200, what="the job is closed")

        found = ledger.job(job)
        assert source.most_at_once > 3, "it was listed side by side"
        assert_exact(found, store)
        assert (found.done, found.failed, found.skipped) == (len(KEYS), 0, 0)
        assert set(ledger.states(job, 0, len(KEYS))) == {ImageState.DONE}


def test_a_hundred_thousand_images_some_delivered_twice_are_counted_exactly(tmp_path: Path) -> None:
    told = tmp_path / "rows.json"

    ran = subprocess.run(
        [sys.executable, "-m", "tests.bench.scale", "--images", "100000", "--json", str(told)],
        cwd=ROOT,
        env=inherited_environment(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    rows = {row["name"]: row["value"] for row in json.loads(told.read_text())}
    assert rows["images, every count exact"] == 100_000
    assert 4_000 < rows["delivered twice"] < 6_000
    assert rows["Redis, greatest memory"] < 64

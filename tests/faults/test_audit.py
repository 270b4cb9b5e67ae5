"""`cutfleet audit`: finds what was lost or changed outside of Cutfleet, and repairs it from what S3 holds."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner, Result

from jobs.s3.location import Location
from producer.audit.rebuild import AuditedJob, rebuild
from producer.cli.main import main
from tests.faults.fleet import IMAGES, Fleet, Reference, Submit
from tests.faults.invariants import assert_exact
from tests.faults.proc import is_stopped
from tests.faults.processes import LONG_LEASE_S
from tests.faults.stand_in_settings import MODEL
from tests.support.images import put_images, sample_image
from tests.support.places import Places, delete_object
from tests.support.waiting import wait_until

SETTINGS = {"test_device_ms": "200"}


def folder(places: Places, job: str) -> str:
    return f"{places.to}_cutfleet/{job}/"


def run_in_process(fleet: Fleet, *args: str) -> Result:
    """Run the `cutfleet` command here: a new process takes seconds to import it."""
    env = fleet.stack.environment
    ran = CliRunner().invoke(main, args, env=env)
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    return ran


@pytest.fixture
def submit(fleet: Fleet, places: Places) -> Submit:
    def submit(*options: str) -> str:
        ran = run_in_process(fleet, "submit", places.source, "--to", places.to, "--model", MODEL, *options)
        assert ran.exit_code == 0, ran.stderr
        return ran.stdout.strip()

    return submit


def audit(fleet: Fleet, target: str, *options: str, code: int) -> dict[str, list[str]]:
    """Return the key of each disagreement, or its text if it has none, by code. `code`: the expected exit code."""
    ran = run_in_process(fleet, "audit", target, "--json", *options)
    found: dict[str, list[str]] = {}
    for row in map(json.loads, ran.stdout.splitlines()):
        found.setdefault(row["code"], []).append(row["key"] or row["what"])
    assert ran.exit_code == code, (found, ran.stderr)
    return found


def assert_healthy(fleet: Fleet, target: str, *options: str) -> None:
    ran = run_in_process(fleet, "audit", target, *options)
    assert (ran.exit_code, ran.stdout) == (0, ""), (ran.stdout, ran.stderr)


def connect(fleet: Fleet) -> redis.Redis:
    return redis.Redis(port=fleet.stack.redis_port, decode_responses=True)


def flush(fleet: Fleet) -> None:
    with connect(fleet) as client:
        client.flushall()


def finish(fleet: Fleet, job: str, places: Places, names: list[str], reference: Reference) -> dict[str, int]:
    return assert_exact(fleet, job, places, names=names, reference=reference).counts


@pytest.mark.parametrize("lane", ["backfill", "live"])
def test_a_job_that_redis_lost_is_rebuilt_from_s3_and_ends_exact(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, lane: str
) -> None:
    names = put_images(fleet.store, places, 2 * IMAGES)
    fleet.workers.start(**SETTINGS)
    with fleet.dispatcher():
        job = submit("--lane", lane)
        wait_until(lambda: fleet.ledger.jobs.get(job).done > 6)
        flush(fleet)
        wait_until(fleet.workers.are_idle)
        made = fleet.workers.publish_counts(places)

        assert "job_lost" in audit(fleet, folder(places, job), code=1)
        assert "job_lost" in audit(fleet, folder(places, job), "--repair", code=0)
        assert finish(fleet, job, places, names, reference)["done"] == len(names)

        assert set(fleet.workers.publish_counts(places).values()) == {1}
        assert 6 < len(made) < len(names)
        assert_healthy(fleet, job, "--repair")
    fleet.workers.terminate()


def test_a_repair_that_was_killed_is_completed_by_the_next(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 6)
    fleet.workers.start()
    job = submit()
    flush(fleet)
    rebuild(AuditedJob(Location.parse(folder(places, job)), ledger=fleet.ledger, store=fleet.store))
    # killed here: the job is paused, and finished images are not recorded yet

    with fleet.dispatcher():
        assert audit(fleet, job, code=1) == {"job_lost": ["The job, or a part of it, is not in Redis."]}
        assert fleet.ledger.jobs.get(job).paused is not None, "an audit without --repair changes nothing"
        audit(fleet, job, "--repair", code=0)

        assert finish(fleet, job, places, names, reference)["done"] == 6
    fleet.workers.terminate()


def test_a_job_whose_last_changes_redis_lost_ends_exact(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    """A crash of the machine truncates the append-only file."""
    names = put_images(fleet.store, places, IMAGES)
    file = next((fleet.stack.folder / "valkey" / "appendonlydir").glob("*.incr.aof"))
    before = file.stat().st_size
    fleet.workers.start(**SETTINGS)
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.ledger.jobs.get(job).done > 6)
        restart_with_truncated_file(fleet, file, lambda size: before + (size - before) // 3)

        audit(fleet, folder(places, job), "--repair", code=0)

        assert finish(fleet, job, places, names, reference)["done"] == IMAGES
        assert_healthy(fleet, job)
    fleet.workers.terminate()


def restart_with_truncated_file(fleet: Fleet, file: Path, new_size: Callable[[int], int]) -> None:
    valkey = fleet.stack.valkey
    assert valkey is not None
    valkey.kill()
    os.truncate(file, new_size(file.stat().st_size))
    fleet.stack.start_valkey()


def test_audit_finds_nothing_wrong_with_healthy_jobs(fleet: Fleet, places: Places, submit: Submit) -> None:
    put_images(fleet.store, places, IMAGES)
    worker = fleet.workers.start(**SETTINGS)
    with fleet.dispatcher():
        job = submit()
        live = submit("--lane", "live")
        wait_until(lambda: fleet.ledger.jobs.get(job).final > 0)

        for running in (job, live):
            assert_healthy(fleet, running, "--repair", "--deep")
        wait_until(lambda: None not in [fleet.ledger.jobs.get(name).closed for name in (job, live)])
        for closed in (job, live):
            assert_healthy(fleet, closed, "--repair", "--deep")
        flush(fleet)

        assert_healthy(fleet, folder(places, job), "--repair")  # closed and forgotten, as after CUTFLEET_KEEP_DAYS
        assert fleet.ledger.jobs.find(job) is None
    assert fleet.workers.alive() == [worker]
    fleet.workers.terminate()


def test_audit_finds_nothing_wrong_with_an_image_that_becomes_final_meanwhile(
    fleet: Fleet, places: Places, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_images(fleet.store, places, 1)
    worker = fleet.workers.start(test_freezepoints=f"before_commit={tmp_path / 'frozen'}", lease_s=LONG_LEASE_S)
    find_in_window = AuditedJob.find_in_window

    def find_later(audited: AuditedJob, images: Sequence[str]) -> set[str]:
        os.kill(worker, signal.SIGCONT)
        wait_until(lambda: fleet.ledger.jobs.get(job).done == 1, what="the image is done")
        return find_in_window(audited, images)

    with fleet.dispatcher(lease_s=LONG_LEASE_S):
        job = submit()
        wait_until(lambda: is_stopped(worker), what="the outputs are written")
        monkeypatch.setattr(AuditedJob, "find_in_window", find_later)

        assert_healthy(fleet, job)
    assert fleet.workers.terminate() == [0]


@pytest.mark.parametrize("forgotten", [False, True], ids=["known", "forgotten"])
def test_deleted_or_changed_outputs_are_made_again_and_failures_stay(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, forgotten: bool
) -> None:
    names = put_images(fleet.store, places, 8)
    fleet.store.put(places.key(names[7]), b"no image", content_type="image/jpeg")
    fleet.workers.start()
    with fleet.dispatcher():
        job = submit()
        assert finish(fleet, job, places, names, reference)["failed"] == 1
        delete_object(fleet.store, places.cutout(names[0]))
        delete_object(fleet.store, places.mask(names[1]))
        fleet.store.put(places.mask(names[2]), sample_image(seed=9, form="PNG"), content_type="image/png")
        fleet.store.put(places.mask(names[3]), b"", content_type="image/png")
        fleet.store.put(places.cutout(names[4]), b"something else", content_type="image/png")
        if forgotten:
            flush(fleet)

        wrong = {"output_missing": names[:2], "output_wrong": names[2:5]}
        target = folder(places, job)
        found = audit(fleet, target, "--deep", code=1)
        assert {code: sorted(keys) for code, keys in found.items()} == wrong
        found = audit(fleet, target, "--deep", "--repair", code=0)
        assert {code: sorted(keys) for code, keys in found.items()} == wrong

        counts = finish(fleet, job, places, names, reference)
        assert (counts["done"], counts["failed"]) == (7, 1)
        assert names[7] in run_in_process(fleet, "dead", job).stdout
        assert_healthy(fleet, target, "--deep", "--repair")
        assert run_in_process(fleet, "retry", job).exit_code == 0
        assert finish(fleet, job, places, names, reference)["failed"] == 1
    fleet.workers.terminate()


def test_a_mask_that_is_newer_than_its_cutout_is_checked_without_deep(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 3)
    fleet.workers.start()
    with fleet.dispatcher():
        job = submit()
        finish(fleet, job, places, names, reference)
        attempts = itertools.count()

        def replaced() -> bool:
            other = sample_image(seed=next(attempts), form="PNG")
            fleet.store.put(places.mask(names[1]), other, content_type="image/png")
            return run_in_process(fleet, "audit", job).exit_code == 1

        wait_until(replaced, what="the mask is newer by S3's clock, which has whole seconds")
        assert audit(fleet, job, code=1) == {"output_wrong": [names[1]]}
    fleet.workers.terminate()


def test_an_object_that_no_job_explains_is_reported_and_kept(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 4)
    fleet.workers.start()
    with fleet.dispatcher():
        job = submit()
        finish(fleet, job, places, names, reference)
        unknown = places.cutout("unknown.jpg")
        fleet.store.put(unknown, b"mine", content_type="image/png")
        below = f"{places.to}below/"
        other = run_in_process(fleet, "submit", f"{places.source}p0000", "--to", below, "--model", MODEL, "--wait")
        assert other.exit_code == 0, other.stderr

        for _ in range(2):
            assert audit(fleet, job, "--repair", code=1) == {"extra_object": [str(unknown)]}

        assert fleet.store.head(unknown, role="output") is not None
        shown = run_in_process(fleet, "audit", job)
        assert f"{unknown}: no job made it" in shown.stdout
    fleet.workers.terminate()


def test_counts_and_claims_that_contradict_the_states_are_corrected(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 4)
    fleet.workers.start()
    with fleet.dispatcher(), connect(fleet) as client:
        job = submit()
        finish(fleet, job, places, names, reference)
        client.hincrby(f"cf:job:{job}", "done", -1)
        client.hset("cf:claim", str(places.cutout(names[0])), f"{job}:0")
        client.hset("cf:entry", f"{job}:1", "q\nmessage")

        assert len(audit(fleet, job, code=1)["books_wrong"]) == 3
        audit(fleet, job, "--repair", code=0)

        assert_healthy(fleet, job)
        assert finish(fleet, job, places, names, reference)["done"] == 4
    fleet.workers.terminate()


def test_a_job_that_was_lost_during_its_listing_can_be_resumed(
    fleet: Fleet, places: Places, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 4)
    fleet.workers.start()
    flag = str(fleet.stack.folder / f"flag-{places.destination.bucket}")
    killed = fleet.submissions.start_for(places, test_failpoints=f"after_add_part={flag}")
    assert fleet.submissions.wait_for(killed) == -signal.SIGKILL, fleet.submissions.log_tail()
    job = fleet.ledger.jobs.open()[-1].id
    delete_object(fleet.store, places.destination.below(f"_cutfleet/{job}/manifest/end.json"))
    flush(fleet)

    found = audit(fleet, folder(places, job), "--repair", code=1)

    assert set(found) == {"job_lost", "listing_unknown"}
    assert f"--resume {job}" in found["listing_unknown"][0]
    with fleet.dispatcher():
        resumed = run_in_process(fleet, "submit", places.source, "--to", places.to, "--model", MODEL, "--resume", job)
        assert resumed.exit_code == 0, resumed.stderr
        assert finish(fleet, job, places, names, reference)["done"] == 4
    fleet.workers.terminate()


def test_an_unknown_job_and_a_folder_without_a_job_are_different_errors(fleet: Fleet, places: Places) -> None:
    unknown = run_in_process(fleet, "audit", "20260101-000000-aaaaaa")
    no_folder = run_in_process(fleet, "audit", f"{places.to}_cutfleet/20260101-000000-aaaaaa/")

    assert (unknown.exit_code, no_folder.exit_code) == (2, 2)
    assert "s3://BUCKET/TO/_cutfleet/20260101-000000-aaaaaa/ --repair" in unknown.stderr
    assert "[record_missing]" in no_folder.stderr


def test_a_retry_of_a_closed_job_that_redis_lost_is_repeated(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 3)
    fleet.store.put(places.key(names[1]), b"<html>", content_type="image/jpeg")
    fleet.workers.start()
    with fleet.dispatcher():
        job = submit()
        assert finish(fleet, job, places, names, reference)["failed"] == 1
        fleet.store.put(places.key(names[1]), sample_image(seed=1), content_type="image/jpeg")
        fleet.workers.terminate()
        assert fleet.run("retry", job).returncode == 0
        flush(fleet)

        assert "job_lost" in audit(fleet, folder(places, job), "--repair", code=0)
        fleet.workers.start()
        finish(fleet, job, places, names, {})
        [(_, failure)] = fleet.ledger.images.failures(job)
        assert failure.code == "source_changed", "the manifest names the former version"
        flush(fleet)
        assert_healthy(fleet, folder(places, job))
    fleet.workers.terminate()

"""`cutfleet audit`: whatever was lost or changed behind our back is named, and put right from what S3 holds."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner, Result

from jobs.s3.client import Location
from producer.audit.rebuild import Books
from producer.cli.main import main
from tests.faults.fleet import IMAGES, UNHURRIED_S, Fleet, Reference, Submit, is_stopped
from tests.faults.terms import MODEL
from tests.faults.truth import prove
from tests.support.factories import Places, put_images, sample_image, wait_until

SETTINGS = {"test_device_ms": "200"}


def folder(places: Places, job: str) -> str:
    return f"{places.to}_cutfleet/{job}/"


def call(fleet: Fleet, *args: str) -> Result:
    """The command in this process: a fresh one takes seconds to import."""
    env = fleet.stack.environment
    ran = CliRunner().invoke(main, args, env=env)
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    return ran


@pytest.fixture
def submit(fleet: Fleet, places: Places) -> Submit:
    def submit(*more: str) -> str:
        ran = call(fleet, "submit", places.source, "--to", places.to, "--model", MODEL, *more)
        assert ran.exit_code == 0, ran.stderr
        return ran.stdout.strip()

    return submit


def audit(fleet: Fleet, what: str, *more: str, code: int) -> dict[str, list[str]]:
    """The keys, or words, of what disagrees, by code."""
    ran = call(fleet, "audit", what, "--json", *more)
    named: dict[str, list[str]] = {}
    for row in map(json.loads, ran.stdout.splitlines()):
        named.setdefault(row["code"], []).append(row["key"] or row["what"])
    assert ran.exit_code == code, (named, ran.stderr)
    return named


def assert_healthy(fleet: Fleet, what: str, *more: str) -> None:
    ran = call(fleet, "audit", what, *more)
    assert (ran.exit_code, ran.stdout) == (0, ""), (ran.stdout, ran.stderr)


def client_of(fleet: Fleet) -> redis.Redis:
    return redis.Redis(port=fleet.stack.redis_port, decode_responses=True)


def flush(fleet: Fleet) -> None:
    with client_of(fleet) as client:
        client.flushall()


def delete(fleet: Fleet, place: Location) -> None:
    fleet.store._s3.delete_object(Bucket=place.bucket, Key=place.key)


def finish(fleet: Fleet, job: str, places: Places, names: list[str], reference: Reference) -> dict[str, int]:
    return prove(fleet, job, places, names=names, reference=reference).counts


@pytest.mark.parametrize("lane", ["backfill", "live"])
def test_a_job_that_redis_lost_is_rebuilt_from_s3_and_ends_exact(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, lane: str
) -> None:
    names = put_images(fleet.store, places, 2 * IMAGES)
    fleet.workers.start(**SETTINGS)
    with fleet.dispatcher():
        job = submit("--lane", lane)
        wait_until(lambda: fleet.ledger.job(job).done > 6)
        flush(fleet)
        wait_until(fleet.workers.are_idle)
        made = fleet.workers.published(places)

        assert "job_lost" in audit(fleet, folder(places, job), code=1)
        assert "job_lost" in audit(fleet, folder(places, job), "--repair", code=0)
        assert finish(fleet, job, places, names, reference)["done"] == len(names)

        assert {place: count for place, count in fleet.workers.published(places).items() if count > 1} == {}
        assert 6 < len(made) < len(names)
        assert_healthy(fleet, job, "--repair")
    fleet.workers.dismiss()


def test_a_repair_that_was_killed_is_taken_up_by_the_next(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 6)
    fleet.workers.start()
    job = submit()
    flush(fleet)
    books = Books(Location.parse(folder(places, job)), ledger=fleet.ledger, store=fleet.store)
    books.rebuild()  # and no more: nothing of what is done is recorded yet, and it is paused

    with fleet.dispatcher():
        assert audit(fleet, job, code=1) == {"job_lost": ["Redis does not know the job, or not all of it."]}
        assert fleet.ledger.job(job).paused is not None, "a look changes nothing"
        audit(fleet, job, "--repair", code=0)

        assert finish(fleet, job, places, names, reference)["done"] == 6
    fleet.workers.dismiss()


def test_a_job_whose_end_redis_forgot_ends_exact(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    """The append-only file loses its tail, as a crash of the machine cuts it."""
    names = put_images(fleet.store, places, IMAGES)
    file = next((fleet.stack.folder / "valkey" / "appendonlydir").glob("*.incr.aof"))
    before = file.stat().st_size
    fleet.workers.start(**SETTINGS)
    with fleet.dispatcher():
        job = submit()
        wait_until(lambda: fleet.ledger.job(job).done > 6)
        restart_without_the_last(fleet, file, lambda size: before + (size - before) // 3)

        audit(fleet, folder(places, job), "--repair", code=0)

        assert finish(fleet, job, places, names, reference)["done"] == IMAGES
        assert_healthy(fleet, job)
    fleet.workers.dismiss()


def restart_without_the_last(fleet: Fleet, file: Path, size: object) -> None:
    valkey = fleet.stack.valkey
    assert valkey is not None
    valkey.kill()
    os.truncate(file, size(file.stat().st_size))  # type: ignore[operator]
    fleet.stack.start_valkey()


def test_nothing_is_said_of_jobs_that_are_well(fleet: Fleet, places: Places, submit: Submit) -> None:
    put_images(fleet.store, places, IMAGES)
    worker = fleet.workers.start(**SETTINGS)
    with fleet.dispatcher():
        job = submit()
        live = submit("--lane", "live")
        wait_until(lambda: fleet.ledger.job(job).final > 0)

        for running in (job, live):
            assert_healthy(fleet, running, "--repair", "--deep")
        wait_until(lambda: None not in [fleet.ledger.job(name).closed for name in (job, live)])
        for closed in (job, live):
            assert_healthy(fleet, closed, "--repair", "--deep")
        flush(fleet)

        assert_healthy(fleet, folder(places, job), "--repair")  # closed and forgotten, as after some days
        assert fleet.ledger.find_job(job) is None
    assert fleet.workers.alive() == [worker]
    fleet.workers.dismiss()


def test_nothing_is_said_of_an_image_that_ends_between_two_looks(
    fleet: Fleet, places: Places, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_images(fleet.store, places, 1)
    worker = fleet.workers.start(test_freezepoints=f"before_commit={tmp_path / 'frozen'}", lease_s=UNHURRIED_S)
    look = Books.in_window

    def look_late(books: Books, images: Sequence[str]) -> set[str]:
        os.kill(worker, signal.SIGCONT)
        wait_until(lambda: fleet.ledger.job(job).done == 1, what="it is done")
        return look(books, images)

    with fleet.dispatcher(lease_s=UNHURRIED_S):
        job = submit()
        wait_until(lambda: is_stopped(worker), what="its results are there")
        monkeypatch.setattr(Books, "in_window", look_late)

        assert_healthy(fleet, job)
    assert fleet.workers.dismiss() == [0]


@pytest.mark.parametrize("forgotten", [False, True], ids=["known", "forgotten"])
def test_what_was_deleted_or_changed_is_made_again_and_what_failed_stays_so(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference, forgotten: bool
) -> None:
    names = put_images(fleet.store, places, 8)
    fleet.store.put(places.key(names[7]), b"no image", content_type="image/jpeg")
    fleet.workers.start()
    with fleet.dispatcher():
        job = submit()
        assert finish(fleet, job, places, names, reference)["failed"] == 1
        delete(fleet, places.cutout(names[0]))
        delete(fleet, places.mask(names[1]))
        fleet.store.put(places.mask(names[2]), sample_image(seed=9, form="PNG"), content_type="image/png")
        fleet.store.put(places.mask(names[3]), b"", content_type="image/png")
        fleet.store.put(places.cutout(names[4]), b"something else", content_type="image/png")
        if forgotten:
            flush(fleet)

        wrong = {"output_missing": names[:2], "output_wrong": names[2:5]}
        what = folder(places, job)
        found = audit(fleet, what, "--deep", code=1)
        assert {code: sorted(keys) for code, keys in found.items()} == wrong
        found = audit(fleet, what, "--deep", "--repair", code=0)
        assert {code: sorted(keys) for code, keys in found.items()} == wrong

        counts = finish(fleet, job, places, names, reference)
        assert (counts["done"], counts["failed"]) == (7, 1)
        assert names[7] in call(fleet, "dead", job).stdout
        assert_healthy(fleet, what, "--deep", "--repair")
        assert call(fleet, "retry", job).exit_code == 0
        assert finish(fleet, job, places, names, reference)["failed"] == 1
    fleet.workers.dismiss()


def test_a_mask_that_is_younger_than_its_cutout_is_looked_at_without_being_asked(
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
            return call(fleet, "audit", job).exit_code == 1

        wait_until(replaced, what="a second has passed")
        assert audit(fleet, job, code=1) == {"output_wrong": [names[1]]}
    fleet.workers.dismiss()


def test_an_object_that_no_job_explains_is_named_and_left_alone(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 4)
    fleet.workers.start()
    with fleet.dispatcher():
        job = submit()
        finish(fleet, job, places, names, reference)
        stranger = places.cutout("nobody's.jpg")
        fleet.store.put(stranger, b"mine", content_type="image/png")
        below = f"{places.to}below/"
        other = call(fleet, "submit", f"{places.source}p0000", "--to", below, "--model", MODEL, "--wait")
        assert other.exit_code == 0, other.stderr

        for _ in range(2):
            assert audit(fleet, job, "--repair", code=1) == {"extra_object": [str(stranger)]}

        assert fleet.store.head(stranger, role="output") is not None
        shown = call(fleet, "audit", job)
        assert f"{stranger}: no job made it" in shown.stdout
    fleet.workers.dismiss()


def test_counts_and_claims_that_do_not_follow_from_the_states_are_put_right(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 4)
    fleet.workers.start()
    with fleet.dispatcher(), client_of(fleet) as client:
        job = submit()
        finish(fleet, job, places, names, reference)
        client.hincrby(f"cf:job:{job}", "done", -1)
        client.hset("cf:claim", str(places.cutout(names[0])), f"{job}:0")
        client.hset("cf:entry", f"{job}:1", "q\nmessage")

        assert len(audit(fleet, job, code=1)["books_wrong"]) == 3
        audit(fleet, job, "--repair", code=0)

        assert_healthy(fleet, job)
        assert finish(fleet, job, places, names, reference)["done"] == 4
    fleet.workers.dismiss()


def test_a_job_lost_while_it_was_listed_says_how_to_go_on(fleet: Fleet, places: Places, reference: Reference) -> None:
    names = put_images(fleet.store, places, 4)
    fleet.workers.start()
    flag = str(fleet.stack.folder / f"flag-{Location.parse(places.to).bucket}")
    killed = fleet.submits.start_for(places, test_failpoints=f"after_add_part={flag}")
    assert fleet.submits.wait_for(killed) == -signal.SIGKILL, fleet.submits.words()
    job = fleet.ledger.open_jobs()[-1].id
    delete(fleet, Location(Location.parse(places.to).bucket, f"_cutfleet/{job}/manifest/end.json"))
    flush(fleet)

    found = audit(fleet, folder(places, job), "--repair", code=1)

    assert set(found) == {"job_lost", "listing_unknown"}
    assert f"--resume {job}" in found["listing_unknown"][0]
    with fleet.dispatcher():
        resumed = call(fleet, "submit", places.source, "--to", places.to, "--model", MODEL, "--resume", job)
        assert resumed.exit_code == 0, resumed.stderr
        assert finish(fleet, job, places, names, reference)["done"] == 4
    fleet.workers.dismiss()


def test_a_folder_that_is_no_jobs_and_a_job_that_redis_does_not_know_are_told_apart(
    fleet: Fleet, places: Places
) -> None:
    unknown = call(fleet, "audit", "20260101-000000-aaaaaa")
    nowhere = call(fleet, "audit", f"{places.to}_cutfleet/20260101-000000-aaaaaa/")

    assert (unknown.exit_code, nowhere.exit_code) == (2, 2)
    assert "s3://BUCKET/TO/_cutfleet/20260101-000000-aaaaaa/ --repair" in unknown.stderr
    assert "[record_missing]" in nowhere.stderr


def test_a_closed_job_whose_retries_redis_lost_is_tried_again(
    fleet: Fleet, places: Places, submit: Submit, reference: Reference
) -> None:
    names = put_images(fleet.store, places, 3)
    fleet.store.put(places.key(names[1]), b"<html>", content_type="image/jpeg")
    fleet.workers.start()
    with fleet.dispatcher():
        job = submit()
        assert finish(fleet, job, places, names, reference)["failed"] == 1
        fleet.store.put(places.key(names[1]), sample_image(seed=1), content_type="image/jpeg")
        fleet.workers.dismiss()
        assert fleet.run("retry", job).returncode == 0
        flush(fleet)

        assert "job_lost" in audit(fleet, folder(places, job), "--repair", code=0)
        fleet.workers.start()
        finish(fleet, job, places, names, {})
        [(_, failure)] = fleet.ledger.failures(job)
        assert failure.code == "source_changed", "its manifest names the version that was no image"
        flush(fleet)
        assert_healthy(fleet, folder(places, job))
    fleet.workers.dismiss()

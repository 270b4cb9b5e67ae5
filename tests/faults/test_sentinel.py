"""A primary dies and Sentinels promote its replica: ledger and broker follow, and no image is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from jobs.ledger import Ledger
from jobs.ledger.connection import broker_urls, parse_sentinels
from jobs.settings import Settings
from producer.demo.local_stack import Process, free_port, valkey_program
from tests.faults.fleet import IMAGES, Fleet, Reference
from tests.faults.invariants import assert_exact
from tests.faults.stand_in_settings import MODEL
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.waiting import wait_until

NAME = "cutfleet"


class Cluster:
    """A primary, its replica, and two Sentinels with a quorum of one."""

    def __init__(self, folder: Path) -> None:
        self.ports = [free_port(), free_port()]
        self.servers = [self._start_server(folder / f"server-{port}", port) for port in self.ports]
        self._sentinel_ports = [free_port(), free_port()]
        self.sentinels = [self._start_sentinel(folder / f"sentinel-{port}", port) for port in self._sentinel_ports]
        first, second = self._sentinel_ports
        self.url = f"sentinel://127.0.0.1:{first}/0?master_name={NAME};sentinel://127.0.0.1:{second}"

    def primary(self) -> int:
        """Return the primary's port from the first Sentinel; 0 while it does not answer."""
        with redis.Redis(port=self._sentinel_ports[0], decode_responses=True) as sentinel:
            try:
                return int(sentinel.sentinel_get_master_addr_by_name(NAME)[1])
            except redis.RedisError:
                return 0

    def has_replica(self) -> bool:
        """Whether the replica is in sync with its primary and all Sentinels know it."""
        for port in self._sentinel_ports:
            with redis.Redis(port=port, decode_responses=True) as sentinel:
                try:
                    replicas = sentinel.sentinel_slaves(NAME)
                    others = sentinel.sentinel_sentinels(NAME)
                except redis.RedisError:
                    return False
            if len(others) != 1 or [found.get("master-link-status") for found in replicas] != ["ok"]:
                return False
        return True

    def stop(self) -> None:
        for process in (*self.sentinels, *self.servers):
            if process.poll() is None:
                process.kill()

    def _start_server(self, folder: Path, port: int) -> Process:
        folder.mkdir()
        command = [valkey_program(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
        command += ["--appendonly", "yes", "--save", "", "--repl-diskless-sync-delay", "0"]
        if port != self.ports[0]:
            command += ["--replicaof", f"127.0.0.1 {self.ports[0]}"]
        return Process(command, log=folder / "log", env={})

    def _start_sentinel(self, folder: Path, port: int) -> Process:
        folder.mkdir()
        (folder / "sentinel.conf").write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {NAME} 127.0.0.1 {self.ports[0]} 1\n"
            f"sentinel down-after-milliseconds {NAME} 3000\n"
            f"sentinel failover-timeout {NAME} 5000\n"
        )
        return Process([valkey_program(), str(folder / "sentinel.conf"), "--sentinel"], log=folder / "log", env={})


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    try:
        wait_until(
            lambda: cluster.primary() == cluster.ports[0] and cluster.has_replica(),
            what="Sentinels and servers know each other",
        )
        yield cluster
    finally:
        cluster.stop()


def test_a_killed_primary_loses_no_image(fleet: Fleet, places: Places, reference: Reference, cluster: Cluster) -> None:
    names = put_images(fleet.store, places, IMAGES)
    with Ledger(cluster.url, name="cluster") as ledger:
        worker = fleet.workers.fork(redis_url=cluster.url, test_device_ms="150")
        fleet.dispatchers.start(redis_url=cluster.url)
        wait_until(lambda: bool(ledger.fleet.workers()), what=fleet.workers.log_tail())
        env = {"CUTFLEET_REDIS_URL": cluster.url}
        ran = fleet.run("submit", places.source, "--to", places.to, "--model", MODEL, env=env)
        assert ran.returncode == 0, ran.stderr
        job = ran.stdout.strip()
        wait_until(lambda: ledger.jobs.get(job).done > 4, what=fleet.workers.log_tail())

        cluster.servers[0].kill()
        wait_until(lambda: cluster.primary() == cluster.ports[1], within_s=120, what="the replica is promoted")

        outcome = assert_exact(fleet, job, places, names=names, reference=reference, port=cluster.ports[1])
    assert outcome.counts["done"] == IMAGES
    assert fleet.workers.alive() == [worker], fleet.workers.log_tail()
    assert fleet.workers.terminate() == [0]
    assert fleet.dispatchers.terminate() == [0]


def test_one_url_names_the_sentinels_for_ledger_and_broker() -> None:
    url = "sentinel://worker:pass%40word@one:1/3?master_name=shop;sentinel://two"
    found = parse_sentinels(url)
    assert found is not None

    assert (found.hosts, found.master_name, found.database) == ((("one", 1), ("two", 26379)), "shop", "3")
    assert (found.username, found.password) == ("worker", "pass@word")
    assert broker_urls(url) == (
        "sentinel://worker:pass%40word@one:1/3;sentinel://worker:pass%40word@two:26379/3",
        {"master_name": "shop"},
    )
    assert "pass" not in repr(found)
    assert "pass" not in Settings(redis_url=url).redis_name


@pytest.mark.parametrize("url", ["sentinel://one:1/0", "sentinel://one/0?master_name=a;redis://two"])
def test_an_incomplete_sentinel_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="master_name=NAME"):
        Settings(redis_url=url)

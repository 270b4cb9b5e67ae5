"""The options and health checks in docker-compose.yml, on the real programs."""

from __future__ import annotations

import contextlib
import re
import urllib.request
from pathlib import Path
from typing import Any

import redis
import yaml

from producer.demo.local_stack import LocalStack, Process, free_port, valkey_program
from tests.support.environment import find_program
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def with_defaults(text: str) -> str:
    """Replace each variable by its default, as Compose does."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", text)


def test_valkey_accepts_its_options(tmp_path: Path) -> None:
    port = free_port()
    options = [with_defaults(text) for text in SERVICES["valkey"]["command"][1:]]
    command = [valkey_program(), *options, f"--port {port}", "--bind 127.0.0.1", f"--dir {tmp_path}"]

    server = Process(command, log=tmp_path / "log", env={})
    try:
        client = redis.Redis(port=port, decode_responses=True)
        wait_until(lambda: _is_up(client), what="Valkey answers")
        config = client.config_get("*")
        client.close()
    finally:
        server.kill()

    assert (config["appendonly"], config["maxmemory"], config["maxmemory-policy"]) == ("yes", str(2**30), "noeviction")
    assert "pubsub 268435456 67108864 60" in str(config["client-output-buffer-limit"])


def test_seaweedfs_accepts_its_options_and_is_healthy(tmp_path: Path) -> None:
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    (tmp_path / "identities.json").write_text('{"identities": []}')
    options = [
        text.replace("/data", str(tmp_path)).replace("/etc/seaweedfs", str(tmp_path))
        for text in SERVICES["s3"]["command"]
    ]
    local = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    local += [f"-{name}.port={port}" for name, port in ports.items()]

    server = Process([find_program("weed"), "-logtostderr=true", *options, *local], log=tmp_path / "log", env={})
    try:
        health = SERVICES["s3"]["healthcheck"]["test"][-1].replace("8333", str(ports["s3"]))
        wait_until(lambda: server.poll() is not None or _is_healthy(health), what="S3 is healthy")
        assert server.poll() is None, server.log_tail()
    finally:
        server.kill()


def test_a_dispatcher_touches_its_liveness_file(stack: LocalStack, tmp_path: Path) -> None:
    file = tmp_path / "alive"
    dispatcher = stack.start_dispatcher(alive_file=str(file))
    try:
        touched: set[int] = set()

        def is_touched_again() -> bool:
            with contextlib.suppress(FileNotFoundError):
                touched.add(file.stat().st_mtime_ns)
            return len(touched) > 2  # the first may come from the check that the file can be written

        wait_until(is_touched_again, what="the file is touched again")
    finally:
        dispatcher.stop()


def _is_up(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310  (our own server)
            return bool(answer.status == 200)
    except OSError:
        return False

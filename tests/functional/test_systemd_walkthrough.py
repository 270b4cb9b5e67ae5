"""Runs the commands of infra/systemd/README.md on servers of their own. This virtual environment, a folder and plain
processes replace a new environment, root's folders and systemd."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer.demo.local_stack import LocalStack, Process, free_port, inherited_environment
from tests.support.environment import find_program
from tests.support.images import put_images
from tests.support.places import Places
from tests.support.systemd_unit import FOLDER, Unit
from tests.support.waiting import wait_until

ROOT = FOLDER.parents[1]
SKIPPED = ("python3 -m venv", "useradd", "editor", "systemctl enable")
"""Not run here: the environment exists, no user is added, and the test starts the units' programs."""


def commands() -> list[str]:
    """Return the commands of the first three blocks, which end with a result."""
    blocks = re.findall(r"```console\n(.*?)```", (FOLDER / "README.md").read_text(), re.S)[:3]
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


@pytest.fixture
def own_stack(tmp_path: Path) -> Iterator[LocalStack]:
    with LocalStack(tmp_path / "stack") as stack:
        yield stack


def start(unit: str, env: dict[str, str], log: Path, *, on_cpu: bool = False) -> Process:
    """Start a unit's program with the unit's variables, then those of the file. `on_cpu`: without the unit's choice of
    a GPU, which this machine lacks."""
    directives = Unit(unit).directives
    own = dict(pair.split("=", 1) for text in directives["Environment"] for pair in text.split())
    own |= {"CUTFLEET_METRICS_PORT": str(free_port()), "HOME": os.environ["HOME"]}
    own = {name: value.replace("%i", "0") for name, value in own.items() if name != "HF_HOME"}
    if on_cpu:
        del own["CUTFLEET_GPU"], own["CUTFLEET_DEVICE"]
    program, *words = shlex.split(directives["ExecStart"][0])
    return Process([find_program(Path(program).name), *words], log=log, env=inherited_environment() | own | env)


def edit(file: Path, stack: LocalStack) -> dict[str, str]:
    """Set the stack's values in the environment file; return all variables of the file."""
    values = stack.environment | {"CUTFLEET_MODEL": "u2netp"}
    lines = []
    for line in file.read_text().splitlines():
        name = line.lstrip("#").partition("=")[0]
        lines.append(f"{name}={shlex.quote(values[name])}" if name in values else line)
    file.write_text("\n".join(lines) + "\n")
    return dict(shlex.split(line)[0].split("=", 1) for line in lines if re.match(r"\w+=", line))


def test_nine_commands_lead_to_a_result(own_stack: LocalStack, tmp_path: Path) -> None:
    lines = commands()
    assert len(lines) == 9
    places = Places("s3://shop/photos/", "s3://shop-cutouts/")
    with own_stack.store() as store:
        for location in (places.source_location, places.destination):
            store.create_bucket(location.bucket)
        put_images(store, places, 2)
    (tmp_path / "etc/systemd/system").mkdir(parents=True)

    def run(*commands: str) -> subprocess.CompletedProcess[str]:
        text = "\n".join(commands).replace("/etc/", f"{tmp_path}/etc/").replace("/opt/cutfleet", sys.prefix)
        text = text.replace("systemctl daemon-reload", "true")
        return subprocess.run(
            ["bash", "-ec", text], cwd=ROOT, env=without_aws(), capture_output=True, text=True, check=False
        )

    setup = [line for line in lines[:-3] if not line.startswith(SKIPPED)]
    assert run(*setup).returncode == 0
    file = tmp_path / "etc/cutfleet/cutfleet.env"
    assert file.stat().st_mode & 0o777 == 0o600
    variables = edit(file, own_stack)
    processes = [
        start("cutfleet-worker@.service", variables, tmp_path / "no-gpu.log"),
        start("cutfleet-dispatcher.service", variables, tmp_path / "dispatcher.log"),
        start("cutfleet-worker@.service", variables, tmp_path / "worker.log", on_cpu=True),
    ]
    try:
        with own_stack.ledger() as ledger:
            wait_until(
                lambda: bool(ledger.fleet.workers()) and ledger.dispatch.is_active(), what=processes[2].log_tail()
            )
        *environment, doctor, submit = lines[-3:]
        checked, submitted = run(*environment, doctor), run(*environment, submit)
        wait_until(lambda: processes[0].poll() is not None, what="the worker without its GPU exits")
    finally:
        codes = [process.stop() for process in processes]

    assert checked.returncode == 0, checked.stdout
    assert submitted.returncode == 0, submitted.stderr
    with own_stack.store() as store:
        assert store.head(places.cutout("p00001.jpg"), role="output") is not None
    assert codes == [2, 0, 0]
    assert "no_gpu" in processes[0].log_tail()


def without_aws() -> dict[str, str]:
    return {name: value for name, value in inherited_environment().items() if not name.startswith("AWS_")}

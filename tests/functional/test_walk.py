"""A newcomer's walk: the commands of infra/systemd's page, as they stand there, on servers of their own. In place of
a fresh environment, of root's folders and of systemd: this environment, a folder, and what the units start."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.s3.client import Location
from producer.demo.local_stack import LocalStack, Process, free_port, inherited_environment
from tests.support.factories import Places, put_images, wait_until
from tests.support.systemd_unit import FOLDER, Unit

ROOT = FOLDER.parents[1]
ELSEWHERE = ("python3 -m venv", "useradd", "editor", "systemctl enable")
"""What is done otherwise here: the environment is there, nobody is added, and the units' programs are started below."""


def commands() -> list[str]:
    """Of the page's first three blocks: until a result is there."""
    blocks = re.findall(r"```console\n(.*?)```", (FOLDER / "README.md").read_text(), re.S)[:3]
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[LocalStack]:
    with LocalStack(tmp_path / "stack") as stack:
        yield stack


def start(unit: str, env: dict[str, str], log: Path, *, on_cpu: bool = False) -> Process:
    """What systemd would start, with the unit's own variables and then those of the file. `on_cpu`: without the unit's
    choice of a GPU, which is not here."""
    said = Unit(unit).directives
    own = dict(pair.split("=", 1) for text in said["Environment"] for pair in text.split())
    own |= {"CUTFLEET_METRICS_PORT": str(free_port()), "HOME": os.environ["HOME"]}
    own = {name: value.replace("%i", "0") for name, value in own.items() if name != "HF_HOME"}
    if on_cpu:
        del own["CUTFLEET_GPU"], own["CUTFLEET_DEVICE"]
    program, *words = shlex.split(said["ExecStart"][0])
    there = str(Path(sys.executable).with_name(Path(program).name))
    return Process([there, *words], log=log, env=inherited_environment() | own | env)


def edit(file: Path, stack: LocalStack) -> dict[str, str]:
    """As a person would, with values of this machine. Returns all that the file says."""
    values = stack.environment | {"CUTFLEET_MODEL": "u2netp"}
    lines = []
    for line in file.read_text().splitlines():
        name = line.lstrip("#").partition("=")[0]
        lines.append(f"{name}={shlex.quote(values[name])}" if name in values else line)
    file.write_text("\n".join(lines) + "\n")
    return dict(shlex.split(line)[0].split("=", 1) for line in lines if re.match(r"\w+=", line))


def test_from_the_page_to_results_in_nine_commands(own: LocalStack, tmp_path: Path) -> None:
    asked = commands()
    assert len(asked) == 9
    places = Places("s3://shop/photos/", "s3://shop-cutouts/")
    with own.store() as store:
        for uri in (places.source, places.to):
            store.create_bucket(Location.parse(uri).bucket)
        put_images(store, places, 2)
    (tmp_path / "etc/systemd/system").mkdir(parents=True)

    def run(*lines: str) -> subprocess.CompletedProcess[str]:
        text = "\n".join(lines).replace("/etc/", f"{tmp_path}/etc/").replace("/opt/cutfleet", sys.prefix)
        text = text.replace("systemctl daemon-reload", "true")
        return subprocess.run(["bash", "-ec", text], cwd=ROOT, env=clean(), capture_output=True, text=True, check=False)

    before = [line for line in asked[:-3] if not line.startswith(ELSEWHERE)]
    assert run(*before).returncode == 0
    file = tmp_path / "etc/cutfleet/cutfleet.env"
    assert file.stat().st_mode & 0o777 == 0o600
    said = edit(file, own)
    processes = [
        start("cutfleet-worker@.service", said, tmp_path / "no-gpu.log"),
        start("cutfleet-dispatcher.service", said, tmp_path / "dispatcher.log"),
        start("cutfleet-worker@.service", said, tmp_path / "worker.log", on_cpu=True),
    ]
    try:
        with own.ledger() as ledger:
            wait_until(lambda: bool(ledger.workers()) and ledger.is_dispatched(), what=processes[2].last_words())
        *environment, doctor, submit = asked[-3:]
        checked, submitted = run(*environment, doctor), run(*environment, submit)
        wait_until(lambda: processes[0].poll() is not None, what="the worker whose GPU is not here gives up")
    finally:
        codes = [process.stop() for process in processes]

    assert checked.returncode == 0, checked.stdout
    assert submitted.returncode == 0, submitted.stderr
    with own.store() as store:
        assert store.head(places.cutout("p00001.jpg"), role="output") is not None
    assert codes == [2, 0, 0]
    assert "no_gpu" in processes[0].last_words()


def clean() -> dict[str, str]:
    return {name: value for name, value in inherited_environment().items() if not name.startswith("AWS_")}

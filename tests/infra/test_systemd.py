"""The systemd units say what the code beside them says."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from jobs.settings import PREFIX, Settings
from tests.support.systemd_unit import FOLDER, Unit
from workers.__main__ import EXIT_BUG, EXIT_DRAIN_DEADLINE, EXIT_SETTINGS, EXIT_UNREACHABLE
from workers.process.watchdog import EXIT_DEVICE_LOST, EXIT_STALLED

ROOT = Path(__file__).resolve().parents[2]
WORKER, DISPATCHER = "cutfleet-worker@.service", "cutfleet-dispatcher.service"


def directives(unit: str) -> dict[str, list[str]]:
    return Unit(unit).directives


@pytest.mark.parametrize("unit", [WORKER, DISPATCHER])
def test_it_starts_again_after_everything_but_a_mistake_in_its_settings(unit: str) -> None:
    said = directives(unit)

    assert said["Restart"] == ["always"]
    assert said["StartLimitIntervalSec"] == ["0"]
    assert said["RestartPreventExitStatus"] == [str(EXIT_SETTINGS)]
    assert EXIT_SETTINGS not in (EXIT_UNREACHABLE, EXIT_DEVICE_LOST, EXIT_BUG)


def test_a_worker_has_longer_to_stop_than_it_takes_to_drain_and_is_asked_alone() -> None:
    said = directives(WORKER)

    assert float(said["TimeoutStopSec"][0]) > Settings.model_fields["drain_s"].default
    assert said["KillMode"] == ["mixed"]
    assert said["SuccessExitStatus"] == [str(EXIT_DRAIN_DEADLINE)]
    assert said["OOMPolicy"] == ["continue"], "a decoder's death is not the worker's"


def test_an_instance_has_the_gpu_of_its_number_and_can_reach_it() -> None:
    said = directives(WORKER)

    assert "CUTFLEET_GPU=%i" in " ".join(said["Environment"]).split()
    assert "CUTFLEET_DEVICE=cuda" in " ".join(said["Environment"]).split()
    assert not {"PrivateDevices", "DevicePolicy", "ProtectClock", "MemoryDenyWriteExecute"} & set(said)


def test_each_process_of_a_machine_has_a_metrics_port_of_its_own() -> None:
    def port(unit: str, instance: str) -> int:
        words = " ".join(directives(unit)["Environment"]).split()
        (text,) = [word.partition("=")[2] for word in words if word.startswith("CUTFLEET_METRICS_PORT=")]
        return int(text.replace("%i", instance))

    ports = [port(DISPATCHER, ""), *(port(WORKER, str(gpu)) for gpu in range(16))]

    assert len(set(ports)) == len(ports)
    assert all(1023 < number < 65_536 for number in ports)


def test_what_they_start_is_there() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

    assert directives(WORKER)["ExecStart"] == ["/opt/cutfleet/bin/python -m workers"]
    program, command = directives(DISPATCHER)["ExecStart"][0].split()
    assert Path(program).name in scripts
    assert command == "dispatch"


def test_the_environment_file_leaves_the_units_own_settings_to_the_unit() -> None:
    names = re.findall(rf"^#?({PREFIX}[A-Z_0-9]+)=", (FOLDER / "cutfleet.env").read_text(), re.MULTILINE)
    pairs = [pair for unit in (WORKER, DISPATCHER) for pair in " ".join(directives(unit)["Environment"]).split()]
    own = [pair.split("=")[0] for pair in pairs]

    assert not set(names) & set(own), "a file's value wins over the unit's: every worker would have one GPU"
    assert f"{PREFIX}REDIS_URL" in names


@pytest.mark.parametrize("page", ["systemd/cutfleet.env", "redis/README.md"])
def test_a_shell_reads_the_url_of_redis_as_systemd_does(page: str, tmp_path: Path) -> None:
    """systemd takes what stands between single quotes as it is (systemd.exec, EnvironmentFile)."""
    lines = re.findall(r"^CUTFLEET_REDIS_URL=.*$", (FOLDER.parent / page).read_text(), re.MULTILINE)
    assert lines

    for line in lines:
        (tmp_path / "cutfleet.env").write_text(line + "\n")
        read = subprocess.run(
            ["sh", "-c", "set -a; . ./cutfleet.env; printenv CUTFLEET_REDIS_URL"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert line == f"CUTFLEET_REDIS_URL='{read.strip()}'"


def test_without_a_gpu_the_unit_chooses_none() -> None:
    (drop_in,) = re.findall(r"```ini\n(.*?)```", (FOLDER / "README.md").read_text(), re.S)
    own = dict(pair.split("=", 1) for pair in " ".join(directives(WORKER)["Environment"]).split())

    own |= dict(re.findall(r"^Environment=(\w+)=(.+)$", drop_in, re.M))
    for name in re.findall(r"^UnsetEnvironment=(\w+)$", drop_in, re.M):
        del own[name]

    assert {name: value for name, value in own.items() if name in ("CUTFLEET_DEVICE", "CUTFLEET_GPU")} == {
        "CUTFLEET_DEVICE": "cpu"
    }


@pytest.mark.parametrize(
    "code", [EXIT_SETTINGS, EXIT_UNREACHABLE, EXIT_DEVICE_LOST, EXIT_BUG, EXIT_STALLED, EXIT_DRAIN_DEADLINE]
)
def test_the_page_explains_each_exit_code(code: int) -> None:
    assert f"| {code} | " in (FOLDER / "README.md").read_text()


def test_systemd_takes_them_where_it_can_be_asked(tmp_path: Path) -> None:
    programs = r"/opt/cutfleet/bin/\w+|/usr/bin/nvidia-modprobe"
    for unit in (WORKER, DISPATCHER):
        text = (FOLDER / unit).read_text()
        assert re.search(programs, text)
        (tmp_path / unit.replace("@", "@0")).write_text(re.sub(programs, "/bin/true", text))
    analyze = shutil.which("systemd-analyze")

    if analyze is not None:
        ran = subprocess.run(
            [analyze, "verify", *map(str, tmp_path.iterdir())], capture_output=True, text=True, check=False
        )
        assert (ran.returncode, ran.stderr) == (0, "")

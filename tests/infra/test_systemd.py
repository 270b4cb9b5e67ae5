"""The systemd units agree with the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from jobs.settings import PREFIX, Settings
from tests.support.systemd_unit import FOLDER, Unit
from workers.process.exit_codes import ExitCode

ROOT = Path(__file__).resolve().parents[2]
WORKER, DISPATCHER = "cutfleet-worker@.service", "cutfleet-dispatcher.service"


def read_directives(unit: str) -> dict[str, list[str]]:
    return Unit(unit).directives


@pytest.mark.parametrize("unit", [WORKER, DISPATCHER])
def test_a_unit_restarts_after_every_exit_code_but_that_of_wrong_settings(unit: str) -> None:
    directives = read_directives(unit)

    assert directives["Restart"] == ["always"]
    assert directives["StartLimitIntervalSec"] == ["0"]
    assert directives["RestartPreventExitStatus"] == [str(ExitCode.SETTINGS.value)]


def test_a_worker_has_time_to_drain_and_sigterm_goes_to_its_main_process_only() -> None:
    directives = read_directives(WORKER)

    assert float(directives["TimeoutStopSec"][0]) > Settings.model_fields["drain_s"].default
    assert directives["KillMode"] == ["mixed"]
    assert directives["SuccessExitStatus"] == [str(ExitCode.DRAIN_DEADLINE.value)]
    assert directives["OOMPolicy"] == ["continue"], "the worker must survive the death of a decode subprocess"


def test_an_instance_uses_the_gpu_of_its_number_and_can_open_it() -> None:
    directives = read_directives(WORKER)

    assert "CUTFLEET_GPU=%i" in " ".join(directives["Environment"]).split()
    assert "CUTFLEET_DEVICE=cuda" in " ".join(directives["Environment"]).split()
    assert not {"PrivateDevices", "DevicePolicy", "ProtectClock", "MemoryDenyWriteExecute"} & set(directives)


def test_each_process_of_a_machine_has_its_own_metrics_port() -> None:
    def port(unit: str, instance: str) -> int:
        words = " ".join(read_directives(unit)["Environment"]).split()
        (text,) = [word.partition("=")[2] for word in words if word.startswith("CUTFLEET_METRICS_PORT=")]
        return int(text.replace("%i", instance))

    ports = [port(DISPATCHER, ""), *(port(WORKER, str(gpu)) for gpu in range(16))]

    assert len(set(ports)) == len(ports)
    assert all(1023 < number < 65_536 for number in ports)


def test_the_programs_that_the_units_start_exist() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

    assert read_directives(WORKER)["ExecStart"] == ["/opt/cutfleet/bin/python -m workers"]
    program, command = read_directives(DISPATCHER)["ExecStart"][0].split()
    assert Path(program).name in scripts
    assert command == "dispatch"


def test_the_environment_file_sets_no_variable_of_the_units() -> None:
    names = re.findall(rf"^#?({PREFIX}[A-Z_0-9]+)=", (FOLDER / "cutfleet.env").read_text(), re.MULTILINE)
    pairs = [pair for unit in (WORKER, DISPATCHER) for pair in " ".join(read_directives(unit)["Environment"]).split()]
    own = [pair.split("=")[0] for pair in pairs]

    assert not set(names) & set(own), "a value in the file overrides the unit's: all workers would use one GPU"
    assert f"{PREFIX}REDIS_URL" in names


@pytest.mark.parametrize("page", ["systemd/cutfleet.env", "redis/README.md"])
def test_a_shell_reads_the_redis_url_as_systemd_does(page: str, tmp_path: Path) -> None:
    """systemd takes text between single quotes literally (systemd.exec, EnvironmentFile)."""
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


def test_the_drop_in_for_cpus_selects_no_gpu() -> None:
    (drop_in,) = re.findall(r"```ini\n(.*?)```", (FOLDER / "README.md").read_text(), re.S)
    own = dict(pair.split("=", 1) for pair in " ".join(read_directives(WORKER)["Environment"]).split())

    own |= dict(re.findall(r"^Environment=(\w+)=(.+)$", drop_in, re.M))
    for name in re.findall(r"^UnsetEnvironment=(\w+)$", drop_in, re.M):
        del own[name]

    assert {name: value for name, value in own.items() if name in ("CUTFLEET_DEVICE", "CUTFLEET_GPU")} == {
        "CUTFLEET_DEVICE": "cpu"
    }


@pytest.mark.parametrize("code", ExitCode)
def test_the_readme_explains_each_exit_code(code: ExitCode) -> None:
    assert f"| {code.value} | " in (FOLDER / "README.md").read_text()


def test_systemd_analyze_accepts_the_units_where_installed(tmp_path: Path) -> None:
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

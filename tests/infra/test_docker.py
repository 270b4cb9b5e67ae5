"""The container images, checked without a Docker engine: copied files exist, lock files match the requirements."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra/docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = {"producer.txt": ["flower", "api"], "worker-cuda.txt": ["worker"]}
HEAVY = {"torch", "torchvision", "numpy", "pillow", "opencv-python-headless", "transformers", "kornia", "simplejpeg"}


def read_lock(name: str) -> dict[str, str]:
    """Return the version of each package. Fails on a package without a hash."""
    entries = re.findall(r"^(\S+?)==(\S+) \\\n((?:    --hash=\S+(?: \\)?\n)*)", (FOLDER / name).read_text(), re.M)
    assert entries
    for package, _, hashes in entries:
        assert "--hash=sha256:" in hashes, package
    return {canonicalize_name(package): version for package, version, _ in entries}


def read_dockerfile(image: str) -> str:
    return (FOLDER / f"{image}.Dockerfile").read_text()


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_covers_every_requirement(name: str) -> None:
    found = read_lock(name)

    extras = [text for extra in LOCKS[name] for text in PROJECT["optional-dependencies"][extra]]
    for text in PROJECT["dependencies"] + extras:
        requirement = Requirement(text)
        assert requirement.specifier.contains(found.get(canonicalize_name(requirement.name), "0")), (
            f"{text}: make locks"
        )


def test_the_producer_installs_no_pixel_library() -> None:
    names = read_lock("producer.txt")

    assert not {name for name in names if name in HEAVY or name.startswith(("nvidia-", "cuda-", "triton"))}
    assert read_lock("worker-cuda.txt").keys() >= HEAVY


@pytest.mark.parametrize(("image", "packages"), [("producer", {"jobs", "producer"}), ("worker", {"jobs", "workers"})])
def test_copied_files_exist_and_belong_to_one_side(image: str, packages: set[str]) -> None:
    lines = [line.split()[1:-1] for line in read_dockerfile(image).splitlines() if re.match(r"COPY (?!--from)", line)]
    sources = {source.replace("${LOCK}", "worker-cuda.txt") for line in lines for source in line}

    assert {source for source in sources if not (ROOT / source).exists()} == set()
    assert {source for source in sources if (ROOT / source).is_dir()} == packages


@pytest.mark.parametrize("image", ["producer", "worker"])
def test_a_container_runs_without_root_and_receives_sigterm(image: str) -> None:
    text = read_dockerfile(image)
    entry = re.search(r"^ENTRYPOINT (.+)$", text, re.M)

    assert entry is not None
    assert json.loads(entry[1]), "exec form: a shell would not pass on SIGTERM"
    assert re.search(r"^USER 10001:10001$", text, re.M)
    assert "HEALTHCHECK" in text
    assert f"VERSION={PROJECT['version']}" in text
    assert "--require-hashes" in text

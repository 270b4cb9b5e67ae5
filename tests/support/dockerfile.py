"""Builds a container image without an engine: runs each step of a Dockerfile's build stage in folders of this machine.

    python -m tests.support.dockerfile producer|worker FOLDER

Handles COPY and RUN, with WORKDIR and /opt/cutfleet below FOLDER; then starts the entry point's program. Base image,
users and the second stage are ignored.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.environment import ROOT

ARGUMENTS = {"producer": ["--help"], "worker": ["no-such-command"]}
EXIT_CODES = {"producer": 0, "worker": 2}
HEAVY = ("torch", "torchvision", "numpy", "PIL", "cv2", "nvidia", "triton")


def main(image: str, folder: Path) -> None:
    prefix, work = folder / "cutfleet", folder / "src"
    work.mkdir(parents=True)
    text = re.sub(r"\\\n", "", (ROOT / f"infra/docker/{image}.Dockerfile").read_text())
    build, last = text.split("\nFROM ")[1:]
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.M))
    for line in build.splitlines():
        step, _, rest = re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], line).partition(" ")
        if step == "COPY":
            *sources, to = rest.split()
            for source in sources:
                _copy(ROOT / source, work / to, whole=len(sources) > 1)
        elif step == "RUN":
            print(f"RUN {rest}", flush=True)
            subprocess.run(["/bin/sh", "-c", rest.replace("/opt/cutfleet", str(prefix))], cwd=work, check=True)
    entry = json.loads(re.findall(r"^ENTRYPOINT (.+)$", last, re.M)[0])
    ran = subprocess.run([str(prefix / "bin" / entry[0]), *entry[1:], *ARGUMENTS[image]], cwd=folder, check=False)
    assert ran.returncode == EXIT_CODES[image], ran.returncode
    (packages,) = prefix.glob("lib/python*/site-packages")
    files = [file for file in prefix.rglob("*") if file.is_file() and not file.is_symlink()]
    print(f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.0f} MB")
    print("heavy:", sorted(path.name for path in packages.iterdir() if path.name in HEAVY) or "none")


def _copy(source: Path, to: Path, *, whole: bool) -> None:
    if source.is_dir():
        shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, to / source.name if whole or to.is_dir() else to)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""Reads the state of processes from /proc."""

from __future__ import annotations

from pathlib import Path


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP has stopped the process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def find_children(pid: int, command: str = "") -> list[int]:
    """Return the live children of `pid` whose command line contains `command`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, parent = stat.read_text().rpartition(")")[2].split()[:2]
            line = stat.with_name("cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and command.encode() in line:
            found.append(int(stat.parent.name))
    return found


def resident_mb(pid: int) -> int:
    """Return the resident memory of the process; 0 when it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024
    return 0

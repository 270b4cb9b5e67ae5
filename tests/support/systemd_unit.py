"""The systemd units of `infra/systemd`: what they say, and what systemd does by it."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "infra/systemd"


class Unit:
    """`directives`: each one's values. Fails on a line that is none, such as a comment behind a value's end would
    leave."""

    def __init__(self, name: str) -> None:
        self.directives: dict[str, list[str]] = {}
        for line in (FOLDER / name).read_text().splitlines():
            if line and not line.startswith(("#", "[")):
                directive, mark, value = line.partition("=")
                assert mark, line
                assert re.fullmatch(r"[A-Z][A-Za-z]+", directive), line
                assert " #" not in value, f"systemd knows no comment at a line's end: {line}"
                self.directives.setdefault(directive, []).append(value)
        assert self.directives["Restart"] == ["always"]

    @property
    def stop_s(self) -> float:
        """Between the asking and the killing."""
        return float(self.directives["TimeoutStopSec"][0])

    def starts_again_after(self, code: int) -> bool:
        """`code`: an exit code, or the number of a signal, negative."""
        return str(code) not in self.directives["RestartPreventExitStatus"][0].split()

    def is_well_after(self, code: int) -> bool:
        """Whether a stop that ends so leaves the unit not failed."""
        return code in (0, -15) or str(code) in " ".join(self.directives.get("SuccessExitStatus", [])).split()

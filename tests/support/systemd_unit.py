"""Reads the systemd units of `infra/systemd`: their directives, and what systemd does by them."""

from __future__ import annotations

import re

from tests.support.environment import ROOT

FOLDER = ROOT / "infra/systemd"


class Unit:
    """`directives`: values by name. Fails on a line that is no directive, such as a comment after a value."""

    def __init__(self, name: str) -> None:
        self.directives: dict[str, list[str]] = {}
        for line in (FOLDER / name).read_text().splitlines():
            if line and not line.startswith(("#", "[")):
                directive, mark, value = line.partition("=")
                assert mark, line
                assert re.fullmatch(r"[A-Z][A-Za-z]+", directive), line
                assert " #" not in value, f"systemd has no comments at the end of a line: {line}"
                self.directives.setdefault(directive, []).append(value)
        assert self.directives["Restart"] == ["always"]

    @property
    def stop_s(self) -> float:
        """Seconds between SIGTERM and SIGKILL."""
        return float(self.directives["TimeoutStopSec"][0])

    def restarts_after(self, code: int) -> bool:
        """Whether systemd restarts the unit. `code`: exit code, or the negative number of a signal."""
        return str(code) not in self.directives["RestartPreventExitStatus"][0].split()

    def is_success_after(self, code: int) -> bool:
        """Whether the unit counts as successful after it was stopped and ended with `code`."""
        return code in (0, -15) or str(code) in " ".join(self.directives.get("SuccessExitStatus", [])).split()

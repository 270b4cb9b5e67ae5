"""A file that a process touches while it makes progress: a probe judges the process by the file's age.

The file appears when the process is ready; one that an earlier process left is removed at the start."""

from __future__ import annotations

from pathlib import Path

from jobs.errors import SettingsError

TOUCH_EVERY_S = 5.0
"""Approximate interval; a probe should allow a minute."""


class LivenessFile:
    """Does nothing with an empty path."""

    def __init__(self, path: str) -> None:
        """Raises `SettingsError` when the file can't be written."""
        self._path = Path(path) if path else None
        if self._path is not None:
            try:
                self._path.touch()
                self._path.unlink()
            except OSError as exc:
                raise SettingsError(f"CUTFLEET_ALIVE_FILE can't be written: {exc}.") from exc

    def touch(self) -> None:
        if self._path is not None:
            self._path.touch()

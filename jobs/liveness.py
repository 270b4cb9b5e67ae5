"""A file that a process touches while it makes progress, so that a probe can judge by its age without asking anybody.

It appears when the process is ready. One that an earlier process left is removed at the start."""

from __future__ import annotations

from pathlib import Path

from jobs.errors import SettingsError

ALIVE_S = 5.0
"""How often it is touched, roughly; a probe should allow a minute."""


class AliveFile:
    """With an empty path, nothing happens."""

    def __init__(self, path: str) -> None:
        """Raises `SettingsError` when the file could not be written later."""
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

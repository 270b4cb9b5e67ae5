"""Exit codes of a worker process. Beside them: 0 after a drain, 1 from faulthandler (a library kept the interpreter
lock), and a fault's own signal."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """A supervisor restarts the worker after every code except `SETTINGS`."""

    SETTINGS = 2  # a setting, an argument or the model is wrong: a restart can't help
    UNREACHABLE = 4  # Redis or S3 is unavailable at the start
    DEVICE_LOST = 70
    BUG = 71  # a thread ended with an unexpected error
    STALLED = 72  # an image made no progress, or memory ran out
    DRAIN_DEADLINE = 75  # images still ran at the end of CUTFLEET_DRAIN_S

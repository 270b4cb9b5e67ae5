"""Where this checkout and the optional test data are, and what the fixtures of `tests/conftest.py` hand out."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from producer.demo.local_stack import LocalStack

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("CUTFLEET_TEST_DATA") or ROOT.parent / "shared")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def alone_url(stack: LocalStack) -> str:
    """The stack's second Redis database: no dispatcher works on it."""
    return stack.environment["CUTFLEET_REDIS_URL"].replace("/0", "/2")

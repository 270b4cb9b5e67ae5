"""Where the checkout, the optional test data and the installed programs are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from producer.demo.local_stack import LocalStack

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("CUTFLEET_TEST_DATA") or ROOT.parent / "shared")

Run = Callable[..., "subprocess.CompletedProcess[str]"]
"""The fixture `cutfleet`: runs the command with these arguments."""


def own_redis_url(stack: LocalStack) -> str:
    """Return the URL of the stack's second Redis database, where no dispatcher works."""
    return stack.environment["CUTFLEET_REDIS_URL"].replace("/0", "/2")


def find_program(name: str) -> str:
    """Return the path of a program that a package of this virtual environment installed, independent of PATH."""
    return str(Path(sys.executable).with_name(name))

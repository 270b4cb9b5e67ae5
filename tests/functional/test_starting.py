"""A worker that is told to go before it serves leaves at once, and cleanly: a rollout taken back is no fault."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from producer.demo.local_stack import LocalStack, inherited_environment
from tests.support.environment import ROOT

PROGRAM = """
import logging, os, runpy, signal, sys
place = sys.argv.pop()
def passed(name):
    if name == place:
        os.kill(os.getpid(), signal.SIGTERM)
    return True
sys.addaudithook(lambda event, args: event == "import" and passed(args[0]))
logging.getLogger("workers").addFilter(lambda line: passed(line.getMessage()))
runpy.run_module("workers", run_name="__main__", alter_sys=True)
"""
"""The worker as it is, which hears SIGTERM when it first imports a module, or says something."""


@pytest.mark.parametrize(
    "place",
    ["jobs.settings", "torch", "workers.models.u2net", "ready"],
    ids=["just_begun", "before_its_libraries", "before_its_model", "ready_before_celerys_handlers"],
)
def test_told_to_go_while_it_starts_a_worker_leaves_with_0_and_holds_nothing(stack: LocalStack, place: str) -> None:
    env = inherited_environment() | stack.environment | {"CUTFLEET_DEVICE": "cpu", "CUTFLEET_NODE": "starting"}

    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, place], env=env, cwd=ROOT, capture_output=True, text=True, timeout=100
    )

    assert ran.returncode == 0, (signal.Signals(-ran.returncode) if ran.returncode < 0 else "", ran.stderr)
    assert "Traceback" not in ran.stderr
    assert "gone" not in ran.stderr, "it was never there"

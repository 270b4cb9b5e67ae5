"""A worker that gets SIGTERM while it starts exits with 0, as when a rollout is undone."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from producer.demo.local_stack import LocalStack, inherited_environment
from tests.support.environment import ROOT

PROGRAM = """
import logging, os, runpy, signal, sys
step = sys.argv.pop()
def reach(name):
    if name == step:
        os.kill(os.getpid(), signal.SIGTERM)
    return True
sys.addaudithook(lambda event, args: event == "import" and reach(args[0]))
logging.getLogger("workers.serve").addFilter(lambda line: reach(line.getMessage()))
runpy.run_module("workers", run_name="__main__", alter_sys=True)
"""
"""The unchanged worker. It gets SIGTERM when it first imports a module or logs a message, named by the argument."""


@pytest.mark.parametrize(
    "step",
    ["jobs.settings", "torch", "workers.models.u2net", "ready"],
    ids=["just_started", "before_its_libraries", "before_its_model", "before_celerys_handlers"],
)
def test_a_worker_that_gets_sigterm_while_it_starts_exits_with_0(stack: LocalStack, step: str) -> None:
    env = inherited_environment() | stack.environment | {"CUTFLEET_DEVICE": "cpu", "CUTFLEET_NODE": "starting"}

    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, step], env=env, cwd=ROOT, capture_output=True, text=True, timeout=100
    )

    assert ran.returncode == 0, (signal.Signals(-ran.returncode) if ran.returncode < 0 else "", ran.stderr)
    assert "Traceback" not in ran.stderr
    assert "stopped" not in ran.stderr, "it never served"

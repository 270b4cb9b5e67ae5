"""A short campaign of random faults; `make faults` runs a long one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.environment import ROOT

MINUTES, SEED = "4", "7"


@pytest.mark.timeout(900)
def test_random_faults_under_load_lose_no_image() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--minutes", MINUTES],
        env=os.environ | {"SEED": SEED},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )

    print(ran.stdout)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "| lost | 0 |" in ran.stdout

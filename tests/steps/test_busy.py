"""Threads of a step wait without spinning, so that another process on a core does not stop the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOWS = "import sys, steps, os; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"


@pytest.mark.parametrize("given, expected", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_a_step_waits_passively_before_torch_is_loaded_unless_the_user_says_otherwise(given, expected):
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": given} if given else {}
    shown = subprocess.run([sys.executable, "-c", SHOWS], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [expected, "False"]

"""Threads of a step wait without spinning, so that another process on a core does not stop the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOWS = "import sys, steps, os; print(*map(os.environ.get, sys.argv[1:]), *{'torch', 'numpy'} & sys.modules.keys())"
DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE", "OPENBLAS_NUM_THREADS": "2"}])
def test_a_step_waits_passively_before_torch_and_numpy_are_loaded_unless_the_user_says_otherwise(given):
    env = {name: value for name, value in os.environ.items() if name not in DEFAULTS} | given
    command = [sys.executable, "-c", SHOWS, *DEFAULTS]
    shown = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [*(DEFAULTS | given).values()]

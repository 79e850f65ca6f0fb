"""The statistics stand on numpy and scipy alone, so that a step can import them in a second."""

import subprocess
import sys
from pathlib import Path


def test_importing_the_statistics_loads_no_framework():
    code = (
        "import sys, ssd.stats.estimate, ssd.stats.variance, ssd.stats.power, ssd.stats.compare, ssd.verdict.decision\n"
        "print([name for name in ('torch', 'mlflow', 'pandas', 'pyarrow', 'transformers', 'vllm')"
        " if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

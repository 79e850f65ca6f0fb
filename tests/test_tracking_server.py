"""Steps against a real `mlflow server` with PostgreSQL and artifacts of its own, which goes away in their midst.

Slow (a database, a server and an outage of a minute), so asked for by name: `python -m pytest -m slow -n 0 tests`.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from ssd import records
from ssd.lab import world
from ssd.records import Problem

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
OUTAGE_S = 60


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """`mlflow server`, in a process group of its own."""

    def __init__(self, database: str, artifacts: Path):
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--workers", "1"]
        self.command += ["--artifacts-destination", str(artifacts), "--host", "127.0.0.1", "--port", str(self.port)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            time.sleep(0.5)
        raise RuntimeError(f"mlflow server at {self.uri} did not start")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(postgresql, tmp_path) -> Iterator[Server]:
    running = Server(postgresql("mlflow"), tmp_path / "artifacts")
    mlflow.set_tracking_uri(running.uri)
    yield running
    mlflow.set_tracking_uri(None)
    running.kill()


def test_a_step_outlives_a_server_that_is_gone_for_a_minute(server, lab_model, tmp_path):
    records.write(tmp_path / "quick.parquet", Problem, world.problems(400, 5))
    command = [sys.executable, "-m", "steps.evaluate", f"--model={lab_model}", f"--problems={tmp_path}/quick.parquet"]
    command += ["--arm=base", "--engine=transformers", "--max_tokens=48", "--n=20", "--temperature=1.0", "--top_p=1.0"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": server.uri, "SSD_WORK_DIR": str(tmp_path / "work")}
    step = subprocess.Popen(command, env=environment, cwd=ROOT)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "work").glob("*/samples/*.parquet")):
        assert step.poll() is None and time.monotonic() < deadline, "the step drew no samples"
        time.sleep(0.1)
    server.kill()
    time.sleep(OUTAGE_S)
    assert step.poll() is None, "the step gave up"
    server.start()
    assert step.wait(timeout=300) == 0
    (run,) = mlflow.search_runs(["0"], "tags.step = 'evaluate'", output_format="list")
    assert run.info.status == "FINISHED" and run.info.artifact_uri.startswith("mlflow-artifacts:")
    assert run.data.metrics["num_samples"] == 8000
    grades = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/grades.parquet", dst_path=str(tmp_path))
    assert len(records.read(grades, records.Grade)) == 8000
    assert list((tmp_path / "artifacts").rglob("figures/generation.png"))

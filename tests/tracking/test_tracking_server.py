"""Steps against a real `mlflow server`: one as it starts without options, one with PostgreSQL that goes away, and one
as a team may have it: PostgreSQL, artifacts in S3, and a password.

Slow (servers, a database and an outage of a minute), so asked for by name: `python -m pytest -m slow -n 0 tests`.
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
ROOT = Path(__file__).resolve().parents[2]
OUTAGE_S = 60


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """`mlflow server`, in a process group of its own."""

    def __init__(self, folder: Path, *options: str, **environment: str):
        self.environment = environment
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        self.command += ["--workers", "1", *options]
        self.folder = folder
        self.start()

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        environment |= self.environment
        self.process = subprocess.Popen(self.command, start_new_session=True, cwd=self.folder, env=environment)
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
    options = ("--backend-store-uri", postgresql("mlflow"), "--artifacts-destination", str(tmp_path / "artifacts"))
    running = Server(tmp_path, *options)
    mlflow.set_tracking_uri(running.uri)
    yield running
    mlflow.set_tracking_uri(None)
    running.kill()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Iterator[Server]:
    """A server as most teams start it: on a new SQLite file, and artifacts go through it."""
    running = Server(tmp_path_factory.mktemp("server"))
    mlflow.set_tracking_uri(running.uri)
    yield running
    mlflow.set_tracking_uri(None)
    running.kill()


@pytest.fixture
def s3(tmp_path) -> Iterator[dict[str, str]]:
    """An S3-compatible store with the bucket `artifacts`: the environment in which its clients find it."""
    boto3, _ = (pytest.importorskip(name, reason="needs the extra servers") for name in ("boto3", "moto"))
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL)
    endpoint, keys = f"http://127.0.0.1:{port}", {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):  # botocore has an error for each way in which a server is not there yet
            client.create_bucket(Bucket="artifacts")
            break
        time.sleep(0.5)
    yield {"MLFLOW_S3_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"} | keys
    process.terminate()
    process.wait()


@pytest.fixture
def team(postgresql, s3, tmp_path, monkeypatch) -> Iterator[Server]:
    """A server with PostgreSQL, artifacts in S3 and passwords. The steps are given the password and no key to S3."""
    pytest.importorskip("flask_wtf", reason="needs the extra servers")
    folder = tmp_path / "server"
    folder.mkdir()
    accounts = f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/accounts.db\n"
    accounts += "admin_username = admin\nadmin_password = a-password-1234\n"
    accounts += "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    (folder / "auth.ini").write_text(accounts)
    options = ("--app-name", "basic-auth", "--backend-store-uri", postgresql("team"))
    options += ("--artifacts-destination", "s3://artifacts/mlflow")
    secrets = {"MLFLOW_AUTH_CONFIG_PATH": f"{folder}/auth.ini", "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret"}
    running = Server(folder, *options, **secrets, **s3)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-password-1234")
    mlflow.set_tracking_uri(running.uri)
    yield running
    mlflow.set_tracking_uri(None)
    running.kill()


def run_step(name: str, server: str, work: Path, **parameters: object) -> mlflow.entities.Run:
    """A step as a user runs it, against the server at `server`; its run."""
    command = [sys.executable, "-m", f"steps.{name}", *(f"--{key}={value}" for key, value in parameters.items())]
    environment = os.environ | {"MLFLOW_TRACKING_URI": server, "SSD_WORK_DIR": str(work)}
    subprocess.run(command, env=environment, cwd=ROOT, check=True)
    return mlflow.search_runs(["0"], f"tags.step = '{name}'", output_format="list")[0]


@pytest.fixture(scope="module")
def prepared(plain, tmp_path_factory) -> mlflow.entities.Run:
    sources = dict.fromkeys(("train_sources", "val_sources", "final_sources"), "lab")
    sizes = {"train_size": 40, "val_size": 20, "quick_size": 10, "final_size": 20}
    return run_step("prepare", plain.uri, tmp_path_factory.mktemp("work"), **sources, **sizes)


def test_steps_run_on_a_server_without_options_and_their_datasets_can_be_loaded_from_it(
    plain, prepared, lab_model, tmp_path
):
    assert prepared.info.artifact_uri.startswith("mlflow-artifacts:")
    train = f"runs:/{prepared.info.run_id}/train.parquet"
    given = {"model": lab_model, "problems": train, "engine": "transformers", "max_tokens": 40, "temperature": 1.0}
    run = run_step("sample", plain.uri, tmp_path, top_k=0, n=1, **given)
    assert run.info.status == "FINISHED" and run.data.metrics["num_samples"] == 40
    for dataset in prepared.inputs.dataset_inputs:
        if dataset.dataset.source_type == "http":
            loaded = mlflow.data.get_source(dataset).load(str(tmp_path))
            assert len(records.read(loaded, Problem)) == int(prepared.data.metrics[f"num_{dataset.dataset.name}"])
    assert {dataset.dataset.source_type for dataset in run.inputs.dataset_inputs} == {"http"}


def check_whole_experiment(server: Server, folder: Path) -> None:
    """Run `main` from another folder than the server's; then the report, a model and samples open from the server."""
    main = run_step("main", server.uri, folder / "work", preset=ROOT / "tests/tiny.yaml")
    nested = mlflow.search_runs(["0"], f"tags.`mlflow.parentRunId` = '{main.info.run_id}'", output_format="list")
    assert main.info.status == "FINISHED" and {run.info.status for run in nested} == {"FINISHED"}
    assert {run.info.artifact_uri.partition(":")[0] for run in nested} == {"mlflow-artifacts"}
    by_step = {run.data.tags["step"]: run.info.run_id for run in nested}
    assert "<html" in mlflow.artifacts.load_text(f"runs:/{by_step['report']}/report.html")
    for uri in (f"runs:/{by_step['train']}/model/model.safetensors", f"runs:/{by_step['sample']}/samples"):
        assert Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder))).exists()


def test_the_whole_experiment_runs_on_a_server_without_options_and_its_report_opens_from_there(plain, tmp_path):
    check_whole_experiment(plain, tmp_path)


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


def test_the_whole_experiment_runs_on_the_server_of_a_team(team, tmp_path):
    check_whole_experiment(team, tmp_path)


def test_a_wrong_password_is_one_line(team, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    command = [sys.executable, "-m", "steps.power"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": team.uri, "SSD_WORK_DIR": str(tmp_path / "work")}
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert team.uri in ended.stderr and "401" in ended.stderr

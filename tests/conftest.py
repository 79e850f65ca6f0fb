"""What several tests share: one thread for each of the two workers, and a small model of the lab, trained here once."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import mlflow
import pytest


def pytest_collection_modifyitems(items):
    """The longest files first, so that both workers end at about the same time."""
    items.sort(key=lambda item: ("test_project" not in item.nodeid, "test_training" not in item.nodeid))


@pytest.fixture(scope="session", autouse=True)
def work_dir(tmp_path_factory) -> Path:
    """Where the tests' unfinished work is: not among the user's."""
    folder = tmp_path_factory.mktemp("work")
    os.environ["SSD_WORK_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def lab_model(tmp_path_factory) -> str:
    """Folder of a lab model that has learned a little: its likeliest tokens are no ties."""
    from ssd.lab import model

    folder = tmp_path_factory.mktemp("lab") / "model"
    model.train(folder, seed=0, num_steps=40)
    return str(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Folder of an empty tracking store, that of this module's runs."""
    folder = tmp_path_factory.mktemp("store")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.create_experiment("tests", artifact_location=str(folder / "artifacts"))
    mlflow.set_experiment("tests")
    yield folder
    mlflow.set_tracking_uri(None)
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)  # which `set_experiment` leaves for the processes of other modules


@pytest.fixture(scope="session")
def run_step():
    """Runs a step in this process; returns its run."""

    def run(name: str, /, **parameters: object) -> mlflow.entities.Run:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, *(f"--{key}={value}" for key, value in parameters.items())])
            runpy.run_module(f"steps.{name}", run_name="__main__")
        return mlflow.search_runs(filter_string=f"tags.step = '{name}'", output_format="list")[0]

    return run


@pytest.fixture
def postgresql():
    """Makes a database of a name, on a PostgreSQL server that is started for this test, and gives its URL."""
    pytest.importorskip("psycopg2", reason="needs the extra postgres")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [shutil.which("initdb")]
    if found[-1] is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    binaries, folder = Path(found[-1]).parent, Path("/tmp") / f"postgresql-{os.getpid()}"
    folder.mkdir()
    as_user = []
    if os.getuid() == 0:  # PostgreSQL refuses root
        shutil.chown(folder, "nobody")
        as_user = ["setpriv", "--reuid=nobody", "--clear-groups", "--"]

    def call(name: str, *arguments: str) -> None:
        subprocess.run([*as_user, binaries / name, *arguments], check=True, cwd="/tmp", stdout=subprocess.DEVNULL)

    call("initdb", "-D", f"{folder}/data", "-U", "tests", "--auth=trust", "--no-sync")
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    call("pg_ctl", "-D", f"{folder}/data", "-w", "-o", options, "-l", f"{folder}/log", "start")

    def database(name: str) -> str:
        call("createdb", "-h", str(folder), "-U", "tests", name)
        return f"postgresql+psycopg2://tests@/{name}?host={folder}"

    try:
        yield database
    finally:
        call("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
        shutil.rmtree(folder)

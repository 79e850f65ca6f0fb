"""What several tests share: one thread for each of the two workers, and a small model of the lab, trained here once."""

import os
import runpy
import sys

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import mlflow
import pytest


def pytest_collection_modifyitems(items):
    """The longest file first, so that the other worker does all the rest beside it."""
    items.sort(key=lambda item: "test_project" not in item.nodeid)


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


@pytest.fixture(scope="session")
def run_step():
    """Runs a step in this process; returns its run."""

    def run(name: str, /, **parameters: object) -> mlflow.entities.Run:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, *(f"--{key}={value}" for key, value in parameters.items())])
            runpy.run_module(f"steps.{name}", run_name="__main__")
        return mlflow.search_runs(filter_string=f"tags.step = '{name}'", output_format="list")[0]

    return run

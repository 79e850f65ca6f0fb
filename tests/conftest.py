"""What several tests share: one thread for each of the two workers, and a small model of the lab, trained here once."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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

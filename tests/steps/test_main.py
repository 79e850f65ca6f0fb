"""What `main` launches, in which order and with what: the arms differ in nothing but what makes them arms."""

import json
import runpy
import sys

import mlflow
import pytest

from ssd import evaluation, parameters
from ssd.tracking import reuse

BEST = {
    "temperature": {"temperature": 0.8, "temperature_last": False},
    "min-p": {"min_p": 0.1, "temperature_last": False},
    "temperature-last": {"temperature": 2.0, "temperature_last": True},
}


@pytest.fixture(params=[()])
def launched(request, tmp_path, monkeypatch) -> list[tuple[str, str, dict]]:
    """(entry point, run id, parameters) of every step that a main of the lab launches; the steps are not run."""
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.create_experiment("main", artifact_location=str(tmp_path / "artifacts"))
    mlflow.set_experiment("main")
    calls = []

    def launch(entry_point: str, preset: str, overrides: dict) -> str:
        with mlflow.start_run(nested=True) as run:
            mlflow.set_tag("mlflow.note.content", "done")
            mlflow.log_metric("num_final", 2000)
            mlflow.log_text(json.dumps({"best": {f: {"decoding": d} for f, d in BEST.items()}}), "decodings.json")
        calls.append((entry_point, run.info.run_id, parameters.preset_values(preset, entry_point) | overrides))
        return run.info.run_id

    monkeypatch.setattr(reuse, "launch", launch)
    monkeypatch.setattr(sys, "argv", ["main", "--preset", "lab", "--seed", "3", *request.param])
    runpy.run_module("steps.main", run_name="__main__")
    yield calls
    mlflow.set_tracking_uri(None)


def differences(one: dict, other: dict) -> set[str]:
    return {name for name in one if one[name] != other[name]}


def test_main_runs_every_arm_and_they_differ_in_what_makes_them_arms(launched):
    by_step = {name: [(run, given) for step, run, given in launched if step == name] for name, _, _ in launched}
    (ssd_run, ssd), (control_run, control) = by_step["sample"]
    assert differences(ssd, control) == {"arm", "top_p"}
    assert (control["temperature"], control["top_k"], control["top_p"]) == (1.0, 0, 1.0)
    (_, ssd_training), (_, control_training) = by_step["train"]
    assert differences(ssd_training, control_training) == {"samples"}
    assert (ssd_run in ssd_training["samples"], control_run in control_training["samples"]) == (True, True)

    measured = {given["arm"]: given for _, given in by_step["evaluate"]}
    checkpoints = measured.pop("ssd-by-step")
    assert "quick.parquet" in checkpoints["problems"] and f"{checkpoints['model']}/model" == measured["ssd"]["model"]
    searches = {arm: measured.pop(arm) for arm in ("base-search", "ssd-search")}
    assert all("quick.parquet" in given["problems"] for given in searches.values())
    assert differences(*searches.values()) == {"arm", "model"}
    base = measured["base"]
    assert (
        differences(base, measured["ssd-same-decoding"]) == differences(base, measured["control"]) == {"arm", "model"}
    )
    for family, decoding in BEST.items():
        tuned = measured[f"base-tuned-{family}"]
        assert differences(base, tuned) <= {"arm", *evaluation.DECODING}
        assert {name: tuned[name] for name in decoding} == decoding
    assert measured["ssd"]["temperature"] == BEST["temperature"]["temperature"]

    (_, compared), (_, power) = by_step["compare"][0], by_step["power"][0]
    assert {arm.split("=")[0] for arm in compared["arms"].split(",")} == set(measured)
    assert "quick.parquet" in compared["chosen_on"]
    assert power["num_problems"] == 2000


def test_main_says_how_long_each_step_took(launched):
    (main,) = mlflow.search_runs(filter_string="tags.step = 'main'", output_format="list")
    *_, total = rows = main.data.tags["mlflow.note.content"].split("| step | minutes |")[1].splitlines()[2:]
    assert len(rows) == len(launched) + 1 and total.startswith("| together | 0.")


def test_no_two_sets_are_sampled_with_one_seed(launched):
    """Training, choosing and the final reading draw with seeds of their own."""
    seeds = {step if step != "evaluate" else given["problems"][-13:]: given.get("seed") for step, _, given in launched}
    assert seeds["sample"] == seeds["baseline"] == 3
    assert len({seeds["sample"], seeds["quick.parquet"], seeds["final.parquet"]}) == 3


@pytest.mark.parametrize("launched", [("--model", "a/folder", "--source_root", "a/mirror")], indirect=True)
def test_a_model_and_a_mirror_that_are_given_take_the_place_of_the_presets(launched):
    given = {step: parameters for step, _, parameters in launched}
    assert "lab" not in given and given["prepare"]["source_root"] == "a/mirror"
    assert {given[step]["model"] for step in ("baseline", "sample", "train")} == {"a/folder"}
    assert "a/folder" in {values["model"] for step, _, values in launched if step == "evaluate"}

"""Choosing among candidate decodings, and comparing arms, in steps that run in this process."""

import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ssd import models, processes, records, tracking
from ssd.lab import world
from ssd.records import Grade, Problem
from ssd.tracking.reuse import work_key

pytestmark = pytest.mark.usefixtures("store")
CANDIDATES = """
temperature: [{temperature: 0.0}, {temperature: 5.0}]
min-p: [{temperature: 1.0, min_p: 0.1}]
temperature-last: [{temperature: 2.0, top_p: 0.8, temperature_last: true}]
"""


def artifact(run, name: str):
    return json.loads(Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/{name}")).read_text())


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("problems") / "final.parquet"
    records.write(path, Problem, world.problems(40, 5))
    records.write(path.with_name("val.parquet"), Problem, world.problems(20, 6))
    return str(path)


def test_the_best_candidate_of_each_family_is_chosen_and_every_candidate_is_a_run(
    run_step, tmp_path, lab_model, problems
):
    (tmp_path / "candidates.yaml").write_text(CANDIDATES)
    common = {"model": lab_model, "problems": problems, "engine": "transformers", "max_tokens": 40}
    run = run_step("evaluate", arm="base-search", decodings=tmp_path / "candidates.yaml", n=2, **common)
    found = artifact(run, "decodings.json")
    assert list(found["best"]) == ["temperature", "min-p", "temperature-last"]
    for family, best in found["best"].items():
        of_family = [row["estimate"]["value"] for row in found["candidates"] if row["family"] == family]
        assert best["estimate"]["value"] == max(of_family)
    nested = mlflow.search_runs(filter_string=f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", output_format="list")
    assert len(nested) == 4
    assert {child.data.metrics["num_samples"] for child in nested} == {80}


def test_every_checkpoint_of_a_training_is_measured_and_the_model_before_it(run_step, lab_model, problems, tmp_path):
    weights = models.load_weights(lab_model, torch.float32)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter *= 0.9
    weights.save_pretrained(tmp_path)
    models.load_tokenizer(lab_model).save_pretrained(tmp_path)
    with mlflow.start_run() as train:
        mlflow.log_param("model", lab_model)
        for folder, name, number in ((tmp_path, "model", 96), (lab_model, "checkpoints/step-000048", 48)):
            mlflow.log_artifacts(str(folder), name)
            mlflow.set_tags({"step": "train", f"{tracking.CHECKPOINT}{name}": number})
    common = {"problems": problems, "engine": "transformers", "max_tokens": 40}
    run = run_step("evaluate", arm="ssd-by-step", model=f"runs:/{train.info.run_id}", **common)
    of_parent = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    nested = mlflow.search_runs(filter_string=of_parent, order_by=["start_time"], output_format="list")
    assert [child.data.tags["ssd.checkpoint_step"] for child in nested] == ["0", "48", "96"]
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "pass_at_1_by_step")
    expected = {int(child.data.tags["ssd.checkpoint_step"]): child.data.metrics["pass_at_1"] for child in nested}
    assert {metric.step: metric.value for metric in history} == expected and expected[0] == expected[48]
    measured = [artifact(child, "samples/manifest.json")["model"] for child in nested]
    assert measured == [models.digest(str(folder)) for folder in (lab_model, lab_model, tmp_path)]


def test_stored_samples_are_graded_again_without_an_engine(
    monkeypatch, run_step, capsys, tmp_path, lab_model, problems
):
    common = {"model": lab_model, "problems": problems, "engine": "transformers", "max_tokens": 40}
    first = run_step("evaluate", arm="base", n=2, temperature=0.9, temperature_last=1, **common)
    monkeypatch.setattr("ssd.sampling.open_engine", None)
    again = run_step("evaluate", samples=f"runs:/{first.info.run_id}/samples")
    made_with = tracking.step_run(again).params  # not what MLproject's defaults say
    assert {name: made_with[name] for name in ("n", "temperature", "temperature_last", "max_tokens", "top_k")} == {
        "n": "2", "temperature": "0.9", "temperature_last": "True", "max_tokens": "40", "top_k": "20"
    }  # fmt: skip
    assert again.info.run_id != first.info.run_id and again.data.tags["arm"] == "base"
    for name in ("ssd.conditions", "ssd.base_model"):
        assert again.data.tags[name] == first.data.tags[name]
    assert made_with["engine"] == "transformers" and made_with["arm"] == "base"
    drawn = {name for name in first.data.metrics if not name.startswith("system/")} - {
        "tokens_per_second",
        "tail_share",
    }
    assert {name: again.data.metrics[name] for name in drawn} == {name: first.data.metrics[name] for name in drawn}
    records.write(tmp_path / "more.parquet", Problem, world.problems(42, 5))
    with pytest.raises(SystemExit):
        run_step("evaluate", samples=f"runs:/{first.info.run_id}/samples", problems=tmp_path / "more.parquet")
    assert "has none of 2 of the 42 problems" in capsys.readouterr().err


def test_a_run_that_a_kill_left_running_is_ended_by_the_next_of_its_step(run_step, tmp_path):
    """With all that it nested; also where it only waited: `mlflow run` with a preset does in a run of its own. And
    where another process has its id by now, as in a container that was started again."""
    killed = subprocess.Popen(["true"])
    killed.wait()
    client = mlflow.MlflowClient()
    experiment = mlflow.get_experiment_by_name("tests").experiment_id
    shared = {"step": "power", "ssd.host": socket.gethostname()}
    left, replaced, alive = (
        client.create_run(experiment, tags=shared | {"ssd.process": process})
        for process in (f"{killed.pid} 1.00", f"{os.getpid()} 1.00", processes.this())
    )
    trial = client.create_run(experiment, tags={"mlflow.parentRunId": left.info.run_id})
    not_begun = client.create_run(experiment, tags={"mlflow.parentRunId": trial.info.run_id})
    grades = [Grade(f"p{i}", k, "right" if i % 2 else "wrong", "1") for i in range(20) for k in range(2)]
    records.write(tmp_path / "grades.parquet", Grade, grades)
    run_step("power", grades=tmp_path / "grades.parquet")
    status = [client.get_run(each.info.run_id).info.status for each in (left, trial, not_begun, replaced, alive)]
    assert status == [*["KILLED"] * 4, "RUNNING"]
    client.set_terminated(alive.info.run_id)


def test_a_run_names_its_step_and_process_from_the_moment_that_it_exists(run_step, tmp_path, monkeypatch):
    """A kill in the next moment leaves a run that the next step of its kind ends."""
    start, made = mlflow.start_run, []

    def start_and_die(**given):
        made.append(start(**given))
        raise KeyboardInterrupt

    monkeypatch.setattr(mlflow, "start_run", start_and_die)
    with pytest.raises(KeyboardInterrupt):
        run_step("power", grades=tmp_path)
    mlflow.end_run("KILLED")
    tags = mlflow.get_run(made[0].info.run_id).data.tags
    assert (tags["step"], tags["ssd.process"]) == ("power", processes.this())


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        (["right right", "wrong wrong"] * 50, "Between-problem share 100%"),
        (["right wrong", "wrong right"] * 50, r"(?s)no difference between problems can be seen.*\*\*Warning"),
        (
            ["right right", "wrong wrong"],
            r"(?s)2 problems detect nothing .*of 2 problems: nothing \(not even 100 points",
        ),
        (["wrong wrong"] * 100, r"Nothing can be planned from this:.*all 2 samples of all 100 problems were wrong"),
    ],
    ids=["all variance between", "all variance within", "too few problems", "no variance"],
)
def test_power_says_what_the_variance_allows(run_step, tmp_path, outcomes, said):
    rows = [Grade(f"p{i}", s, word, "1") for i, each in enumerate(outcomes) for s, word in enumerate(each.split())]
    records.write(tmp_path / "grades.parquet", Grade, rows)
    run = run_step("power", grades=tmp_path / "grades.parquet", tokens_per_second=100.0, budget=400)
    assert re.search(said, run.data.tags["mlflow.note.content"])
    assert ("needed_problems" in run.data.metrics) == (len(set(outcomes)) > 1)


def test_arms_are_compared_pairwise_and_not_on_problems_that_a_choice_has_seen(
    run_step, capsys, lab_model, problems, tmp_path
):
    common = {"model": lab_model, "problems": problems, "engine": "transformers", "max_tokens": 40, "top_k": 0}
    base = run_step("evaluate", arm="base", temperature=1.0, top_p=1.0, **common)
    other = run_step("evaluate", arm="ssd-same-decoding", temperature=0.0, top_p=1.0, **common)
    arms = f"base=runs:/{base.info.run_id},ssd-same-decoding=runs:/{other.info.run_id}"
    compared = run_step("compare", arms=arms)
    difference = artifact(compared, "verdict.json")["findings"][0]["difference"]
    expected = other.data.metrics["pass_at_1"] - base.data.metrics["pass_at_1"]
    assert difference["value"] == pytest.approx(expected)
    assert difference["ci_low"] <= expected <= difference["ci_high"]
    stored = tracking.local_path(f"runs:/{compared.info.run_id}/arms.parquet")
    from_file = run_step("compare", arms=stored)
    for name in ("comparison.json", "verdict.json"):
        assert artifact(from_file, name) == artifact(compared, name)
    rows, damaged = pq.read_table(stored), tmp_path / "arms.parquet"
    for table, message in (
        (pq.read_table(problems), "is no arms.parquet of a comparison"),
        (rows.drop_columns("base"), "is no arms.parquet of a comparison"),
        (rows.replace_schema_metadata({b"ssd.arms": b"[1]"}), "is no arms.parquet of a comparison"),
        (pa.concat_tables([rows, rows]), "has no problem, one twice"),
    ):
        pq.write_table(table, damaged)
        with pytest.raises(SystemExit):
            run_step("compare", arms=damaged)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_step("compare", arms=arms, chosen_on=problems)
    assert "shares 40 problems with the evaluated set" in capsys.readouterr().err
    moved = [shutil.copy(problems, tmp_path / name) for name in ("holdout.parquet", "val.parquet")]
    same = {name: run_step("evaluate", arm=name, **common | {"problems": moved[0]}) for name in ("base", "control")}
    renamed = ",".join(f"{name}=runs:/{run.info.run_id}" for name, run in same.items())
    with pytest.raises(SystemExit):
        run_step("compare", arms=renamed)
    assert "chosen_on=quick shares 40 problems with the evaluated set" in capsys.readouterr().err
    (tmp_path / "val.parquet").unlink()
    unchecked = run_step("compare", arms=renamed).data.tags["ssd.unchecked"]
    assert unchecked == f"chosen_on is taken at its word: there is no {tmp_path}/val.parquet"
    with pytest.raises(SystemExit):
        run_step("compare", arms=stored, chosen_on="val")
    assert "says quick; leave it out" in capsys.readouterr().err
    swapped = f"base=runs:/{other.info.run_id},ssd-same-decoding=runs:/{base.info.run_id}"
    for given, message in (
        ({"arms": swapped}, "was evaluated as arm ssd-same-decoding; name it so"),
        ({"arms": f"{arms},base=runs:/{base.info.run_id}"}, "base is given twice"),
        ({"arms": arms, "chosen_on": "fianl"}, "chosen_on='fianl' is none of train, val, quick, final"),
    ):
        with pytest.raises(SystemExit):
            run_step("compare", **given)
        assert message in capsys.readouterr().err
    unplanned = run_step("evaluate", arm="mine", temperature=0.0, top_p=1.0, **common)
    with pytest.raises(SystemExit):
        run_step("compare", arms=f"base=runs:/{base.info.run_id},mine=runs:/{unplanned.info.run_id}")
    assert "no claim of docs/plan.md is about base and mine" in capsys.readouterr().err
    rows = records.read(tracking.local_path(f"runs:/{other.info.run_id}/grades.parquet"), Grade)
    records.write(tmp_path / "grades.parquet", Grade, rows[1:])
    mlflow.MlflowClient().log_artifact(other.info.run_id, str(tmp_path / "grades.parquet"))
    with pytest.raises(SystemExit):
        run_step("compare", arms=arms, chosen_on="val")  # else the first comparison would be reused
    assert "was graded on other problems than the arms before" in capsys.readouterr().err


def test_a_killed_run_goes_on_elsewhere_and_at_another_price_but_a_replay_is_of_its_own_recordings():
    def key(engine, price=0.0):
        return work_key("sample", {"engine": engine, "gpu_hour_price": price, "n": 1})

    assert key("openai:http://one:8000/v1") == key("openai:http://two:8000/v1,http://three:8000/v1", 2.5)
    assert key("vllm") == key("vllm:data_parallel_size=2") != key("openai:http://one:8000/v1")
    assert key("replay:one") != key("replay:two")

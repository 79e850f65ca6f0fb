"""The whole project through `mlflow run`, killed twice on its way and finished from another clone: nothing is lost or
done twice."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest

from ssd import records
from ssd.records import Grade, Sample

ROOT = Path(__file__).resolve().parents[1]
NUM_TRAIN = 320  # as tests/tiny.yaml has it


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A clean checkout with the tiny preset, and no runs."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("MLproject", "conda.yaml", "presets", "ssd", "steps"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    shutil.copy(ROOT / "tests/tiny.yaml", folder / "presets")
    engine = (
        folder / "ssd/engines/transformers.py"
    )  # small batches: sampling takes long enough to be killed in its midst
    engine.write_text(engine.read_text().replace("MAX_BATCH = 512", "MAX_BATCH = 64"))
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    (folder / ".gitignore").write_text("__pycache__/\nwork/\nmlruns/\nmlflow.db*\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "tiny"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


MLFLOW_RUN = ("mlflow", "run", ".", "--env-manager", "local", "-P", "preset=tiny")


def start(project: Path, module: str, *arguments: str, clone: str = ".") -> subprocess.Popen:
    """`python -m module arguments` in the project, or a `clone` of it, its output in log.txt."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db", "PYTHONUNBUFFERED": "1"}
    environment["XDG_CACHE_HOME"] = f"{project}/work"
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # mlflow calls `python`
    for name in (
        "SSD_WORK_DIR",
        "MLFLOW_RUN_ID",
        "PYTHONDONTWRITEBYTECODE",
    ):  # files of Python's own appear as they do for a user
        environment.pop(name, None)
    with open(project / "log.txt", "ab") as log:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, cwd=project / clone, env=environment, stdout=log, stderr=log)


def finish(process: subprocess.Popen, project: Path) -> str:
    """Its output; the run must succeed."""
    assert process.wait() == 0, (project / "log.txt").read_text()[-3000:]
    return (project / "log.txt").read_text()


def kill_when(project: Path, process: subprocess.Popen, pattern: str, whole: bool) -> list[Path]:
    """kill -9 `main` when a file matches, with every step, as a power cut does, or alone; returns what matched."""
    while not (found := sorted(project.glob(pattern))):
        assert process.poll() is None, (project / "log.txt").read_text()[-3000:]
        time.sleep(0.02)
    main = psutil.Process(process.pid)
    family = [main, *main.children(recursive=True)]
    for each in family if whole else [main]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    assert not psutil.wait_procs(family, timeout=15)[1]  # no step goes on without the one that launched it
    return found


@pytest.fixture(scope="module")
def finished(project) -> dict:
    """The project after main was killed in mid-sampling, then in mid-training, and then left to finish."""
    main = ("steps.main", "--preset", "tiny")  # as `mlflow run .` starts it
    shards = kill_when(project, start(project, *main), "work/ssd-math/sample-*/samples/part-*.parquet", True)
    before_kill = {(s.problem_id, s.sample_index): s.token_ids for shard in shards for s in records.read(shard, Sample)}
    kill_when(project, start(project, *main), "work/ssd-math/train-*/checkpoint-10/trainer_state.json", False)
    subprocess.run(["git", "clone", "-q", ".", "work/clone"], cwd=project, check=True)  # as MLflow makes of a URL
    output = finish(start(project, *MLFLOW_RUN, clone="work/clone"), project)
    assert list(project.glob("work/ssd-math/*")) == []
    mlflow.set_tracking_uri(f"sqlite:///{project}/mlflow.db")
    yield {"before_kill": before_kill, "output": output}
    mlflow.set_tracking_uri(None)


def runs(query: str = "") -> list:
    return mlflow.search_runs(["0"], query, output_format="list")


def steps(entry_point: str, arm: str | None = None) -> list:
    found = runs(f"tags.step = '{entry_point}' and attributes.status = 'FINISHED'")
    done = [run for run in found if "ssd.same_as" not in run.data.tags]
    return [run for run in done if arm is None or run.data.tags.get("arm") == arm]


def artifact(run, name: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/{name}"))


def test_no_sample_is_lost_or_doubled_by_a_kill(finished):
    (run,) = steps("sample", "ssd")
    samples = records.read(artifact(run, "samples"), Sample)
    keys = [(sample.problem_id, sample.sample_index) for sample in samples]
    assert len(keys) == len(set(keys)) == NUM_TRAIN
    assert finished["before_kill"]
    found = {key: sample.token_ids for key, sample in zip(keys, samples)}
    assert finished["before_kill"].items() <= found.items()


def test_training_goes_on_from_its_checkpoint_after_a_kill(finished):
    (run,) = steps("train", "ssd")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    num_steps = math.ceil(run.data.metrics["num_rows"] / 16)
    assert [point.step for point in sorted(history, key=lambda point: point.step)] == list(range(1, num_steps + 1))
    saved = {path.name for path in artifact(run, "checkpoints").iterdir()}
    assert saved == {f"step-{number:06d}" for number in range(10, num_steps, 10)}
    assert (artifact(run, "model") / "model.safetensors").exists()


def test_each_step_was_done_once_and_the_killed_runs_say_so(finished):
    done = [run.data.tags["ssd.key"] for run in runs("attributes.status = 'FINISHED'") if "ssd.key" in run.data.tags]
    assert len(done) == len(set(done))
    ended = [*runs("attributes.status = 'KILLED'"), *runs("attributes.status = 'FAILED'")]
    assert {run.data.tags["step"] for run in ended} == {"sample", "train", "main"}
    assert runs("attributes.status = 'RUNNING'") == []


def test_every_arm_is_measured_on_the_same_problems_with_the_same_metrics(finished):
    evaluated = [run for run in steps("evaluate") if "ssd.conditions" in run.data.tags]
    assert {run.data.tags["arm"] for run in evaluated} == {"base", "ssd-same-decoding"}
    assert len({run.data.tags["ssd.conditions"] for run in evaluated}) == 1
    names = [{name for name in run.data.metrics if not name.startswith("system/")} for run in evaluated]
    assert names[0] == names[1]
    for run in evaluated:
        grades = records.read(artifact(run, "grades.parquet"), Grade)
        assert run.data.metrics["pass_at_1"] == pytest.approx(sum(g.outcome == "right" for g in grades) / 60)
        assert run.data.metrics["pass_at_1_ci_low"] <= run.data.metrics["pass_at_1"]
        assert sum(value for name, value in run.data.metrics.items() if name in OUTCOME_METRICS) == 60


OUTCOME_METRICS = {"num_right", "num_wrong", "num_no_answer", "num_cut_off", "num_timed_out"}


def test_lineage_is_recorded_from_the_data_to_the_verdict(finished):
    (prepared,), (compared,) = steps("prepare"), steps("compare")
    contexts = {tag.value for dataset in prepared.inputs.dataset_inputs for tag in dataset.tags}
    assert {"train", "val", "quick", "final"} <= contexts
    verdict = json.loads(artifact(compared, "verdict.json").read_text())
    assert verdict["promotion"] in ("champion", "candidate", "refused")
    for run in runs("attributes.status = 'FINISHED'"):
        assert run.data.tags["mlflow.note.content"]
    checkpoints = mlflow.search_logged_models(["0"], filter_string="name LIKE 'train-step-%'", output_format="list")
    rows = {run.info.run_id: run.data.metrics["num_rows"] for run in steps("train")}
    expected = {
        (run_id, s) for run_id, n in rows.items() for s in {*range(10, math.ceil(n / 16), 10), math.ceil(n / 16)}
    }
    assert {(model.source_run_id, int(model.params["step"])) for model in checkpoints} == expected
    for model in checkpoints:
        measured = {(metric.key, metric.step) for metric in model.metrics}
        assert {(name, int(model.params["step"])) for name in ("loss", "gradient_signal", "displacement")} <= measured


def test_the_registry_holds_a_version_or_the_run_says_why_not(finished):
    (run,) = steps("register")
    outcome = json.loads(artifact(run, "registration.json").read_text())
    versions = mlflow.MlflowClient().search_model_versions("name = 'tiny'")
    assert outcome["reasons"]
    assert (outcome["promotion"] == "refused") == (len(versions) == 0)


def test_the_last_lines_say_what_was_found_and_how_to_open_the_ui(finished):
    last = finished["output"].strip().splitlines()[-4:]
    assert any("mlflow ui" in line for line in last)


def test_a_second_main_launches_nothing_and_a_step_with_the_preset_is_reused(project, finished):
    (measured,) = steps("baseline")
    before = {run.info.run_id for run in runs()}
    again = [start(project, *MLFLOW_RUN), start(project, "steps.baseline", "--preset", "tiny")]
    for process in again:
        finish(process, project)
    new = {run.data.tags["step"]: run for run in runs() if run.info.run_id not in before}
    assert set(new) == {"main", "baseline"} and len(runs()) == len(before) + 2
    assert new["baseline"].info.status == "FINISHED"
    assert new["baseline"].data.tags["ssd.same_as"] == measured.info.run_id


def test_a_dirty_tree_is_not_reused_and_says_so(project, finished):
    code = project / "ssd" / "prompts.py"
    code.write_text(code.read_text() + "\n# a change\n")
    before = {run.info.run_id for run in runs()}
    (measured,) = steps("baseline")
    grades = f"runs:/{measured.info.run_id}/grades.parquet"
    output = finish(start(project, "steps.power", "--preset", "tiny", "--grades", grades, "--delta", "0.1"), project)
    (new,) = [run for run in runs() if run.info.run_id not in before]
    assert "ssd.same_as" not in new.data.tags
    assert "uncommitted changes (ssd/prompts.py" in output

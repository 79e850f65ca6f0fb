"""A study that workers share: its trials are raced, none is lost or doubled, and the winner is measured once more."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import mlflow
import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from ssd import records, sampling, search
from ssd.decoding import Decoding
from ssd.lab import world
from ssd.records import Problem, Sample
from ssd.search import Attempt, Space
from ssd.tracking import reuse

ROOT = Path(__file__).resolve().parents[1]
SPACE = Space({"x": optuna.distributions.FloatDistribution(0.0, 1.0)}, [{"x": 0.6, "source": "a paper"}])
SIZES = [50, 100, 200]
forked = multiprocessing.get_context("fork")  # imports nothing again


def outcomes(params: dict, num_problems: int) -> np.ndarray:
    """Right or wrong at a true pass@1 of 0.8 at x = 0.7, falling to 0.3; the same problems for every trial."""
    chance = 0.8 - 5 * min(0.1, (params["x"] - 0.7) ** 2)
    return (np.random.default_rng(3).random((200, 1)) < chance)[:num_problems].astype(float)


def attempt(folder, params, best_PS) -> Attempt:
    correct_PS = search.race(lambda n: outcomes(params, n), best_PS, SIZES, search.ALPHA)
    return Attempt(correct_PS, 10 * len(correct_PS))


def study(url: str) -> optuna.Study:
    is_local = url.startswith("sqlite:///")
    storage = search.open_local(Path(url.removeprefix("sqlite:///"))) if is_local else search.open_storage(url)
    return search.open_study(storage, "study", SPACE, seed=0)


@pytest.fixture
def url(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


def test_known_points_come_first_and_the_best_is_found_near_the_truth(url):
    trials = search.run(study(url), SPACE, 14, attempt)
    assert [trial.number for trial in trials] == list(range(14))
    assert (trials[0].params, trials[0].source) == ({"x": 0.6}, "a paper")
    assert abs(search.choose(trials, SPACE).params["x"] - 0.7) < 0.1
    assert [trial.params for trial in search.run(study(url), SPACE, 14, attempt)] == [trial.params for trial in trials]


def test_what_cannot_win_is_stopped_early_and_the_tokens_that_saves_are_counted(url):
    trials = search.run(study(url), SPACE, 14, attempt)
    lengths = [len(trial.attempt.correct_PS) for trial in trials]
    assert {50, 200} <= set(lengths) <= set(SIZES)
    assert [trial.stopped for trial in trials] == [length < 200 for length in lengths]
    assert search.tokens_saved(trials, 200) == sum(10 * (200 - length) for length in lengths)


def test_a_race_ends_where_the_trial_cannot_win_any_more():
    good, bad = np.ones((200, 1)), np.zeros((200, 1))
    assert len(search.race(lambda n: bad[:n], good, SIZES, 0.1)) == 50
    assert len(search.race(lambda n: good[:n], bad, SIZES, 0.1)) == 200
    assert len(search.race(lambda n: bad[:n], None, SIZES, 0.1)) == 200


def worker(url: str, dies_at: int | None, log: str, pause_s: float = 0.0) -> None:
    """Takes part in the study; is killed as -9 does in the attempt number `dies_at` of its own."""
    count = 0

    def attempt_or_die(folder, params, best_PS):
        nonlocal count
        with open(log, "a") as lines:
            lines.write(f"{folder} {os.getpid()}\n")
        if count == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        time.sleep(pause_s)
        return attempt(folder, params, best_PS)

    search.run(study(url), SPACE, 8, attempt_or_die)


def dies_twice_and_goes_on(url: str, tmp_path: Path) -> None:
    for dies_at in (0, 3):  # at a known point, and at one of the search's
        process = forked.Process(target=worker, args=(url, dies_at, f"{tmp_path}/log"))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    worker(url, None, f"{tmp_path}/log")
    trials = study(url).get_trials()
    assert Counter(trial.state for trial in trials) == {TrialState.COMPLETE: 8, TrialState.FAIL: 2}
    attempts = Counter(line.split()[0] for line in Path(f"{tmp_path}/log").read_text().splitlines())
    assert sorted(attempts.values()) == [1] * 6 + [2] * 2 and attempts["known-0"] == 2
    for failed in (trial for trial in trials if trial.state == TrialState.FAIL):
        origin = failed.user_attrs.get("origin", str(failed.number))
        (again,) = (t for t in trials if t.number > failed.number and t.user_attrs.get("origin") == origin)
        assert (again.state, again.params) == (TrialState.COMPLETE, failed.params)
    unbroken = search.run(study(f"sqlite:///{tmp_path}/unbroken.db"), SPACE, 8, attempt)
    assert [trial.params for trial in search.finished(study(url))] == [trial.params for trial in unbroken]


def test_killed_workers_trials_are_done_again_once_and_the_study_is_as_if_nothing_had_been_killed(url, tmp_path):
    dies_twice_and_goes_on(url, tmp_path)


def two_workers(url: str, tmp_path: Path) -> None:
    workers = [forked.Process(target=worker, args=(url, None, f"{tmp_path}/log", 0.2)) for _ in range(2)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
        assert each.exitcode == 0
    by_worker = Counter(line.split()[1] for line in Path(f"{tmp_path}/log").read_text().splitlines())
    assert len(by_worker) == 2 and sum(by_worker.values()) == 8
    trials = study(url).get_trials()
    assert sum(trial.state == TrialState.COMPLETE for trial in trials) == 8
    assert (
        sum(trial.user_attrs.get("origin") == "known-0" and trial.state == TrialState.COMPLETE for trial in trials) == 1
    )


def test_two_workers_share_the_trials_of_a_study(url, tmp_path):
    two_workers(url, tmp_path)


def test_of_two_trials_that_stand_for_one_the_first_counts(url):
    """As two workers make them that find a dead one's trial at the same moment."""
    of = study(url)
    for _ in range(2):
        of.enqueue_trial({"x": 0.5}, user_attrs={"origin": "7", "source": "search"})
    trials = search.run(of, SPACE._replace(known=[]), 3, attempt)
    assert len(trials) == 3
    assert [trial.params for trial in trials].count({"x": 0.5}) == 1


def test_a_damaged_study_is_named_and_may_be_removed(url, tmp_path):
    search.run(study(url), SPACE, 3, attempt)
    file = tmp_path / "study.db"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match=r"study\.db: .*not a database; .*damaged, remove it"):
        study(url)
    file.unlink()
    assert len(search.run(study(url), SPACE, 3, attempt)) == 3


def test_a_worker_elsewhere_is_dead_when_nothing_was_heard_of_it_for_long():
    now = time.time()
    for host, seen_s_ago, is_alive in (("elsewhere", 10, True), ("elsewhere", 1000, False)):
        trial = optuna.trial.create_trial(value=0.0)
        trial.user_attrs.update({"worker": f"{host} 1", "seen_at": now - seen_s_ago})
        assert search._is_alive(trial) == is_alive


def test_a_heartbeat_is_seen_while_a_trial_lasts(url, monkeypatch):
    monkeypatch.setattr(search, "HEARTBEAT_S", 0.02)
    of = study(url)

    def slow(folder, params, best_PS):
        time.sleep(0.3)
        return attempt(folder, params, best_PS)

    before = threading.active_count()
    search.run(of, SPACE, 1, slow)
    assert time.time() - of.get_trials()[0].user_attrs["seen_at"] < 5
    assert threading.active_count() <= before


def test_mlflows_storage_is_opened_twice_as_one_study(tmp_path):
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = mlflow.create_experiment("study", artifact_location=str(tmp_path))
    try:
        from mlflow.optuna.storage import MlflowStorage

        for num_trials in (1, 3):
            of = search.open_study(MlflowStorage(experiment), "study", SPACE, seed=0)
            assert len(search.run(of, SPACE, num_trials, attempt)) == num_trials
    finally:
        mlflow.set_tracking_uri(None)


@pytest.mark.slow
def test_workers_share_a_postgresql_study_and_one_that_is_killed_loses_nothing(postgresql, tmp_path):
    two_workers(postgresql("two"), tmp_path)
    (tmp_path / "killed").mkdir()
    dies_twice_and_goes_on(postgresql("killed"), tmp_path / "killed")


@pytest.mark.parametrize("path", sorted((ROOT / "presets/spaces").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_space_makes_decodings_and_its_known_points_have_a_source(path):
    families = search.load_space(str(path))
    assert {"temperature", "min-p", "temperature-last", "training"} == set(families)
    for family, space in families.items():
        assert space.known
        for point in [*space.known, *search.corners(space)]:
            settings = {name: point[name] for name in space.settings}
            if family != "training":
                assert isinstance(Decoding(**settings), Decoding)


def test_an_engine_is_opened_for_every_choice_of_a_space(tmp_path):
    """vLLM is given what truncates first only where it is asked for beforehand."""
    (tmp_path / "space.yaml").write_text(
        "a: {settings: {temperature: [3.0, 1.0], top_p: {low: 0.5, high: 0.9}, temperature_last: [true, false]}}"
    )
    found = search.corners(search.load_space(str(tmp_path / "space.yaml"))["a"])
    assert {(each["temperature"], each["temperature_last"]) for each in found} == {
        (1.0, False),
        (3.0, False),
        (1.0, True),
    }
    assert {each["top_p"] for each in found} == {0.9}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: {settings: {x: {low: 0.0}}}", "x: {'low': 0.0} is neither"),
        ("a: {settings: {x: [1, 2]}, known: [{x: 1}]}", "it needs source, x"),
        ("a: {settings: {x: {low: 0.0, high: 1.0}}, known: [{x: 2.0, source: me}]}", "x=2.0, outside"),
        ("just words", "does not hold settings by family"),
        ("a: {settings: null}", "space.yaml does not hold settings by family"),
        ("a: {settings: {x: [1]}, known: [1]}", "space.yaml does not hold settings by family"),
        ("a: {settings: {x: {low: 0.0, high: 1.0}}, known: [{x: high, source: me}]}", "x=high, outside"),
        ("a: !!python/object/apply:os.system [ls]", "space.yaml is not YAML of plain values .*os.system"),
        ("a: {settings: [", "space.yaml is not YAML of plain values .*line 1"),
        ("[" * 5000, "space.yaml is not YAML that can be read: it is nested too deeply"),
        ("a: &x [1]\nb: *x", "space.yaml is not YAML of plain values .*x is an alias"),
    ],
)
def test_a_space_that_means_nothing_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "space.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        search.load_space(str(tmp_path / "space.yaml"))


def test_settings_survive_the_unit_cube():
    space = search.load_space(str(ROOT / "presets/spaces/qwen3.5-4b.yaml"))["min-p"]
    for point in space.known:
        params = {name: point[name] for name in space.settings}
        assert search._from_unit(space.settings, search._to_unit(space.settings, params)) == pytest.approx(params)


def test_candidates_are_moved_to_the_settings_that_are_made_of_them():
    Float, Int = optuna.distributions.FloatDistribution, optuna.distributions.IntDistribution
    settings = {
        "a": Float(0.0, 2.0), "b": Float(1e-6, 1e-3, log=True), "c": Float(-0.37, 1.2345), "d": Int(1, 50),
        "e": Int(1, 500, log=True), "f": optuna.distributions.CategoricalDistribution([1, 2, 5]),
        "g": optuna.distributions.CategoricalDistribution([True]),
    }  # fmt: skip
    x_QD = np.vstack([np.random.default_rng(0).random((1000, len(settings))), np.zeros((1, 7)), np.ones((1, 7))])
    expected = np.array([search._to_unit(settings, search._from_unit(settings, x_D)) for x_D in x_QD])
    assert search._on_choices(settings, x_QD) == pytest.approx(expected, abs=1e-12)


def test_many_trials_go_on_after_a_kill_as_if_nothing_had_been_killed(url, tmp_path, monkeypatch):
    """The surface of many trials is fitted at numbers of trials that do not depend on when a process began."""
    monkeypatch.setattr(search, "MAX_APART", 8)
    unbroken = search.run(study(url), SPACE, 24, attempt)
    again = f"sqlite:///{tmp_path}/again.db"
    for num_trials in (13, 19, 24):
        trials = search.run(study(again), SPACE, num_trials, attempt)
    assert [trial.params for trial in trials] == [trial.params for trial in unbroken]
    assert abs(search.choose(trials, SPACE).params["x"] - 0.7) < 0.1


def test_parts_are_nested_and_each_has_its_share_of_every_source():
    problems = world.problems(400, 0)
    ordered, sizes = search.nested(problems, seed=0)
    assert sizes == [50, 100, 200, 400]
    assert {problem.problem_id for problem in ordered} == {problem.problem_id for problem in problems}
    shares = Counter(problem.source for problem in problems)
    for size in sizes:
        part = Counter(problem.source for problem in ordered[:size])
        assert all(abs(part[source] - shares[source] * size / 400) <= 5 for source in shares)


def test_a_larger_part_extends_what_was_drawn_for_a_smaller_one_by_one_loading(tmp_path, lab_model, monkeypatch):
    loaded, asked = [], []

    class Engine:
        num_gpus = 0.0

        def generate(self, requests):
            for request in requests:
                asked.append((request.problem_id, request.sample_index))
                yield Sample(
                    request.problem_id, request.sample_index, list(request.prompt_token_ids), [1], "", "stop", 0.0
                )

    monkeypatch.setattr(sampling, "open_engine", lambda *_: loaded.append(1) or Engine())
    problems = world.problems(30, 0)
    sampler = sampling.Sampler(lab_model, "transformers", "code")
    for num_problems in (10, 30):
        generated = sampler.generate(problems[:num_problems], {"a": Decoding(max_tokens=8)}, 2, 0, tmp_path)
        assert len(generated["a"].samples) == 2 * num_problems
    assert len(loaded) == 1
    assert Counter(asked) == {(problem.problem_id, index): 1 for problem in problems for index in range(2)}


SPACES = """
temperature:
  settings: {temperature: {low: 0.5, high: 2.0, log: true}, top_k: [3, 0]}
  known: [{temperature: 1.0, top_k: 0, source: test}]
temperature-last:
  settings: {temperature: {low: 0.5, high: 2.0}, top_p: {low: 0.5, high: 1.0}, temperature_last: [true]}
  known: [{temperature: 1.0, top_p: 0.9, temperature_last: true, source: test}]
training:
  settings: {temperature: {low: 0.7, high: 1.5}, lr: {low: 1.0e-5, high: 1.0e-3, log: true}}
  known: [{temperature: 1.0, lr: 1.0e-4, source: test}]
"""


@pytest.fixture(scope="module")
def sets(store) -> Path:
    """Folder of quick.parquet within val.parquet, and train.parquet, beside a space."""
    problems = world.problems(90, 5)
    for name, part in {"quick": problems[:40], "val": problems[:60], "train": problems[60:]}.items():
        records.write(store / f"{name}.parquet", Problem, part)
    (store / "space.yaml").write_text(SPACES)
    return store


def artifact(run, name: str):
    return json.loads(Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/{name}")).read_text())


def children(run) -> list[mlflow.entities.Run]:
    return mlflow.search_runs(filter_string=f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", output_format="list")


def common(sets: Path) -> dict:
    return {"problems": sets / "quick.parquet", "space": sets / "space.yaml", "engine": "transformers",
            "max_tokens": 40}  # fmt: skip


def test_every_trial_is_a_run_and_the_winner_is_measured_on_problems_that_did_not_choose_it(
    monkeypatch, run_step, lab_model, sets
):
    monkeypatch.setenv("SSD_WORK_DIR", str(sets / "work"))
    run = run_step("search", model=lab_model, trials=2, **common(sets))
    nested = children(run)
    trials = [each for each in nested if each.data.tags["arm"] == "base-search"]
    again = {each.data.tags["arm"]: each for each in nested if each.data.tags["arm"] != "base-search"}
    assert Counter(each.data.tags["family"] for each in trials) == {"temperature": 2, "temperature-last": 2}
    assert all(each.data.metrics["num_problems"] == 40 and "temperature" in each.data.params for each in trials)
    assert set(again) == {"base-tuned-temperature", "base-tuned-temperature-last"}
    seen = {problem.problem_id for problem in records.read(sets / "quick.parquet", Problem)}
    for family in ("temperature", "temperature-last"):
        confirmed = again[f"base-tuned-{family}"]
        measured = records.read(mlflow.artifacts.download_artifacts(f"runs:/{confirmed.info.run_id}/samples"), Sample)
        assert {sample.problem_id for sample in measured}.isdisjoint(seen) and len(measured) == 20
        assert artifact(run, "decodings.json")["best"][family]["estimate"]["value"] == pytest.approx(
            confirmed.data.metrics["pass_at_1"]
        )
    assert {trial["source"] for trial in artifact(run, "trials.json")} == {"test", "search"}
    figures = {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id, "figures")}
    assert {
        f"figures/temperature-last-{name}.png" for name in ("parallel-coordinates", "contour", "slice", "importance")
    } <= figures


@pytest.mark.slow
def test_a_killed_search_goes_on_and_all_of_its_trials_are_those_of_the_run_that_finished(lab_model, sets):
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{sets}/mlflow.db", "MLFLOW_EXPERIMENT_NAME": "tests",
        "SSD_WORK_DIR": str(sets / "killed"),
    }  # fmt: skip
    records.write(sets / "large.parquet", Problem, world.problems(120, 6))  # trials grow, from 60 problems
    given = common(sets) | {"problems": sets / "large.parquet", "model": lab_model, "trials": 4, "seed": 1}
    command = [sys.executable, "-m", "steps.search", *(f"--{name}={value}" for name, value in given.items())]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while not list(sets.glob("killed/search-*/trials/temperature-*/part-000001.parquet")):  # of a second part
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    killed, run = sorted(
        (run for run in mlflow.search_runs(output_format="list") if run.data.params.get("seed") == "1"),
        key=lambda run: run.info.start_time,
    )
    assert (killed.info.status, run.info.status) == ("KILLED", "FINISHED")
    trials = [each for each in children(run) if each.data.tags["arm"] == "base-search"]
    assert Counter((each.data.tags["family"], each.info.status) for each in trials) == {
        ("temperature", "FINISHED"): 4, ("temperature-last", "FINISHED"): 4,
    }  # fmt: skip
    assert len({(each.data.tags["family"], each.data.tags["trial"]) for each in trials}) == 8
    assert len(artifact(run, "trials.json")) == 8
    assert not list(sets.glob("killed/search-*"))


def test_the_whole_method_is_searched_with_one_training_for_many_decodings(monkeypatch, run_step, lab_model, sets):
    monkeypatch.setenv("SSD_WORK_DIR", str(sets / "work"))
    launched = []

    def launch(entry_point: str, preset: str, overrides: dict) -> str:
        with mlflow.start_run(nested=True) as run:
            mlflow.set_tag("step", entry_point)
            if entry_point == "train":
                mlflow.log_artifacts(lab_model, "model")
        launched.append((entry_point, overrides))
        return run.info.run_id

    monkeypatch.setattr(reuse, "launch", launch)
    run = run_step("search", target="ssd", model=lab_model, trials=2, trainings=2, **common(sets))
    assert [name for name, _ in launched] == ["sample", "train"] * 2
    assert launched[0][1]["problems"].endswith("train.parquet") and launched[1][1]["lr"] == 1e-4
    trainings = [each for each in children(run) if each.data.tags["arm"] == "ssd-search"]
    assert len(trainings) == 2
    for each in trainings:
        assert Counter(child.data.tags.get("step", "decoding") for child in children(each)) == {
            "sample": 1, "train": 1, "decoding": 2,
        }  # fmt: skip
    best = artifact(run, "decodings.json")["best"]["training"]
    assert best["model"].startswith("runs:/") and best["estimate"]["n"] == 20


def test_a_password_is_not_taken_from_the_parameters_that_a_run_records(run_step, capsys, lab_model, sets):
    with pytest.raises(SystemExit):
        run_step("search", model=lab_model, storage="postgresql+psycopg2://me:secret@host/db", **common(sets))
    assert "storage holds a password" in capsys.readouterr().err

"""Search the best decoding of a model by family, or the whole method: how to sample, train and decode.

Reads:  model, problems (latest: prepare/quick.parquet, to choose on; val.parquet beside it has the problems on which
        the winner is measured again, train.parquet those that target=ssd trains on), space (a YAML file: settings,
        ranges and known points by family).
Writes: a nested run for each trial; trials.json, decodings.json (as evaluate does) with the best of each family, and
        what it is worth on samples that did not choose it; figures of the study.
Run:    mlflow run . -e search -P target=decode
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import mlflow
import numpy as np
import optuna

from ssd import evaluation, records, sampling, search, tracking
from ssd.decoding import Decoding
from ssd.grading import grader
from ssd.markdown import escaped
from ssd.records import Problem
from ssd.report import figures
from ssd.report.text import percent
from ssd.search import Attempt, Space, Trial
from ssd.stats import estimate

TARGETS = ("decode", "ssd")
TRAINING = "training"  # the family of a space that is no decoding
OF_CHECKPOINTS = "temperature"  # the family that the trained model is decoded by, as docs/plan.md has it


def run(step: tracking.Step) -> None:
    args = step.args
    if args.target not in TARGETS:
        raise ValueError(f"target={args.target!r} is not one of {', '.join(TARGETS)}")
    spaces = search.load_space(args.space)
    storage = _storage(step)
    if args.target == "decode":
        spaces.pop(TRAINING, None)
        studies, trials, again = _decode(step, storage, spaces)
    else:
        for family in (TRAINING, OF_CHECKPOINTS):
            if family not in spaces:
                raise ValueError(f"space={args.space} has no {family}, which target=ssd searches; add it")
        studies, trials, again = _ssd(step, storage, spaces)
    _adopt(step, [*(trial for of in trials.values() for trial in of), *again.values()])
    _write(step, studies, trials, again)


def _decode(step: tracking.Step, storage, spaces: dict[str, Space]):
    measured = _Measured(step, step.args.model, spaces.values())
    again = _Measured(step, step.args.model, spaces.values(), confirms=True, loaded=measured)
    studies = {family: _study(step, storage, family, space) for family, space in spaces.items()}
    arm = "ssd" if tracking.tag_of(step.args.model, "step", "") == "train" else "base"

    def trials(family: str, wait: bool) -> list[Trial]:
        attempt = measured.attempt(f"{arm}-search", family)
        return search.run(studies[family], spaces[family], step.args.trials, attempt, wait)

    for family in spaces:  # another worker's last trials are waited for when all families are begun
        trials(family, wait=False)
    found = {family: trials(family, wait=True) for family in spaces}
    best = {family: search.choose(found[family], spaces[family]) for family in spaces}
    confirmed = {}
    for wait in (False, True):
        for family, space in spaces.items():
            name = f"base-tuned-{family}" if arm == "base" else arm
            confirmed[family] = _confirm(step, storage, family, space, best[family], again.attempt(name, family), wait)
    return studies, found, {family: of[0] for family, of in confirmed.items()}


def _ssd(step: tracking.Step, storage, spaces: dict[str, Space]):
    args, space = step.args, spaces[OF_CHECKPOINTS]
    study = _study(step, storage, TRAINING, spaces[TRAINING])

    def attempt(folder: str, params: dict[str, Any], best_PS) -> Attempt:
        with mlflow.start_run(nested=True) as run:
            mlflow.log_params({f"training.{name}": value for name, value in params.items()})
            trained = _train(step, params)
            measured = _Measured(step, trained, [space], folder=folder)
            inner = _study(step, storage, f"{TRAINING}-{folder}", space)
            trials = search.run(inner, space, args.trials, measured.attempt("ssd-search", OF_CHECKPOINTS, best_PS))
            measured.sampler.close()
            best = search.choose(_longest(trials), space)
            found = estimate.mean(best.attempt.correct_PS)
            bounds = {"": "value", "_ci_low": "ci_low", "_ci_high": "ci_high"}
            mlflow.log_metrics({f"pass_at_1{end}": getattr(found, part) for end, part in bounds.items()})
            mlflow.log_metric("num_problems", found.n)
            words = " ".join(f"{name}={value}" for name, value in params.items())
            step.describe(
                f"ssd-search · trained with {words}",
                f"pass@1 **{percent(found)}** on {found.n:,} problems at "
                f"{escaped(_decoding(args, best.params))}, the best of {len(trials)} decodings. Chosen here, so no "
                "result.",
                arm="ssd-search",
            )
            num_tokens = sum(trial.attempt.num_tokens for trial in trials)
            saved = search.tokens_saved(trials, measured.sizes[-1])
            notes = {"model": trained, "decoding": best.params, "num_tokens_saved": saved}
            return Attempt(best.attempt.correct_PS, num_tokens, run.info.run_id, notes)

    trials = search.run(study, spaces[TRAINING], args.trainings, attempt)
    best = search.choose(_longest(trials), spaces[TRAINING])
    decoded = best._replace(params=best.attempt.notes["decoding"])

    def confirm(folder: str, params: dict[str, Any], best_PS) -> Attempt:
        measured = _Measured(step, best.attempt.notes["model"], [space], confirms=True)
        found = measured.attempt("ssd", TRAINING)(folder, params, best_PS)
        return found._replace(notes=best.attempt.notes)

    (again,) = _confirm(step, storage, TRAINING, space, decoded, confirm, wait=True)
    return {TRAINING: study}, {TRAINING: trials}, {TRAINING: again}


def _train(step: tracking.Step, params: dict[str, Any]) -> str:
    """The model that was sampled and trained so; launched, or reused where it is done."""
    args = step.args
    sampling_at = {name: params[name] for name in ("temperature", "top_k", "top_p") if name in params}
    problems = _beside(args.problems, "train.parquet")
    shared = {"model": args.model, "seed": args.seed}
    sampled = step.launch("sample", arm="ssd", problems=problems, engine=args.engine, **shared, **sampling_at)
    training = {name: value for name, value in params.items() if name not in sampling_at}
    return f"runs:/{step.launch('train', samples=f'runs:/{sampled}/samples', **shared, **training)}/model"


def _longest(trials: Sequence[Trial]) -> list[Trial]:
    """Those that were measured on the most problems: what was stopped early has lost its race."""
    longest = max(len(trial.attempt.correct_PS) for trial in trials)
    return [trial for trial in trials if len(trial.attempt.correct_PS) == longest]


class _Measured:
    """Trials of `model`'s decodings, on the problems to choose on or, to confirm, on others with other seeds."""

    def __init__(
        self, step: tracking.Step, model: str, spaces, confirms: bool = False, loaded: "_Measured | None" = None,
        folder: str = "",
    ):  # fmt: skip
        args = step.args
        choosing = records.read(step.path("problems"), Problem)
        problems_uri, self.seed = args.problems, args.seed + confirms
        self.folder = step.work / (folder or ("again" if confirms else "trials"))
        self.problems, self.sizes = search.nested(choosing, args.seed)
        if confirms:
            known = {problem.problem_id for problem in choosing}
            problems_uri, others = _others(args.problems, known)
            self.problems = others or choosing
            self.sizes = [len(self.problems)]
        overrides = {"model": model, "problems": problems_uri}
        self.step = dataclasses.replace(step, args=argparse.Namespace(**vars(args) | overrides))
        if loaded:
            self.sampler = loaded.sampler
        else:
            engine, (code, _) = evaluation.engine(args), tracking.code_version()
            self.sampler = sampling.Sampler(tracking.local_path(model), engine, code, closes=True)
            corners = [_decoding(args, corner) for space in spaces for corner in search.corners(space)]
            problem = max(self.problems, key=lambda each: len(each.problem))
            self.sampler.expected = [r for d in corners for r in self.sampler.requests([problem], d, 1, 0)]

    def attempt(self, arm: str, family: str, to_beat_PS=None) -> search.Attempter:
        """What measures one trial, stopped where it cannot beat the best one, nor `to_beat_PS`."""
        args = self.step.args

        def attempt(folder: str, params: dict[str, Any], best_PS) -> Attempt:
            decoding, graded, drawn = _decoding(args, params), {}, []
            name = f"{family}-{folder}"

            def measure(num_problems: int) -> np.ndarray:
                part = self.problems[:num_problems]
                generated = self.sampler.generate(part, {name: decoding}, args.n, self.seed, self.folder)[name]
                new = [answer for answer in evaluation.answered(generated) if answer.problem_id not in graded]
                for grade in grader.grade_answers(new, part):
                    graded.setdefault(grade.problem_id, []).append(grade)
                drawn[:] = [generated]
                return np.array([[g.outcome == "right" for g in graded[problem.problem_id]] for problem in part], float)

            complete = [each for each in (best_PS, to_beat_PS) if each is not None and len(each) == self.sizes[-1]]
            standard = max(complete, key=np.mean, default=None)
            correct_PS = search.race(measure, standard, self.sizes, search.ALPHA)
            part = self.problems[: len(correct_PS)]
            generated = drawn[0]._replace(drawn=None)
            grades = [grade for problem in part for grade in graded[problem.problem_id]]
            with mlflow.start_run(nested=True) as run:
                evaluation.log(self.step, arm, part, generated, grades)
                stopped = len(correct_PS) < self.sizes[-1]
                mlflow.set_tags({"family": family, "trial": folder, "stopped": str(stopped).lower()})
            num_tokens = int(generated.rows.num_tokens_S.sum())
            return Attempt(correct_PS, num_tokens, run.info.run_id)

        return attempt


def _others(problems: str, known: set[str]) -> tuple[str, list[Problem]]:
    """Problems of val that no choice was made on, and where they are from; none where no val lies beside `problems`."""
    uri = _beside(problems, "val.parquet")
    try:
        val = records.read(tracking.local_path(uri), Problem)
    except ValueError:
        return problems, []
    return uri, [problem for problem in val if problem.problem_id not in known]


def _beside(uri: str, name: str) -> str:
    return f"{uri.rpartition('/')[0]}/{name}"


def _decoding(args, params: dict[str, Any]) -> Decoding:
    return Decoding(max_tokens=args.max_tokens, **params)


def _storage(step: tracking.Step) -> optuna.storages.BaseStorage:
    """Where the study is kept: with the work, in the tracking store, or in a database that workers share."""
    storage = step.args.storage
    if storage == "mlflow":
        from mlflow.optuna.storage import MlflowStorage

        return MlflowStorage(experiment_id=mlflow.active_run().info.experiment_id)
    if re.search(r"://[^/@]*:[^/@]+@", storage):
        raise ValueError(
            "storage holds a password, and runs record their parameters: give it in PGPASSWORD or ~/.pgpass instead, "
            "and delete this run"
        )
    return search.open_local(step.work / "study.db") if storage == "local" else search.open_storage(storage)


def _study(step: tracking.Step, storage, family: str, space: Space) -> optuna.Study:
    return search.open_study(storage, f"{step.name}-{step.key[:16]}-{family}", space, step.args.seed)


def _confirm(step, storage, family: str, space: Space, best: Trial, attempt: search.Attempter, wait: bool):
    """Measure the winner again, as a study of one trial, so that of several workers one does it."""
    point = Space(space.settings, [best.params | {"source": f"best of {family}"}])
    study = _study(step, storage, f"{family}-again", point)
    return search.run(study, point, 1, attempt, wait)


def _adopt(step: tracking.Step, trials: Sequence[Trial]) -> None:
    """Trials that a killed run of this search finished belong to the run that went on."""
    client = mlflow.MlflowClient()
    for trial in trials:
        parent = client.get_run(trial.attempt.run_id).data.tags["mlflow.parentRunId"]
        if parent != step.run_id and client.get_run(parent).info.status in ("KILLED", "FAILED"):
            client.set_tag(trial.attempt.run_id, "mlflow.parentRunId", step.run_id)


def _write(step: tracking.Step, studies, trials: dict[str, list[Trial]], again: dict[str, Trial]) -> None:
    args = step.args
    bounds = {"": "value", "_ci_low": "ci_low", "_ci_high": "ci_high"}
    choosing = records.read(step.path("problems"), Problem)
    rows, best, spent, saved = [], {}, 0, 0
    table = ["| family | best | pass@1, measured again | problems | trials | stopped early |"]
    table += ["| --- | --- | --- | ---: | ---: | ---: |"]
    for family, of in trials.items():
        for trial in of:
            row = {"family": family, "estimate": estimate.mean(trial.attempt.correct_PS)}
            rows.append(row | trial._replace(attempt=trial.attempt._replace(correct_PS=None))._asdict())
        attempt, decoding = again[family].attempt, _decoding(args, again[family].params)
        confirmed = estimate.mean(attempt.correct_PS)
        best[family] = {"decoding": decoding, "estimate": confirmed, "run_id": attempt.run_id} | (attempt.notes or {})
        num_stopped = sum(len(trial.attempt.correct_PS) < len(choosing) for trial in of)
        table.append(
            f"| {escaped(family)} | {escaped(decoding)} | {percent(confirmed)} | {confirmed.n:,} | {len(of)} | "
            f"{num_stopped} |"
        )
        name = family.replace("-", "_")
        mlflow.log_metrics({f"{name}_pass_at_1{end}": getattr(confirmed, part) for end, part in bounds.items()})
        spent += sum(trial.attempt.num_tokens for trial in of)
        inner = [trial.attempt.notes["num_tokens_saved"] for trial in of if trial.attempt.notes]
        saved += sum(inner) if inner else search.tokens_saved(of, len(choosing))
        for name, figure in figures.study(studies[family]).items():
            mlflow.log_figure(figure, f"figures/{family}-{name}.png")
    mlflow.log_metrics({"num_trials": len(rows), "num_tokens": spent, "num_tokens_saved": saved})
    step.log_json("trials.json", rows)
    step.log_json("decodings.json", {"candidates": rows, "best": best})
    _, others = _others(args.problems, {problem.problem_id for problem in choosing})
    step.describe(
        f"search · {args.target} · {len(rows)} trials",
        "\n".join(table)
        + f"\n\nEach estimate is from {'problems of val' if others else 'samples, of the same problems,'} "
        f"that did not choose it. {spent:,} tokens were drawn to choose; stopping what could no longer win saved about "
        f"{saved:,} ({saved / (saved + spent):.0%}).",
    )


if __name__ == "__main__":
    tracking.execute("search", run, model="lab/model", problems="prepare/quick.parquet")

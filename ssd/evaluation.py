"""Measure a model on problems: draw its samples, grade them, and log what they say with its uncertainty."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa

from ssd import records, tracking
from ssd.decoding import Decoding
from ssd.grades import correct_matrix, correctness_table, health, outcome_counts
from ssd.grading import grader
from ssd.grading.writing import normalise
from ssd.markdown import escaped
from ssd.records import Grade, Problem
from ssd.report import figures
from ssd.report.text import estimate_tables, percent
from ssd.samples import Generated, Samples
from ssd.stats import estimate as estimating
from ssd.stats.estimate import Estimate
from ssd.tracking import Step

DECODING = tuple(field.name for field in dataclasses.fields(Decoding))


def decoding(args: argparse.Namespace) -> Decoding:
    """The decoding that a step's parameters spell out; what a step has no parameter for stays off."""
    given = {name: getattr(args, name) for name in DECODING if hasattr(args, name)}
    return Decoding(**given | {"temperature_last": bool(given.get("temperature_last", 0))})


def generate(
    step: Step, decodings: Mapping[str, Decoding], closes: bool = False
) -> tuple[list[Problem], dict[str, Generated]]:
    """The problems that the step's parameters name, and its model's samples of them at each of `decodings`.

    `closes` is whether the GPU is to be free again, for another model.
    """
    from ssd import sampling  # torch takes seconds to load; the steps that generate nothing do without

    args = step.args
    problems = records.read(step.path("problems"), Problem)
    model, (code, _) = str(step.path("model")), tracking.code_version()
    drawn = sampling.generate(
        model, engine(args), problems, decodings, args.n, args.seed, step.work, code, closes=closes
    )
    return problems, drawn


def engine(args: argparse.Namespace) -> str:
    """The engine that a step's parameters name, its recordings (replay:runs:/ID/samples) on this machine."""
    name, colon, place = args.engine.partition(":")
    return name + colon + tracking.local_path(place)


def log_generation(step: Step, generated: Generated) -> None:
    """Log to the active run how long the samples are and, where they were drawn now, what that took."""
    rows, drawn = generated.rows, generated.drawn
    for q in (10, 50, 90, 99):
        mlflow.log_metric(f"tokens_per_sample_p{q}", float(np.percentile(rows.num_tokens_S, q)))
    by_reason = {"stop": rows.num_tokens_S[~rows.is_cut_off_S], "length": rows.num_tokens_S[rows.is_cut_off_S]}
    if drawn:
        took = {"tokens_per_second": drawn.tokens_per_second, "tail_share": drawn.tail_share}
        if drawn.gpu_hours > 0:
            price = getattr(step.args, "gpu_hour_price", 0.0)
            took |= {"gpu_hours": drawn.gpu_hours} | ({"gpu_cost": price * drawn.gpu_hours} if price else {})
        mlflow.log_metrics(took)
    finished_s, num_tokens = (drawn.finished_s, drawn.num_tokens) if drawn else ([], [])
    mlflow.log_figure(figures.generation(by_reason, finished_s, num_tokens), "figures/generation.png")


def log(
    step: Step,
    arm: str,
    problems: Sequence[Problem],
    generated: Generated,
    grades: Sequence[Grade] | None = None,
) -> Estimate:
    """Grade the samples, unless `grades` are given, and log to the active run what they say of `arm`: its pass@1."""
    samples, manifest, decoded = generated.rows, generated.manifest, generated.decoding
    grades = grades or grader.grade_answers(answered(generated), problems)
    estimates, groups = _estimates(problems, samples, grades)
    estimate = estimates["pass_at_1"]
    args, run = step.args, mlflow.active_run()
    problem_table = records.table(Problem, problems)
    name = Path(args.problems).stem
    dataset = tracking.log_dataset(name, problem_table, context="evaluation", source=args.problems)
    metrics = {}
    for metric, value in estimates.items():
        metrics |= {metric: value.value, f"{metric}_ci_low": value.ci_low, f"{metric}_ci_high": value.ci_high}
    artifact = args.model.removeprefix("runs:/").partition("/")[2]
    logged_model = tracking.tag_of(args.model, f"ssd.logged_model.{artifact}", "") or None
    number = int(tracking.tag_of(args.model, f"{tracking.CHECKPOINT}{artifact}", "0"))
    mlflow.log_metrics(metrics, step=number, model_id=logged_model, dataset=dataset)
    mlflow.log_metrics({"num_problems": estimate.n, "num_samples": len(samples)})
    log_generation(step, generated)
    mlflow.log_metrics({f"num_{outcome}": count for outcome, count in outcome_counts(grades).items()})
    if run.info.run_id != step.run_id:
        mlflow.log_params({key: str(value) for key, value in dataclasses.asdict(decoded).items()})
    folder = step.work / run.info.run_id
    records.write_table(folder / "samples" / "samples.parquet", samples.tables())
    (folder / "samples" / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    records.write(folder / "grades.parquet", Grade, grades)
    correctness = correctness_table(problems, grades)
    records.write_table(folder / "correctness.parquet", pa.table(correctness))
    mlflow.log_artifacts(str(folder))
    mlflow.log_table(correctness, "correctness.json")
    step.log_json("estimates.json", {"estimates": estimates, **groups})
    conditions = {
        "problems": tracking.digest(problem_table),
        "prompt": manifest["prompt"],
        "max_tokens": decoded.max_tokens,
        "engine": manifest["engine"],
        "grader": grader.version(),
    }
    mlflow.set_tags({"ssd.conditions": json.dumps(conditions), "arm": arm, "split": name})
    description = (
        f"pass@1 **{percent(estimate)}** on {estimate.n:,} problems of {escaped(name)} "
        f"({len(samples) // estimate.n} samples each) at {escaped(decoded)}.\n\n"
        + ", ".join(f"{outcome} {count:,}" for outcome, count in outcome_counts(grades).items())
        + "\n\n"
        + estimate_tables(estimates, groups)
    )
    step.describe(f"{arm} · {name} · {decoded}", description)
    return estimate


def answered(generated: Generated) -> list[grader.Answered]:
    """What a grade depends on, of each sample in order."""
    rows, thinks = generated.rows, generated.manifest["thinks"]
    answers = rows.in_order(lambda table: [grader.extract(text, thinks) for text in table["text"].to_pylist()])
    parts = zip(rows.ids(), rows.is_cut_off_S.tolist(), answers, strict=True)
    return [grader.Answered(*key, is_cut_off, answer) for key, is_cut_off, answer in parts]


def _estimates(
    problems: Sequence[Problem], samples: Samples, grades: Sequence[Grade]
) -> tuple[dict[str, Estimate], dict[str, dict[str, Estimate]]]:
    """What the grades say, by name of metric, and pass@1 by source and by level."""
    ids, correct_PS = correct_matrix(grades)
    k = correct_PS.shape[1]
    found = {"pass_at_1": estimating.mean(correct_PS)}
    if k > 1:
        ordered = sorted(grades, key=lambda row: (row.problem_id, row.sample_index))
        answers_PS = [[normalise(row.answer) for row in ordered[i : i + k]] for i in range(0, len(ordered), k)]
        found[f"pass_at_{k}"] = estimating.pass_at_k(correct_PS, k)
        found[f"majority_at_{k}"] = estimating.majority_at_k(answers_PS, correct_PS)
    for name, values_PS in health(samples, grades)._asdict().items():
        found[name] = (estimating.quantity if name == "tokens_per_sample" else estimating.mean)(values_PS)
    by_id = {problem.problem_id: problem for problem in problems}
    groups = {
        f"by_{field}": estimating.by_group(correct_PS, [getattr(by_id[each], field) for each in ids])
        for field in ("source", "level")
    }
    return found, groups

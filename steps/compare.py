"""Compare the arms pairwise on the same problems, and apply the analysis plan (docs/plan.md).

Reads:  arms (`name=runs:/ID,...`, any number of evaluate runs, base among them; latest: the newest finished one of each
        arm; or the arms.parquet of another comparison), chosen_on (the set, by name or Parquet file, that decodings and
        checkpoints were chosen on; no verdict is read on any of it; arms.parquet names its own).
Writes: comparison.json (differences, also by source and by level, health and cost of each arm), verdict.json, figures;
        arms.parquet, all that these were made from: what was right, by problem and arm. Each reading of the evaluated
        set is counted.
Run:    mlflow run . -e compare
"""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mlflow.entities import Run
from numpy.typing import NDArray

from ssd import evaluation, parameters, records, tracking
from ssd.decoding import Decoding
from ssd.grades import correct_matrix
from ssd.records import Grade, Problem
from ssd.report import figures, page
from ssd.stats import compare as comparing
from ssd.stats.estimate import Estimate
from ssd.stats.power import Cost
from ssd.tracking import reuse
from ssd.verdict import decision
from ssd.verdict.comparison import Arm, arm_of, compare_arms

SETS = ("train", "val", "quick", "final")
HEALTH = ("think_close_rate", "boxed_answer_rate", "length_stop_rate", "timed_out_rate", "tokens_per_sample")
PERCENTILES = ("p10", "p50", "p90", "p99")


KEY = b"ssd.arms"  # what arms.parquet says besides its rows


class Measured(NamedTuple):
    """Arms on the same problems: correct_PS of each, and all else that a comparison says of them."""

    arms: dict[str, Arm]
    correct: dict[str, NDArray]
    ids_P: list[str]
    sources_P: list[str]
    levels_P: list[str]
    conditions: dict[str, Any]
    base_model: str
    evaluated_on: str
    chosen_on: str


def compare(step: tracking.Step) -> None:
    is_file = step.args.arms.endswith(".parquet")
    measured = _of_file(step.args.arms) if is_file else _of_runs(step)
    if is_file and step.args.chosen_on not in (parameters.defaults("compare")["chosen_on"], measured.chosen_on):
        raise ValueError(
            f"chosen_on={step.args.chosen_on}, but arms={step.args.arms} says {measured.chosen_on}; leave it out"
        )
    arms, correct, conditions = measured.arms, measured.correct, measured.conditions
    pairs = [(claim.arm, claim.against) for claim in decision.PLAN.claims]
    present = [pair for pair in pairs if set(pair) <= arms.keys()]
    if not present:
        raise ValueError(
            f"arms={step.args.arms}: no claim of docs/plan.md is about {' and '.join(arms)}; its pairs are "
            + ", ".join(f"{arm} against {against}" for arm, against in pairs)
        )
    read = ",".join(sorted(f"{name}={arm.run_id}" for name, arm in arms.items()))
    mlflow.set_tags({"ssd.problems": conditions["problems"], "ssd.arms": read, "ssd.base_model": measured.base_model})
    num_earlier_reads = len(tracking.reads(conditions["problems"]) - {read})
    comparison = compare_arms(arms, correct, measured.sources_P, measured.levels_P, conditions, measured.chosen_on)
    verdict = decision.decide(
        {(arm, against): comparing.paired(correct[arm], correct[against]) for arm, against in present},
        chosen_on={"decoding": measured.chosen_on, "checkpoint": measured.chosen_on},
        evaluated_on=measured.evaluated_on,
        num_earlier_reads=num_earlier_reads,
    )
    step.log_table("arms.parquet", _table(measured))
    step.log_json("comparison.json", comparison)
    step.log_json("verdict.json", verdict)
    mlflow.log_metrics({"num_problems": len(measured.ids_P), "reading": verdict.reading})
    for finding in verdict.findings:
        difference, name = finding.difference, f"{finding.claim.arm}_minus_{finding.claim.against}"
        mlflow.log_metrics(
            {name: difference.value, f"{name}_ci_low": difference.ci_low, f"{name}_ci_high": difference.ci_high,
             f"{name}_p_value": difference.p_value, f"{name}_p_adjusted": finding.p_adjusted}
        )  # fmt: skip
    mlflow.log_figure(figures.forest(comparison.pass_at_1, comparison.against_base), "figures/arms.png")
    mlflow.log_figure(figures.claims(verdict.findings), "figures/claims.png")
    step.describe(f"compare · {verdict.promotion}", page.comparison(comparison, verdict), verdict=verdict.promotion)


def _of_runs(step: tracking.Step) -> Measured:
    runs = _named(step.args.arms)
    if "base" not in runs or len(runs) < 2:
        raise ValueError(f"arms={step.args.arms}: found {', '.join(runs) or 'none'}; needs base and another arm")
    base = runs["base"]
    conditions = json.loads(base.data.tags["ssd.conditions"])
    _check_comparable(runs, conditions)
    problems_uri = base.data.params.get("input.problems", base.data.params["problems"])
    problems = {row.problem_id: row for row in records.read(tracking.local_path(problems_uri), Problem)}
    chosen_on = _chosen_on(step.args.chosen_on, problems_uri, problems)
    ids, correct = [], {}
    for arm, run in runs.items():
        grades = records.read(tracking.local_path(f"runs:/{run.info.run_id}/grades.parquet"), Grade)
        arm_ids, correct[arm] = correct_matrix(grades)
        if arm_ids != (ids := ids or arm_ids):
            raise ValueError(
                f"arm {arm} (run {run.info.run_id}) was graded on other problems than the arms before; evaluate again"
            )
    return Measured(
        {arm: _arm(run) for arm, run in runs.items()},
        correct,
        ids,
        [problems[problem_id].source for problem_id in ids],
        [problems[problem_id].level for problem_id in ids],
        conditions,
        base.data.tags["ssd.base_model"],
        Path(problems_uri).stem,
        chosen_on,
    )


def _table(measured: Measured) -> pa.Table:
    """A row a problem: its id, source and level, and for each arm which of its samples are right."""
    columns = {"problem_id": measured.ids_P, "source": measured.sources_P, "level": measured.levels_P}
    rows = pa.table(
        columns | {arm: pa.array((correct_PS == 1).tolist()) for arm, correct_PS in measured.correct.items()}
    )
    said = {name: getattr(measured, name) for name in ("arms", "conditions", "base_model", "evaluated_on", "chosen_on")}
    said["arms"] = {name: dataclasses.asdict(arm) for name, arm in measured.arms.items()}
    return rows.replace_schema_metadata({KEY: json.dumps(records.jsonable(said))})


def _of_file(path: str) -> Measured:
    try:
        rows = pq.read_table(path)
        said = json.loads(rows.schema.metadata[KEY])
        arms = {name: arm_of(arm) for name, arm in said.pop("arms").items()}
        correct = {name: np.array(rows[name].to_pylist(), dtype=float) for name in arms}
        problems = [rows[name].to_pylist() for name in ("problem_id", "source", "level")]
        measured = Measured(arms, correct, *problems, **said)
    except (OSError, pa.ArrowException, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"arms={path} is no arms.parquet of a comparison ({error}); give that, or runs") from error
    if not 0 < len(measured.ids_P) == len({*measured.ids_P}) or "base" not in arms:
        raise ValueError(f"arms={path} has no problem, one twice, or no arm base; give arms.parquet as it was written")
    return measured


def _named(arms: str) -> dict[str, Run]:
    runs = {}
    for entry in arms.split(","):
        arm, _, uri = entry.partition("=")
        if not uri.startswith("runs:/"):
            raise ValueError(f"arms: {entry!r} is not name=runs:/ID; separate several by commas")
        run = tracking.run_of(uri)
        if "ssd.conditions" not in run.data.tags:
            raise ValueError(f"arms: run {run.info.run_id} ({run.info.run_name}) is no evaluation of one decoding")
        arm, measured = arm.strip(), run.data.tags["arm"]
        if arm in runs:
            raise ValueError(f"arms: {arm} is given twice; give each arm one run")
        if arm != measured:
            raise ValueError(
                f"arms: {entry.strip()} was evaluated as arm {measured}; name it so, or evaluate it as {arm}"
            )
        runs[arm] = run
    return runs


def _check_comparable(runs: Mapping[str, Run], conditions: dict) -> None:
    model = runs["base"].data.tags["ssd.base_model"]
    for arm, run in runs.items():
        comparing.check_comparable(conditions, json.loads(run.data.tags["ssd.conditions"]))
        if run.data.tags["ssd.base_model"] != model:
            raise ValueError(
                f"arm {arm} goes back to the model {run.data.tags['ssd.base_model']}, base to {model}; compare arms "
                "of one model"
            )


def _chosen_on(given: str, problems_uri: str, problems: Mapping[str, Problem]) -> str:
    """Name of the set that choices were made on; ValueError where it shares problems with the evaluated one."""
    if given.endswith(".parquet"):
        chosen = records.read(tracking.local_path(given), Problem)
    elif given in SETS:
        chosen = _set_of(problems_uri, "val" if given == "quick" else given)  # quick lies within val
    else:
        raise ValueError(f"chosen_on={given!r} is none of {', '.join(SETS)}; or give the Parquet file of the set")
    seen = {row.problem_id for row in chosen} & problems.keys()
    if seen:
        raise ValueError(f"chosen_on={given} shares {len(seen)} problems with the evaluated set; use another")
    return Path(given).stem


def _set_of(problems_uri: str, name: str) -> list[Problem]:
    """The set `name` beside the evaluated one, or else of the newest run of prepare; without either, none and a tag."""
    folders = [problems_uri.rpartition("/")[0]]
    folders += [f"runs:/{run.info.run_id}" for run in tracking.finished_runs("prepare")[:1]]
    files = [f"{folder}/{name}.parquet" for folder in folders]
    for file in files:
        with contextlib.suppress(ValueError):
            return records.read(tracking.local_path(file), Problem)
    unchecked = f"chosen_on is taken at its word: there is no {' or '.join(files)}"
    mlflow.set_tag("ssd.unchecked", unchecked)
    print(f"{unchecked}; give the Parquet file of that set to have it checked", flush=True)
    return []


def _arm(run: Run) -> Arm:
    uri, metrics, nan = f"runs:/{run.info.run_id}", run.data.metrics, float("nan")
    estimates = tracking.read_json(f"{uri}/estimates.json")["estimates"]
    decoding = tracking.read_json(f"{uri}/samples/manifest.json")["decoding"]
    return Arm(
        run.info.run_id,
        run.data.params.get("input.model", run.data.params["model"]),
        str(Decoding(**decoding)),
        {name: decision.from_json(Estimate, estimates[name]) for name in HEALTH},
        {name: metrics[f"tokens_per_sample_{name}"] for name in PERCENTILES},
        Cost(
            metrics["tokens_per_sample"] * metrics["num_samples"],
            metrics.get("gpu_hours", nan),
            metrics.get("gpu_cost", nan),
        ),
    )


def _latest(args: argparse.Namespace) -> str:
    """The newest finished evaluation of each arm; where there is none, the two arms of the method's claim."""
    runs: dict[str, str] = {}
    for run in tracking.finished_runs("evaluate"):
        if "ssd.conditions" in run.data.tags:
            runs.setdefault(run.data.tags["arm"], run.info.run_id)
    if not runs:
        base = parameters.preset_values(args.preset, "baseline")
        shared = {name: base[name] for name in evaluation.DECODING if name in base}
        shared["problems"] = f"runs:/{reuse.launch('prepare', args.preset, {})}/final.parquet"
        models = {"base": base["model"], "ssd-same-decoding": parameters.LATEST}
        for arm, model in models.items():
            runs[arm] = reuse.launch("evaluate", args.preset, {"arm": arm, "model": model, **shared})
    return ",".join(f"{arm}=runs:/{run_id}" for arm, run_id in reversed(runs.items()))


if __name__ == "__main__":
    tracking.execute("compare", compare, arms=_latest)

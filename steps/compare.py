"""Compare the arms pairwise on the same problems, and apply the analysis plan (docs/plan.md).

Reads:  arms (`name=runs:/ID,...`; latest: the newest finished evaluate run of each arm), chosen_on (the set, by
        name or Parquet file, that decodings and checkpoints were chosen on; no verdict is read on any of it).
Writes: comparison.json, verdict.json, a forest plot, the differences by source.
Run:    mlflow run . -e compare
"""

import json
from pathlib import Path

import mlflow
from mlflow.entities import Run

from ssd import decision, evaluation, grading, parameters, records, report, tracking
from ssd.records import Grade, Problem
from ssd.stats import compare as comparing
from ssd.stats import estimate

SETS = ("train", "val", "quick", "final")


def compare(step: tracking.Step) -> None:
    runs = _latest(step) if step.args.arms == tracking.LATEST else _named(step.args.arms)
    if "base" not in runs or len(runs) < 2:
        raise ValueError(f"arms={step.args.arms}: found {', '.join(runs) or 'none'}; needs base and another arm")
    base = runs["base"]
    ids, correct, conditions = None, {}, json.loads(base.data.tags["ssd.conditions"])
    for arm, run in runs.items():
        comparing.check_comparable(conditions, json.loads(run.data.tags["ssd.conditions"]))
        if run.data.tags["ssd.base_model"] != base.data.tags["ssd.base_model"]:
            raise ValueError(
                f"arm {arm} goes back to the model {run.data.tags['ssd.base_model']}, base to "
                f"{base.data.tags['ssd.base_model']}; compare arms of one model"
            )
        grades = records.read(tracking.local_path(f"runs:/{run.info.run_id}/grades.parquet"), Grade)
        ids, correct[arm] = grading.correct(grades)
    problems_uri = base.data.params.get("input.problems", base.data.params["problems"])
    problems = {row.problem_id: row for row in records.read(tracking.local_path(problems_uri), Problem)}
    estimates = {arm: estimate.mean(correct_PS) for arm, correct_PS in correct.items()}
    pairs = [(claim.arm, claim.against) for claim in decision.PLAN.claims]
    differences = {
        pair: comparing.paired(correct[pair[0]], correct[pair[1]]) for pair in pairs if set(pair) <= correct.keys()
    }
    sources_P = [problems[problem_id].source for problem_id in ids]
    by_source = {
        arm: comparing.by_group(correct_PS, correct["base"], sources_P)
        for arm, correct_PS in correct.items()
        if arm != "base"
    }
    chosen_on = step.args.chosen_on
    if chosen_on.endswith(".parquet"):
        seen = {row.problem_id for row in records.read(tracking.local_path(chosen_on), Problem)} & set(ids)
        if seen:
            raise ValueError(f"chosen_on={chosen_on} shares {len(seen)} problems with the evaluated set; use another")
        chosen_on = Path(chosen_on).stem
    elif chosen_on not in SETS:
        raise ValueError(f"chosen_on={chosen_on!r} is none of {', '.join(SETS)}; or give the Parquet file of the set")
    if not differences:
        raise ValueError(
            f"arms={step.args.arms}: no claim of docs/plan.md is about {' and '.join(runs)}; its pairs are "
            + ", ".join(f"{arm} against {against}" for arm, against in pairs)
        )
    verdict = decision.decide(
        differences,
        chosen_on={"decoding": chosen_on, "checkpoint": chosen_on},
        evaluated_on=Path(problems_uri).stem,
    )
    against_base = {
        arm: comparing.paired(correct_PS, correct["base"]) for arm, correct_PS in correct.items() if arm != "base"
    }
    step.log_json(
        "comparison.json",
        {
            "runs": {arm: run.info.run_id for arm, run in runs.items()},
            "decodings": {arm: run.info.run_name.split(" · ")[-1] for arm, run in runs.items()},
            "models": {arm: run.data.params.get("input.model", run.data.params["model"]) for arm, run in runs.items()},
            "estimates": estimates,
            "against_base": against_base,
            "by_source": by_source,
            "conditions": conditions,
        },
    )
    step.log_json("verdict.json", verdict)
    mlflow.log_metric("num_problems", len(ids))
    for (arm, against), difference in differences.items():
        name = f"{arm}_minus_{against}"
        mlflow.log_metrics(
            {name: difference.value, f"{name}_ci_low": difference.ci_low, f"{name}_ci_high": difference.ci_high,
             f"{name}_p_value": difference.p_value}
        )  # fmt: skip
    mlflow.log_figure(report.forest(estimates, against_base), "figures/arms.png")
    mlflow.log_figure(report.claims(verdict.findings), "figures/claims.png")
    step.describe(
        f"compare · {verdict.promotion}",
        report.comparison(estimates, against_base, by_source, {a: r.info.run_name for a, r in runs.items()}, verdict),
        verdict=verdict.promotion,
    )


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


def _latest(step: tracking.Step) -> dict[str, Run]:
    runs: dict[str, Run] = {}
    for run in tracking.finished_runs("evaluate"):
        if "ssd.conditions" in run.data.tags:
            runs.setdefault(run.data.tags["arm"], run)
    return runs or _launched(step)


def _launched(step: tracking.Step) -> dict[str, Run]:
    """The two arms of the method's claim, both decoded as the base is."""
    base = parameters.preset_values(step.args.preset, "baseline")
    shared = {name: base[name] for name in evaluation.DECODING if name in base}
    shared["problems"] = f"runs:/{step.launch('prepare')}/final.parquet"
    arms = {"base": base["model"], "ssd-same-decoding": tracking.LATEST}
    return {a: mlflow.get_run(step.launch("evaluate", arm=a, model=model, **shared)) for a, model in arms.items()}


if __name__ == "__main__":
    tracking.execute("compare", compare)

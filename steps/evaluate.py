"""Measure a model on a problem set: at one decoding, at each of a list of candidates, or by samples already drawn.

Reads:  model (latest: train/model; runs:/ID of a train run: each of its checkpoints and the model it began with),
        problems (latest: prepare/quick.parquet), decodings (a YAML file of candidate decodings by family, or none),
        samples (runs:/ID/samples to grade again without an engine, or none).
Writes: samples/, grades.parquet, correctness.parquet, estimates.json: pass@1 and health with intervals; with decodings
        these for each candidate in a nested run, and decodings.json with the best of each family; for a train run
        these for each checkpoint in a nested run, and pass@1 by step.
Run:    mlflow run . -e evaluate -P model=runs:/ID/model
"""

import argparse
import collections
import dataclasses
from pathlib import Path

import mlflow

from ssd import evaluation, parameters, records, tracking
from ssd.markdown import escaped
from ssd.records import Problem
from ssd.report import figures
from ssd.report.text import percent
from ssd.samples import load_samples


def evaluate(step: tracking.Step) -> None:
    args = step.args
    if args.arm.startswith("base") and tracking.tag_of(args.model, "step", "") == "train":
        raise ValueError(
            f"arm={args.arm} is the untrained model, and model={args.model} was trained; give arm or model"
        )
    if args.samples != "none":
        problems, drawn = records.read(step.path("problems"), Problem), load_samples(step.path("samples"))
        held = collections.Counter(problem_id for problem_id, _ in drawn.rows.ids())
        missing = {row.problem_id for row in problems} - held.keys()
        if missing:
            raise ValueError(
                f"samples={args.samples} has none of {len(missing):,} of the {len(problems):,} problems in "
                f"{args.problems}, as of {min(missing)}; give the problems that they were drawn for"
            )
        n = drawn.manifest["n"]
        if short := min((problem_id for problem_id, count in held.items() if count != n), default=None):
            raise ValueError(
                f"samples={args.samples} has {held[short]} samples of problem {short}, and its manifest says n={n}; a "
                "file is missing there: copy the folder again, or sample again"
            )
        made_with = {name: drawn.manifest[name] for name in ("n", "seed", "engine")}
        made_with |= dataclasses.asdict(drawn.decoding) | {"arm": tracking.tag_of(args.samples, "arm", args.arm)}
        given = {name: value for name, value in vars(args).items() if value != made_with.get(name, value)}
        mlflow.log_params({f"input.{name}": str(made_with[name]) for name in given})
        evaluation.log(step, made_with["arm"], problems, drawn)
    elif args.model.startswith("runs:/") and "/" not in args.model.removeprefix("runs:/"):
        _by_step(step)
    elif args.decodings == "none":
        problems, generated = evaluation.generate(step, {"samples": evaluation.decoding(args)})
        evaluation.log(step, args.arm, problems, generated["samples"])
    else:
        _choose(step)


def _by_step(step: tracking.Step) -> None:
    """Measure every checkpoint of the training run that `model` names, and the model that it began with."""
    run, decoding = tracking.run_of(step.args.model), evaluation.decoding(step.args)
    found = tracking.checkpoints(run)
    if run.data.tags["step"] != "train" or not found:
        raise ValueError(f"model={step.args.model} is no run of train with checkpoints; give runs:/ID/model")
    estimates = {}
    for number, uri in ({0: run.data.params.get("input.model", run.data.params["model"])} | found).items():
        args = argparse.Namespace(**vars(step.args) | {"model": uri})
        of_model = dataclasses.replace(step, args=args, work=step.work / f"step-{number}")
        with mlflow.start_run(nested=True):
            problems, generated = evaluation.generate(of_model, {"samples": decoding}, closes=True)
            estimates[number] = evaluation.log(of_model, step.args.arm, problems, generated["samples"])
            name = f"{step.args.arm} · step {number} · {decoding}"
            mlflow.set_tags({"ssd.checkpoint_step": number, "mlflow.runName": name})
        mlflow.log_metric("pass_at_1_by_step", estimates[number].value, step=number)
    mlflow.log_figure(figures.by_step({step.args.arm: estimates}), "figures/by_step.png")
    step.log_json("by_step.json", {"decoding": str(decoding), "estimates": estimates})
    table = ["| training step | pass@1 |", "| ---: | --- |"]
    table += [f"| {number} | {percent(estimate)} |" for number, estimate in estimates.items()]
    note = f"\n\n{estimates[0].n:,} problems at {escaped(decoding)}; step 0 is the model before training."
    step.describe(f"{step.args.arm} · by training step · {decoding}", "\n".join(table) + note, arm=step.args.arm)
    mlflow.set_tags({"ssd.checkpoints_of": run.info.run_id, "split": Path(step.args.problems).stem})


def _choose(step: tracking.Step) -> None:
    """Measure every candidate, and name the best of each family."""
    args = step.args
    families = parameters.load_decodings(args.decodings, args.max_tokens)
    candidates = {(family, index): d for family, of in families.items() for index, d in enumerate(of)}
    named = {f"{family}-{index}": decoding for (family, index), decoding in candidates.items()}
    problems, generated = evaluation.generate(step, named)
    rows = []
    for (family, index), decoding in candidates.items():
        with mlflow.start_run(nested=True):
            estimate = evaluation.log(step, args.arm, problems, generated[f"{family}-{index}"])
        rows.append({"family": family, "decoding": decoding, "estimate": estimate})
    best = {
        family: max((row for row in rows if row["family"] == family), key=lambda row: row["estimate"].value)
        for family in families
    }
    step.log_json("decodings.json", {"candidates": rows, "best": best})
    mlflow.log_figure(figures.candidates(rows), "figures/decodings.png")
    table = ["| family | best decoding | pass@1 on these problems |", "| --- | --- | --- |"]
    table += [f"| {escaped(f)} | {escaped(row['decoding'])} | {percent(row['estimate'])} |" for f, row in best.items()]
    note = "\n\nChosen on these problems, so these figures are no result on them."
    step.describe(f"{args.arm} · choose among {len(rows)} decodings", "\n".join(table) + note, arm=args.arm)


if __name__ == "__main__":
    tracking.execute("evaluate", evaluate, model="train/model", problems="prepare/quick.parquet")

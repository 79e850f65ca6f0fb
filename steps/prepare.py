"""Build the problem sets: gradable problems, nothing of the evaluation in the training, quick nested in val.

Reads:  public sets from the hub or a local mirror (`source_root`), or the lab's generator (sources `lab`).
Writes: train.parquet, val.parquet, quick.parquet, final.parquet where named, removals.parquet, sources.json, a figure.
Run:    mlflow run . -e prepare -P source_root=DIR
"""

import dataclasses
import itertools
from collections import Counter

import mlflow
import pyarrow as pa

from ssd import grading, records, report, sources, splits, tracking
from ssd.lab import world
from ssd.overlap import Overlap
from ssd.records import Problem

LAB = "lab"


def prepare(step: tracking.Step) -> None:
    args = step.args
    wanted = {role: _names(getattr(args, f"{role}_sources")) for role in ("train", "val", "final")}
    if [LAB] in wanted.values():
        if any(names != [LAB] for names in wanted.values()):
            raise ValueError(f"sources {wanted}: lab stands alone, for train, val and final alike")
        parts, funnel = _lab(args), {}
    else:
        parts, funnel = _public(args, wanted)
    for name in ("train", "val", "quick", "final"):
        problems = getattr(parts, name)
        if problems:
            rows = records.table(Problem, problems)
            tracking.log_dataset(name, rows, context=name, source=step.log_table(f"{name}.parquet", rows))
            mlflow.log_metric(f"num_{name}", len(problems))
    removals = [dataclasses.asdict(pair) for pair in parts.overlaps]
    fields = [field.name for field in dataclasses.fields(Overlap)]
    step.log_table("removals.parquet", pa.table({name: [row[name] for row in removals] for name in fields}))
    mlflow.log_metric("num_removed", len({pair.left_id for pair in parts.overlaps if pair.removed}))
    step.log_json("sources.json", funnel)
    if funnel:
        mlflow.log_figure(report.funnel(funnel), "figures/sources.png")
    step.describe(f"prepare · {', '.join(_names(args.train_sources))}", _summary(args, parts, funnel))


def _names(sources_given: str) -> list[str]:
    return [] if sources_given == "none" else [name.strip() for name in sources_given.split(",")]


def _lab(args) -> splits.Splits:
    """Generated problems are distinct by construction and alike by design, so there are no duplicates to look for."""
    sizes = (args.train_size, args.val_size, args.final_size)
    problems = world.problems(sum(sizes), args.seed)
    val = problems[args.train_size : args.train_size + args.val_size]
    return splits.Splits(
        train=problems[: args.train_size],
        val=val,
        quick=splits.draw_quick(val, args.quick_size, args.seed),
        final=problems[args.train_size + args.val_size :],
        overlaps=[],
    )


def _public(args, wanted: dict[str, list[str]]) -> tuple[splits.Splits, dict[str, dict[str, int]]]:
    loaded = {name: sources.load(name, args.source_root) for name in dict.fromkeys(itertools.chain(*wanted.values()))}
    usable = grading.gradable(problem.answer for source in loaded.values() for problem in source.problems)
    pools, funnel = {}, {}
    for name, source in loaded.items():
        pools[name] = [problem for problem in source.problems if usable[problem.answer]]
        ungradable = Counter({"answer the grader cannot use": len(source.problems) - len(pools[name])})
        funnel[name] = {"rows": source.raw_rows, **(source.dropped + ungradable), "candidates": len(pools[name])}
        rows = records.table(Problem, pools[name])
        tracking.log_dataset(name, rows, context="source", source=source.uri)
        if not pools[name]:
            raise ValueError(f"source {name} ({source.uri}) has no usable problem left: {dict(source.dropped)}")
    final = {problem.problem_id: problem for name in wanted["final"] for problem in pools[name]}
    final = splits.in_hash_order(list(final.values()), args.seed)
    parts = splits.split(
        [problem for name in wanted["train"] for problem in pools[name]],
        [problem for name in wanted["val"] for problem in pools[name]],
        final[: args.final_size or None],
        train_size=args.train_size,
        val_size=args.val_size,
        quick_size=args.quick_size,
        seed=args.seed,
    )
    return parts, funnel


def _summary(args, parts: splits.Splits, funnel: dict[str, dict[str, int]]) -> str:
    lines = []
    if funnel:
        lines += ["| source | rows | of a wanted level | dropped | candidates |", "| --- | ---: | ---: | --- | ---: |"]
    for name, counts in funnel.items():
        wanted = counts["rows"] - counts.get(sources.WRONG_LEVEL, 0)
        shown = {reason: n for reason, n in counts.items() if reason not in ("rows", "candidates", sources.WRONG_LEVEL)}
        dropped = ", ".join(f"{reason} {n:,}" for reason, n in shown.items() if n)
        lines.append(f"| {name} | {counts['rows']:,} | {wanted:,} | {dropped or '-'} | {counts['candidates']:,} |")
    lines += ["", "| split | problems | by source |", "| --- | ---: | --- |"]
    for name in ("train", "val", "quick", "final"):
        problems = getattr(parts, name)
        by_source = ", ".join(f"{source} {n:,}" for source, n in Counter(p.source for p in problems).most_common())
        lines.append(f"| {name} | {len(problems):,} | {by_source} |")
    if parts.overlaps:
        by_rule = Counter(pair.rule for pair in parts.overlaps if pair.removed)
        lines += ["", "| removed because of another problem, by rule | pairs |", "| --- | ---: |"]
        lines += [f"| {rule} | {n:,} |" for rule, n in by_rule.most_common()]
    if len(parts.train) < args.train_size:
        lines += [
            "",
            f"**Warning:** train has {len(parts.train):,} problems, not {args.train_size:,}: no more are left.",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    tracking.execute("prepare", prepare)

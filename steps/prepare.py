"""Build the problem sets: gradable problems, nothing of the evaluation in the training, quick nested in val.

Reads:  public sets from the hub or a local mirror (`source_root`), or a lab's generator (a world
        as the only source, `lab`).
Writes: train.parquet, val.parquet, quick.parquet, final.parquet where named, removals.parquet, sources.json,
        data_card.md, figures.
Run:    mlflow run . -e prepare -P source_root=DIR
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import mlflow
import pyarrow as pa

from ssd import parameters, records, tracking
from ssd.data import overlap, sources, splits
from ssd.grading import grader
from ssd.lab import world
from ssd.markdown import escaped
from ssd.records import Problem
from ssd.report import figures
from ssd.stats import power

UNUSABLE = "answer the grader cannot use"
SETS = ("train", "val", "quick", "final")
# What is planned with before anything is measured: the variance of one outcome that the method's author assumed, and
# the share of it that he found between problems ("more than 85%"). `-e power` measures both on the base model.
ASSUMED_VARIANCE, ASSUMED_BETWEEN_SHARE = 0.23, 0.85
REMOVALS = pa.schema(
    [
        (field.name, {str: pa.string(), float: pa.float64(), bool: pa.bool_()}[field.type])
        for field in dataclasses.fields(overlap.Overlap)
    ]
)
CARD = """# Problem sets

Each problem has one answer that the grader parses and finds equal to itself, and belongs to one set (quick is part of
val). A problem of train that repeats a problem of any evaluation source was taken out, whether or not that one was
drawn into val; of problems that repeat each other within a role one was kept. `removals.parquet` lists each pair with
both texts, its score and rule, pairs that came close and stayed (`removed` false), and each row that was dropped before
(no `right`, the reason as its rule). Same answer and numbers: taken
out from a Jaccard similarity of words of {recall.answers_and_numbers:g} on; same answer: {recall.answers:g}; same
numbers: {recall.numbers:g}. Within a role: {precision.answers_and_numbers:g}, {precision.answers:g} and never.

Membership is decided by a hash of the seed ({seed}) and a problem's source and statement.

{summary}

## Sources and licences

The problems keep their licences; the text of contest problems belongs to those who set them.

| source | set | licence | read from | rows |
| --- | --- | --- | --- | ---: |
{sources}
"""


def prepare(step: tracking.Step) -> None:
    args = step.args
    wanted = {role: _names(getattr(args, f"{role}_sources")) for role in ("train", "val", "final")}
    if worlds := [name for names in wanted.values() for name in names if name in world.WORLDS]:
        if any(names != worlds[:1] for names in wanted.values()):
            raise ValueError(f"sources {wanted}: {worlds[0]} stands alone, for train, val and final alike")
        loaded, parts = {}, _lab(args)
    else:
        loaded = _loaded(args, itertools.chain(*wanted.values()))
        parts = _split(args, wanted, loaded)
    for name in SETS:
        if problems := getattr(parts, name):
            rows = records.table(Problem, problems)
            tracking.log_dataset(name, rows, context=name, source=step.log_table(f"{name}.parquet", rows))
            mlflow.log_metric(f"num_{name}", len(problems))
    ungradable = [_without_pair(*row) for source in loaded.values() for row in source.dropped]
    removals = [*map(dataclasses.asdict, parts.overlaps), *ungradable]
    step.log_table("removals.parquet", pa.Table.from_pylist(removals, REMOVALS))
    mlflow.log_metric("num_removed", len(_removed(parts)))
    funnel = {name: _funnel(source, parts) for name, source in loaded.items()}
    step.log_json("sources.json", funnel)
    if funnel:
        mlflow.log_figure(figures.funnel(funnel), "figures/sources.png")
    if any(problem.level for problem in [*parts.train, *parts.val]):
        mlflow.log_figure(figures.difficulty({name: getattr(parts, name) for name in SETS}), "figures/difficulty.png")
    summary = _summary(args, parts, funnel)
    mlflow.log_text(_card(args, loaded, summary), "data_card.md")
    run = mlflow.active_run().info
    link = f"#/experiments/{run.experiment_id}/runs/{run.run_id}/artifacts/data_card.md"
    step.describe(
        f"prepare · {', '.join(_names(args.train_sources))}", f"{summary}\n\nLicences and rules: [data card]({link})."
    )


def _without_pair(problem: Problem, reason: str) -> dict:
    """The row of the removals of a problem that was dropped before any comparison: it has no `right`."""
    left = {"left_id": problem.problem_id, "left_problem": problem.problem, "left_answer": problem.answer}
    return left | {"rule": reason, "removed": True}


def _names(sources_given: str) -> list[str]:
    return [] if sources_given == "none" else [name.strip() for name in sources_given.split(",")]


def _lab(args) -> splits.Splits:
    """Generated problems are distinct by construction and alike by design, so there are no duplicates to look for."""
    sizes = (args.train_size, args.val_size, args.final_size)
    problems = world.problems(sum(sizes), args.seed, world.WORLDS[args.train_sources.strip()])
    val = problems[args.train_size : args.train_size + args.val_size]
    return splits.Splits(
        train=problems[: args.train_size],
        val=val,
        quick=splits.draw_quick(val, args.quick_size, args.seed),
        final=problems[args.train_size + args.val_size :],
        overlaps=[],
    )


def _loaded(args, names: Iterable[str]) -> dict[str, sources.Loaded]:
    """Each source with the problems whose answers the grader can use."""
    names = list(dict.fromkeys(names))
    called, count = Counter(Path(name).stem for name in names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} sources are called {called}, and their problems would be mixed up; rename a file")
    loaded = {name: sources.load(name, args.source_root) for name in names}
    usable = grader.gradable(problem.answer for source in loaded.values() for problem in source.problems)
    # Once more, with little to do: which problems are kept must not hang on how busy the machine was.
    usable |= grader.gradable(answer for answer, is_usable in usable.items() if not is_usable)
    for name, source in loaded.items():
        problems = [problem for problem in source.problems if usable[problem.answer]]
        unusable = [(problem, UNUSABLE) for problem in source.problems if not usable[problem.answer]]
        loaded[name] = source._replace(problems=problems, dropped=source.dropped + unusable)
        tracking.log_dataset(name, records.table(Problem, problems), context="source", source=source.uri)
        if not problems:
            raise ValueError(
                f"source {name} ({source.uri}) has no usable problem left: {dict(loaded[name].reasons)}; leave it out"
            )
    return loaded


def _split(args, wanted: dict[str, list[str]], loaded: dict[str, sources.Loaded]) -> splits.Splits:
    train, val, final = (
        list({problem.problem_id: problem for name in names for problem in loaded[name].problems}.values())
        for names in wanted.values()
    )
    parts = splits.split(
        train,
        val,
        final,
        train_size=args.train_size,
        val_size=args.val_size,
        quick_size=args.quick_size,
        final_size=args.final_size,
        seed=args.seed,
    )
    if not parts.train:
        raise ValueError(
            f"train_sources={args.train_sources}: every problem repeats one of the evaluation; add a source"
        )
    return parts


def _removed(parts: splits.Splits) -> set[str]:
    return {pair.left_id for pair in parts.overlaps if pair.removed}


def _funnel(source: sources.Loaded, parts: splits.Splits) -> dict[str, int]:
    """What became of the rows of a source; all but `rows` add up to it."""
    counts = Counter()
    place = dict.fromkeys(_removed(parts), splits.REPEATS)
    for name in ("train", "val", "final"):
        place |= dict.fromkeys((problem.problem_id for problem in getattr(parts, name)), name)
    for problem in source.problems:
        counts[place.get(problem.problem_id, splits.NOT_DRAWN)] += 1
    return {"rows": source.raw_rows, **{fate: counts[fate] for fate in splits.FATES}, **source.reasons}


def _summary(args, parts: splits.Splits, funnel: dict[str, dict[str, int]]) -> str:
    lines = [f"**Warning:** {warning}.\n" for warning in _warnings(args, parts)]
    lines += ["| set | problems | by source |", "| --- | ---: | --- |"]
    for name, problems in ((name, getattr(parts, name)) for name in SETS if getattr(parts, name)):
        by_source = ", ".join(
            f"{escaped(source)} {n:,}" for source, n in Counter(p.source for p in problems).most_common()
        )
        lines.append(f"| {name} | {len(problems):,} | {by_source} |")
    if funnel:
        lines += ["", f"| source | rows | {' | '.join(splits.FATES)} | dropped |"]
        lines += ["| --- |" + " ---: |" * (1 + len(splits.FATES)) + " --- |"]
    for name, counts in funnel.items():
        dropped = [
            f"{escaped(reason)} {n:,}" for reason, n in counts.items() if n and reason not in ("rows", *splits.FATES)
        ]
        cells = " | ".join(f"{counts[key]:,}" for key in ("rows", *splits.FATES))
        lines.append(f"| {escaped(name)} | {cells} | {', '.join(dropped) or '-'} |")
    if parts.overlaps:
        by_rule = Counter(pair.rule if pair.removed else "suspected, but kept" for pair in parts.overlaps)
        lines += ["", "| repeats another problem, by rule | pairs |", "| --- | ---: |"]
        lines += [f"| {rule} | {n:,} |" for rule, n in by_rule.most_common()]
    plan = _plan()
    lines += [
        "",
        f"What can be detected (alpha {plan['alpha']:g}, power {plan['power']:.0%}, one sample a problem), assuming a "
        f"variance of {ASSUMED_VARIANCE}, {ASSUMED_BETWEEN_SHARE:.0%} of it between problems, and paired arms whose "
        f"chances correlate at {power.DEFAULT_RHO:g}; `-e power` measures the variance:",
        "",
        "| set | problems | detects, paired (points) | detects, different problems an arm (points) |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in SETS[1:]:
        if n := len(getattr(parts, name)):
            lines.append(f"| {name} | {n:,} | {100 * _detectable(n):.1f} | {100 * _detectable(n, rho=0.0):.1f} |")
    delta = parameters.defaults("power")["delta"]
    lines += [
        "",
        f"{100 * delta:g} points need {_needed(delta):,} problems paired, {_unpaired(delta):,} an arm unpaired.",
    ]
    return "\n".join(lines)


def _warnings(args, parts: splits.Splits) -> list[str]:
    found = []
    if len(parts.train) < args.train_size:
        found.append(f"train has {len(parts.train):,} problems, not {args.train_size:,}: no more are left")
    delta = parameters.defaults("power")["delta"]
    for name in ("quick", "val"):
        n = len(getattr(parts, name))
        if _detectable(n) > delta:
            found.append(
                f"{name} ({n:,} problems) cannot detect {100 * delta:g} points: paired, it detects "
                f"{100 * _detectable(n):.1f}, under the assumptions below"
            )
    return found


def _plan() -> dict[str, float]:
    return {name: parameters.defaults("power")[name] for name in ("alpha", "power")}


def _variances(rho: float = power.DEFAULT_RHO) -> tuple[float, float, float]:
    within = (1 - ASSUMED_BETWEEN_SHARE) * ASSUMED_VARIANCE
    return power.planned_omega2(ASSUMED_BETWEEN_SHARE * ASSUMED_VARIANCE, rho), within, within


def _detectable(n: int, rho: float = power.DEFAULT_RHO) -> float:
    return power.minimal_detectable_effect(n, *_variances(rho), **_plan())


def _needed(delta: float) -> int:
    return power.sample_size_paired(*_variances(), delta, **_plan())


def _unpaired(delta: float) -> int:
    return power.sample_size_unpaired(ASSUMED_VARIANCE, delta, **_plan())


def _card(args, loaded: dict[str, sources.Loaded], summary: str) -> str:
    rows = []
    for name, source in loaded.items():
        known = sources.SOURCES.get(name)
        hub_id, licence = (known.hub_id, known.licence) if known else ("a file of one's own", "not stated")
        rows.append(f"| {escaped(name)} | {hub_id} | {licence} | {escaped(source.uri)} | {source.raw_rows:,} |")
    return CARD.format(
        recall=overlap.RECALL_FIRST,
        precision=overlap.PRECISION_FIRST,
        seed=args.seed,
        summary=summary,
        sources="\n".join(rows or [f"| {escaped(args.train_sources)} | generated by ssd/lab | Apache-2.0 | - | - |"]),
    )


if __name__ == "__main__":
    tracking.execute("prepare", prepare)

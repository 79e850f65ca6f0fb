"""Figures: each shows its uncertainty."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ssd import records
from ssd.data.splits import FATES
from ssd.records import Problem
from ssd.report.blocks import NARROW_INCHES
from ssd.stats import power
from ssd.stats.compare import Difference
from ssd.stats.estimate import Estimate
from ssd.verdict.decision import Finding

if TYPE_CHECKING:
    from optuna.study import Study

WIDTH_INCHES = 7.5


def funnel(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """What became of the rows of each source, in percent: its `rows`, FATES, and what was dropped by reason."""
    reasons = [
        *FATES,
        *dict.fromkeys(reason for row in counts.values() for reason in row if reason not in FATES),
    ]
    reasons = [reason for reason in reasons if reason != "rows" and any(row.get(reason) for row in counts.values())]
    figure, axes = plt.subplots(figsize=(1.3 * WIDTH_INCHES, 1.8 + 0.4 * len(counts)), layout="constrained")
    labels, left = [f"{name} ({row['rows']:,})" for name, row in counts.items()], np.zeros(len(counts))
    colours = dict(zip(FATES, ("C0", "C1", "C2", "0.8", "0.5"))) | dict(
        zip((reason for reason in reasons if reason not in FATES), plt.get_cmap("tab20b").colors)
    )
    for reason in reasons:
        shares = np.array([100 * row.get(reason, 0) / row["rows"] for row in counts.values()])
        axes.barh(labels, shares, left=left, label=reason, color=colours[reason])
        left += shares
    axes.invert_yaxis()
    axes.set(xlabel="rows of the source (%)", xlim=(0, 100))
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), title="in a set, or why not")
    return _closed(figure)


def difficulty(sets: Mapping[str, Sequence[Problem]]) -> Figure:
    """A panel for each source that has levels: how the problems of each set divide among them, in percent."""
    by_source: dict[str, dict[str, Counter]] = {}
    for name, problems in sets.items():
        for problem in problems:
            if problem.level:
                by_source.setdefault(problem.source, {}).setdefault(name, Counter())[problem.level] += 1
    figure, panels = plt.subplots(
        len(by_source), 1, figsize=(WIDTH_INCHES, 0.5 + 1.8 * len(by_source)), layout="constrained", squeeze=False
    )
    for axes, (source, levels_of) in zip(panels[:, 0], sorted(by_source.items())):
        levels = sorted(set().union(*levels_of.values()), key=records.difficulty)
        width = 0.8 / len(levels_of)
        for k, (name, counts) in enumerate(levels_of.items()):
            places = np.arange(len(levels)) + (k - (len(levels_of) - 1) / 2) * width
            shares = [100 * counts[level] / counts.total() for level in levels]
            colour = f"C{list(sets).index(name)}"
            axes.bar(places, shares, width, label=f"{name} (n = {counts.total():,})", color=colour)
        axes.set_xticks(range(len(levels)), levels)
        axes.set(title=source, ylabel="problems (%)")
        axes.legend(fontsize="small")
    axes.set_xlabel("level, as the source has it")
    return _closed(figure)


def generation(num_tokens: Mapping[str, Sequence[int]], finished_s: Sequence[float], drawn: Sequence[int]) -> Figure:
    """Left, tokens a sample by finish reason; right, tokens a second and samples left over the time of drawing.

    `finished_s` is when each sample ended, in seconds, and `drawn` its number of tokens; empty where none was drawn.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH_INCHES * 1.4, 3.5), layout="constrained")
    longest = max(max(values, default=0) for values in num_tokens.values())
    edges = np.arange(
        0, longest + 2 * (step := max(1, round(longest / 40))), step
    )  # whole numbers, else neighbours differ by rounding
    left.hist(list(num_tokens.values()), bins=edges, stacked=True, label=[f"finish reason {r}" for r in num_tokens])
    left.set(xlabel="tokens a sample", ylabel="samples")
    left.legend(fontsize="small")
    if len(finished_s):
        tokens, edges_s = np.histogram(finished_s, bins=min(60, len(finished_s)), weights=drawn)
        right.stairs(tokens / np.diff(edges_s), edges_s / 60, label="tokens a second, of samples that ended")
        right.set(xlabel="minutes", ylabel="tokens a second")
        of_samples = right.twinx()
        of_samples.plot(np.array(finished_s) / 60, np.arange(len(finished_s))[::-1], color="C1", label="samples left")
        of_samples.set_ylabel("samples left")
        for axes, place in ((right, "upper left"), (of_samples, "upper right")):
            axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
            axes.legend(fontsize="small", loc=place)
    return _closed(figure)


def candidates(rows: Sequence[Mapping]) -> Figure:
    """pass@1 of each candidate decoding with its interval, by family."""
    ordered = sorted(rows, key=lambda row: (row["family"], row["estimate"].value))
    labels = [f"{row['family']}: {row['decoding']}" for row in ordered]
    return _intervals(labels, [row["estimate"] for row in ordered], "pass@1 (%)")


def study(of: "Study") -> dict[str, Figure]:
    """Optuna's figures of a study, by name; settings that never varied are left out, importance needs two trials."""
    import optuna  # half a second, which the other steps need not spend
    from optuna.visualization import matplotlib as drawn

    trials = of.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    varied = [name for name in trials[0].params if len({str(trial.params[name]) for trial in trials}) > 1]
    figures = {}
    with warnings.catch_warnings(), plt.rc_context():  # Optuna sets a style for good
        warnings.simplefilter("ignore")  # that these figures are experimental, or few trials say nothing of importance
        for name, draw, least in (
            ("parallel-coordinates", drawn.plot_parallel_coordinate, 1),
            ("contour", drawn.plot_contour, 2),
            ("slice", drawn.plot_slice, 1),
            ("importance", drawn.plot_param_importances, 1),
        ):
            if len(varied) >= least:
                draw(of, params=varied, target_name="pass@1") if name != "contour" else draw(of, params=varied[:3])
                figures[name] = _closed(plt.gcf())
                figures[name].set_size_inches(1.6 * WIDTH_INCHES, 0.8 * WIDTH_INCHES)
                figures[name].set_layout_engine("tight")
    return figures


def detectable(
    n: int, budget: int, variances: tuple[float, float, float], delta: float, plan: Mapping[str, float]
) -> Figure:
    """Smallest difference that a paired comparison detects: over the number of problems, and at fixed budgets over k.

    `variances` are omega^2 and the two arms' within-problem variance; a budget is generations an arm, on at most `n`
    problems.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH_INCHES * 1.4, 4), sharey=True, layout="constrained")
    sizes = np.unique(np.geomspace(50, max(5000, 2 * n), 60).astype(int))
    for k in (1, 2, 4, 16):
        effects = [100 * power.minimal_detectable_effect(int(size), *variances, k, k, **plan) for size in sizes]
        left.plot(sizes, effects, label=f"{k} sample{'s' * (k > 1)} a problem")
    left.axvline(n, color="grey", linestyle="--", label=f"{n:,} problems")
    left.set(xscale="log", xlabel="problems", ylabel="detectable difference (points)", ylim=(0, None))
    for factor in (0.25, 1, 4):
        plans = power.allocations(max(1, int(factor * budget)), n, *variances, **plan)
        plans = [each for each in plans if each.k <= 32]
        effects = [100 * each.minimal_detectable_effect for each in plans]
        (line,) = right.plot([each.k for each in plans], effects, ".-", label=f"{factor * budget:,.0f} generations")
        best = min(plans, key=lambda each: each.minimal_detectable_effect)
        right.plot(best.k, 100 * best.minimal_detectable_effect, "*", markersize=13, color=line.get_color())
    right.set(xscale="log", xlabel=f"samples a problem, on at most {n:,} problems (star: best)")
    for axes in (left, right):
        axes.axhline(100 * delta, color="grey", linestyle=":", label=f"{100 * delta:g} points")
        axes.legend(fontsize="small")
    return _closed(figure)


def training(history: Mapping[int, Mapping[str, float]], global_batch_size: int) -> Figure:
    """By optimizer step: loss and entropy, the gradient's signal against its noise, how far the weights moved."""
    figure, panels = plt.subplots(2, 2, figsize=(WIDTH_INCHES * 1.4, 5.5), sharex=True, layout="constrained")
    shown = {
        ("loss", "entropy"): "nats a token",
        ("gradient_signal", "gradient_noise"): f"|G|^2, batch of {global_batch_size}",
        ("weights_changed",): "share of weights changed in bfloat16",
        ("displacement", "update_ratio"): "norm over that of the weights",
    }
    for axes, (names, label) in zip(panels.flat, shown.items()):
        for name in names:
            points = [(number, row[name]) for number, row in sorted(history.items()) if name in row]
            axes.plot(*zip(*points) if points else ([], []), label=name.replace("_", " "))
        axes.set_ylabel(label)
        axes.legend(fontsize="small")
    panels[0, 1].axhline(0, color="grey", linestyle=":")
    panels[1, 0].set_ylim(0, None)
    panels[1, 1].set_yscale("log")
    for axes in panels[1]:
        axes.set_xlabel("optimizer step")
    return _closed(figure)


def forest(estimates: Mapping[str, Estimate], against_base: Mapping[str, Difference]) -> Figure:
    """Above, pass@1 of each arm; below, its paired difference to the base."""
    names = list(estimates)
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(NARROW_INCHES, 1.6 + 0.5 * len(names)), height_ratios=(len(names), len(names) - 1),
        layout="constrained",
    )  # fmt: skip
    _draw_intervals(above, names, [estimates[name] for name in names])
    above.set_xlabel("pass@1 (%)")
    _draw_intervals(below, list(against_base), list(against_base.values()))
    below.axvline(0, color="grey", linestyle=":")
    below.set_xlabel("paired difference to base (points)")
    return _closed(figure)


def claims(findings: Sequence[Finding]) -> Figure:
    """The differences that the plan names, with what each says."""
    labels = [f"{f.claim.arm}\n- {f.claim.against}: {f.word}" for f in findings]
    figure, axes = plt.subplots(figsize=(NARROW_INCHES, 1 + 0.45 * len(labels)), layout="constrained")
    _draw_intervals(axes, labels, [finding.difference for finding in findings])
    axes.axvline(0, color="grey", linestyle=":")
    axes.set_xlabel("paired difference (points)")
    return _closed(figure)


def by_step(lines: Mapping[str, Mapping[int, Estimate]]) -> Figure:
    """pass@1 with its interval against training step, a line for each label."""
    figure, axes = plt.subplots(figsize=(NARROW_INCHES, 3.5), layout="constrained")
    for label, of_step in lines.items():
        values, lows, highs = np.array([[100 * x for x in (e.value, e.ci_low, e.ci_high)] for e in of_step.values()]).T
        axes.errorbar(list(of_step), values, [values - lows, highs - values], fmt="o-", capsize=3, label=label)
    axes.set(xlabel="training step", ylabel="pass@1 (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _closed(figure)


def lengths(percentiles: Mapping[str, Mapping[str, float]]) -> Figure:
    """Tokens a sample of each arm: a bar from p10 to p90, a dot at the median, a tick at p99."""
    figure, axes = plt.subplots(figsize=(NARROW_INCHES, 1.2 + 0.3 * len(percentiles)), layout="constrained")
    for height, row in enumerate(percentiles.values()):
        axes.plot([row["p10"], row["p90"]], [height, height], color="C0", linewidth=6, alpha=0.4, solid_capstyle="butt")
        axes.plot(row["p50"], height, "o", color="C0")
        axes.plot(row["p99"], height, "|", color="C0", markersize=10)
    axes.set_yticks(range(len(percentiles)), list(percentiles))
    axes.set_ylim(len(percentiles) - 0.5, -0.5)
    axes.set_xlim(0, None)
    axes.set_xlabel("tokens (bar p10 to p90, dot median, tick p99)")
    axes.grid(axis="x", alpha=0.3)
    return _closed(figure)


def curves(by_name: Mapping[str, Mapping[str, Sequence[Estimate]]], temperatures: Sequence[float]) -> Figure:
    """The paper's curves, and the entropy at locks and at forks: a colour for each model, bands 95%."""
    figure, panels = plt.subplots(2, 3, figsize=(WIDTH_INCHES * 1.7, 7), layout="constrained")
    shown = {
        "cumulative_mass": ("mass of the likeliest tokens, by rank", "cumulative mass"),
        "num_surviving": ("tokens that truncation leaves", "tokens"),
        "entropy_left": ("entropy after truncation", "nats"),
        "entropy_left 0": ("the same, by mass of the base's first 20 tokens", "nats"),
        "entropy_left at locks": ("the same, at locks", "nats"),
        "entropy_left at forks": ("the same, at forks", "nats"),
    }
    for axes, (prefix, (title, ylabel)) in zip(panels.flat, shown.items()):
        names = [name for name in by_name if name == prefix or (prefix[-1] == "0" and name.startswith(prefix))]
        for name, style in zip(names, ("-", "--", "-.", ":")):
            for number, (model, points) in enumerate(by_name[name].items()):
                x = range(1, len(points) + 1) if prefix == "cumulative_mass" else temperatures
                label = f"{model}, {name.removeprefix('entropy_left ')}" if len(names) > 1 else model
                colour, width = ("black", 1) if number == 0 else (f"C{number}", 2.5)  # equal lines stay both visible
                axes.plot(x, [p.value for p in points], style, color=colour, label=label, lw=width, zorder=3 - number)
                bounds = [point.ci_low for point in points], [point.ci_high for point in points]
                axes.fill_between(x, *bounds, color=colour, alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel="evaluation temperature", ylabel=ylabel)
        if names:
            axes.legend(fontsize="small")
    panels[0, 0].set(
        xscale="log", xlabel="rank of the token", xticks=(ranks := (1, 2, 5, 10, 20, 50)), xticklabels=ranks
    )
    return _closed(figure)


def changes(rows: Sequence[Mapping]) -> Figure:
    """What training changed in each group of positions, by model, with intervals over problems."""
    shown = {
        "kept_mass": "kept mass (points)",
        "top_1": "likeliest token (points)",
        "tail_mass": "mass of the base's tail (points)",
        "entropy": "entropy (0.01 nats)",
    }
    rows = [row for row in rows if row["against"] == "base" and row["quantity"] in shown]
    names, models = list(dict.fromkeys(r["group"] for r in rows)), list(dict.fromkeys(r["model"] for r in rows))
    figure, panels = plt.subplots(
        1, len(shown), figsize=(WIDTH_INCHES * 1.6, 1.2 + 0.35 * len(names)), sharey=True, layout="constrained"
    )
    for axes, (quantity, label) in zip(panels, shown.items()):
        for row in rows:
            if row["quantity"] == quantity:
                number, estimate = models.index(row["model"]), row["estimate"]
                height = names.index(row["group"]) + 0.2 * (number - (len(models) - 1) / 2)
                axes.plot([100 * estimate.ci_low, 100 * estimate.ci_high], [height] * 2, color=f"C{number + 1}", lw=3)
                axes.plot(100 * estimate.value, height, "o", markersize=4, color=f"C{number + 1}")
        axes.axvline(0, color="grey", linestyle=":")
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    for number, model in enumerate(models):
        panels[0].plot([], [], "o-", color=f"C{number + 1}", label=f"{model} - base")
    figure.legend(loc="outside upper center", ncols=len(models), fontsize="small")
    return _closed(figure)


def _intervals(labels: Sequence[str], rows: Sequence[Estimate | Difference], xlabel: str) -> Figure:
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 1 + 0.3 * len(labels)), layout="constrained")
    _draw_intervals(axes, labels, rows)
    axes.set_xlabel(xlabel)
    return _closed(figure)


def _draw_intervals(axes, labels: Sequence[str], rows: Sequence[Estimate | Difference]) -> None:
    heights = range(len(labels))
    for height, row in zip(heights, rows, strict=True):
        axes.plot([100 * row.ci_low, 100 * row.ci_high], [height, height], color="C0")
        axes.plot(100 * row.value, height, "o", color="C0")
    axes.set_yticks(list(heights), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def _closed(figure: Figure) -> Figure:
    """Out of pyplot's hands, so that a long process does not collect figures."""
    plt.close(figure)
    return figure

"""Figures and Markdown for a person: every figure shows its uncertainty, every table its n."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ssd import splits
from ssd.decision import Finding, Verdict
from ssd.records import Problem
from ssd.stats import power
from ssd.stats.compare import Difference
from ssd.stats.estimate import Estimate

if TYPE_CHECKING:
    from optuna.study import Study

WIDTH_INCHES = 7.5
NOT_DRAWN, REPEATS = "not drawn", "repeats"
FATES = ("train", "val", "final", NOT_DRAWN, REPEATS)


def percent(estimate: Estimate) -> str:
    """`52.1% [49.0, 55.2]`."""
    return f"{estimate.value:.1%} [{estimate.ci_low * 100:.1f}, {estimate.ci_high * 100:.1f}]"


def estimates(rows: Mapping[str, Estimate], groups: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Tables of every estimate of an evaluation, and of pass@1 by group where there are several."""
    lines = ["| estimate | 95% interval |", "| --- | --- |"]
    for name, row in rows.items():
        is_rate = name != "tokens_per_sample"
        shown = percent(row) if is_rate else f"{row.value:,.1f} [{row.ci_low:,.1f}, {row.ci_high:,.1f}]"
        lines.append(f"| {name.replace('_', ' ')} | {shown} |")
    for name, of_group in groups.items():
        if len(of_group) > 1:
            lines += ["", f"| {name.removeprefix('by_')} | problems | pass@1 |", "| --- | ---: | --- |"]
            lines += [f"| {group or '-'} | {row.n:,} | {percent(row)} |" for group, row in of_group.items()]
    return "\n".join(lines)


def points(difference: Difference) -> str:
    """`+7.3 [+5.1, +9.5]`, in percentage points."""
    return f"{difference.value * 100:+.1f} [{difference.ci_low * 100:+.1f}, {difference.ci_high * 100:+.1f}]"


def p_value(value: float) -> str:
    """`< 0.001` or three decimals."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def funnel(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """What became of the rows of each source, in percent: its `rows`, FATES, and what was dropped by reason."""
    reasons = [*FATES, *dict.fromkeys(reason for row in counts.values() for reason in row if reason not in FATES)]
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
        levels = sorted(set().union(*levels_of.values()), key=splits.difficulty)
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
                figures[name].set_layout_engine("constrained" if name != "parallel-coordinates" else "tight")
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
    """Left, pass@1 of each arm; right, its paired difference to the base."""
    names = list(estimates)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH_INCHES * 1.3, 1.2 + 0.4 * len(names)), sharey=True, layout="constrained"
    )
    _draw_intervals(left, names, [estimates[name] for name in names])
    left.set_xlabel("pass@1 (%)")
    rows = [against_base.get(name) for name in names]
    _draw_intervals(right, names, rows)
    right.axvline(0, color="grey", linestyle=":")
    right.set_xlabel("paired difference to base (points)")
    return _closed(figure)


def claims(findings: Sequence[Finding]) -> Figure:
    """The differences that the plan names, with what each says."""
    labels = [f"{f.claim.arm} - {f.claim.against}: {f.word}" for f in findings]
    figure = _intervals(labels, [finding.difference for finding in findings], "paired difference (points)")
    figure.axes[0].axvline(0, color="grey", linestyle=":")
    return figure


def comparison(
    estimates: Mapping[str, Estimate],
    against_base: Mapping[str, Difference],
    by_source: Mapping[str, Mapping[str, Difference]],
    names: Mapping[str, str],
    verdict: Verdict,
) -> str:
    """The page of a compare run: arms, claims, verdict, and differences by source where there are several."""
    n = estimates["base"].n
    lines = [
        f"**{verdict.promotion}** · read on {verdict.evaluated_on}, {n:,} problems, by the plan of {verdict.plan.date}"
    ]
    lines += [""] + [f"- {reason}" for reason in verdict.reasons]
    lines += ["", "| arm | decoding | pass@1 (95%) | minus base, paired, points (95%) |", "| --- | --- | --- | --- |"]
    for arm, estimate in estimates.items():
        difference = points(against_base[arm]) if arm in against_base else ""
        lines.append(f"| {arm} | {names[arm].split(' · ')[-1]} | {percent(estimate)} | {difference} |")
    lines += ["", "The plan's claims, Holm's adjustment over all but the control:"]
    lines += ["", "| claim | difference, points (95%) | Holm's p | finding |", "| --- | --- | --- | --- |"]
    for finding in verdict.findings:
        more = f" ({finding.n_to_decide:,} problems would decide)" if finding.n_to_decide else ""
        lines.append(
            f"| {finding.claim.arm} - {finding.claim.against} | {points(finding.difference)} | "
            f"{p_value(finding.p_adjusted)} | {finding.word}{more} |"
        )
    sources = list(next(iter(by_source.values())))
    if len(sources) > 1:
        lines += ["", "Minus base by source, paired, points (95%, unadjusted, to look at, not to decide by):", ""]
        lines += [f"| source | problems | {' | '.join(by_source)} |", "| --- | ---: |" + " --- |" * len(by_source)]
        for source in sources:
            row = [differences[source] for differences in by_source.values()]
            lines.append(f"| {source} | {row[0].n:,} | {' | '.join(map(points, row))} |")
    return "\n".join(lines)


def _intervals(labels: Sequence[str], rows: Sequence[Estimate | Difference], xlabel: str) -> Figure:
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 1 + 0.3 * len(labels)), layout="constrained")
    _draw_intervals(axes, labels, rows)
    axes.set_xlabel(xlabel)
    return _closed(figure)


def _draw_intervals(axes, labels: Sequence[str], rows: Sequence[Estimate | Difference | None]) -> None:
    heights = range(len(labels))
    for height, row in zip(heights, rows, strict=True):
        if row is not None:
            axes.plot([100 * row.ci_low, 100 * row.ci_high], [height, height], color="C0")
            axes.plot(100 * row.value, height, "o", color="C0")
    axes.set_yticks(list(heights), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def _closed(figure: Figure) -> Figure:
    """Out of pyplot's hands, so that a long process does not collect figures."""
    plt.close(figure)
    return figure

"""Take the base model's variance apart, and say what the problem sets can detect.

Reads:  grades (latest: baseline/grades.parquet), at least two samples a problem.
Writes: power.json, a figure; variance components with intervals, detectable effect, needed problems.
Run:    mlflow run . -e power -P delta=0.05
"""

import math

import mlflow

from ssd import grading, records, report, tracking
from ssd.records import Grade
from ssd.stats import power as planning
from ssd.stats import variance


def power(step: tracking.Step) -> None:
    args = step.args
    _, correct_PS = grading.correct(records.read(step.path("grades"), Grade))
    parts = variance.components(correct_PS)
    if parts.k < 2:
        raise ValueError(f"grades={args.grades} has one sample a problem; the variance needs -e baseline with n >= 2")
    omega2 = planning.planned_omega2(parts.between)
    plan = {"alpha": args.alpha, "power": args.power}
    needed = {
        k: planning.sample_size_paired(omega2, parts.within, parts.within, args.delta, k, k, **plan)
        for k in (1, 2, 4, 8)
    }
    unpaired = planning.sample_size_unpaired(parts.total, args.delta, **plan)
    low, high = (
        planning.minimal_detectable_effect(parts.n, *_planned(parts.total, share), **plan)
        for share in (parts.between_share_ci_high, parts.between_share_ci_low)
    )
    detectable = planning.minimal_detectable_effect(parts.n, omega2, parts.within, parts.within, **plan)
    step.log_json(
        "power.json",
        {"components": parts, "omega2": omega2, "delta": args.delta, "needed_paired_by_k": needed,
         "needed_unpaired": unpaired, "detectable_at_n": detectable, "n": parts.n, **plan},
    )  # fmt: skip
    names = ("total", "between", "within", "between_share", "reliability")
    mlflow.log_metrics({name: getattr(parts, name) for name in parts._fields if name.startswith(names)})
    mlflow.log_metrics({"detectable_effect_ci_low": low, "detectable_effect_ci_high": high})
    mlflow.log_metrics({"detectable_effect": detectable, "needed_problems": needed[1], "num_problems": parts.n})
    mlflow.log_figure(report.detectable(parts, omega2, args.delta, plan), "figures/power.png")
    if parts.between_share_ci_low <= 0:
        advice = "no difference between problems can be seen"
    elif parts.between_share_ci_low > 0.5:
        advice = "spend on problems, not on samples"
    else:
        advice = "more samples a problem help too"
    step.describe(
        f"power · {args.delta:.0%} at {parts.n} problems",
        f"Between-problem share {parts.between_share:.0%} "
        f"[{parts.between_share_ci_low:.0%}, {parts.between_share_ci_high:.0%}] of a variance of {parts.total:.3f} "
        f"({parts.n:,} problems, {parts.k} samples each): {advice}.\n\n"
        f"- {args.delta * 100:g} points need {needed[1]:,} problems in a paired comparison with one sample each "
        f"(two: {needed[2]:,}; four: {needed[4]:,}), {unpaired:,} an arm unpaired.\n"
        f"- {parts.n:,} problems detect {detectable * 100:.1f} points [{low * 100:.1f}, {high * 100:.1f}] "
        f"(paired, one sample, power {args.power:.0%}; the interval is the share's).",
    )


def _planned(total: float, between_share: float) -> tuple[float, float, float]:
    """omega^2 and the two arms' within-problem variance, were `between_share` the true share of `total`."""
    share = 0.0 if math.isnan(between_share) else min(max(between_share, 0.0), 1.0)  # NaN: every outcome is the same
    return planning.planned_omega2(total * share), total * (1 - share), total * (1 - share)


if __name__ == "__main__":
    tracking.execute("power", power, grades="baseline/grades.parquet")

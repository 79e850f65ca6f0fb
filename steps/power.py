"""Take the base model's variance apart, and say what the planned comparison can detect, what it needs and costs.

Reads:  grades (latest: baseline/grades.parquet), at least two samples a problem.
Writes: power.json, a figure; variance components with intervals, detectable effect, needed problems, the best use of a
        budget of generations, its cost in tokens, GPU-hours and money.
Run:    mlflow run . -e power -P delta=0.05 -P num_problems=2000 -P gpu_hour_price=3
"""

import math

import mlflow

from ssd import records, tracking
from ssd.grades import correct_matrix
from ssd.records import Grade
from ssd.report import figures
from ssd.stats import power as planning
from ssd.stats import variance


def power(step: tracking.Step) -> None:
    args = step.args
    _, correct_PS = correct_matrix(records.read(step.path("grades"), Grade))
    parts = variance.components(correct_PS)
    if parts.k < 2:
        raise ValueError(f"grades={args.grades} has one sample a problem; the variance needs -e baseline with n >= 2")
    names = ("total", "between", "within", "between_share", "reliability")
    mlflow.log_metrics(
        {name: value for name, value in parts._asdict().items() if name.startswith(names) and not math.isnan(value)}
    )
    name = f"power · {100 * args.delta:g} points, {args.num_problems or parts.n:,} problems"
    if parts.total == 0:
        step.log_json("power.json", {"components": parts})
        outcome = "right" if correct_PS.all() else "wrong"
        step.describe(
            name,
            f"**Nothing can be planned from this:** all {parts.k} samples of all {parts.n:,} problems were {outcome}, "
            "so no variance was seen. Measure the model on problems that it solves sometimes.",
        )
        return
    n, budget = args.num_problems or parts.n, args.budget or parts.n * parts.k
    variances, plan = _planned(parts.total, parts.between_share), {"alpha": args.alpha, "power": args.power}
    needed = {k: planning.sample_size_paired(*variances, args.delta, k, k, **plan) for k in (1, 2, 4, 8)}
    unpaired = planning.sample_size_unpaired(parts.total, args.delta, **plan)
    low, high = (
        planning.minimal_detectable_effect(n, *_planned(parts.total, share), **plan)
        for share in (parts.between_share_ci_high, parts.between_share_ci_low)
    )
    detectable = planning.minimal_detectable_effect(n, *variances, **plan)
    best = planning.optimal_k(budget, n, *variances, **plan)
    tokens, speed = (tracking.metric_of(args.grades, metric) for metric in ("tokens_per_sample", "tokens_per_second"))
    speed = args.tokens_per_second or speed
    price = args.gpu_hour_price or math.nan
    cost = planning.cost(2 * best.n * best.k, tokens, speed, price) if tokens > 0 and speed > 0 else None
    step.log_json(
        "power.json",
        {"components": parts, "omega2": variances[0], "delta": args.delta, "n": n, "detectable_at_n": detectable,
         "needed_paired_by_k": needed, "needed_unpaired": unpaired, "budget": budget, "best_use_of_budget": best,
         "cost_of_two_arms": cost, **plan},
    )  # fmt: skip
    mlflow.log_metrics({"detectable_effect_ci_low": low, "detectable_effect_ci_high": high})
    mlflow.log_metrics({"detectable_effect": detectable, "needed_problems": needed[1], "num_problems": n})
    mlflow.log_figure(figures.detectable(n, budget, variances, args.delta, plan), "figures/power.png")
    omega2_low, *within_high = _planned(parts.total, parts.between_share_ci_low)
    if parts.between_share_ci_low <= 0:
        advice = "no difference between problems can be seen"
    elif omega2_low > sum(within_high):  # of the planned difference's variance, more than a second sample could halve
        advice = "spend on problems, not on samples"
    else:
        advice = "more samples a problem help too"
    lines = [
        f"Between-problem share {parts.between_share:.0%} "
        f"[{parts.between_share_ci_low:.0%}, {parts.between_share_ci_high:.0%}] of a variance of {parts.total:.3f} "
        f"({parts.n:,} problems, {parts.k} samples each): {advice}.",
        "",
        f"- {args.delta * 100:g} points need {needed[1]:,} problems in a paired comparison with one sample each "
        f"(two: {needed[2]:,}; four: {needed[4]:,}), {unpaired:,} an arm unpaired.",
        f"- {n:,} problems detect {_points(detectable)} [{_points(low)}, {_points(high)}] "
        f"(paired, one sample, power {args.power:.0%}; the interval is the share's).",
        f"- {budget:,} generations an arm on at most {n:,} problems are best spent on {best.k} "
        f"sample{'s' * (best.k > 1)} of {best.n:,} problems: {_points(best.minimal_detectable_effect)}.",
    ]
    num_mixed = int(((correct_PS.mean(axis=1) > 0) & (correct_PS.mean(axis=1) < 1)).sum())
    if num_mixed < variance.LEAST_MIXED:
        lines.append(
            f"- Only {num_mixed} of {parts.n:,} problems have both right and wrong samples: below "
            f"{variance.LEAST_MIXED}, the share's interval is too short."
        )
    if args.tokens_per_second and not tokens > 0:
        lines.append("- No cost: only the grades of a run (runs:/ID/grades.parquet) say how many tokens a sample took.")
    if cost:
        money = "" if math.isnan(cost.money) else f", {cost.money:,.2f} at {args.gpu_hour_price:g} an hour"
        lines.append(f"- Two arms of that: {cost.tokens:,.0f} tokens, {cost.gpu_hours:,.2g} hours{money}.")
    if best.minimal_detectable_effect > args.delta:
        lines += [
            "",
            f"**Warning:** the planned comparison cannot tell {args.delta * 100:g} points from none: take more "
            f"problems ({needed[1]:,} with one sample each), or a larger delta.",
        ]
    step.describe(name, "\n".join(lines))


def _points(effect: float) -> str:
    return f"{100 * effect:.1f} points" if effect < 1 else "nothing (not even 100 points)"


def _planned(total: float, between_share: float) -> tuple[float, float, float]:
    """omega^2 and the two arms' within-problem variance, were `between_share` the true share of `total`."""
    share = min(max(between_share, 0.0), 1.0)
    return planning.planned_omega2(total * share), total * (1 - share), total * (1 - share)


if __name__ == "__main__":
    tracking.execute("power", power, grades="baseline/grades.parquet")

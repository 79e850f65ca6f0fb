"""What a comparison of two arms can detect, what it needs, how to spend a budget on it, and what that costs.

Effects and variances are of proportions: 5 points are 0.05. `omega2` is the variance over problems of the true
difference of the arms, `within_a` and `within_b` the mean variance of one sample around its problem's chance.
"""

import math
from typing import NamedTuple

from scipy import optimize, special

# The true problem means of two arms correlate at .3 to .7 between unrelated models (Miller 2024, section 4.2), and at
# about .87 between a model and its own fine-tuned copy (from the port's paired and unpaired intervals on 1,000
# problems). The top of the first range asks for more problems than the second: the plan errs towards too many.
DEFAULT_RHO = 0.7


class Allocation(NamedTuple):
    """A way to spend a budget: `n` problems with `k` samples an arm, and the effect that it can detect."""

    n: int
    k: int
    minimal_detectable_effect: float


class Cost(NamedTuple):
    tokens: float
    gpu_hours: float
    money: float


def sample_size_unpaired(sigma2: float, delta: float, alpha: float = 0.05, power: float = 0.8) -> int:
    r"""Problems an arm, for two arms on different problems.

    .. math:: n = \frac{2 \sigma^2 (z_{\alpha/2} + z_\beta)^2}{\delta^2}

    `sigma2` is the variance of a problem's mean: Var(x) + E[sigma_i^2] / k. The formula is often printed without its
    square, which asks for a third of the problems it takes.

    References
    ----------
    Cohen 1988; Miller 2024, eq. 9 with Cov(x_A, x_B) = 0.

    Examples
    --------
    >>> sample_size_unpaired(sigma2=0.23, delta=0.05)
    1445
    """
    return sample_size_paired(2 * sigma2, 0.0, 0.0, delta, alpha=alpha, power=power)


def sample_size_paired(
    omega2: float,
    within_a: float,
    within_b: float,
    delta: float,
    k_a: int = 1,
    k_b: int = 1,
    alpha: float = 0.05,
    power: float = 0.8,
) -> int:
    r"""Problems, for two arms on the same problems with `k_a` and `k_b` samples each.

    .. math:: n = \frac{(z_{\alpha/2} + z_\beta)^2 (\omega^2 + \sigma_A^2/K_A + \sigma_B^2/K_B)}{\delta^2}

    References
    ----------
    Miller 2024, eq. 9.

    Examples
    --------
    >>> sample_size_paired(omega2=1 / 9, within_a=0, within_b=0, delta=0.03)
    969
    """
    if not 0 < abs(delta) <= 1:
        raise ValueError(f"delta {delta} is not a difference of two accuracies; 5 points are 0.05")
    variance = _variance_of_difference(omega2, within_a, within_b, k_a, k_b)
    return max(1, math.ceil(_z_sum(alpha, power) ** 2 * variance / delta**2))


def sample_size_equivalent(
    variance: float, delta: float, margin: float, alpha: float = 0.05, power: float = 0.8
) -> int:
    r"""Problems at which the 1 - `alpha` interval of a true difference `delta` lies within +-`margin` with that power.

    .. math:: \Phi\Big(\frac{m - \delta}{SE} - z_{\alpha/2}\Big) + \Phi\Big(\frac{m + \delta}{SE} - z_{\alpha/2}\Big)
              \ge 2 - \beta, \qquad SE^2 = \frac{\text{variance}}{n}

    `variance` is that of one problem's difference. Both bounds count: at delta = 0 each is missed with half of beta.

    References
    ----------
    Phillips 1990, "Power of the two one-sided tests procedure"; Julious 2004, "Sample sizes for clinical trials with
    normal data", section 5.

    Examples
    --------
    >>> sample_size_equivalent(variance=0.2, delta=0.0, margin=0.02)
    5254
    """
    if not abs(delta) < margin < 1:
        raise ValueError(f"delta {delta} does not lie within the margin {margin}; no number of problems shows that")
    z, _ = special.ndtri(1 - alpha / 2), _z_sum(alpha, power)

    def lacks(se: float) -> float:
        return special.ndtr((margin - delta) / se - z) + special.ndtr((margin + delta) / se - z) - 1 - power

    # At the lower end both bounds always hold; at the upper neither does.
    se = optimize.brentq(lacks, (margin - abs(delta)) / 1e3, margin * 1e3)
    return max(1, math.ceil(variance / se**2))


def minimal_detectable_effect(
    n: int,
    omega2: float,
    within_a: float,
    within_b: float,
    k_a: int = 1,
    k_b: int = 1,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    r"""Smallest true difference that `n` problems detect with the given power.

    .. math:: \delta = (z_{\alpha/2} + z_\beta) \sqrt{(\omega^2 + \sigma_A^2/K_A + \sigma_B^2/K_B) / n}

    For two arms on different problems, n each, omega^2 is Var(x_A) + Var(x_B): `planned_omega2(between, rho=0)`.

    References
    ----------
    Miller 2024, eq. 10.

    Examples
    --------
    >>> round(minimal_detectable_effect(198, omega2=1 / 9, within_a=1 / 6, within_b=1 / 6), 3)
    0.133
    >>> round(minimal_detectable_effect(198, omega2=1 / 9, within_a=1 / 6, within_b=1 / 6, k_a=10, k_b=10), 3)
    0.076
    """
    if n < 1:
        raise ValueError(f"n={n} problems; give at least 1")
    return _z_sum(alpha, power) * math.sqrt(_variance_of_difference(omega2, within_a, within_b, k_a, k_b) / n)


def achieved_power(
    n: int,
    delta: float,
    omega2: float,
    within_a: float,
    within_b: float,
    k_a: int = 1,
    k_b: int = 1,
    alpha: float = 0.05,
) -> float:
    r"""Chance that a two-sided test on `n` problems calls a true difference `delta`, in its own direction.

    .. math:: 1 - \beta = \Phi\big(|\delta| / SE - z_{\alpha/2}\big)

    References
    ----------
    Miller 2024, eq. 9 solved for beta.

    Examples
    --------
    >>> round(achieved_power(969, delta=0.03, omega2=1 / 9, within_a=0, within_b=0), 2)
    0.8
    """
    if n < 1:
        raise ValueError(f"n={n} problems; give at least 1")
    variance = _variance_of_difference(omega2, within_a, within_b, k_a, k_b)
    if variance == 0:
        raise ValueError("omega2, within_a and within_b are all 0; no difference between problems, nothing to plan")
    return float(special.ndtr(abs(delta) / math.sqrt(variance / n) + special.ndtri(alpha / 2)))


def planned_omega2(between: float, rho: float = DEFAULT_RHO) -> float:
    r"""omega^2 of a planned paired comparison when only the base arm has been measured.

    .. math:: \omega^2 = Var(x_A) + Var(x_B) - 2 Cov(x_A, x_B) = 2 Var(x) (1 - \rho)

    with the second arm given the base's variance between problems. `rho` is the correlation of the two arms' problem
    chances; 0 is the design with different problems. The default is 0.7, cautious for a model and its fine-tuned copy
    (the constant says why). A `between` below 0 (see `variance.components`) counts as 0.

    References
    ----------
    Miller 2024, section 4.2.

    Examples
    --------
    >>> round(planned_omega2(between=0.2), 3)
    0.12
    """
    if not -1 <= rho <= 1:
        raise ValueError(f"rho {rho} is not a correlation; give a number from -1 to 1")
    if math.isnan(between):
        raise ValueError("between is NaN (k = 1 leaves the split undefined); measure the base with k of 2 or more")
    return 2 * max(between, 0.0) * (1 - rho)


def allocations(
    budget: int,
    max_problems: int,
    omega2: float,
    within_a: float,
    within_b: float,
    problem_cost: float = 0.0,
    alpha: float = 0.05,
    power: float = 0.8,
) -> list[Allocation]:
    """What `budget` generations an arm can detect at each k, with no more than `max_problems` problems to be had.

    `problem_cost` is what one more problem costs besides its samples (finding, grading, reading its prompt), in
    generations. Only the k at which a problem is affordable are listed, up to the first that leaves a single problem of
    several; above 100 only the first and the largest k of each n.

    Examples
    --------
    >>> [(a.n, a.k) for a in allocations(4000, 1000, omega2=0.05, within_a=0.03, within_b=0.03)[:6]]
    [(1000, 1), (1000, 2), (1000, 3), (1000, 4), (800, 5), (666, 6)]
    """
    if max_problems < 1 or budget < 1 + problem_cost:
        raise ValueError(f"budget {budget} and max_problems {max_problems} do not buy one sample of one problem")
    plans, k, n = [], 1, 0
    while k <= int(budget - problem_cost) and not n == 1 < max_problems:
        n = min(max_problems, int(budget // (k + problem_cost)))
        effect = minimal_detectable_effect(n, omega2, within_a, within_b, k, k, alpha, power)
        plans.append(Allocation(n, k, effect))
        k = k + 1 if k < 100 else max(k + 1, int(budget // n - problem_cost))
    return plans


def optimal_k(
    budget: int,
    max_problems: int,
    omega2: float,
    within_a: float,
    within_b: float,
    problem_cost: float = 0.0,
    alpha: float = 0.05,
    power: float = 0.8,
) -> Allocation:
    r"""The k, and n, that detect the smallest effect with `budget` generations an arm.

    Where problems are free and many, k = 1 is best: a second sample of one problem removes less variance than a first
    sample of another. k grows only where problems run out, or cost something by themselves:

    .. math:: k^* = \sqrt{\frac{\sigma_A^2 + \sigma_B^2}{\omega^2} \, c_{problem}}

    References
    ----------
    Cochran 1977, eq. 10.32 (optimum subsample size); found here by enumeration, since k and n are whole numbers.

    Examples
    --------
    >>> best = optimal_k(4000, max_problems=1000, omega2=0.05, within_a=0.03, within_b=0.03)
    >>> best.n, best.k, round(best.minimal_detectable_effect, 4)
    (1000, 4, 0.0226)
    """
    plans = allocations(budget, max_problems, omega2, within_a, within_b, problem_cost, alpha, power)
    return min(plans, key=lambda plan: (plan.minimal_detectable_effect, plan.k))


def cost(
    num_samples: int, tokens_per_sample: float, tokens_per_second: float, price_per_gpu_hour: float = math.nan
) -> Cost:
    """Tokens, GPU-hours and money of `num_samples` generations, at a throughput of one GPU.

    `num_samples` is problems x samples x arms; the money is NaN where no price is given.

    Examples
    --------
    >>> cost(num_samples=2000, tokens_per_sample=18_000, tokens_per_second=2_500, price_per_gpu_hour=3.0)
    Cost(tokens=36000000, gpu_hours=4.0, money=12.0)
    """
    if not (num_samples >= 0 and tokens_per_sample >= 0 and tokens_per_second > 0):
        raise ValueError(
            f"{num_samples} samples of {tokens_per_sample} tokens at {tokens_per_second} tokens a second; "
            "counts must not be negative and the throughput must be above 0"
        )
    tokens = num_samples * tokens_per_sample
    gpu_hours = tokens / tokens_per_second / 3600
    return Cost(tokens, gpu_hours, gpu_hours * price_per_gpu_hour)


def _variance_of_difference(omega2: float, within_a: float, within_b: float, k_a: int, k_b: int) -> float:
    """Variance over problems of the difference of two problem means."""
    if k_a < 1 or k_b < 1:
        raise ValueError(f"k_a={k_a} and k_b={k_b}; each arm needs at least 1 sample a problem")
    for name, variance in (("omega2", omega2), ("within_a", within_a), ("within_b", within_b)):
        if not variance >= 0:
            raise ValueError(
                f"{name} is {variance}; a variance is not negative, and NaN means that it was measured with k = 1: "
                "measure with k of 2 or more"
            )
    return omega2 + within_a / k_a + within_b / k_b


def _z_sum(alpha: float, power: float) -> float:
    if not 0 < alpha < 1 or not 0 < power < 1:
        raise ValueError(f"alpha {alpha} and power {power} must lie between 0 and 1; 0.05 and 0.8 are usual")
    if power <= alpha / 2:
        raise ValueError(f"power {power} is what no difference at all reaches at alpha {alpha}; 0.8 is usual")
    return float(special.ndtri(1 - alpha / 2) + special.ndtri(power))

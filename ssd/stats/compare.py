"""The difference of two arms: on the same problems, on different ones, by group, and over several claims.

`correct_a_PS` and `correct_b_PS` are problems x samples. In a paired comparison row i of both is the same problem;
the arms may have different numbers of samples. The difference is always a - b, as a proportion (5 points are 0.05).
"""

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from ssd.stats.estimate import clustered_se, effective_n, labels, normal_quantile, of_problems, outcomes

# What two arms must share for their difference to be about the model and its decoding.
CONDITIONS = ("problems", "prompt", "max_tokens", "engine", "grader")


class Difference(NamedTuple):
    """a - b with its standard error, interval and p-value; `n` problems, `test` names how `p_value` was found."""

    value: float
    se: float
    ci_low: float
    ci_high: float
    p_value: float
    n: int
    test: str


def paired(
    correct_a_PS: ArrayLike,
    correct_b_PS: ArrayLike,
    clusters_P: ArrayLike | None = None,
    confidence: float = 0.95,
    num_permutations: int = 20_000,
    seed: int = 0,
) -> Difference:
    r"""Difference of two arms on the same problems.

    .. math:: d_i = \bar a_i - \bar b_i, \qquad \bar d = \frac1n \sum_i d_i, \qquad
              SE^2 = \frac{G}{G-1} \frac{1}{n^2} \sum_c \Big(\sum_{i \in c} (d_i - \bar d)\Big)^2

    The interval is Bonett and Price's: the analytic one after adding two problems, one with d = u and one with -u,
    where u = 1 / min(K_A, K_B) is one sample of difference, and with the t quantile of G - 1 (and, where clusters are
    given, G / (G - 1)). Without those two, arms that happened to agree everywhere would get an interval of no width.

    The p-value is exact McNemar where both arms have one sample a problem and there are no clusters. Otherwise the
    signs of the differences (of the clusters' sums) are flipped at random, `num_permutations` times, the observed
    value counted once more; a p-value is never below 1 / (num_permutations + 1).

    References
    ----------
    Miller 2024, eq. 7 and 8; Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data"; McNemar 1947; Phipson and Smyth 2010 for the add-one.

    Examples
    --------
    >>> difference = paired([[1], [1], [1], [0]] * 25, [[1], [0], [1], [0]] * 25)
    >>> round(difference.value, 3), round(difference.ci_low, 3), round(difference.ci_high, 3), difference.test
    (0.25, 0.156, 0.334, 'mcnemar-exact')
    """
    correct_a_PS, correct_b_PS = _same_problems(correct_a_PS, correct_b_PS)
    differences_P = correct_a_PS.mean(axis=1) - correct_b_PS.mean(axis=1)
    n = len(differences_P)
    cluster_of_P = np.arange(n)
    if clusters_P is not None:
        cluster_of_P = np.unique(labels(clusters_P, n, "clusters_P"), return_inverse=True)[1]
    num_samples = min(correct_a_PS.shape[1], correct_b_PS.shape[1])
    low, high = _paired_interval(differences_P, cluster_of_P, 1 / num_samples, confidence)
    if clusters_P is None and correct_a_PS.shape[1] == correct_b_PS.shape[1] == 1:
        test, p_value = "mcnemar-exact", _mcnemar(differences_P)
    else:
        test, p_value = "sign-flip", _sign_flip(np.bincount(cluster_of_P, differences_P), num_permutations, seed)
    value, se = float(differences_P.mean()), clustered_se(differences_P, cluster_of_P)
    return Difference(value, se, low, high, p_value, n, test)


def _paired_interval(
    differences_P: NDArray, cluster_of_P: NDArray, unit: float, confidence: float
) -> tuple[float, float]:
    n = len(differences_P)
    num_clusters = len(np.unique(cluster_of_P))
    normal_quantile(confidence)  # which refuses what is no confidence
    if num_clusters < 2:
        return float("nan"), float("nan")
    centre = differences_P.sum() / (n + 2)
    sums_C = np.bincount(cluster_of_P, differences_P - centre)
    squares = sums_C @ sums_C + (unit - centre) ** 2 + (unit + centre) ** 2
    if num_clusters < n:
        squares *= num_clusters / (num_clusters - 1)
    half = special.stdtrit(num_clusters - 1, (1 + confidence) / 2) * np.sqrt(squares) / (n + 2)
    return max(-1.0, float(centre - half)), min(1.0, float(centre + half))


def _mcnemar(differences_P: NDArray) -> float:
    """Two-sided exact p-value: the problems that only one arm solved, against a fair coin."""
    only_a, only_b = int((differences_P > 0).sum()), int((differences_P < 0).sum())
    return min(1.0, 2 * float(special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def _sign_flip(sums_C: NDArray, num_permutations: int, seed: int) -> float:
    """Two-sided p-value of the sum of `sums_C` when each keeps or changes its sign with equal chance."""
    rng = np.random.default_rng(seed)
    # Clusters of equal size of difference are interchangeable: how many keep their sign is one binomial draw.
    sizes, counts = np.unique(np.abs(sums_C).round(12), return_counts=True)
    flipped_B = np.zeros(num_permutations)
    for size, count in zip(sizes.tolist(), counts.tolist()):
        if size > 0:
            flipped_B += size * (2 * rng.binomial(count, 0.5, size=num_permutations) - count)
    # Ties with the observed sum count against the difference; rounding must not break them.
    as_extreme = int((np.abs(flipped_B) >= abs(sums_C.sum()) - 1e-9).sum())
    return (as_extreme + 1) / (num_permutations + 1)


def unpaired(
    correct_a_PS: ArrayLike,
    correct_b_PS: ArrayLike,
    clusters_a_P: ArrayLike | None = None,
    clusters_b_P: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Difference:
    r"""Difference of two arms on different problems; where the problems are the same, `paired` is far sharper.

    .. math:: SE = \sqrt{SE_A^2 + SE_B^2}, \qquad
              z = \frac{\bar a - \bar b}{\sqrt{\bar p (1 - \bar p) (1/n^*_A + 1/n^*_B)}}

    The interval joins the arms' Wilson intervals (Newcombe's method 10); the p-value is the pooled score test. Both
    use the effective numbers of problems n* of `estimate.effective_n`. `n` counts the problems of both arms.

    References
    ----------
    Miller 2024, eq. 6; Newcombe 1998, "Interval estimation for the difference between independent proportions".

    Examples
    --------
    >>> difference = unpaired([[1]] * 56 + [[0]] * 14, [[1]] * 48 + [[0]] * 32)
    >>> round(difference.value, 4), round(difference.ci_low, 4), round(difference.ci_high, 4)
    (0.2, 0.0524, 0.3339)
    """
    a_PS, b_PS = outcomes(correct_a_PS, "correct_a_PS"), outcomes(correct_b_PS, "correct_b_PS")
    a_P, b_P = a_PS.mean(axis=1), b_PS.mean(axis=1)
    a = of_problems(a_P, a_PS.shape[1], clusters_a_P, confidence)
    b = of_problems(b_P, b_PS.shape[1], clusters_b_P, confidence)
    value = a.value - b.value
    low = value - np.hypot(a.value - a.ci_low, b.ci_high - b.value)
    high = value + np.hypot(a.ci_high - a.value, b.value - b.ci_low)
    n_a = effective_n(a_P, a_PS.shape[1], clusters_a_P, confidence)
    n_b = effective_n(b_P, b_PS.shape[1], clusters_b_P, confidence)
    pooled = (n_a * a.value + n_b * b.value) / (n_a + n_b)
    score_se = np.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
    p_value = 2 * float(special.ndtr(-abs(value) / score_se)) if score_se > 0 else 1.0
    return Difference(value, float(np.hypot(a.se, b.se)), float(low), float(high), p_value, a.n + b.n, "score")


def by_group(
    correct_a_PS: ArrayLike,
    correct_b_PS: ArrayLike,
    groups_P: ArrayLike,
    clusters_P: ArrayLike | None = None,
    confidence: float = 0.95,
    num_permutations: int = 20_000,
    seed: int = 0,
) -> dict[Hashable, Difference]:
    """`paired` within each group of problems (source, difficulty), in the order of the sorted labels.

    The p-values are not adjusted for the number of groups.

    Examples
    --------
    >>> by_source = by_group([[1], [1], [0]], [[0], [1], [0]], ["aime", "aime", "omni"])
    >>> {group: (difference.value, difference.n) for group, difference in by_source.items()}
    {'aime': (0.5, 2), 'omni': (0.0, 1)}
    """
    a_PS, b_PS = _same_problems(correct_a_PS, correct_b_PS)
    groups_P = labels(groups_P, len(a_PS), "groups_P")
    clusters_P = None if clusters_P is None else labels(clusters_P, len(a_PS), "clusters_P")
    return {
        group: paired(
            a_PS[rows], b_PS[rows], None if clusters_P is None else clusters_P[rows], confidence, num_permutations, seed
        )
        for group, rows in ((group, groups_P == group) for group in np.unique(groups_P).tolist())
    }


def noninferior(difference: Difference, margin: float) -> bool:
    """Whether a is shown to be worse than b by less than `margin`: the whole interval lies above -margin.

    From a two-sided interval of 95% this is a one-sided test at 2.5%.

    References
    ----------
    Piaggio et al. 2012, CONSORT extension for non-inferiority trials.

    Examples
    --------
    >>> noninferior(Difference(0.01, 0.01, -0.0096, 0.0296, 0.32, 1000, "sign-flip"), margin=0.02)
    True
    """
    return difference.ci_low > -_margin(margin)


def equivalent(difference: Difference, margin: float) -> bool:
    """Whether the arms are shown to differ by less than `margin`: the whole interval lies within +-margin.

    From a two-sided interval of 95% these are two one-sided tests at 2.5% each.

    References
    ----------
    Schuirmann 1987.

    Examples
    --------
    >>> equivalent(Difference(0.01, 0.01, -0.0096, 0.0296, 0.32, 1000, "sign-flip"), margin=0.02)
    False
    """
    return -_margin(margin) < difference.ci_low and difference.ci_high < margin


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    r"""p-values adjusted so that the chance of any false claim among them stays below alpha.

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min\big(1, (m - j + 1) \, p_{(j)}\big)

    References
    ----------
    Holm 1979.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    p_values = np.asarray(p_values, dtype=float)
    if p_values.ndim != 1 or not ((p_values >= 0) & (p_values <= 1)).all():
        raise ValueError(f"p_values {p_values.tolist()} are not a list of numbers from 0 to 1; leave out what is NaN")
    order = np.argsort(p_values)
    adjusted = np.empty_like(p_values)
    scaled = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(scaled)) if len(scaled) else scaled
    return adjusted


def check_comparable(conditions_a: Mapping[str, Hashable], conditions_b: Mapping[str, Hashable]) -> None:
    """Refuse two arms that do not share problems, prompt, cap, engine and grader (`CONDITIONS`, names or digests).

    Raises
    ------
    ValueError
        If a condition is missing or differs; the message names each.

    Examples
    --------
    >>> base = {"problems": "3f", "prompt": "a1", "max_tokens": 32768, "engine": "vllm 0.30.0", "grader": "c9"}
    >>> check_comparable(base, base | {"max_tokens": 49152})
    Traceback (most recent call last):
        ...
    ValueError: the arms differ in max_tokens (32768 against 49152); evaluate both alike before comparing them
    """
    for name, conditions in (("a", conditions_a), ("b", conditions_b)):
        missing = [condition for condition in CONDITIONS if condition not in conditions]
        if missing:
            raise ValueError(f"arm {name} does not say its {', '.join(missing)}; evaluate it again to record them")
    unlike = [
        f"{condition} ({conditions_a[condition]} against {conditions_b[condition]})"
        for condition in CONDITIONS
        if conditions_a[condition] != conditions_b[condition]
    ]
    if unlike:
        raise ValueError(f"the arms differ in {', '.join(unlike)}; evaluate both alike before comparing them")


def _same_problems(correct_a_PS: ArrayLike, correct_b_PS: ArrayLike) -> tuple[NDArray, NDArray]:
    a_PS, b_PS = outcomes(correct_a_PS, "correct_a_PS"), outcomes(correct_b_PS, "correct_b_PS")
    if len(a_PS) != len(b_PS):
        raise ValueError(
            f"arm a has {len(a_PS)} problems and arm b {len(b_PS)}; align both on the problems they share, "
            "or use unpaired"
        )
    return a_PS, b_PS


def _margin(margin: float) -> float:
    if not 0 < margin < 1:
        raise ValueError(f"margin {margin} is not a difference of accuracies; 2 points are 0.02")
    return margin

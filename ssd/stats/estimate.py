"""Accuracy with its uncertainty: means, pass@k and majority@k over problems, by group and re-weighted.

The unit of sampling is the problem. `correct_PS` holds one row a problem and one column a sample, 0 or 1; problems
that were copied from each other, or come from one contest, share a label in `clusters_P` and count as one draw.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special


class Estimate(NamedTuple):
    """A value that does not travel without its standard error, its interval and its number of problems."""

    value: float
    se: float
    ci_low: float
    ci_high: float
    n: int


class Interval(NamedTuple):
    low: float
    high: float


def mean(correct_PS: ArrayLike, clusters_P: ArrayLike | None = None, confidence: float = 0.95) -> Estimate:
    r"""pass@1: the mean over problems of each problem's mean, with a standard error clustered by problem.

    .. math:: \bar s = \frac1n \sum_i s_i, \qquad
              SE^2 = \frac{G}{G-1} \frac{1}{n^2} \sum_c \Big(\sum_{i \in c} (s_i - \bar s)\Big)^2

    Without clusters every problem is its own (G = n) and SE is the sample deviation of the problem means over
    sqrt(n). The interval is Wilson's at the effective number of problems (see `effective_n`), at every n: it is plain
    Wilson for one sample a problem, it stays inside [0, 1], and it is not empty where every problem went the same way.
    The percentile bootstrap is too short for an accuracy near 0 or 1 on a hundred problems, so it is not used here.
    With about 20 clusters and an accuracy near 0 or 1 the interval covers 93 times in 100 instead of 95.

    Returns
    -------
    Estimate
        `n` counts problems. `se` is NaN for a single problem or cluster; the interval is then Wilson's at n = 1.

    References
    ----------
    Miller 2024, "Adding Error Bars to Evals", eq. 1-4; Wilson 1927; Korn and Graubard 1998 for the effective n.

    Examples
    --------
    >>> estimate = mean([[1, 1], [1, 0], [0, 0], [1, 1]])
    >>> [round(x, 3) for x in estimate]
    [0.625, 0.239, 0.237, 0.899, 4]
    """
    correct_PS = outcomes(correct_PS)
    return of_problems(correct_PS.mean(axis=1), correct_PS.shape[1], clusters_P, confidence)


def quantity(values_PS: ArrayLike, clusters_P: ArrayLike | None = None, confidence: float = 0.95) -> Estimate:
    r"""Mean of a quantity that is no proportion, such as tokens a sample, with Student's interval over problems.

    .. math:: \bar x \pm t_{G-1} \, SE

    with SE and G as in `mean`; NaN with one problem. Every problem has the same number of samples.

    References
    ----------
    Miller 2024, eq. 4.

    Examples
    --------
    >>> [round(x, 2) for x in quantity([[10, 12], [14, 16], [12, 14]])[:4]]
    [13.0, 1.15, 8.03, 17.97]
    """
    values_P = np.asarray(values_PS, dtype=float).mean(axis=1)
    se = clustered_se(values_P, clusters_P)
    num_clusters = len(_by_cluster(values_P, clusters_P)[0])
    half = special.stdtrit(num_clusters - 1, (1 + confidence) / 2) * se if num_clusters > 1 else np.nan
    value = float(values_P.mean())
    return Estimate(value, se, float(value - half), float(value + half), len(values_P))


def bootstrap(
    correct_PS: ArrayLike,
    clusters_P: ArrayLike | None = None,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """pass@1 with a percentile interval from resampling problems (or clusters), each with all of its samples.

    A second opinion on `mean`, which makes no assumption on the shape; it is too short where fewer than about 30
    problems went the rarer way.

    References
    ----------
    Efron and Tibshirani 1993, ch. 13.

    Examples
    --------
    >>> estimate = bootstrap([[1, 1], [1, 0], [0, 0], [1, 1]] * 25)
    >>> [round(x, 2) for x in estimate]
    [0.62, 0.04, 0.55, 0.7, 100]
    """
    values_P = outcomes(correct_PS).mean(axis=1)
    sums_C, sizes_C = _by_cluster(values_P, clusters_P)
    # Equal clusters are interchangeable, so drawing how often each kind occurs is drawing the clusters themselves.
    kinds, counts = np.unique(np.column_stack([sums_C, sizes_C]), axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=num_resamples)
    means = (draws @ kinds[:, 0]) / (draws @ kinds[:, 1])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(values_P.mean()), float(means.std(ddof=1)), float(low), float(high), len(values_P))


def wilson(accuracy: float, n: float, confidence: float = 0.95) -> Interval:
    r"""Wilson's score interval of a proportion; `n` may be an effective, fractional number of problems.

    .. math:: \frac{1}{1 + z^2/n} \Big(p + \frac{z^2}{2n} \pm z \sqrt{\frac{p(1-p)}{n} + \frac{z^2}{4n^2}}\Big)

    References
    ----------
    Wilson 1927; Brown, Cai and DasGupta 2001.

    Examples
    --------
    >>> [round(x, 4) for x in wilson(0.05, 100)]
    [0.0215, 0.1118]
    """
    if not 0 <= accuracy <= 1 or not n > 0:
        raise ValueError(f"accuracy {accuracy} and n {n}: give a proportion within [0, 1] and n above 0")
    z = normal_quantile(confidence)
    centre = accuracy + z * z / (2 * n)
    half = z * (accuracy * (1 - accuracy) / n + z * z / (4 * n * n)) ** 0.5
    # Rounding would leave 1e-18 where the bound is exactly 0, or 1 - 1e-16 where it is exactly 1.
    low = 0.0 if accuracy == 0 else (centre - half) / (1 + z * z / n)
    high = 1.0 if accuracy == 1 else (centre + half) / (1 + z * z / n)
    return Interval(float(low), float(high))


def pass_at_k(correct_PS: ArrayLike, k: int, clusters_P: ArrayLike | None = None, confidence: float = 0.95) -> Estimate:
    r"""Chance that at least one of `k` samples is right, unbiased from S >= k samples a problem, over problems.

    .. math:: \widehat{pass@k} = 1 - \binom{S-c}{k} \Big/ \binom{S}{k}
              = 1 - \prod_{i=S-c+1}^{S} \Big(1 - \frac{k}{i}\Big)

    for a problem with c of S samples right; standard error and interval as in `mean`.

    References
    ----------
    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1.

    Examples
    --------
    >>> round(pass_at_k([[1, 0, 0, 0], [0, 0, 0, 0]], k=2).value, 3)
    0.25
    """
    correct_PS = outcomes(correct_PS)
    num_samples = correct_PS.shape[1]
    if not 1 <= k <= num_samples or k != int(k):
        raise ValueError(f"k={k} with {num_samples} samples a problem; take k from 1 to {num_samples} or sample more")
    failing = [
        float(np.prod(1 - k / np.arange(num_samples - right + 1, num_samples + 1))) for right in range(num_samples + 1)
    ]
    values_P = 1 - np.array(failing)[correct_PS.sum(axis=1).astype(int)]
    return of_problems(values_P, num_samples, clusters_P, confidence)


def majority_at_k(
    answers_PS: Sequence[Sequence[str]],
    correct_PS: ArrayLike,
    clusters_P: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Accuracy of each problem's most frequent answer among its S samples (k = S).

    A sample without an answer ('') casts no vote; a problem without any vote is wrong. Among tied answers one is
    drawn, so that the problem's value is the share of the tied answers that are right. Answers are compared as the
    strings they are: normalise them before.

    References
    ----------
    Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning in Language Models".

    Examples
    --------
    >>> majority_at_k([["7", "7", "3"], ["1", "", "2"]], [[1, 1, 0], [0, 0, 1]]).value
    0.75
    """
    correct_PS = outcomes(correct_PS)
    num_problems, num_samples = correct_PS.shape
    if len(answers_PS) != num_problems or any(len(answers) != num_samples for answers in answers_PS):
        raise ValueError(f"answers_PS is not {num_problems} x {num_samples} as correct_PS is; give one answer a sample")
    values_P = [_majority(answers_S, correct_S) for answers_S, correct_S in zip(answers_PS, correct_PS)]
    return of_problems(np.array(values_P), num_samples, clusters_P, confidence)


def _majority(answers_S: Sequence[str], correct_S: NDArray) -> float:
    votes: dict[str, list[float]] = {}
    for answer, correct in zip(answers_S, correct_S):
        if answer:
            votes.setdefault(str(answer), []).append(float(correct))
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    return float(np.mean([np.mean(ballots) for ballots in votes.values() if len(ballots) == most]))


def by_group(
    correct_PS: ArrayLike, groups_P: ArrayLike, clusters_P: ArrayLike | None = None, confidence: float = 0.95
) -> dict[Hashable, Estimate]:
    """`mean` within each group of problems (source, difficulty), in the order of the sorted labels.

    Examples
    --------
    >>> {group: (e.value, e.n) for group, e in by_group([[1], [0], [1]], ["aime", "aime", "omni"]).items()}
    {'aime': (0.5, 2), 'omni': (1.0, 1)}
    """
    correct_PS = outcomes(correct_PS)
    groups_P = labels(groups_P, len(correct_PS), "groups_P")
    clusters_P = None if clusters_P is None else labels(clusters_P, len(correct_PS), "clusters_P")
    return {
        group: mean(correct_PS[rows], None if clusters_P is None else clusters_P[rows], confidence)
        for group, rows in ((group, groups_P == group) for group in np.unique(groups_P).tolist())
    }


def post_stratified(
    correct_PS: ArrayLike,
    groups_P: ArrayLike,
    share_by_group: Mapping[Hashable, float],
    confidence: float = 0.95,
) -> Estimate:
    r"""pass@1 on a population in which the groups have other shares than in the set that was measured.

    .. math:: \hat\mu = \sum_g w_g \bar s_g, \qquad SE^2 = \sum_g w_g^2 \frac{S_g^2}{n_g}

    with S_g^2 the sample variance of the problem means in group g. The interval is Wilson's at the effective n of that
    SE. Shares are taken as known, and problems as independent.

    References
    ----------
    Cochran 1977, "Sampling Techniques", eq. 5.6 and section 5A.9.

    Examples
    --------
    >>> easy, hard = [[1], [1], [1], [0]], [[0], [1], [0], [0]]
    >>> round(post_stratified(easy + hard, ["easy"] * 4 + ["hard"] * 4, {"easy": 0.2, "hard": 0.8}).value, 3)
    0.35
    """
    correct_PS = outcomes(correct_PS)
    values_P = correct_PS.mean(axis=1)
    groups_P = labels(groups_P, len(values_P), "groups_P")
    found = np.unique(groups_P).tolist()
    if set(found) != set(share_by_group):
        raise ValueError(f"shares are given for {sorted(share_by_group)} but the groups are {found}; give one for each")
    shares = np.array([share_by_group[group] for group in found], dtype=float)
    if not np.isclose(shares.sum(), 1) or shares.min() < 0:
        raise ValueError(f"shares {dict(zip(found, shares.tolist()))} are not a distribution; make them sum to 1")
    group_of_P = np.searchsorted(found, groups_P)
    sizes = np.bincount(group_of_P)
    if sizes.min() < 2:
        raise ValueError(f"group {found[int(sizes.argmin())]!r} has one problem, no variance; merge it with another")
    means = np.bincount(group_of_P, values_P) / sizes
    value = float(shares @ means)
    residuals_P = (shares / np.sqrt(sizes * (sizes - 1.0)))[group_of_P] * (values_P - means[group_of_P])
    se = float(np.sqrt(residuals_P @ residuals_P))
    n_weighted = 1 / float(shares**2 @ (1 / sizes))
    n_effective = n_weighted
    if 0 < value < 1:
        n_effective = _effective_n(value, se**2, n_weighted, correct_PS.shape[1], confidence)
    interval = wilson(value, n_effective, confidence)
    return Estimate(value, se, interval.low, interval.high, len(values_P))


def of_problems(
    values_P: NDArray, num_samples: int, clusters_P: ArrayLike | None = None, confidence: float = 0.95
) -> Estimate:
    """Mean of one value in [0, 1] a problem, each made of `num_samples` samples, with the interval of `mean`.

    Examples
    --------
    >>> round(of_problems(np.array([0.25, 0.75, 1.0]), num_samples=4).value, 3)
    0.667
    """
    value = min(max(float(values_P.mean()), 0.0), 1.0)
    interval = wilson(value, effective_n(values_P, num_samples, clusters_P, confidence), confidence)
    return Estimate(value, clustered_se(values_P, clusters_P), interval.low, interval.high, len(values_P))


def of_clusters(sums_C: ArrayLike, sizes_C: ArrayLike, confidence: float = 0.95) -> Estimate:
    r"""Mean over all members of clusters of unequal size, such as the positions of each problem's texts.

    .. math:: \bar x = \frac{\sum_c x_c}{\sum_c m_c}, \qquad
              SE^2 = \frac{G}{G-1} \frac{\sum_c (x_c - m_c \bar x)^2}{(\sum_c m_c)^2}, \qquad
              \bar x \pm t_{G-1} \, SE

    with x_c the sum and m_c the number of members of cluster c. `n` counts the G clusters; NaN without any.

    References
    ----------
    Cochran 1977, "Sampling Techniques", eq. 6.13 and section 9A.2 (a ratio of two totals).

    Examples
    --------
    >>> [round(x, 3) for x in of_clusters([3.0, 1.0, 8.0], [3, 1, 4])]
    [1.5, 0.39, -0.179, 3.179, 3]
    """
    sums_C, sizes_C = np.asarray(sums_C, dtype=float), np.asarray(sizes_C, dtype=float)
    num_clusters, total = len(sums_C), sizes_C.sum()
    value = float(sums_C.sum() / total) if total > 0 else float("nan")
    if num_clusters < 2:
        return Estimate(value, float("nan"), float("nan"), float("nan"), num_clusters)
    residuals_C = sums_C - sizes_C * value
    se = float(np.sqrt(num_clusters / (num_clusters - 1) * (residuals_C @ residuals_C)) / total)
    half = float(special.stdtrit(num_clusters - 1, (1 + confidence) / 2)) * se
    return Estimate(value, se, value - half, value + half, num_clusters)


def clustered_se(values_P: NDArray, clusters_P: ArrayLike | None = None) -> float:
    r"""Standard error of the mean of `values_P`, whose clusters are independent; the formula stands in `mean`.

    References
    ----------
    Miller 2024, eq. 4, with the factor G / (G - 1) of Cameron and Miller 2015, section II.B.

    Examples
    --------
    >>> round(clustered_se(np.array([1.0, 1.0, 0.0, 0.0]), ["a", "a", "b", "b"]), 3)
    0.5
    """
    sums_C, _ = _by_cluster(values_P - values_P.mean(), clusters_P)
    num_clusters = len(sums_C)
    if num_clusters < 2:
        return float("nan")
    return float(np.sqrt(num_clusters / (num_clusters - 1) * (sums_C @ sums_C)) / len(values_P))


def effective_n(
    values_P: NDArray, num_samples: int, clusters_P: ArrayLike | None = None, confidence: float = 0.95
) -> float:
    r"""Number of independent right-or-wrong problems whose mean would be as uncertain as this one.

    .. math:: n^* = n \frac{\bar s (1 - \bar s)}{v^*}, \qquad
              v^* = \frac{n v + z^2 \max(v, \bar s (1 - \bar s))}{n + z^2}, \qquad
              v = n \, SE^2 \, \frac{G-1}{G} \Big(\frac{t_{G-1}}{t_{n-1}}\Big)^2

    with n* at most n S. One sample a problem and no clusters give n itself. The z^2 problems whose samples all agree
    allow for v being estimated: without them a hundred problems at accuracy .05 with four samples each are covered 93
    times in 100. Where all values are 0, or all are 1, nothing is known of v, and each cluster counts once.

    References
    ----------
    Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts", for
    n* and the ratio of t quantiles; the z^2 problems follow Wilson 1927 and are checked by simulation.

    Examples
    --------
    >>> round(effective_n(np.array([1.0, 0.0, 1.0, 1.0]), num_samples=1), 6)
    4.0
    """
    n = len(values_P)
    num_clusters = n if clusters_P is None else len(np.unique(labels(clusters_P, n, "clusters_P")))
    value = float(values_P.mean())
    if num_clusters < 2:
        return 1.0
    variance = clustered_se(values_P, clusters_P) ** 2 * (num_clusters - 1) / num_clusters
    if num_clusters < n:
        upper = (1 + confidence) / 2
        variance *= (special.stdtrit(num_clusters - 1, upper) / special.stdtrit(n - 1, upper)) ** 2
    return _effective_n(value, variance, n, num_samples, confidence) if 0 < value < 1 else float(num_clusters)


def _effective_n(value: float, variance: float, n: float, num_samples: int, confidence: float) -> float:
    """n* of a mean with this `variance` over `n` problems."""
    spread = value * (1 - value)
    z2 = normal_quantile(confidence) ** 2
    shrunk = (n * n * variance + z2 * max(n * variance, spread)) / (n + z2)
    return min(n * spread / shrunk, float(n * num_samples))


def normal_quantile(confidence: float) -> float:
    """z of a two-sided interval.

    Examples
    --------
    >>> round(normal_quantile(0.95), 4)
    1.96
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1; 0.95 is usual")
    return float(special.ndtri((1 + confidence) / 2))


def outcomes(correct_PS: ArrayLike, name: str = "correct_PS") -> NDArray[np.float64]:
    """`correct_PS` as floats, after checking that it is problems x samples and holds only 0 and 1.

    Examples
    --------
    >>> outcomes([[True, False]])
    array([[1., 0.]])
    """
    try:
        array = np.asarray(correct_PS, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not a table of numbers ({error}); give every problem the same samples") from error
    if array.ndim == 1:
        raise ValueError(f"{name} has one axis, of {array.size}; for one sample a problem pass it as {name}[:, None]")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; give problems x samples with at least one of each")
    wrong = np.argwhere((array != 0) & (array != 1))
    if len(wrong):
        problem, sample = wrong[0].tolist()
        raise ValueError(
            f"{name}[{problem}, {sample}] is {array[problem, sample]}, neither 0 nor 1 ({len(wrong)} such entries); "
            "a sample without a grade must be graded, or the problem left out of both arms"
        )
    return array


def labels(labels_P: ArrayLike, num_problems: int, name: str) -> NDArray:
    """`labels_P` as an array, after checking that there is one label a problem.

    Examples
    --------
    >>> labels(["aime", "omni"], 2, "groups_P").tolist()
    ['aime', 'omni']
    """
    array = np.asarray(labels_P)
    if array.shape != (num_problems,):
        raise ValueError(f"{name} has shape {array.shape} for {num_problems} problems; give one label a problem")
    return array


def _by_cluster(values_P: NDArray, clusters_P: ArrayLike | None) -> tuple[NDArray, NDArray]:
    """Sum of the values, and number of problems, of each cluster."""
    if clusters_P is None:
        return values_P, np.ones(len(values_P))
    _, cluster_of_P = np.unique(labels(clusters_P, len(values_P), "clusters_P"), return_inverse=True)
    return np.bincount(cluster_of_P, values_P), np.bincount(cluster_of_P).astype(float)

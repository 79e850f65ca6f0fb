"""Where the variance of a graded sample lies: between problems, or between the samples of one problem."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssd.stats.estimate import outcomes

LEAST_MIXED = 20  # problems with both right and wrong samples, below which the intervals of `components` are too short


class Components(NamedTuple):
    """Variance of one sample's outcome, split, with the interval of each part; `n` problems, `k` samples each."""

    total: float
    total_ci_low: float
    total_ci_high: float
    between: float
    between_ci_low: float
    between_ci_high: float
    within: float
    within_ci_low: float
    within_ci_high: float
    between_share: float
    between_share_ci_low: float
    between_share_ci_high: float
    reliability: float
    reliability_ci_low: float
    reliability_ci_high: float
    n: int
    k: int


def components(
    correct_PS: ArrayLike, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Components:
    r"""Split the variance of a sample's outcome by the law of total variance, without the bias of few samples.

    .. math:: Var(s) = Var(x) + E[\sigma^2], \qquad
              \widehat{E[\sigma^2]} = MSW = \frac1n \sum_i \frac{k}{k-1} \bar s_i (1 - \bar s_i), \qquad
              \widehat{Var(x)} = S^2_{\bar s} - \frac{MSW}{k}

    where x is a problem's chance of being solved, and S^2 the sample variance of the problem means, which counts
    E[sigma^2] / k as if it lay between problems. `total` is the sum, `between_share` the part of it between problems
    (the intraclass correlation), and `reliability` = Var(x) / S^2, the share of the variance of the problem means at
    this k that more samples would not remove. Intervals are percentiles over resampled problems; they are too short
    where fewer than about 20 (LEAST_MIXED) problems have both right and wrong samples.

    Returns
    -------
    Components
        With k = 1 the split is undefined: `between`, `within`, `between_share` and `reliability` are NaN, `total` is
        known. Where every outcome is the same, `total` is 0 and the shares are NaN. `between` is not cut at 0, which
        would bias it: a value below 0 says that no variance between problems can be seen.

    References
    ----------
    Miller 2024, section 3.1; Searle, Casella and McCulloch 1992, section 3.5 (one-way random-effects ANOVA);
    Shrout and Fleiss 1979, ICC(1,1) and ICC(1,k).

    Examples
    --------
    >>> parts = components([[1, 1], [1, 0], [0, 0], [1, 1]])
    >>> [round(x, 3) for x in (parts.total, parts.between, parts.within, parts.between_share, parts.reliability)]
    [0.292, 0.167, 0.125, 0.571, 0.727]
    """
    correct_PS = outcomes(correct_PS)
    n, k = correct_PS.shape
    if n < 2:
        raise ValueError(f"{n} problem has no variance between problems; give at least 2")
    # The number right is all that the estimators use of a problem, so a resample is a draw of how often each occurs.
    counts_R = np.bincount(correct_PS.sum(axis=1).astype(int), minlength=k + 1)
    estimates_Q = _split(counts_R[None, :])[0]
    draws_BR = np.random.default_rng(seed).multinomial(n, counts_R / n, size=num_resamples)
    lows_Q, highs_Q = _percentiles(_split(draws_BR), confidence)
    # A quantity that is undefined for the set itself has no interval either.
    lows_Q, highs_Q = (np.where(np.isnan(estimates_Q), np.nan, bounds) for bounds in (lows_Q, highs_Q))
    triples = np.column_stack([estimates_Q, lows_Q, highs_Q]).ravel().tolist()
    return Components(*triples, n, k)


def _split(counts_BR: NDArray) -> NDArray:
    """total, between, within, between_share and reliability (columns) of each row of counts by number right."""
    n, k = counts_BR[0].sum(), counts_BR.shape[1] - 1
    means_R = np.arange(k + 1) / k
    mean_B = counts_BR @ means_R / n
    of_means_B = ((counts_BR @ means_R**2) / n - mean_B**2) * n / (n - 1)
    # Cancellation leaves 1e-17 where all problem means are equal.
    of_means_B[np.abs(of_means_B) < 1e-14] = 0.0
    if k == 1:
        undefined_B = np.full_like(of_means_B, np.nan)
        return np.column_stack([of_means_B] + [undefined_B] * 4)
    within_B = counts_BR @ (means_R * (1 - means_R)) / n * k / (k - 1)
    between_B = of_means_B - within_B / k
    total_B = between_B + within_B
    with np.errstate(invalid="ignore", divide="ignore"):
        share_B = np.where(total_B > 0, between_B / total_B, np.nan)
        reliability_B = np.where(of_means_B > 0, between_B / of_means_B, np.nan)
    return np.column_stack([total_B, between_B, within_B, share_B, reliability_B])


def _percentiles(resampled_BQ: NDArray, confidence: float) -> tuple[NDArray, NDArray]:
    bounds_2Q = np.full((2, resampled_BQ.shape[1]), np.nan)
    for column, values_B in enumerate(resampled_BQ.T):
        defined = values_B[~np.isnan(values_B)]
        if len(defined):
            bounds_2Q[:, column] = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return bounds_2Q[0], bounds_2Q[1]

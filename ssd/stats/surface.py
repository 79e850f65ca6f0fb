"""A smooth response over settings, from trials that are noisy and of unequal size.

One trial's estimate is off by points; its neighbours' trials speak about it too. Rows lie in the unit cube of settings,
one a trial.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, optimize, special

from ssd.stats.estimate import outcomes

# Priors, log-normal and wide: pass@1 varies by some 5 points, within about half of each setting's range.
SCALE, SCALE_SPREAD = 0.05, 0.75
LENGTH, LENGTH_SPREAD = 0.5, 1.0
JITTER = 1e-8


class Surface(NamedTuple):
    """A Gaussian process given its trials: `lengths_D` by setting, `scale` of its deviations from `level`."""

    x_TD: NDArray
    lengths_D: NDArray
    scale: float
    level: float
    weights_T: NDArray
    factor: tuple

    def at(self, x_QD: ArrayLike) -> tuple[NDArray, NDArray]:
        """Mean and standard deviation of the response at the rows of `x_QD`; the deviation is not the noise's."""
        covariance_QT = self.scale**2 * _correlation(np.asarray(x_QD, dtype=float), self.x_TD, self.lengths_D)
        explained_Q = np.sum(linalg.solve_triangular(self.factor[0], covariance_QT.T, lower=True) ** 2, axis=0)
        return self.level + covariance_QT @ self.weights_T, np.sqrt(np.maximum(self.scale**2 - explained_Q, 0.0))


def fit(x_TD: ArrayLike, y_T: ArrayLike, variance_T: ArrayLike) -> Surface:
    r"""Gaussian process through trials at `x_TD` with responses `y_T`, each with its own known noise variance.

    .. math:: y = \mu + f(x) + \epsilon, \quad f \sim GP(0, s^2 e^{-\frac12 \sum_d (x_d - x'_d)^2 / l_d^2}),
              \quad \epsilon_t \sim N(0, v_t)

    mu is the generalized least-squares mean; s and l_d maximize the marginal likelihood times their priors.

    References
    ----------
    Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", ch. 2 and eq. 5.8.

    Examples
    --------
    >>> surface = fit([[0.0], [0.5], [1.0]], [0.40, 0.50, 0.40], [1e-6, 1e-6, 1e-6])
    >>> mean_Q, sd_Q = surface.at([[0.5], [0.25]])
    >>> mean_Q.round(2).tolist(), bool(sd_Q[1] > sd_Q[0])
    ([0.5, 0.45], True)
    """
    x_TD, y_T, variance_T = (np.asarray(each, dtype=float) for each in (x_TD, y_T, variance_T))
    if x_TD.ndim != 2 or not len(x_TD) == len(y_T) == len(variance_T) >= 1:
        raise ValueError(f"x_TD {x_TD.shape}, y_T {y_T.shape} and variance_T {variance_T.shape} are not of one length")
    middle = np.log([SCALE, *[LENGTH] * x_TD.shape[1]])
    spread = np.array([SCALE_SPREAD, *[LENGTH_SPREAD] * x_TD.shape[1]])

    def given(log_scale_and_lengths: NDArray) -> Surface:
        scale, *lengths_D = np.exp(log_scale_and_lengths)
        return through(x_TD, y_T, variance_T, float(scale), np.array(lengths_D))

    def cost(log_scale_and_lengths: NDArray) -> float:
        surface = given(log_scale_and_lengths)
        misfit = 0.5 * (y_T - surface.level) @ surface.weights_T + np.log(np.diag(surface.factor[0])).sum()
        return float(misfit + 0.5 * np.sum(((log_scale_and_lengths - middle) / spread) ** 2))

    box = [(m - 4 * s, m + 4 * s) for m, s in zip(middle, spread)]
    return given(optimize.minimize(cost, middle, method="L-BFGS-B", bounds=box).x)


def through(x_TD: NDArray, y_T: NDArray, variance_T: NDArray, scale: float, lengths_D: NDArray) -> Surface:
    """The surface through trials at a known scale and known lengths."""
    covariance = scale**2 * _correlation(x_TD, x_TD, lengths_D) + np.diag(variance_T + JITTER)
    factor = linalg.cho_factor(covariance, lower=True)
    of_ones = linalg.cho_solve(factor, np.ones(len(y_T)))
    level = float(of_ones @ y_T / of_ones.sum())
    return Surface(x_TD, lengths_D, scale, level, linalg.cho_solve(factor, y_T - level), factor)


def expected_improvement(mean_Q: NDArray, sd_Q: NDArray, best: float) -> NDArray[np.float64]:
    r"""How much the response is expected to exceed `best`, where it does.

    .. math:: E[\max(0, f - b)] = (m - b) \Phi(u) + s \phi(u), \qquad u = (m - b) / s

    References
    ----------
    Jones, Schonlau and Welch 1998, eq. 15.

    Examples
    --------
    >>> expected_improvement(np.array([0.0]), np.array([1.0]), best=0.0).round(4).tolist()
    [0.3989]
    """
    sd_Q = np.maximum(sd_Q, 1e-12)
    u_Q = (mean_Q - best) / sd_Q
    return (mean_Q - best) * special.ndtr(u_Q) + sd_Q * np.exp(-0.5 * u_Q**2) / np.sqrt(2 * np.pi)


def level_parts(trials_PS: list[ArrayLike]) -> tuple[NDArray, NDArray]:
    r"""Estimates of trials on nested parts of the same problems, as if each had done them all, and their variances.

    Trial t did the first m_t problems. How much easier these are than all M is what the trials that did all say:

    .. math:: y_t = \bar x_t + \bar c - \bar c_{1..m_t}, \qquad v_t = Var_i(x_{ti} - c_i) / m_t

    with c_i the mean of the complete trials on problem i, trial t itself left out of its own variance. What all trials
    share cancels in differences, as in a paired comparison. Each variance has two problems added, one right and one
    wrong by a sample, so that no trial counts as exact.

    Examples
    --------
    >>> y_T, v_T = level_parts([[[1], [1], [0], [0]] * 10, [[1], [1], [0], [0]] * 3])  # the first problems are easier
    >>> y_T.round(3).tolist()
    [0.5, 0.5]
    """
    trials_PS = [outcomes(each, f"trial {t}") for t, each in enumerate(trials_PS)]
    return level_means([trial.mean(axis=1) for trial in trials_PS], [trial.shape[1] for trial in trials_PS])


def level_means(means_P: Sequence[NDArray], num_samples_T: ArrayLike) -> tuple[NDArray, NDArray]:
    """`level_parts` of trials by their share of right samples, by problem, and their number of samples a problem."""
    sizes_T, num_samples_T = np.array([len(own_P) for own_P in means_P]), np.asarray(num_samples_T)
    y_T, variance_T = np.empty(len(sizes_T)), np.empty(len(sizes_T))
    longest = sizes_T.max(initial=0)
    num_complete = np.sum(sizes_T == longest)
    total_P = np.sum([own_P for own_P in means_P if len(own_P) == longest], axis=0)
    for m in np.unique(sizes_T):  # trials of one size together, since there may be a thousand
        same_size, is_complete = np.flatnonzero(sizes_T == m), m == longest
        own_TP = np.array([means_P[t] for t in same_size])
        ease = total_P[:m].mean() / num_complete - total_P.mean() / num_complete
        num_others = num_complete - is_complete
        others_TP = (total_P[:m] - own_TP * is_complete) / num_others if num_others else own_TP.mean(1, keepdims=True)
        residual_TP = own_TP - others_TP
        squares_T = np.sum((residual_TP - residual_TP.mean(1, keepdims=True)) ** 2, axis=1)
        y_T[same_size] = own_TP.mean(1) - ease
        variance_T[same_size] = (squares_T + 2 / num_samples_T[same_size] ** 2) / (m + 1) / m
    return y_T, variance_T


def merged(x_TD: NDArray, y_T: NDArray, variance_T: NDArray, at_most: int) -> tuple[NDArray, NDArray, NDArray]:
    """Trials as `at_most` groups of near ones, the mean of each by precision, since a surface costs the cube of them.

    The largest group is halved along its widest setting until there are enough.

    Examples
    --------
    >>> x_TD, y_T, variance_T = merged(np.array([[0.0], [0.1], [0.9]]), np.array([0.4, 0.6, 0.5]), np.ones(3), 2)
    >>> x_TD[:, 0].tolist(), y_T.tolist(), variance_T.tolist()
    ([0.05, 0.9], [0.5, 0.5], [0.5, 1.0])
    """
    if len(y_T) <= at_most:
        return x_TD, y_T, variance_T
    groups = [(-len(y_T), 0, np.arange(len(y_T)))]  # a heap: the largest first
    while len(groups) < at_most:
        _, _, largest = heapq.heappop(groups)
        widest = np.argmax(np.ptp(x_TD[largest], axis=0))
        ordered = largest[np.argsort(x_TD[largest, widest], kind="stable")]
        for half in (ordered[: (len(ordered) + 1) // 2], ordered[(len(ordered) + 1) // 2 :]):
            heapq.heappush(groups, (-len(half), int(half.min()), half))
    numbers = [trials for _, _, trials in groups]
    precision_T = 1 / variance_T
    total_G = np.array([precision_T[trials].sum() for trials in numbers])
    x_GD = np.array([precision_T[trials] @ x_TD[trials] for trials in numbers]) / total_G[:, None]
    return x_GD, np.array([precision_T[trials] @ y_T[trials] for trials in numbers]) / total_G, 1 / total_G


def _correlation(x_QD: NDArray, x_TD: NDArray, lengths_D: NDArray) -> NDArray:
    # Setting by setting: numpy is slow at sums over a short last axis.
    squares_QT = sum(((x_QD[:, d, None] - x_TD[None, :, d]) / length) ** 2 for d, length in enumerate(lengths_D))
    return np.exp(-0.5 * squares_QT)

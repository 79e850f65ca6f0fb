"""Looking often without cheating: bounds for a test that is repeated while its data grow.

A difference that is tested at each of several looks at 5% is found where there is none far more often than 5%. An
alpha-spending function says how much of the error is spent by which share of the data; the bounds follow from it, and
hold for looks at any shares.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, optimize, special

GRID_POINTS = 513  # of the density between two looks, by Simpson's rule; the bounds are exact to four decimals
REACH = 8.0  # standard deviations of the score beyond which there is no mass


def spent(information_J: Sequence[float], alpha: float) -> NDArray[np.float64]:
    r"""Error spent by each share of the data, after Pocock: about evenly, so that early looks can stop.

    .. math:: \alpha(t) = \alpha \ln(1 + (e - 1) t)

    References
    ----------
    Lan and DeMets 1983, "Discrete sequential boundaries for clinical trials", spending function 2.

    Examples
    --------
    >>> spent([0.25, 1.0], alpha=0.05).round(4).tolist()
    [0.0179, 0.05]
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha {alpha} is not between 0 and 0.5; a one-sided error of 5% is 0.05")
    information_J = np.asarray(information_J, dtype=float)
    if information_J.ndim != 1 or not len(information_J) or not (np.diff(information_J, prepend=0.0) > 0).all():
        raise ValueError(f"information {information_J.tolist()} is not a growing list of shares above 0")
    if information_J[-1] > 1:
        raise ValueError(f"information {information_J.tolist()} goes beyond 1, which is all of the data")
    return alpha * np.log1p((np.e - 1) * information_J)


def bounds(information_J: Sequence[float], alpha: float) -> NDArray[np.float64]:
    r"""z_j of one-sided looks at shares t_j of the data, such that crossing at any look has chance alpha(1) in all.

    .. math:: P(Z_1 < z_1, \dots, Z_{j-1} < z_{j-1}, Z_j \ge z_j) = \alpha(t_j) - \alpha(t_{j-1})

    where Z_j \sqrt{t_j} is a Brownian motion at t_j, as the sum of differences of problems that are drawn alike is in
    the limit. The density of paths that crossed nothing is carried from look to look by numerical integration.

    References
    ----------
    Lan and DeMets 1983; Armitage, McPherson and Rowe 1969 for the recursion.

    Examples
    --------
    >>> bounds([0.2, 0.4, 0.6, 0.8, 1.0], alpha=0.025).round(3).tolist()
    [2.438, 2.427, 2.41, 2.397, 2.386]
    """
    spent_J = spent(information_J, alpha)
    t_J = np.asarray(information_J, dtype=float)
    bounds_J = np.empty(len(t_J))
    s, density, before = np.zeros(1), None, 0.0  # scores of the last look and the density there; first a point at 0
    for j, (t, to_spend) in enumerate(zip(t_J, np.diff(spent_J, prepend=0.0))):
        sd = np.sqrt(t - before)

        def crossing(bound: float, s=s, density=density, sd=sd) -> float:
            chances = special.ndtr((s - bound) / sd)
            return float(chances[0] if density is None else integrate.simpson(density * chances, x=s))

        limit = REACH * np.sqrt(t)
        bound = optimize.brentq(lambda x: crossing(x) - to_spend, -limit, limit, xtol=1e-10)  # noqa: B023
        bounds_J[j] = bound / np.sqrt(t)
        to = np.linspace(-limit, bound, GRID_POINTS)
        steps = np.exp(-0.5 * ((to[:, None] - s) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))
        density = steps[:, 0] if density is None else integrate.simpson(density * steps, x=s, axis=1)
        s, before = to, t
    return bounds_J

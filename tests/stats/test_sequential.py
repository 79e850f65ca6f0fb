"""Bounds for repeated looks, against published ones, another way to compute them, and simulated races."""

import numpy as np
import pytest
from scipy import stats

from ssd import search
from ssd.stats import compare, sequential


def test_bounds_are_the_published_ones_of_pocock_type_spending():
    """Five equal looks, two-sided 5%: Reboussin et al. 2000, "Computations for group sequential boundaries", WinLD."""
    found = sequential.bounds([0.2, 0.4, 0.6, 0.8, 1.0], alpha=0.025)
    assert found == pytest.approx([2.4380, 2.4268, 2.4101, 2.3966, 2.3860], abs=2e-4)


def test_one_look_at_all_of_the_data_is_the_ordinary_test():
    assert sequential.bounds([1.0], 0.025) == pytest.approx([stats.norm.ppf(0.975)])


@pytest.mark.parametrize("alpha", [0.01, 0.3])
@pytest.mark.parametrize("shares", [[0.0625, 0.125, 0.25, 0.5, 1.0], [0.5, 0.9]])
def test_each_look_spends_what_is_its_own_by_the_multivariate_normal_distribution(shares, alpha):
    z_J, spent_J = sequential.bounds(shares, alpha), alpha * np.log(1 + (np.e - 1) * np.array(shares))
    ratio = np.minimum.outer(shares, shares) / np.maximum.outer(shares, shares)
    for j in range(1, len(shares) + 1):
        never = stats.multivariate_normal(cov=np.sqrt(ratio)[:j, :j], seed=0, abseps=1e-6, releps=1e-6).cdf(z_J[:j])
        assert 1 - never == pytest.approx(spent_J[j - 1], abs=2e-4)


@pytest.mark.parametrize(
    ("shares", "alpha", "message"),
    [
        ([0.5, 0.5], 0.05, r"\[0.5, 0.5\] is not a growing list"),
        ([0.5, 1.5], 0.05, "goes beyond 1"),
        ([0.5, 1.0], 0.5, "alpha 0.5 is not between 0 and 0.5"),
    ],
)
def test_looks_that_mean_nothing_are_refused(shares, alpha, message):
    with pytest.raises(ValueError, match=message):
        sequential.bounds(shares, alpha)


def test_a_trial_as_good_as_the_best_is_stopped_no_more_often_than_alpha_however_often_it_is_looked_at():
    """And would be, if each look were a test of its own."""
    rng, alpha, sizes, num_races = np.random.default_rng(0), 0.1, [50, 100, 200, 400, 800], 800
    stopped = stopped_naively = 0
    for _ in range(num_races):
        chances_P1 = rng.beta(0.5, 0.5, (sizes[-1], 1))
        trial_PS, best_PS = (rng.random((sizes[-1], 2)) < chances_P1 for _ in range(2))
        stopped += len(search.race(lambda n, own=trial_PS: own[:n].astype(float), best_PS, sizes, alpha)) < sizes[-1]
        stopped_naively += any(
            compare.paired(trial_PS[:n], best_PS[:n], confidence=1 - 2 * alpha, num_permutations=1).ci_high < 0
            for n in sizes[:-1]
        )
    assert 0.5 * alpha < stopped / num_races < alpha  # the last look stops nothing, and leaves its share unspent
    assert stopped_naively / num_races > 1.5 * alpha

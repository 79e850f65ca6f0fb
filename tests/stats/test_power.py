"""Sample sizes, detectable effects and budgets against published figures and simulation."""

import math

import numpy as np
import pytest
from scipy.stats import norm
from statsmodels.stats.power import NormalIndPower

from ssd.stats import compare, power


def test_millers_worked_example_needs_969_problems():
    assert power.sample_size_paired(omega2=1 / 9, within_a=0, within_b=0, delta=0.03) == 969


@pytest.mark.parametrize("k, effect", [(1, 0.133), (10, 0.076)])
def test_millers_198_problems_detect_13_points_with_one_sample_and_8_with_ten(k, effect):
    found = power.minimal_detectable_effect(198, omega2=1 / 9, within_a=1 / 6, within_b=1 / 6, k_a=k, k_b=k)
    assert found == pytest.approx(effect, abs=0.0005)


def test_the_ports_case_needs_1450_problems_an_arm_with_the_square_and_not_516():
    assert power.sample_size_unpaired(sigma2=0.23, delta=0.05) == pytest.approx(1450, abs=10)


def test_the_unpaired_size_agrees_with_statsmodels():
    peer = NormalIndPower().solve_power(effect_size=0.05 / math.sqrt(0.23), alpha=0.05, power=0.8)
    assert power.sample_size_unpaired(sigma2=0.23, delta=0.05) == math.ceil(peer)


def test_size_effect_and_power_invert_each_other():
    given = dict(omega2=0.06, within_a=0.03, within_b=0.02, k_a=2, k_b=4)
    effect = power.minimal_detectable_effect(500, **given, alpha=0.01, power=0.9)
    assert power.sample_size_paired(delta=effect * (1 + 1e-12), **given, alpha=0.01, power=0.9) == 500
    assert power.achieved_power(500, effect, **given, alpha=0.01) == pytest.approx(0.9)


def test_independent_arms_are_the_paired_design_at_rho_zero():
    between, within = 0.2, 0.03
    paired = power.sample_size_paired(power.planned_omega2(between, rho=0), within, within, delta=0.05)
    assert paired == power.sample_size_unpaired(sigma2=between + within, delta=0.05)


def test_planned_omega2_is_the_variance_of_the_difference_of_correlated_arms():
    draws = np.random.default_rng(0).multivariate_normal([0, 0], [[0.2, 0.14], [0.14, 0.2]], size=200_000)
    assert power.planned_omega2(0.2, rho=0.7) == pytest.approx(np.var(draws[:, 0] - draws[:, 1]), rel=0.02)
    assert power.planned_omega2(-0.001) == 0


def test_the_power_formula_agrees_with_simulation():
    # Arm b solves a problem with chance x, arm a with x + .04: omega^2 = 0, what differs is the samples alone.
    rng = np.random.default_rng(1)
    chances_P = rng.uniform(0, 0.96, 100_000)
    within_b, within_a = (np.mean(x * (1 - x)) for x in (chances_P, chances_P + 0.04))
    formula = power.achieved_power(400, 0.04, 0, within_a, within_b, k_a=4, k_b=4)
    calls = 0
    for seed in range(1500):
        x_P = rng.choice(chances_P, 400)[:, None]
        a_PS, b_PS = rng.random((400, 4)) < x_P + 0.04, rng.random((400, 4)) < x_P
        calls += compare.paired(a_PS, b_PS, num_permutations=999, seed=seed).p_value <= 0.05
    assert calls / 1500 == pytest.approx(formula, abs=0.035)


@pytest.mark.parametrize(("delta", "n"), [(0.0, 5254), (0.002, 5483), (0.004, 6303), (0.006, 8021)])
def test_equivalence_takes_problems_for_both_bounds(delta, n):
    # At 0 each bound is missed with half of beta: (z_.975 + z_.9)^2 .2 / .02^2 (Julious 2004); the others by bisection.
    if not delta:
        assert math.ceil((norm.isf(0.025) + norm.isf(0.1)) ** 2 * 0.2 / 0.02**2) == n
    found = power.sample_size_equivalent(0.2, delta, 0.02)
    assert found == pytest.approx(n, abs=1)
    se = math.sqrt(0.2 / found)
    values = np.random.default_rng(0).normal(delta, se, 200_000)
    assert (np.abs(values) + norm.isf(0.025) * se < 0.02).mean() == pytest.approx(0.8, abs=0.005)


def test_of_a_single_problem_more_samples_are_all_there_is():
    best = power.optimal_k(10**8, max_problems=1, omega2=0.05, within_a=0.03, within_b=0.03)
    assert (best.n, best.k) == (1, 10**8)


def test_a_large_budget_is_spent_as_well_as_a_small_one_without_trying_every_k():
    settings = {"omega2": 0.05, "within_a": 0.3, "within_b": 0.3, "problem_cost": 1_000}
    plans = power.allocations(10**6, max_problems=900, **settings)
    by_hand = min(
        power.minimal_detectable_effect(min(900, 10**6 // (k + 1_000)), 0.05, 0.3, 0.3, k, k) for k in range(1, 3_000)
    )
    assert min(plan.minimal_detectable_effect for plan in plans) == pytest.approx(by_hand)
    assert len(plans) < 2_500 and len(power.allocations(2 * 10**7, 10**6, 0.05, 0.1, 0.1)) < 20_000


def test_one_sample_of_many_problems_beats_many_of_few():
    assert power.optimal_k(1000, max_problems=10_000, omega2=0.01, within_a=0.2, within_b=0.2).k == 1


def test_where_problems_run_out_samples_are_what_is_left():
    best = power.optimal_k(4000, max_problems=1000, omega2=0.05, within_a=0.03, within_b=0.03)
    assert (best.n, best.k) == (1000, 4)


def test_where_problems_cost_the_optimal_k_is_cochrans():
    # sqrt((0.1 + 0.1) / 0.05 * 9) = 6.
    best = power.optimal_k(150_000, 10**6, omega2=0.05, within_a=0.1, within_b=0.1, problem_cost=9)
    assert (best.n, best.k) == (10_000, 6)


def test_the_frontier_spends_no_more_than_the_budget_and_knows_each_effect():
    for plan in power.allocations(97, max_problems=30, omega2=0.05, within_a=0.1, within_b=0.1, problem_cost=2):
        assert plan.n * (plan.k + 2) <= 97 and 1 <= plan.n <= 30
        se = math.sqrt((0.05 + 0.2 / plan.k) / plan.n)
        assert plan.minimal_detectable_effect == pytest.approx((norm.isf(0.025) + norm.isf(0.2)) * se)


def test_cost_counts_tokens_hours_and_money_and_knows_no_price_it_was_not_given():
    assert power.cost(1000, 20_000, 2_000, 2.5) == pytest.approx((2e7, 2e7 / 2_000 / 3600, 2e7 / 2_000 / 3600 * 2.5))
    assert math.isnan(power.cost(1000, 20_000, 2_000).money)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: power.sample_size_unpaired(0.23, delta=5), "5 points are 0.05"),
        (lambda: power.sample_size_unpaired(0.23, delta=0), "delta 0"),
        (lambda: power.sample_size_unpaired(0.23, 0.05, alpha=5), "alpha 5"),
        (lambda: power.sample_size_unpaired(0.23, 0.05, power=0.01), "power 0.01 is what no difference"),
        (lambda: power.sample_size_equivalent(0.2, 0.02, 0.02), "does not lie within the margin"),
        (lambda: power.sample_size_paired(-0.1, 0, 0, 0.05), "omega2 is -0.1"),
        (lambda: power.sample_size_paired(0.1, float("nan"), 0, 0.05), "within_a is nan"),
        (lambda: power.minimal_detectable_effect(0, 0.1, 0, 0), "n=0"),
        (lambda: power.minimal_detectable_effect(10, 0.1, 0, 0, k_a=0), "k_a=0"),
        (lambda: power.achieved_power(10, 0.1, 0, 0, 0), "are all 0"),
        (lambda: power.planned_omega2(float("nan")), "measure the base with k of 2 or more"),
        (lambda: power.planned_omega2(0.2, rho=2), "rho 2"),
        (lambda: power.optimal_k(0, 10, 0.1, 0, 0), "budget 0"),
        (lambda: power.cost(10, 10, 0), "throughput must be above 0"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()

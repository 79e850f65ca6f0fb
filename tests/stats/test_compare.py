"""Differences of arms against exhaustive definitions, published figures, statsmodels and simulation."""

import itertools
import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import binomtest, t
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep

from ssd.stats import compare
from ssd.stats.compare import Difference

RNG = np.random.default_rng


def arms(only_a, only_b, both=10, neither=10):
    pairs = [(1, 0)] * only_a + [(0, 1)] * only_b + [(1, 1)] * both + [(0, 0)] * neither
    return np.array(pairs)[:, :1], np.array(pairs)[:, 1:]


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (1, 0), (5, 5), (9, 2), (3, 30)])
def test_one_sample_a_problem_is_tested_by_exact_mcnemar(only_a, only_b):
    found = compare.paired(*arms(only_a, only_b))
    peer = mcnemar([[10, only_a], [only_b, 10]], exact=True).pvalue if only_a + only_b else 1.0
    assert found.test == "mcnemar-exact" and found.p_value == pytest.approx(peer)


def test_value_and_standard_error_are_those_of_the_differences():
    a_PS, b_PS = RNG(0).integers(0, 2, (40, 3)), RNG(1).integers(0, 2, (40, 5))
    differences_P = a_PS.mean(axis=1) - b_PS.mean(axis=1)
    found = compare.paired(a_PS, b_PS)
    assert found.value == pytest.approx(differences_P.mean())
    assert found.se == pytest.approx(differences_P.std(ddof=1) / math.sqrt(40))
    assert (found.n, found.test) == (40, "sign-flip")


def test_the_clustered_standard_error_agrees_with_statsmodels():
    a_PS, b_PS, clusters_P = RNG(2).integers(0, 2, (90, 2)), RNG(3).integers(0, 2, (90, 2)), RNG(4).integers(0, 20, 90)
    differences_P = a_PS.mean(axis=1) - b_PS.mean(axis=1)
    peer = sm.OLS(differences_P, np.ones(90)).fit(cov_type="cluster", cov_kwds={"groups": clusters_P})
    assert compare.paired(a_PS, b_PS, clusters_P).se == pytest.approx(peer.bse[0])


def test_the_interval_is_bonett_and_prices_with_a_t_quantile():
    only_a, only_b, n = 12, 4, 36
    found = compare.paired(*arms(only_a, only_b))
    # Their formula: (f12 + 1) / (n + 2) and (f21 + 1) / (n + 2) in place of the proportions.
    p12, p21 = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = t.ppf(0.975, n - 1) * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / (n + 2))
    assert (found.ci_low, found.ci_high) == pytest.approx((p12 - p21 - half, p12 - p21 + half))


def test_the_interval_is_the_plain_one_where_problems_are_many():
    a_PS, b_PS = RNG(5).integers(0, 2, (20_000, 4)), RNG(6).integers(0, 2, (20_000, 4))
    found = compare.paired(a_PS, b_PS, num_permutations=99)
    plain = (found.value - 1.96 * found.se, found.value + 1.96 * found.se)
    assert (found.ci_low, found.ci_high) == pytest.approx(plain, abs=1e-5)


def test_arms_that_agree_everywhere_differ_by_zero_within_an_interval_that_has_width():
    for k in (1, 4):
        correct_PS = RNG(7).integers(0, 2, (100, k))
        found = compare.paired(correct_PS, correct_PS)
        assert found.value == found.se == 0 and found.p_value == 1
        assert found.ci_low < -0.004 and found.ci_high > 0.004


def test_sign_flipping_agrees_with_flipping_every_way():
    a_PS, b_PS = RNG(8).integers(0, 2, (12, 3)), RNG(9).integers(0, 2, (12, 3))
    a_PS[:9] = 1
    differences_P = a_PS.mean(axis=1) - b_PS.mean(axis=1)
    sums = [abs(np.dot(signs, differences_P)) for signs in itertools.product((-1, 1), repeat=12)]
    exact = np.mean([total >= abs(differences_P.sum()) - 1e-9 for total in sums])
    assert 0.005 < exact < 0.5
    assert compare.paired(a_PS, b_PS, num_permutations=200_000).p_value == pytest.approx(exact, abs=0.005)


def test_sign_flipping_flips_whole_clusters():
    # Five clusters, all in favour of a: 2 of the 32 ways are as extreme.
    a_PS, b_PS = np.ones((20, 1)), np.zeros((20, 1))
    found = compare.paired(a_PS, b_PS, np.repeat(np.arange(5), 4), num_permutations=100_000)
    assert found.test == "sign-flip" and found.p_value == pytest.approx(2 / 32, abs=0.004)


def test_the_same_seed_gives_the_same_p_value_and_none_is_zero():
    a_PS, b_PS = np.ones((200, 2)), np.zeros((200, 2))
    found = compare.paired(a_PS, b_PS, num_permutations=999)
    assert found == compare.paired(a_PS, b_PS, num_permutations=999)
    assert found.p_value == 1 / 1000


def test_swapping_the_arms_swaps_the_sign_of_everything_but_the_p_value():
    a_PS, b_PS = RNG(10).integers(0, 2, (60, 2)), RNG(11).integers(0, 2, (60, 4))
    one, other = compare.paired(a_PS, b_PS), compare.paired(b_PS, a_PS)
    assert (one.value, one.ci_low, one.ci_high) == pytest.approx((-other.value, -other.ci_high, -other.ci_low))
    assert one.p_value == other.p_value


@pytest.mark.parametrize("k_a, k_b", [(1, 1), (4, 4), (1, 4)])
def test_two_arms_with_the_same_chances_are_rarely_called_different_and_covered(k_a, k_b):
    rng = RNG(12)
    calls = hits = 0
    for seed in range(1500):
        x_P = rng.beta(0.3, 0.3, (300, 1))
        found = compare.paired(rng.random((300, k_a)) < x_P, rng.random((300, k_b)) < x_P, None, 0.95, 999, seed)
        calls += found.p_value <= 0.05
        hits += found.ci_low <= 0 <= found.ci_high
    # Three standard errors of 1,500 replicates are 1.7 points.
    assert calls / 1500 <= 0.067 and hits / 1500 >= 0.933


def test_clusters_that_move_together_are_covered_only_when_they_are_named():
    rng = RNG(13)
    named = ignored = 0
    clusters_P = np.repeat(np.arange(40), 5)
    for _ in range(800):
        shift_P = np.repeat(rng.choice([-0.3, 0.3], 40), 5)[:, None]
        a_PS, b_PS = rng.random((200, 2)) < 0.5 + shift_P, rng.random((200, 2)) < 0.5
        for clusters in (clusters_P, None):
            found = compare.paired(a_PS, b_PS, clusters, num_permutations=1)
            if clusters is None:
                ignored += found.ci_low <= 0 <= found.ci_high
            else:
                named += found.ci_low <= 0 <= found.ci_high
    assert 0.925 <= named / 800 <= 0.975 and ignored / 800 < 0.9


def test_independent_arms_have_newcombes_interval():
    # Newcombe 1998, Table II, 56/70 against 48/80, method 10.
    found = compare.unpaired([[1]] * 56 + [[0]] * 14, [[1]] * 48 + [[0]] * 32)
    assert (found.ci_low, found.ci_high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    peer = confint_proportions_2indep(56, 70, 48, 80, method="newcomb")
    assert (found.ci_low, found.ci_high) == pytest.approx(peer)


def test_independent_arms_are_tested_by_the_pooled_score():
    found = compare.unpaired([[1]] * 56 + [[0]] * 14, [[1]] * 48 + [[0]] * 32)
    _, peer = sm.stats.proportions_ztest([56, 48], [70, 80])
    assert found.p_value == pytest.approx(peer) and (found.n, found.test) == (150, "score")
    assert found.se == pytest.approx(math.sqrt(0.8 * 0.2 / 69 + 0.6 * 0.4 / 79))


def test_independent_arms_that_are_all_right_do_not_differ():
    found = compare.unpaired(np.ones((50, 2)), np.ones((40, 2)))
    assert found.value == 0 and found.p_value == 1 and found.ci_low < -0.03 and found.ci_high > 0.03


def test_independent_arms_with_the_same_chances_are_rarely_called_different():
    rng = RNG(14)
    calls = 0
    for _ in range(2000):
        a_PS, b_PS = (rng.random((200, 3)) < rng.beta(0.3, 0.3, (200, 1)) for _ in range(2))
        calls += compare.unpaired(a_PS, b_PS).p_value <= 0.05
    assert calls / 2000 <= 0.065


def test_groups_are_compared_apart():
    a_PS, b_PS = arms(9, 2)
    groups_P = np.array(["aime", "omni"])[np.arange(31) % 2]
    found = compare.by_group(a_PS, b_PS, groups_P)
    assert found["omni"] == compare.paired(a_PS[1::2], b_PS[1::2])
    assert sum(difference.n for difference in found.values()) == 31


def test_a_group_of_one_problem_has_a_value_and_no_interval():
    alone = compare.paired([[1]], [[0]])
    assert alone.value == 1 and alone.p_value == 1 and math.isnan(alone.ci_low) and math.isnan(alone.se)
    assert not compare.noninferior(alone, 0.02) and not compare.equivalent(alone, 0.02)


@pytest.mark.parametrize(
    "low, high, noninferior, equivalent",
    [(-0.01, 0.01, True, True), (-0.03, 0.01, False, False), (-0.01, 0.03, True, False), (0.03, 0.05, True, False)],
)
def test_margins_are_read_from_the_whole_interval(low, high, noninferior, equivalent):
    difference = Difference((low + high) / 2, 0.01, low, high, 0.5, 1000, "sign-flip")
    assert compare.noninferior(difference, 0.02) is noninferior
    assert compare.equivalent(difference, 0.02) is equivalent


def test_a_margin_in_points_is_refused():
    with pytest.raises(ValueError, match=r"2 points are 0\.02"):
        compare.noninferior(Difference(0, 0.01, -0.02, 0.02, 1, 100, "sign-flip"), 2)


def test_holm_agrees_with_statsmodels():
    for size in range(1, 8):
        p_values = RNG(size).random(size) ** 3
        assert compare.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert compare.holm([]).tolist() == []


def test_holm_refuses_what_is_not_a_p_value():
    with pytest.raises(ValueError, match="leave out what is NaN"):
        compare.holm([0.1, float("nan")])


def test_arms_of_different_length_are_refused():
    with pytest.raises(ValueError, match="arm a has 3 problems and arm b 2"):
        compare.paired(np.ones((3, 1)), np.ones((2, 1)))


def test_an_arm_with_an_ungraded_sample_is_named():
    with pytest.raises(ValueError, match=r"correct_b_PS\[0, 0\] is nan"):
        compare.paired([[1.0]], [[float("nan")]])


@pytest.mark.parametrize("condition", compare.CONDITIONS)
def test_arms_under_different_conditions_are_refused(condition):
    conditions = dict.fromkeys(compare.CONDITIONS, "same")
    compare.check_comparable(conditions, dict(conditions))
    with pytest.raises(ValueError, match=rf"the arms differ in {condition} \(same against other\)"):
        compare.check_comparable(conditions, conditions | {condition: "other"})
    with pytest.raises(ValueError, match=f"arm b does not say its {condition}"):
        compare.check_comparable(conditions, {name: "same" for name in conditions if name != condition})


def test_mcnemar_is_a_binomial_test_of_who_alone_was_right():
    assert compare.paired(*arms(14, 5)).p_value == pytest.approx(binomtest(5, 19).pvalue)

"""Estimates against their definitions, published figures, statsmodels and simulation."""

import itertools
import math
import statistics

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from ssd.stats import estimate


def draw(rng, num_problems, num_samples, accuracy, between_share):
    """Outcomes of problems whose chances follow a beta distribution with this intraclass correlation."""
    size = 1 / between_share - 1
    chances_P = rng.beta(accuracy * size, (1 - accuracy) * size, num_problems)
    return (rng.random((num_problems, num_samples)) < chances_P[:, None]).astype(int)


def test_one_sample_a_problem_gives_plain_wilson():
    for right, n in [(0, 40), (3, 40), (20, 40), (40, 40), (15, 300)]:
        found = estimate.mean([[1]] * right + [[0]] * (n - right))
        assert (found.ci_low, found.ci_high) == pytest.approx(proportion_confint(right, n, method="wilson"), abs=1e-12)
        assert (found.value, found.n) == (right / n, n)


def test_the_standard_error_is_the_deviation_of_problem_means_over_root_n():
    correct_PS = [[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]]
    means = [statistics.mean(row) for row in correct_PS]
    assert estimate.mean(correct_PS).se == pytest.approx(statistics.stdev(means) / math.sqrt(5))


def test_the_clustered_standard_error_is_millers_with_the_factor_for_few_clusters():
    correct_PS = np.random.default_rng(0).integers(0, 2, (30, 3))
    clusters_P = np.random.default_rng(1).integers(0, 7, 30)
    centred_P = correct_PS.mean(axis=1) - correct_PS.mean()
    # The slow definition: SE_CLT^2 without its n / (n - 1), and all ordered pairs within a cluster.
    pairs = [(i, j) for i, j in itertools.permutations(range(30), 2) if clusters_P[i] == clusters_P[j]]
    squared = (sum(centred_P**2) + sum(centred_P[i] * centred_P[j] for i, j in pairs)) / 30**2
    assert estimate.mean(correct_PS, clusters_P).se == pytest.approx(math.sqrt(squared * 7 / 6))


def test_the_clustered_standard_error_agrees_with_statsmodels():
    rng = np.random.default_rng(2)
    values_P, clusters_P = rng.random(200), rng.integers(0, 40, 200)
    fitted = sm.OLS(values_P, np.ones(200)).fit(cov_type="cluster", cov_kwds={"groups": clusters_P})
    assert estimate.clustered_se(values_P, clusters_P) == pytest.approx(fitted.bse[0])
    assert estimate.clustered_se(values_P) == pytest.approx(sm.OLS(values_P, np.ones(200)).fit().bse[0])


def test_a_quantity_has_students_interval_over_problems():
    values_PS = np.random.default_rng(4).gamma(2.0, 500.0, (25, 3))
    found, means_P = estimate.quantity(values_PS), values_PS.mean(axis=1)
    expected = stats.ttest_1samp(means_P, 0).confidence_interval(0.95)
    assert (found.ci_low, found.ci_high) == pytest.approx((expected.low, expected.high))
    assert (found.value, found.se, found.n) == (pytest.approx(means_P.mean()), pytest.approx(stats.sem(means_P)), 25)
    assert math.isnan(estimate.quantity([[3.0, 4.0]]).ci_low)


def test_samples_that_always_agree_add_nothing_and_independent_ones_count_each():
    rng = np.random.default_rng(3)
    once_PS = rng.integers(0, 2, (200, 1))
    assert estimate.mean(np.repeat(once_PS, 5, axis=1))[:4] == pytest.approx(estimate.mean(once_PS)[:4])
    coin_PS = rng.integers(0, 2, (2000, 4))
    assert estimate.effective_n(coin_PS.mean(axis=1), 4) == pytest.approx(8000, rel=0.08)


def test_copies_of_a_problem_in_one_cluster_add_nothing_but_few_degrees_of_freedom():
    once_PS = np.random.default_rng(4).integers(0, 2, (60, 1))
    copied = estimate.mean(np.repeat(once_PS, 3, axis=0), np.repeat(np.arange(60), 3))
    single = estimate.mean(once_PS)
    assert (copied.value, copied.se) == pytest.approx((single.value, single.se))
    assert 1 < (copied.ci_high - copied.ci_low) / (single.ci_high - single.ci_low) < 1.03


def test_an_interval_is_never_empty_where_all_problems_went_one_way():
    none, all_ = (proportion_confint(right, 50, method="wilson") for right in (0, 50))
    assert estimate.mean(np.zeros((50, 4)))[:4] == pytest.approx((0, 0, 0, none[1]))
    assert estimate.mean(np.ones((50, 4)))[:4] == pytest.approx((1, 0, all_[0], 1))
    half = estimate.mean([[1, 0]] * 50)
    assert half.se == 0 and half.ci_high - half.ci_low > 0.1


def test_one_problem_has_an_interval_but_no_standard_error():
    alone = estimate.mean([[1, 0]])
    assert math.isnan(alone.se) and alone.ci_low < 0.1 and alone.ci_high > 0.9


@pytest.mark.parametrize("accuracy, between_share", [(0.05, 0.3), (0.05, 0.95), (0.9, 0.85), (0.5, 0.3)])
def test_intervals_on_a_hundred_problems_cover_at_any_accuracy(accuracy, between_share):
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(2000):
        # A point would show the jumps of coverage from one whole number of problems to the next (docs/calibration.md).
        truth = accuracy + rng.uniform(-0.01, 0.01)
        found = estimate.mean(draw(rng, 100, 4, truth, between_share))
        hits += found.ci_low <= truth <= found.ci_high
    # Three standard errors of 2,000 replicates are 1.5 points.
    assert 0.935 <= hits / 2000 <= 0.965


def test_bootstrap_agrees_with_scipys():
    correct_PS = draw(np.random.default_rng(6), 200, 4, 0.6, 0.85)
    found = estimate.bootstrap(correct_PS)
    peer = stats.bootstrap((correct_PS.mean(axis=1),), np.mean, method="percentile", rng=np.random.default_rng(7))
    assert (found.ci_low, found.ci_high) == pytest.approx(tuple(peer.confidence_interval), abs=0.004)
    assert found.se == pytest.approx(peer.standard_error, rel=0.05)


def test_bootstrap_resamples_whole_clusters():
    once_PS = np.random.default_rng(8).integers(0, 2, (60, 1))
    copied = estimate.bootstrap(np.repeat(once_PS, 3, axis=0), np.repeat(np.arange(60), 3))
    assert copied.se == pytest.approx(estimate.bootstrap(once_PS, seed=1).se, rel=0.05)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(k):
    correct_PS = draw(np.random.default_rng(9), 12, 5, 0.4, 0.5)
    subsets = list(itertools.combinations(range(5), k))
    shares = [np.mean([row[list(subset)].any() for subset in subsets]) for row in correct_PS]
    found = estimate.pass_at_k(correct_PS, k)
    assert found.value == pytest.approx(np.mean(shares))
    assert found.se == pytest.approx(np.std(shares, ddof=1) / math.sqrt(12))
    assert found.ci_low < found.value < found.ci_high


def test_pass_at_1_is_the_mean():
    correct_PS = draw(np.random.default_rng(10), 50, 4, 0.4, 0.5)
    assert estimate.pass_at_k(correct_PS, 1) == pytest.approx(estimate.mean(correct_PS))


def test_pass_at_k_beyond_the_samples_is_refused():
    with pytest.raises(ValueError, match="k=5 with 4 samples a problem"):
        estimate.pass_at_k(np.ones((3, 4)), 5)


@pytest.mark.parametrize(
    "answers, correct, value, reason",
    [
        (["7", "7", "3"], [1, 1, 0], 1.0, "the majority is right"),
        (["7", "7", "3"], [0, 0, 1], 0.0, "the majority is wrong"),
        (["7", "3"], [1, 0], 0.5, "a tie is drawn"),
        (["7", "3", "", ""], [1, 0, 0, 0], 0.5, "samples without an answer cast no vote"),
        (["", ""], [0, 0], 0.0, "no vote at all is wrong"),
    ],
)
def test_majority_counts_votes(answers, correct, value, reason):
    assert estimate.majority_at_k([answers], [correct]).value == value, reason


def test_majority_needs_an_answer_for_each_sample():
    with pytest.raises(ValueError, match="answers_PS is not 1 x 2"):
        estimate.majority_at_k([["7"]], [[1, 0]])


def test_groups_are_estimated_apart():
    correct_PS = np.array([[1, 0], [1, 1], [0, 0], [0, 1]])
    groups = estimate.by_group(correct_PS, ["omni", "aime", "aime", "omni"])
    assert list(groups) == ["aime", "omni"]
    assert groups["omni"] == estimate.mean(correct_PS[[0, 3]])


def test_post_stratification_to_the_shares_of_the_set_itself_is_the_mean():
    correct_PS = draw(np.random.default_rng(11), 400, 2, 0.6, 0.5)
    groups_P = np.repeat(["a", "b"], [300, 100])
    found = estimate.post_stratified(correct_PS, groups_P, {"a": 0.75, "b": 0.25})
    assert found.value == pytest.approx(correct_PS.mean())


def test_post_stratified_standard_error_is_the_textbooks():
    correct_PS = draw(np.random.default_rng(12), 60, 3, 0.6, 0.5)
    groups_P = np.repeat(["a", "b"], [45, 15])
    a, b = estimate.by_group(correct_PS, groups_P).values()
    found = estimate.post_stratified(correct_PS, groups_P, {"a": 0.2, "b": 0.8})
    assert found.se == pytest.approx(math.hypot(0.2 * a.se, 0.8 * b.se))


def test_post_stratified_intervals_cover():
    rng = np.random.default_rng(13)
    truth, hits = 0.2 * 0.9 + 0.8 * 0.3, 0
    groups_P = np.repeat(["easy", "hard"], [100, 50])
    for _ in range(1500):
        correct_PS = np.vstack([draw(rng, 100, 2, 0.9, 0.8), draw(rng, 50, 2, 0.3, 0.8)])
        found = estimate.post_stratified(correct_PS, groups_P, {"easy": 0.2, "hard": 0.8})
        hits += found.ci_low <= truth <= found.ci_high
    assert 0.93 <= hits / 1500 <= 0.967


@pytest.mark.parametrize("shares, message", [({"a": 0.5}, "the groups are"), ({"a": 0.5, "b": 0.6}, "sum to 1")])
def test_shares_that_do_not_fit_the_groups_are_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        estimate.post_stratified(np.ones((4, 1)), ["a", "a", "b", "b"], shares)


def test_a_stratum_of_one_problem_is_refused():
    with pytest.raises(ValueError, match="group 'b' has one problem"):
        estimate.post_stratified(np.ones((3, 1)), ["a", "a", "b"], {"a": 0.5, "b": 0.5})


@pytest.mark.parametrize(
    "correct_PS, message",
    [
        ([1, 0, 1], r"has one axis, of 3; for one sample a problem pass it as correct_PS\[:, None\]"),
        ([[1, 0], [float("nan"), 1]], r"correct_PS\[1, 0\] is nan"),
        ([[1, 2]], r"correct_PS\[0, 1\] is 2.0"),
        ([[1, 0], [1]], "not a table of numbers"),
        (np.empty((0, 3)), r"shape \(0, 3\)"),
        (np.ones((2, 2, 2)), r"shape \(2, 2, 2\)"),
    ],
)
def test_what_is_not_problems_by_samples_is_refused_with_its_place(correct_PS, message):
    with pytest.raises(ValueError, match=message):
        estimate.mean(correct_PS)


def test_labels_that_do_not_fit_and_odd_confidence_are_refused():
    with pytest.raises(ValueError, match=r"clusters_P has shape \(1,\) for 2 problems"):
        estimate.mean([[1], [0]], ["a"])
    with pytest.raises(ValueError, match="confidence 95 is not between 0 and 1"):
        estimate.mean([[1], [0]], confidence=95)
    with pytest.raises(ValueError, match="proportion"):
        estimate.wilson(1.2, 10)


def unequal_clusters(rng: np.random.Generator, num_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and cluster labels: sizes from 1 to 40, longer clusters with lower values, members alike within one."""
    sizes = rng.integers(1, 41, num_clusters)
    means = rng.normal(1 - sizes / 40, 0.5)
    labels = np.repeat(np.arange(num_clusters), sizes)
    return means[labels] + rng.normal(0, 1, len(labels)), labels


def test_the_mean_over_clusters_of_unequal_size_is_that_of_a_cluster_robust_regression():
    values, labels = unequal_clusters(np.random.default_rng(0), 50)
    found = estimate.of_clusters(np.bincount(labels, values), np.bincount(labels))
    fit = sm.OLS(values, np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": labels, "df_correction": True}, use_t=True
    )
    # statsmodels multiplies by (N - 1) / (N - k) too, which is 1 for a mean.
    assert [found.value, found.se] == pytest.approx([fit.params[0], fit.bse[0]])
    assert [found.ci_low, found.ci_high] == pytest.approx(fit.conf_int()[0].tolist())
    assert found.n == 50


def test_the_interval_over_clusters_of_unequal_size_covers():
    rng = np.random.default_rng(1)
    sizes = np.arange(1, 41)
    true = (sizes * (1 - sizes / 40)).sum() / sizes.sum()
    covered = []
    for _ in range(2000):
        values, labels = unequal_clusters(rng, 80)
        found = estimate.of_clusters(np.bincount(labels, values), np.bincount(labels))
        covered.append(found.ci_low <= true <= found.ci_high)
    assert 0.93 <= np.mean(covered) <= 0.965


def test_one_cluster_has_no_interval():
    found = estimate.of_clusters([3.0], [2])
    assert found.value == 1.5 and np.isnan([found.se, found.ci_low, found.ci_high]).all()

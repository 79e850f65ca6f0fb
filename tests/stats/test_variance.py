"""Variance components against analysis of variance, known truth and their limits."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from statsmodels.stats.anova import anova_lm

from ssd.stats import estimate, variance

DATA = Path(os.environ.get("SSD_TEST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
SPLIT = ("between", "within", "between_share", "reliability")


def anova(correct_PS):
    """between, within, ICC(1,1) and ICC(1,k) from the mean squares of a one-way analysis of variance."""
    num_problems, k = correct_PS.shape
    long = pd.DataFrame({"problem": np.repeat(np.arange(num_problems), k), "correct": correct_PS.ravel()})
    squares = anova_lm(smf.ols("correct ~ C(problem)", long).fit())["mean_sq"]
    between, within = squares["C(problem)"], squares["Residual"]
    return (
        (between - within) / k,
        within,
        (between - within) / (between + (k - 1) * within),
        (between - within) / between,
    )


def read_correct(origin):
    path = DATA / "labelled" / "samples_correctness.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there; set SSD_TEST_DATA to the folder that holds labelled/")
    rows = pd.DataFrame(json.loads(line) for line in path.read_text().split("\n") if line)
    rows = rows[rows["origin"] == origin]
    return rows.pivot(index="prompt_id", columns="sample_id", values="correct").to_numpy().astype(float)


def test_components_agree_with_analysis_of_variance():
    rng = np.random.default_rng(0)
    correct_PS = (rng.random((80, 5)) < rng.beta(0.4, 0.3, 80)[:, None]).astype(float)
    parts = variance.components(correct_PS)
    assert [getattr(parts, name) for name in SPLIT] == pytest.approx(anova(correct_PS))
    assert parts.total == pytest.approx(parts.between + parts.within)
    assert (parts.n, parts.k) == (80, 5)


def test_components_of_real_samples_agree_with_analysis_of_variance():
    correct_PS = read_correct("qwen_rm_math100_k8")
    parts = variance.components(correct_PS)
    assert parts.k == 8
    assert [getattr(parts, name) for name in SPLIT] == pytest.approx(anova(correct_PS))
    assert parts.between_share_ci_low < parts.between_share < parts.between_share_ci_high


@pytest.mark.parametrize("k", [2, 4])
def test_components_are_unbiased_at_small_k(k):
    # Uniform chances: Var(x) = 1/12, E[x(1 - x)] = 1/6, a third of the variance between problems (Miller 2024).
    rng = np.random.default_rng(1)
    found = np.array(
        [
            (parts.between, parts.within, parts.total)
            for parts in (
                variance.components(rng.random((100, k)) < rng.random((100, 1)), num_resamples=1) for _ in range(2000)
            )
        ]
    )
    errors = found.std(axis=0) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - [1 / 12, 1 / 6, 1 / 4]) < 3.5 * errors).all()


def test_bootstrap_intervals_of_the_share_cover():
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(400):
        parts = variance.components(rng.random((300, 4)) < rng.random((300, 1)), num_resamples=500, seed=seed)
        hits += parts.between_share_ci_low <= 1 / 3 <= parts.between_share_ci_high
    assert 0.91 <= hits / 400 <= 0.98


def test_the_total_explains_the_standard_error_of_the_mean():
    correct_PS = np.random.default_rng(3).integers(0, 2, (50, 4))
    parts = variance.components(correct_PS)
    assert estimate.mean(correct_PS).se ** 2 == pytest.approx((parts.between + parts.within / 4) / 50)


def test_one_sample_a_problem_leaves_the_split_undefined_but_not_the_total():
    parts = variance.components([[1], [0], [1], [1]])
    assert parts.total == pytest.approx(np.var([1, 0, 1, 1], ddof=1)) and parts.total_ci_high > 0
    for name in SPLIT:
        assert np.isnan([getattr(parts, name + bound) for bound in ("", "_ci_low", "_ci_high")]).all()


def test_outcomes_that_are_all_the_same_have_no_variance_and_no_shares():
    for value in (0, 1):
        parts = variance.components(np.full((20, 3), value))
        assert parts.total == parts.between == parts.within == 0
        assert np.isnan([parts.between_share, parts.reliability, parts.between_share_ci_low]).all()


def test_samples_that_always_agree_lie_between_problems_alone():
    parts = variance.components(np.repeat([[1], [0], [1]], 4, axis=1))
    assert (parts.within, parts.between_share, parts.reliability) == (0, 1, 1)


def test_problems_that_are_all_alike_have_a_between_component_below_zero_and_no_reliability():
    parts = variance.components([[1, 0]] * 20)
    assert parts.between < 0 and np.isnan(parts.reliability)


def test_a_single_problem_is_refused():
    with pytest.raises(ValueError, match="give at least 2"):
        variance.components([[1, 0, 1]])

"""The surface through uneven trials, against scikit-learn's Gaussian process and simulated trials."""

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from ssd.stats import surface


def hill(x_TD):
    return 0.5 - 0.3 * np.sum((x_TD - 0.4) ** 2, axis=-1)


def trials(num_trials: int, noise_sd: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    x_TD = rng.random((num_trials, 2))
    return x_TD, hill(x_TD) + rng.normal(0, noise_sd, num_trials), np.full(num_trials, noise_sd**2)


def test_mean_and_deviation_are_those_of_scikit_learn_at_the_same_lengths():
    x_TD, y_T, _ = trials(20, 0.02)
    variance_T = np.linspace(1e-4, 1e-3, 20)
    fitted = surface.fit(x_TD, y_T, variance_T)
    kernel = ConstantKernel(fitted.scale**2) * RBF(fitted.lengths_D)
    other = GaussianProcessRegressor(kernel, alpha=variance_T + surface.JITTER, optimizer=None)
    x_QD = np.random.default_rng(1).random((50, 2))
    mean_Q, sd_Q = other.fit(x_TD, y_T - fitted.level).predict(x_QD, return_std=True)
    found_Q, found_sd_Q = fitted.at(x_QD)
    assert found_Q - fitted.level == pytest.approx(mean_Q, abs=1e-8)
    assert found_sd_Q == pytest.approx(sd_Q, abs=1e-6)


def test_the_surface_is_nearer_to_the_truth_than_the_trials_and_its_deviation_says_how_near():
    errors_of_trials, errors, shares = [], [], []
    for seed in range(20):
        x_TD, y_T, variance_T = trials(30, 0.02, seed)
        mean_T, sd_T = surface.fit(x_TD, y_T, variance_T).at(x_TD)
        errors_of_trials.append(np.mean((y_T - hill(x_TD)) ** 2))
        errors.append(np.mean((mean_T - hill(x_TD)) ** 2))
        shares.append(np.mean(np.abs(mean_T - hill(x_TD)) < 1.96 * sd_T))
    assert np.mean(errors) < 0.5 * np.mean(errors_of_trials)
    assert 0.85 < np.mean(shares) < 0.99


def test_expected_improvement_is_the_mean_of_what_exceeds_the_best():
    draws = np.random.default_rng(0).normal(0.48, 0.02, 400_000)
    found = surface.expected_improvement(np.array([0.48]), np.array([0.02]), best=0.5)
    assert found == pytest.approx(np.maximum(draws - 0.5, 0).mean(), rel=0.02)


def test_trials_on_easy_beginnings_are_levelled_and_their_variances_are_those_of_repeated_draws():
    """The first half of the problems is far easier; a trial on that half alone is 3 points worse than the others."""
    rng = np.random.default_rng(0)
    chances_P = np.append(rng.uniform(0.6, 0.9, 100), rng.uniform(0.1, 0.4, 100))[:, None]
    levels, claimed = [], []
    for _ in range(400):
        complete = [(rng.random((200, 2)) < chances_P).astype(float) for _ in range(4)]
        partial = (rng.random((100, 2)) < chances_P[:100] - 0.03).astype(float)
        y_T, variance_T = surface.level_parts([*complete, partial])
        levels.append(y_T[-1] - y_T[:-1].mean())
        claimed.append(variance_T[-1])
    assert np.mean(levels) == pytest.approx(-0.03, abs=4 * np.std(levels) / 20)
    assert np.var(levels) == pytest.approx(np.mean(claimed), rel=0.2)


@pytest.mark.parametrize("sizes", [[40, 10, 20, 40, 10, 40], [40], [10, 40], [7, 7, 7]])
def test_levels_and_variances_are_those_of_the_definition_trial_by_trial(sizes):
    rng = np.random.default_rng(0)
    trials_PS = [(rng.random((size, 3)) < 0.6).astype(float) for size in sizes]
    complete = [trial.mean(axis=1) for trial in trials_PS if len(trial) == max(sizes)]
    y_T, variance_T = surface.level_parts(trials_PS)
    for trial, y, variance in zip(trials_PS, y_T, variance_T, strict=True):
        own_P, m = trial.mean(axis=1), len(trial)
        ease = np.mean(complete, axis=0)[:m].mean() - np.mean(complete)
        others = [each[:m] for each in complete if m < max(sizes) or not np.array_equal(each, own_P)]
        residual_P = own_P - (np.mean(others, axis=0) if others else own_P.mean())
        squares = np.sum((residual_P - residual_P.mean()) ** 2) + 2 / 3**2
        assert (y, variance) == pytest.approx((own_P.mean() - ease, squares / (m + 1) / m))


def test_merged_trials_keep_their_precision_and_their_mean_and_few_stay_as_they_are():
    x_TD, y_T, variance_T = trials(200, 0.02)
    variance_T = variance_T * np.linspace(1, 5, 200)
    x_GD, y_G, variance_G = surface.merged(x_TD, y_T, variance_T, 50)
    assert x_GD.shape == (50, 2) and len(y_G) == len(variance_G) == 50
    assert np.sum(1 / variance_G) == pytest.approx(np.sum(1 / variance_T))
    assert np.sum(y_G / variance_G) == pytest.approx(np.sum(y_T / variance_T))
    for before, after in zip((x_TD, y_T, variance_T), surface.merged(x_TD, y_T, variance_T, 200)):
        assert np.array_equal(before, after)


def test_a_surface_through_merged_trials_is_as_near_to_the_truth():
    errors, errors_merged = [], []
    for seed in range(10):
        given = trials(400, 0.03, seed)
        x_QD = np.random.default_rng(seed).random((200, 2))
        for squares, parts in ((errors, given), (errors_merged, surface.merged(*given, 128))):
            squares.append(np.mean((surface.fit(*parts).at(x_QD)[0] - hill(x_QD)) ** 2))
    assert np.mean(errors_merged) < 1.5 * np.mean(errors)

"""The split of a gradient into signal and noise, against its definition, and what is said of a training run."""

import math

import numpy as np
import pytest
import torch

from ssd.training import noise


def test_signal_and_noise_are_unbiased_for_parts_of_unequal_size():
    """Gradients of tokens: a true mean of norm 3 and a covariance of trace 200; batches of 40 tokens in three parts."""
    rng = np.random.default_rng(0)
    true, sizes = np.array([3.0, 0.0, 0.0, 0.0, 0.0]), [5, 10, 25]
    by_parts, by_first = [], []
    for _ in range(4000):
        parts = [rng.normal(true, math.sqrt(200 / 5), (size, 5)).sum(axis=0) / sum(sizes) for size in sizes]
        norms2 = [float(part @ part) for part in parts]
        total = sum(parts)
        by_parts.append(noise.split(float(total @ total), norms2, [size / sum(sizes) for size in sizes]))
        by_first.append(noise.split_first(float(total @ total), norms2[0], sizes[0] / sum(sizes)))
    for found in (by_parts, by_first):
        for mean, expected in zip(np.mean(found, axis=0), (9.0, 200 / 40)):
            assert mean == pytest.approx(expected, abs=4 * np.std(found, axis=0).max() / math.sqrt(4000))
    assert np.std(by_parts, axis=0)[0] < np.std(by_first, axis=0)[0]


def test_the_parts_of_a_step_are_the_gradients_of_its_micro_batches():
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(6, 1), torch.randn(12, 6)
    parts = inputs.split([2, 4, 6])
    alone = [torch.autograd.grad(model(part).pow(2).sum().div(12), list(model.parameters())) for part in parts]
    gradients = noise.Gradients(model.parameters())
    for part in parts:
        gradients.begin_part(len(part))
        model(part).pow(2).sum().div(12).backward()
    norms2 = [sum(float(each.pow(2).sum()) for each in grads) for grads in alone]
    total = [sum(each) for each in zip(*alone)]
    norm2 = sum(float(each.pow(2).sum()) for each in total)
    expected = noise.split(norm2, norms2, [2 / 12, 4 / 12, 6 / 12])
    assert list(gradients.end_step(math.sqrt(norm2))) == pytest.approx(list(expected), rel=1e-5)


def test_one_micro_batch_has_no_split():
    assert all(map(math.isnan, noise.split(4.0, [4.0], [1.0])))
    assert all(map(math.isnan, noise.split_first(4.0, 4.0, 1.0)))


def test_only_changes_that_bfloat16_can_hold_count_as_changed():
    weights = torch.nn.Parameter(torch.full((1000,), 1.0))
    watched = noise.Weights([weights])
    with torch.no_grad():
        weights += 1e-4  # a hundredth of the distance between bfloat16 numbers at 1
    assert watched.end_step() == pytest.approx({"weights_changed": 0, "displacement": 1e-4, "update_ratio": 1e-4}, 1e-2)
    with torch.no_grad():
        weights[:500] += 0.1
    assert watched.end_step()["weights_changed"] == pytest.approx(0.5, abs=0.06)


def test_a_signal_that_noise_explains_and_weights_that_hardly_move_are_said():
    rng = np.random.default_rng(1)
    lost = [{"gradient_signal": x, "weights_changed": 1e-5} for x in rng.normal(0, 1, 50)]
    seen = [{"gradient_signal": x, "weights_changed": 0.2} for x in rng.normal(2, 1, 50)]
    assert [text.split(":")[0] for text in noise.warnings(lost)] == [
        "The gradient has no signal that can be told from its noise",
        "Only 0.00% of the weights have another bfloat16 value than before",
    ]
    assert noise.warnings(seen) == noise.warnings([]) == []

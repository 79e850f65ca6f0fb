"""The toy automaton against the figures of arXiv 2604.01193, section C.4, and against runs of the automaton itself."""

import numpy as np
import pytest

from ssd.lab import automaton

TEMPERATURES = np.geomspace(0.2, 4, 1500).tolist()


def simulated(states, temperature: float, num_runs: int, rng: np.random.Generator) -> float:
    """Share of `num_runs` walks that pass; sampling by numpy, truncation by a loop over the sorted tokens."""
    drawn = {}
    for state, probs in states.items():
        weights = np.where(probs.numpy() > 0, probs.numpy(), 0) ** (1 / temperature)
        weights /= weights.sum()
        kept, mass = np.zeros(16), 0.0
        for token in np.argsort(-weights):
            if mass < 0.80:
                kept[token] = weights[token]
                mass += weights[token]
        drawn[state] = kept / kept.sum()
    passes = np.isin(rng.choice(16, num_runs, p=drawn["root"]), (0, 1))
    for state in ("fork", "lock", "lock", "lock"):
        passes &= rng.choice(16, num_runs, p=drawn[state]) == 0
    return passes.mean()


def test_the_teacher_has_the_published_heads_and_sums_to_one():
    for state, probs in automaton.teacher().items():
        assert probs[:4].tolist() == pytest.approx(automaton.HEADS[state])
        assert float(probs.sum()) == pytest.approx(1)
        assert (probs[4:-1] > probs[5:]).all()


def test_the_student_has_the_published_supports():
    student = automaton.student()
    assert {state: int((probs > 0).sum()) for state, probs in student.items()} == {"root": 4, "fork": 5, "lock": 2}
    assert student["lock"].sort(descending=True).values[:2].tolist() == pytest.approx([0.948, 0.052], abs=5e-4)
    assert float(student["fork"].max()) == pytest.approx(0.344, abs=5e-4)
    assert float(student["fork"][0]) == pytest.approx(0.169, abs=5e-4)
    assert float(student["root"][2]) == pytest.approx(0.406, abs=5e-4)


def test_base_and_student_are_best_where_and_as_published():
    # 8.32% at T = 0.639 and 13.77% at T = 2.091. Both maxima lie just below a temperature at which a token enters the
    # nucleus and the rate falls by half, so that they move in the last digit with the grid of temperatures.
    base, at_base = automaton.best(automaton.teacher(), TEMPERATURES)
    student, at_student = automaton.best(automaton.student(), TEMPERATURES)
    assert (base, at_base) == (pytest.approx(0.0832, abs=2e-4), pytest.approx(0.639, abs=1.5e-3))
    assert (student, at_student) == (pytest.approx(0.1377, abs=1e-4), pytest.approx(2.091, abs=5e-3))


@pytest.mark.parametrize(("top_p", "gap"), [(0.90, 0.014), (0.80, 0.054)])
def test_the_gap_at_other_truncations_is_as_published(top_p, gap):
    best = [automaton.best(states, TEMPERATURES, top_p)[0] for states in (automaton.teacher(), automaton.student())]
    assert best[1] - best[0] == pytest.approx(gap, abs=5e-4)


@pytest.mark.parametrize(("states", "temperature"), [("teacher", 0.6), ("teacher", 1.0), ("student", 2.0)])
def test_the_closed_form_agrees_with_a_simulation(states, temperature):
    distributions = getattr(automaton, states)()
    rate, num_runs = automaton.pass_rate(distributions, temperature), 400_000
    found = simulated(distributions, temperature, num_runs, np.random.default_rng(0))
    assert found == pytest.approx(rate, abs=4 * (rate * (1 - rate) / num_runs) ** 0.5)

"""What grades say: which samples are right, by problem and sample, how many had each outcome, and the run's health."""

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ssd.records import OUTCOMES, Grade, Problem
from ssd.samples import Samples


class Health(NamedTuple):
    """Of each sample: 1.0 where the name of the rate holds, and its tokens; shapes (problems, samples)."""

    think_close_rate: np.ndarray
    boxed_answer_rate: np.ndarray
    length_stop_rate: np.ndarray
    timed_out_rate: np.ndarray
    tokens_per_sample: np.ndarray


def correct_matrix(grades: Iterable[Grade]) -> tuple[list[str], np.ndarray]:
    """Problem ids (sorted) and correct_PS, 1.0 where the outcome is right; shape (problems, samples).

    Raises
    ------
    ValueError
        If a (problem, sample) is graded twice, or the samples of a problem are not numbered from 0 on, as many of each.
    """
    by_problem: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for row in grades:
        if row.sample_index in by_problem[row.problem_id]:
            raise ValueError(f"problem {row.problem_id}, sample {row.sample_index} is graded twice")
        by_problem[row.problem_id][row.sample_index] = float(row.outcome == "right")
    sizes = {len(row) for row in by_problem.values()}
    if len(sizes) != 1:
        raise ValueError(f"problems have {sorted(sizes)} samples; every problem needs the same number, at least one")
    for problem_id, row in by_problem.items():
        if sorted(row) != list(range(len(row))):
            raise ValueError(f"problem {problem_id} has the samples {sorted(row)}; some between are not graded")
    ids = sorted(by_problem)
    return ids, np.array([[by_problem[i][s] for s in sorted(by_problem[i])] for i in ids])


def correctness_table(problems: Sequence[Problem], grades: Sequence[Grade]) -> dict[str, list]:
    """Columns of a table with a row for each problem: what it is, k samples, how many are right, each outcome."""
    outcomes = collections.defaultdict(list)
    for row in grades:
        outcomes[row.problem_id].append(row.outcome)
    return {
        "problem_id": [problem.problem_id for problem in problems],
        "source": [problem.source for problem in problems],
        "level": [problem.level for problem in problems],
        "k": [len(outcomes[problem.problem_id]) for problem in problems],
        "correct": [outcomes[problem.problem_id].count("right") for problem in problems],
        "outcomes": [" ".join(outcomes[problem.problem_id]) for problem in problems],
    }


def outcome_counts(grades: Iterable[Grade]) -> dict[str, int]:
    """Number of samples of each outcome; they add up to the number of samples."""
    counts = collections.Counter(row.outcome for row in grades)
    return {outcome: counts[outcome] for outcome in OUTCOMES}


def health(samples: Samples, grades: Iterable[Grade]) -> Health:
    """Health of the run that made `samples`; `grades` are theirs. Every problem has the same number of samples."""
    outcome_by_key = {(row.problem_id, row.sample_index): row.outcome for row in grades}
    outcome_S = np.array([OUTCOMES.index(outcome_by_key[key]) for key in samples.ids()])
    without_answer = [OUTCOMES.index("no_answer"), OUTCOMES.index("cut_off")]
    values = Health(
        think_close_rate=samples.closes_S,
        boxed_answer_rate=~np.isin(outcome_S, without_answer),
        length_stop_rate=samples.is_cut_off_S,
        timed_out_rate=outcome_S == OUTCOMES.index("timed_out"),
        tokens_per_sample=samples.num_tokens_S,
    )
    num_problems = len(np.unique(samples.problem_S))
    return Health(*(value_S.astype(float).reshape(num_problems, -1) for value_S in values))

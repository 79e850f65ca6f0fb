"""Samples -> grades: the last box after the thinking, compared with the gold answer.

Strings, numbers and structure decide most pairs (`ssd.answers`). The rest goes to math-verify in worker processes,
each killed at its deadline and held to a memory limit, because answers are hostile text. A unique (gold, answer) pair
is graded once.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ssd import answers
from ssd.records import OUTCOMES, Grade, Problem, Sample
from ssd.samples import Samples
from ssd.workers import DEADLINE_S, Forker, Pair, Verdict, in_workers
from ssd.writing import last_box

# No gold of the public sets has more than 160 characters or five levels of brackets. An answer beyond these is compared
# as a string, so that what is refused depends on no clock.
MAX_CHARS = 2_000
MAX_NESTING = 12
DECIDED_BY = ("grading", "answers", "structure", "quantities", "values", "writing", "algebra", "workers")  # modules


class Health(NamedTuple):
    """Of each sample: 1.0 where the name of the rate holds, and its tokens; shapes (problems, samples)."""

    think_close_rate: np.ndarray
    boxed_answer_rate: np.ndarray
    length_stop_rate: np.ndarray
    timed_out_rate: np.ndarray
    tokens_per_sample: np.ndarray


class Answered(NamedTuple):
    """What a grade depends on: the extracted answer, None without one, and whether the cap cut the sample off."""

    problem_id: str
    sample_index: int
    is_cut_off: bool
    answer: str | None


def grade(
    samples: Sequence[Sample], problems: Iterable[Problem], thinks: bool, workers: int | None = None
) -> list[Grade]:
    """One Grade a sample, in order.

    Parameters
    ----------
    thinks : bool
        The prompt opens the thinking, so an answer counts only after `</think>`.
    workers : int, optional
        Processes that compare what takes algebra; by default one a core.
    """
    answered = [
        Answered(row.problem_id, row.sample_index, row.finish_reason == "length", extract(row.text, thinks))
        for row in samples
    ]
    return grade_answers(answered, problems, workers)


def grade_answers(answered: Sequence[Answered], problems: Iterable[Problem], workers: int | None = None) -> list[Grade]:
    """`grade` of samples whose answers are extracted."""
    by_id = {problem.problem_id: problem for problem in problems}
    unknown = next((sample.problem_id for sample in answered if sample.problem_id not in by_id), None)
    if unknown is not None:
        raise ValueError(f"sample of problem {unknown!r}, which the problem set does not hold; give the set it is from")

    def pair(sample: Answered) -> Pair:
        problem = by_id[sample.problem_id]
        return problem.answer, sample.answer, problem.tolerance, problem.notation

    verdicts = dict(verify(sorted({pair(each) for each in answered if each.answer is not None}), workers=workers))
    grades = []
    for sample in answered:
        without_answer = "cut_off" if sample.is_cut_off else "no_answer"
        outcome = without_answer if sample.answer is None else verdicts[pair(sample)]
        grades.append(Grade(sample.problem_id, sample.sample_index, outcome, sample.answer or ""))
    return grades


def extract(text: str, thinks: bool) -> str | None:
    """The last box after the thinking, or None where the thinking did not end or there is no box."""
    _, closed, after = text.rpartition("</think>")
    if thinks and not closed:
        return None
    answer = last_box(after)
    return answer or None


def version() -> str:
    """What grades are comparable under: math-verify's version and a digest of the policies' code."""
    code = b"".join(Path(__file__).with_name(f"{module}.py").read_bytes() for module in DECIDED_BY)
    return f"math-verify {importlib.metadata.version('math-verify')}, policies {hashlib.sha256(code).hexdigest()[:8]}"


def correct(grades: Iterable[Grade]) -> tuple[list[str], np.ndarray]:
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


def correctness(problems: Sequence[Problem], grades: Sequence[Grade]) -> dict[str, list]:
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
    return Health(*(each.astype(float).reshape(num_problems, -1) for each in values))


def verify(
    pairs: Sequence[Pair], deadline_s: float = DEADLINE_S, workers: int | None = None
) -> Iterator[tuple[Pair, Verdict]]:
    """Yield each pair with its verdict, as they come."""
    hard, forker = [], None
    try:
        for pair in pairs:
            verdict = _without_algebra(*pair)
            if verdict is None:
                hard.append(pair)
                forker = forker or Forker(deadline_s)  # which loads sympy in the meantime
            else:
                yield pair, verdict
        if forker:
            verdicts = in_workers(hard, forker, workers)
            yield from tqdm(verdicts, "math-verify", len(hard), unit="pair", mininterval=1, disable=len(hard) < 200)
    finally:
        if forker:
            forker.close()


def gradable(golds: Iterable[str]) -> dict[str, bool]:
    """Whether each gold answer is made of numbers, words and expressions that math-verify parses."""
    unique = sorted(set(golds))
    made_of = {gold: answers.expressions(gold) for gold in unique if not _is_beyond_bounds(gold)}
    hard = [(expression, None) for expression in sorted(set(itertools.chain(*made_of.values())))]
    parsed = set()
    if hard:
        with contextlib.closing(Forker(DEADLINE_S)) as forker:
            verdicts = in_workers(hard, forker, None)
            bar = tqdm(verdicts, "parse answers", len(hard), unit="answer", mininterval=1, disable=len(hard) < 200)
            parsed = {expression for (expression, _), verdict in bar if verdict == "right"}
    return {gold: gold in made_of and parsed.issuperset(made_of[gold]) for gold in unique}


class _NeedsAlgebra(Exception):
    """Strings, numbers and structure give no verdict."""


def _without_algebra(gold: str, answer: str, tolerance: float = 0.0, notation: str = "") -> Verdict | None:
    """The verdict where strings, numbers and structure give one."""
    if _is_beyond_bounds(gold) or _is_beyond_bounds(answer):
        return "right" if gold.strip() == answer.strip() else "wrong"
    try:
        return "right" if answers.equal(gold, answer, _refuse, tolerance, notation) else "wrong"
    except _NeedsAlgebra:
        return None
    except Exception:  # no text of a model may end a run; a worker takes it the same way
        return "wrong"


def _refuse(gold: str, answer: str, tolerance: float) -> bool:
    raise _NeedsAlgebra


def _is_beyond_bounds(text: str) -> bool:
    return len(text) > MAX_CHARS or answers.nesting(text) > MAX_NESTING

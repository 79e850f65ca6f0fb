"""Samples -> grades: the last box after the thinking, compared with the gold answer.

Strings, numbers and structure decide most pairs (`answers.py`). The rest goes to math-verify in worker processes, each
killed at its deadline and held to a memory limit, because answers are hostile text. A unique (gold, answer) pair is
graded once.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ssd.grading import answers
from ssd.grading.workers import DEADLINE_S, Forker, Pair, Verdict, in_workers
from ssd.grading.writing import last_box
from ssd.records import Grade, Problem, Sample

# No gold of the public sets has more than 160 characters or five levels of brackets. An answer beyond these is compared
# as a string, so that what is refused depends on no clock.
MAX_CHARS = 2_000
MAX_NESTING = 12


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
    """What grades are comparable under: math-verify's version and a digest of all code in this folder."""
    code = b"".join(path.name.encode() + path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
    return f"math-verify {importlib.metadata.version('math-verify')}, policies {hashlib.sha256(code).hexdigest()[:8]}"


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

"""Samples -> grades: the last box after the thinking, compared with the gold answer.

Equal strings need no algebra. The rest goes to math-verify in worker processes, each killed at its deadline and held
to a memory limit, because answers are hostile text. A unique (gold, answer) pair is graded once.
"""

import collections
import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from ssd.answers import last_box, normalise
from ssd.records import OUTCOMES, Grade, Problem, Sample

Verdict = Literal["right", "wrong", "timed_out"]

DEADLINE_S = 10.0
START_S = 120.0  # a worker imports sympy first, which a busy machine does slowly
MEMORY_BYTES = 1 << 30
MAX_ANSWER_CHARS = 2_000  # no competition answer is longer; what is, is wrong


class Health(NamedTuple):
    """Rates over the samples of a generation run, and their mean length in tokens."""

    think_close_rate: float
    boxed_answer_rate: float
    length_stop_rate: float
    timed_out_rate: float
    tokens_per_sample: float


def grade(samples: Sequence[Sample], problems: Iterable[Problem], thinks: bool) -> list[Grade]:
    """One Grade a sample, in order.

    Parameters
    ----------
    thinks : bool
        The prompt opens the thinking, so an answer counts only after `</think>`.
    """
    gold = {problem.problem_id: problem.answer for problem in problems}
    unknown = next((sample.problem_id for sample in samples if sample.problem_id not in gold), None)
    if unknown is not None:
        raise ValueError(f"sample of problem {unknown!r}, which the problem set does not hold; give the set it is from")
    answers = [extract(sample.text, thinks) for sample in samples]
    pairs = {(gold[s.problem_id], answer) for s, answer in zip(samples, answers, strict=True) if answer is not None}
    verdicts = dict(verify(sorted(pairs)))
    grades = []
    for sample, answer in zip(samples, answers, strict=True):
        if answer is None:
            outcome = "cut_off" if sample.finish_reason == "length" else "no_answer"
        else:
            outcome = verdicts[gold[sample.problem_id], answer]
        grades.append(Grade(sample.problem_id, sample.sample_index, outcome, answer or ""))
    return grades


def extract(text: str, thinks: bool) -> str | None:
    """The last box after the thinking, or None where the thinking did not end or there is no box."""
    _, closed, after = text.rpartition("</think>")
    if thinks and not closed:
        return None
    answer = last_box(after)
    return answer or None


def correct(grades: Iterable[Grade]) -> tuple[list[str], np.ndarray]:
    """Problem ids (sorted) and correct_PS, 1.0 where the outcome is right; shape (problems, samples).

    Raises
    ------
    ValueError
        If a (problem, sample) is graded twice or the problems differ in their number of samples.
    """
    by_problem: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for row in grades:
        if row.sample_index in by_problem[row.problem_id]:
            raise ValueError(f"problem {row.problem_id}, sample {row.sample_index} is graded twice")
        by_problem[row.problem_id][row.sample_index] = float(row.outcome == "right")
    sizes = {len(row) for row in by_problem.values()}
    if len(sizes) != 1:
        raise ValueError(f"problems have {sorted(sizes)} samples; every problem needs the same number, at least one")
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


def health(samples: Sequence[Sample], grades: Sequence[Grade]) -> Health:
    """Health of the run that made `samples`; `grades` are theirs."""
    counts, total = outcome_counts(grades), len(samples)
    return Health(
        think_close_rate=float(np.mean(["</think>" in sample.text for sample in samples])),
        boxed_answer_rate=(total - counts["no_answer"] - counts["cut_off"]) / total,
        length_stop_rate=float(np.mean([sample.finish_reason == "length" for sample in samples])),
        timed_out_rate=counts["timed_out"] / total,
        tokens_per_sample=float(np.mean([len(sample.token_ids) for sample in samples])),
    )


def verify(
    pairs: Sequence[tuple[str, str]], deadline_s: float = DEADLINE_S, workers: int | None = None
) -> Iterator[tuple[tuple[str, str], Verdict]]:
    """Yield each (gold, answer) pair with its verdict, as they come."""
    hard = []
    for pair in pairs:
        verdict = _easy(*pair)
        if verdict is None:
            hard.append(pair)
        else:
            yield pair, verdict
    if hard:
        bar = tqdm(total=len(hard), desc="math-verify", unit="pair", mininterval=1, disable=len(hard) < 200)
        with bar:
            for pair, verdict in _in_workers(hard, deadline_s, workers or os.cpu_count() or 1):
                bar.update()
                yield pair, verdict


def gradable(golds: Iterable[str]) -> dict[str, bool]:
    """Whether math-verify parses each gold answer and finds it equal to itself."""
    unique = sorted(set(golds))
    easy = {gold for gold in unique if re.fullmatch(r"-?\d{1,15}", gold)}
    hard = [(gold, gold) for gold in unique if gold not in easy]
    verdicts = _in_workers(hard, DEADLINE_S, os.cpu_count() or 1)
    bar = tqdm(verdicts, total=len(hard), desc="parse answers", unit="answer", mininterval=1, disable=len(hard) < 200)
    return dict.fromkeys(easy, True) | {gold: verdict == "right" for (gold, _), verdict in bar}


def _easy(gold: str, answer: str) -> Verdict | None:
    gold, answer = normalise(gold), normalise(answer)
    if gold == answer:
        return "right"
    if len(answer) > MAX_ANSWER_CHARS:
        return "wrong"
    if all(re.fullmatch(r"[+-]?\d{1,15}", text) for text in (gold, answer)):
        return "right" if int(gold) == int(answer) else "wrong"
    return None


class _Worker:
    """A process that verifies one pair at a time and may be killed at any time."""

    def __init__(self):
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from ssd.grading import _work; _work()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self.pair: tuple[str, str] | None = None
        self.deadline = time.monotonic() + START_S

    def give(self, pair: tuple[str, str], deadline_s: float) -> None:
        self.pair, self.deadline = pair, time.monotonic() + deadline_s
        self.process.stdin.write(json.dumps(pair).encode() + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def _in_workers(
    pairs: Sequence[tuple[str, str]], deadline_s: float, workers: int
) -> Iterator[tuple[tuple[str, str], Verdict]]:
    waiting = collections.deque(pairs)
    with selectors.DefaultSelector() as selector:
        pool: set[_Worker] = set()

        def start() -> None:
            worker = _Worker()
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            pool.add(worker)

        def end(worker: _Worker) -> None:
            selector.unregister(worker.process.stdout)
            pool.discard(worker)
            worker.kill()

        try:
            for _ in range(min(workers, len(pairs))):
                start()
            while pool:
                for key, _ in selector.select(timeout=0.2):
                    worker, line = key.data, key.fileobj.readline()
                    if worker.pair is None and not line:
                        raise RuntimeError("a grading worker ended before it began; is math-verify installed?")
                    if worker.pair is not None:
                        # An empty line: the worker died on this pair, of the memory limit as a rule.
                        verdict = line.decode(errors="replace").strip()
                        yield worker.pair, (verdict if verdict in ("right", "wrong") else "timed_out")
                        worker.pair = None
                    if not line or not waiting:
                        end(worker)
                    else:
                        worker.give(waiting.popleft(), deadline_s)
                for worker in [worker for worker in pool if time.monotonic() > worker.deadline]:
                    if worker.pair is None:
                        raise RuntimeError(f"a grading worker did not start within {START_S:g} s")
                    yield worker.pair, "timed_out"
                    end(worker)
                while waiting and len(pool) < min(workers, len(waiting)):
                    start()
        finally:
            for worker in list(pool):
                end(worker)


def _work() -> None:
    import resource

    import math_verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            parsed = {text: math_verify.parse(f"${text.strip().strip('$')}$") for text in {gold, answer}}
            right = all(parsed.values()) and math_verify.verify(parsed[gold], parsed[answer])
        except MemoryError:
            os._exit(1)
        except BaseException:  # math-verify's TimeoutException is no Exception; whatever sympy raised, it is not right
            right = False
        print("right" if right else "wrong", flush=True)

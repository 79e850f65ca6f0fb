"""Samples -> grades: the last box after the thinking, compared with the gold answer.

Strings, numbers and structure decide most pairs (`ssd.answers`). The rest goes to math-verify in worker processes,
each killed at its deadline and held to a memory limit, because answers are hostile text. A unique (gold, answer) pair
is graded once.
"""

import collections
import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from ssd import answers
from ssd.answers import last_box
from ssd.records import OUTCOMES, Grade, Problem, Sample

Verdict = Literal["right", "wrong", "timed_out"]

DEADLINE_S = 10.0
START_S = 120.0  # the first worker waits for the import of sympy, which a busy machine does slowly
MEMORY_BYTES = 1 << 30
PAIRS_PER_WORKER = 2_000  # then it is replaced: its caches take some 3 MB for each 100 expressions
# No gold of the public sets has more than 160 characters or five levels of brackets. An answer beyond these is compared
# as a string, so that what is refused depends on no clock.
MAX_CHARS = 2_000
MAX_NESTING = 12
MAX_EXPRESSION_CHARS = 400
MAX_BITS = 200_000
MAX_EXPANDED_EXPONENT = 64


class Health(NamedTuple):
    """Of each sample: 1.0 where the name of the rate holds, and its tokens; shapes (problems, samples)."""

    think_close_rate: np.ndarray
    boxed_answer_rate: np.ndarray
    length_stop_rate: np.ndarray
    timed_out_rate: np.ndarray
    tokens_per_sample: np.ndarray


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
    gold = {problem.problem_id: problem.answer for problem in problems}
    unknown = next((sample.problem_id for sample in samples if sample.problem_id not in gold), None)
    if unknown is not None:
        raise ValueError(f"sample of problem {unknown!r}, which the problem set does not hold; give the set it is from")
    answers = [extract(sample.text, thinks) for sample in samples]
    pairs = {(gold[s.problem_id], answer) for s, answer in zip(samples, answers, strict=True) if answer is not None}
    verdicts = dict(verify(sorted(pairs), workers=workers))
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


def version() -> str:
    """What grades are comparable under: math-verify's version and a digest of the policies' code."""
    code = b"".join(Path(module).read_bytes() for module in (__file__, answers.__file__))
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


def health(samples: Sequence[Sample], grades: Sequence[Grade]) -> Health:
    """Health of the run that made `samples`; `grades` are theirs. Every problem has the same number of samples."""
    outcome_by_key = {(row.problem_id, row.sample_index): row.outcome for row in grades}
    ordered = sorted(samples, key=lambda sample: (sample.problem_id, sample.sample_index))
    outcomes = [outcome_by_key[sample.problem_id, sample.sample_index] for sample in ordered]
    values = Health(
        think_close_rate=["</think>" in sample.text for sample in ordered],
        boxed_answer_rate=[outcome not in ("no_answer", "cut_off") for outcome in outcomes],
        length_stop_rate=[sample.finish_reason == "length" for sample in ordered],
        timed_out_rate=[outcome == "timed_out" for outcome in outcomes],
        tokens_per_sample=[len(sample.token_ids) for sample in ordered],
    )
    num_problems = len({sample.problem_id for sample in ordered})
    return Health(*(np.array(each, dtype=float).reshape(num_problems, -1) for each in values))


def verify(
    pairs: Sequence[tuple[str, str]], deadline_s: float = DEADLINE_S, workers: int | None = None
) -> Iterator[tuple[tuple[str, str], Verdict]]:
    """Yield each (gold, answer) pair with its verdict, as they come."""
    hard, forker = [], None
    try:
        for pair in pairs:
            verdict = _without_algebra(*pair)
            if verdict is None:
                hard.append(pair)
                forker = forker or _Forker(deadline_s)  # which loads sympy in the meantime
            else:
                yield pair, verdict
        if forker:
            verdicts = _in_workers(hard, forker, workers)
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
        with contextlib.closing(_Forker(DEADLINE_S)) as forker:
            verdicts = _in_workers(hard, forker, None)
            bar = tqdm(verdicts, "parse answers", len(hard), unit="answer", mininterval=1, disable=len(hard) < 200)
            parsed = {expression for (expression, _), verdict in bar if verdict == "right"}
    return {gold: gold in made_of and parsed.issuperset(made_of[gold]) for gold in unique}


class _NeedsAlgebra(Exception):
    """Strings, numbers and structure give no verdict."""


def _without_algebra(gold: str, answer: str) -> Verdict | None:
    """The verdict where strings, numbers and structure give one."""
    if _is_beyond_bounds(gold) or _is_beyond_bounds(answer):
        return "right" if gold.strip() == answer.strip() else "wrong"
    try:
        return "right" if answers.equal(gold, answer, _refuse) else "wrong"
    except _NeedsAlgebra:
        return None
    except RecursionError:
        return "wrong"


def _refuse(gold: str, answer: str) -> bool:
    raise _NeedsAlgebra


def _is_beyond_bounds(text: str) -> bool:
    return len(text) > MAX_CHARS or answers.nesting(text) > MAX_NESTING


class _Forker:
    """A process that imports math-verify once and forks a worker in milliseconds, as often as one is killed.

    It leads a process group of its own, which ends with it. Where this process dies, the forker reads the end of its
    socket and ends the group; a worker ends at its deadline in any case, by its own timer.
    """

    def __init__(self, deadline_s: float):
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from ssd.grading import _fork; _fork({theirs.fileno()}, {deadline_s!r})"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            process_group=0,
        )
        theirs.close()
        self.socket = ours

    def worker(self) -> "_Worker":
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self.socket, [b"w"], [theirs.fileno()])
        except OSError as error:
            raise RuntimeError("the grading process ended before it began; is math-verify installed?") from error
        theirs.close()
        return _Worker(ours)

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.socket.close()


class _Worker:
    """This side of a process that decides one pair at a time and may end at any time."""

    def __init__(self, connection: socket.socket):
        self.socket, self.lines = connection, connection.makefile("rb")
        self.pair: tuple[str, str | None] | None = None
        self.num_pairs = 0

    def give(self, pair: tuple[str, str | None]) -> None:
        self.pair, self.num_pairs = pair, self.num_pairs + 1
        self.socket.sendall(json.dumps(pair).encode() + b"\n")

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


def _in_workers(
    pairs: Sequence[tuple[str, str | None]], forker: _Forker, workers: int | None
) -> Iterator[tuple[tuple[str, str | None], Verdict]]:
    """Verdict of each pair, as they come; beside the answer None, 'right' is an expression that can be parsed."""
    waiting, pool = collections.deque(pairs), set()
    begin = time.monotonic()
    with selectors.DefaultSelector() as selector:

        def start() -> None:
            worker = forker.worker()
            selector.register(worker.socket, selectors.EVENT_READ, worker)
            pool.add(worker)

        def end(worker: _Worker) -> None:
            selector.unregister(worker.socket)
            pool.discard(worker)
            worker.close()

        try:
            for _ in range(min(workers or os.cpu_count() or 1, len(pairs))):
                start()
            while pool:
                ready = selector.select(timeout=1)
                if all(worker.pair is None for worker in pool) and not ready and time.monotonic() - begin > START_S:
                    raise RuntimeError(f"no grading worker started within {START_S:g} s")
                for key, _ in ready:
                    worker, line = key.data, key.data.lines.readline()
                    if worker.pair is None and not line:
                        raise RuntimeError("a grading worker ended before it began; is math-verify installed?")
                    if worker.pair is not None:
                        # No line: the worker ended on this pair, at its deadline or at its memory limit.
                        verdict = line.decode(errors="replace").strip()
                        yield worker.pair, (verdict if verdict in ("right", "wrong") else "timed_out")
                        worker.pair = None
                    if not line or not waiting or worker.num_pairs >= PAIRS_PER_WORKER:
                        end(worker)
                        if waiting:
                            start()
                    else:
                        worker.give(waiting.popleft())
        finally:
            for worker in list(pool):
                end(worker)


def _fork(control: int, deadline_s: float) -> None:
    """Fork a worker for each socket that arrives, until there is nobody left to send one."""
    import gc
    import logging

    logging.disable()  # math-verify warns of each answer that it cannot parse
    _same_expression("x^2 - 1", "(x + 1)(x - 1)")  # what parser and sympy load on first use, every worker shares
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=control) as orders:
        while True:
            message, sockets, _, _ = socket.recv_fds(orders, 1, 1)
            if not message:
                os.killpg(0, signal.SIGKILL)
            if os.fork() == 0:
                orders.close()
                _work(socket.socket(fileno=sockets[0]), deadline_s)
                os._exit(0)
            os.close(sockets[0])


def _work(connection: socket.socket, deadline_s: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is computing
    connection.sendall(b"ready\n")
    for line in connection.makefile("rb"):
        signal.setitimer(signal.ITIMER_REAL, deadline_s)
        gold, answer = json.loads(line)
        try:
            if answer is None:
                right = _parsed(gold, False) is not None
            else:
                right = answers.equal(gold, answer, _same_expression)
        except MemoryError:
            os._exit(1)
        except Exception:  # whatever sympy raised, it is not right
            right = False
        # math-verify takes a MemoryError for a difference.
        if not right and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MEMORY_BYTES / 2:
            os._exit(1)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.sendall(b"right\n" if right else b"wrong\n")


def _same_expression(gold: str, answer: str) -> bool:
    """Whether math-verify finds two LaTeX expressions, or the last one in a sentence, equal."""
    import math_verify
    import sympy
    from math_verify.grader import should_treat_as_complex

    is_complex = should_treat_as_complex(gold) or should_treat_as_complex(answer)
    one = _parsed(gold, is_complex)
    if one is None:
        return False
    if answers.is_sentence(answer):
        found = math_verify.parse(answer, parsing_timeout=None, fallback_mode="no_fallback")
        other = found[0] if found else None
    else:
        other = _parsed(answer, is_complex)
    if other is None:
        return False
    if type(one) is type(other) and one == other:
        return True
    if max(_log2(one), _log2(other)) > MAX_BITS:
        return False
    if is_complex:
        one, other = (each.subs({s: sympy.I for s in each.free_symbols if s.name == "i"}) for each in (one, other))
    if not math_verify.verify(one, other, allow_set_relation_comp=True, timeout_seconds=None):
        return False
    # math-verify rounds differences away that are all there is to small numbers.
    if not all(getattr(each, "is_number", False) and each != 0 for each in (one, other)):
        return True
    difference = (one - other).doit()
    if difference.is_Rational:
        return difference == 0
    return bool(abs((one / other).doit().evalf(8) - 1) < 1e-4)


# To the parser the first are 1; it drops primes and bases, writes out binomials as it reads, and is lost in bars.
_MISREAD = re.compile(r"\\(?:gcd|lcm)|'|(?<![\^\d])\d+_|\\[dt]?binom\{[^{}]*(?:\d{5}|\^)|\|(?:[^|]*\|){9}", re.DOTALL)


@functools.lru_cache(maxsize=4096)
def _parsed(latex: str, is_complex: bool):
    """sympy expression of `latex`, nothing in it evaluated; None where it has none or no value."""
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.math_normalization import normalize_latex

    if len(latex) > MAX_EXPRESSION_CHARS or _MISREAD.search(latex):
        return None
    # Units and boxes are gone by now; here `units` would take the letter off `5c`.
    form = NormalizationConfig(True, False, True, True, "none", False)
    try:
        degrees = answers.TRIGONOMETRIC.search(latex) is not None
        expression = latex2sympy(
            normalize_latex(latex, form), is_real=not is_complex, convert_degrees=degrees, normalization_config=None
        )
        return None if expression in (sympy.zoo, sympy.nan) else expression
    except Exception:  # antlr's errors have no common class but this one
        return None


def _log2(expression) -> float:
    """A bound on the bits of the largest number that evaluation of `expression` would write out."""
    import sympy

    bits = [_log2(part) for part in getattr(expression, "args", ())]
    largest = max(bits, default=1.0)
    if isinstance(expression, sympy.Rational):
        return float(max(abs(expression.p).bit_length(), expression.q.bit_length()))
    if isinstance(expression, sympy.Pow | sympy.exp):
        base, exponent = expression.as_base_exp()
        if base.is_Add and base.free_symbols and _log2(exponent) > math.log2(MAX_EXPANDED_EXPONENT):
            return math.inf
        return largest * 2.0 ** bits[-1] if bits[-1] < 64 else math.inf
    if isinstance(expression, sympy.factorial):
        return largest * 2.0**largest if largest < 64 else math.inf
    if isinstance(expression, sympy.Sum | sympy.Product):
        return math.inf if any(_log2(limit) > 14 for limit in expression.limits) else largest
    return sum(bits) if isinstance(expression, sympy.Mul) else largest + math.log2(1 + len(bits))

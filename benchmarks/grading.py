"""How fast are responses graded, beside a plain loop over math-verify, and what do hostile answers cost?

Run:   python -m benchmarks.grading [--data DIR] [--sizes 4000 40000]

Golds are real ones, read from a local mirror of the hub (`--data`, or SSD_TEST_DATA), with 8 samples a problem:
responses of 1,000 to 3,000 characters that end in a box. Each problem has its own chance of being solved; a right
answer is written as in the gold or in another form, wrong ones are drawn from a few a problem, as models repeat theirs.
The plain loop is `verify(parse(gold), parse(response))` in one process; it is measured on a part of the responses, and
its rate is what is compared. Both are measured in turns, since the speed of a machine varies; the median is printed.
Ends with status 0 only if every target is met.
"""

import argparse
import logging
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import math_verify

from ssd.data import sources
from ssd.grading import grader
from ssd.records import Problem, Sample
from tests.grading.test_grader import hostile_answers

DATA = Path(os.environ.get("SSD_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
SAMPLES_PER_PROBLEM = 8
NUM_PLAIN = 600
HOSTILE_SHARE = 0.01
SPEED_UP = 8.0  # own rate on 2 cores over the plain loop's
HOSTILE_RATE = 0.5  # own rate with hostile answers over the own clean rate
WRITINGS = (
    lambda gold: gold.replace("\\frac", "\\dfrac"),
    lambda gold: f"\\left({gold}\\right)" if re.fullmatch(r"\d+", gold) else gold.replace(" ", ""),
    lambda gold: f"x = {gold}",
    lambda gold: f"{gold}.0" if re.fullmatch(r"\d+", gold) else f"{gold}\\,",
    lambda gold: re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", gold),
    lambda gold: f"\\text{{{gold}}}" if gold.isalpha() else re.sub(r"\\sqrt\{(\d+)\}", r"(\1)^{1/2}", gold),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds hub/<set>/<split>.jsonl")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4_000, 40_000], help="numbers of responses")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    logging.disable()
    if not (args.data / "hub").is_dir():
        raise SystemExit(f"no mirror at {args.data / 'hub'}; give --data or set SSD_TEST_DATA")
    golds = real_golds(str(args.data / "hub"))
    math_verify.verify(math_verify.parse("$1$"), math_verify.parse("$1$"))
    print(
        "| responses | unique pairs | plain loop | 1 core | 2 cores | 2 cores / plain | 1% hostile | hostile / clean |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    missed = []
    for size in args.sizes:
        problems, samples = made_samples(golds, size, seed=size)
        poisoned = with_hostile(samples, seed=size)
        plain, one, two, hostile = [], [], [], []
        for turn in range(args.repeats):
            part = random.Random(turn).sample(samples, min(NUM_PLAIN, size))
            plain.append(rate(plain_loop, problems, part))
            one.append(rate(own, problems, samples, 1))
            two.append(rate(own, problems, samples, 2))
            hostile.append(rate(own, problems, poisoned, 2))
        speed_up = statistics.median(b / a for a, b in zip(plain, two, strict=True))
        kept = statistics.median(b / a for a, b in zip(two, hostile, strict=True))
        gold = {problem.problem_id: problem.answer for problem in problems}
        unique = len({(gold[s.problem_id], grader.extract(s.text, thinks=True)) for s in samples})
        rates = " | ".join(f"{statistics.median(each):,.0f}/s" for each in (plain, one, two))
        print(
            f"| {size:,} | {unique:,} | {rates} | {speed_up:.1f} | {statistics.median(hostile):,.0f}/s | {kept:.2f} |",
            flush=True,
        )
        if speed_up < SPEED_UP:
            missed.append(f"{size:,} responses: {speed_up:.1f} times the plain loop")
        if kept < HOSTILE_RATE:
            missed.append(f"{size:,} responses: {kept:.2f} of the clean rate with hostile answers")
    print(
        f"\nTargets: {SPEED_UP:g} times the plain loop on 2 cores; {HOSTILE_RATE:g} of the clean rate with 1% hostile."
    )
    print("missed: " + "; ".join(missed) if missed else "every target met")
    return 1 if missed else 0


def real_golds(root: str) -> list[str]:
    """Golds of every set that the mirror holds, in a fixed random order."""
    held = [name for name, source in sources.SOURCES.items() if sources.mirrored(source, Path(root))]
    golds = [problem.answer for name in held for problem in sources.load(name, root).problems]
    return random.Random(0).sample(golds, len(golds))


def made_samples(golds: Sequence[str], size: int, seed: int) -> tuple[list[Problem], list[Sample]]:
    rng = random.Random(seed)
    problems = [Problem(f"p{i}", "made", "", golds[i % len(golds)], "") for i in range(size // SAMPLES_PER_PROBLEM)]
    samples = []
    for problem in problems:
        solved = rng.betavariate(0.6, 0.6)
        mistakes = [near_miss(problem.answer, rng) for _ in range(3)]
        for index in range(SAMPLES_PER_PROBLEM):
            if rng.random() < solved:
                answer = problem.answer if rng.random() < 0.6 else rng.choice(WRITINGS)(problem.answer)
            else:
                answer = rng.choice(mistakes) if rng.random() < 0.8 else rng.choice(golds)
            samples.append(sample(problem.problem_id, index, response(answer, rng)))
    return problems, samples


def near_miss(gold: str, rng: random.Random) -> str:
    """`gold` with one number changed, or a sign before it."""
    numbers = list(re.finditer(r"(?<![\^_\d])(?<!frac)(?<!frac\d)\d+", gold))
    if not numbers or (rng.random() < 0.2 and gold[0] not in "([{\\"):
        return gold[1:] if gold.startswith("-") else f"-{gold}"
    number = rng.choice(numbers)
    return f"{gold[: number.start()]}{int(number[0]) + rng.randint(1, 9)}{gold[number.end() :]}"


def response(answer: str, rng: random.Random) -> str:
    """1,000 to 3,000 characters of reasoning with formulas, sometimes with an earlier box, then the answer's."""
    length, lines = rng.randint(1_000, 3_000) - len(answer) - 60, []
    while sum(map(len, lines)) < length:
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        lines.append(
            f"Since $x_{{{a}}} = \\frac{{{a}}}{{{b}}}$ and $n \\equiv {a} \\pmod{{{b}}}$, we get ${a * b}$ here.\n"
        )
    if rng.random() < 0.1:
        lines.insert(len(lines) // 2, f"Perhaps \\boxed{{{a}}}, but let me check this again.\n")
    return f"{''.join(lines)[:length]}\n</think>\nTherefore the answer is $\\boxed{{{answer}}}$."


def with_hostile(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """`samples` with 1% of them replaced by hostile ones, of those that the tests make."""
    rng, hostile = random.Random(seed), hostile_answers()
    chosen = set(rng.sample(range(len(samples)), round(len(samples) * HOSTILE_SHARE)))
    return [
        sample(s.problem_id, s.sample_index, f"</think>\\boxed{{{rng.choice(hostile)}}}") if i in chosen else s
        for i, s in enumerate(samples)
    ]


def sample(problem_id: str, index: int, text: str) -> Sample:
    return Sample(problem_id, index, [], [], text, "stop", 0.0)


def rate(grade, problems: Sequence[Problem], samples: Sequence[Sample], *args) -> float:
    """Responses a second."""
    begin = time.perf_counter()
    grade(problems, samples, *args)
    return len(samples) / (time.perf_counter() - begin)


def own(problems: Sequence[Problem], samples: Sequence[Sample], workers: int) -> None:
    grader.grade(samples, problems, thinks=True, workers=workers)


def plain_loop(problems: Sequence[Problem], samples: Sequence[Sample]) -> None:
    gold = {problem.problem_id: problem.answer for problem in problems}
    for each in samples:
        math_verify.verify(math_verify.parse(f"${gold[each.problem_id]}$"), math_verify.parse(each.text))


if __name__ == "__main__":
    sys.exit(main())

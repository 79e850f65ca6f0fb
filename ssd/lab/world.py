"""Generated problems modulo 7 and the worked solutions that the lab's model learns to write.

Every problem reduces to an accumulator and a row of operations on digits. A solution begins with a true fork: guess
at once (the mode, seldom right) or work in one of five styles, which are neither equally likely nor equally good. At
work each result is a lock: the right digit or, now and then, one of six wrong ones, with which the
solution goes on. Greedy decoding therefore guesses and hot decoding breaks locks.
"""

import dataclasses
import hashlib
import operator
import random
from collections.abc import Sequence
from typing import NamedTuple

from ssd.records import Problem

MODULUS = 7
OPERATIONS = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}

# Multiplying is the harder lock, so that problems of one length still differ.
ERROR_RATE = 0.10
ERROR_FACTOR = {"plus": 0.6, "minus": 1.0, "times": 1.4}
# The longer the problem, the likelier a guess: pass@1 then differs between problems as it does in real sets.
GUESS_SHARE = {2: 0.30, 3: 0.40, 4: 0.50, 5: 0.60, 6: 0.70}
GUESS_RIGHT = 0.20


class Style(NamedTuple):
    """One way to write the work: its share of the worked solutions, its notation, its errors beside the average."""

    share: float
    opening: str
    relation: str
    error_factor: float


STYLES = (
    Style(0.30, "Start at ", " is ", 1.0),
    Style(0.26, "We begin with ", " gives ", 0.8),
    Style(0.20, "Take ", " = ", 1.2),
    Style(0.14, "Let me see: ", " makes ", 0.7),
    Style(0.10, "From ", " -> ", 1.4),
)
GUESS = "At a guess"

# Texts between the digits: statements and solutions alternate one of these, each one token, with a digit.
CHAIN = ("Start with ", ". What is the result modulo 7?")
CHAIN_VERBS = {"plus": ", add ", "minus": ", subtract ", "times": ", multiply by "}
RECURRENCE = (
    "Let a_1 = ",
    ". For odd n let a_{n+1} = ",
    " a_n + ",
    "; for even n let a_{n+1} = ",
    ". Find a_",
    " modulo 7.",
)
POLYNOMIAL = ("Let p(x) = ", ". Find p(", ") modulo 7.")
POWERS = {1: "x", 2: "x^2", 3: "x^3"}
SIGNS = {"plus": " + ", "minus": " - "}
STEPS = {name: f"; {name} " for name in OPERATIONS}
THOUGHT_END = ".\n</think>\n\n\\boxed{"


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One problem as the world knows it: its words, and the `start` and `operations` (name, digit) to work it out."""

    family: str
    statement: str
    start: int
    operations: tuple[tuple[str, int], ...]

    def answer(self) -> int:
        """Value of the accumulator after all operations, 0 to 6."""
        value = self.start
        for name, digit in self.operations:
            value = OPERATIONS[name](value, digit) % MODULUS
        return value


def problems(num_problems: int, seed: int) -> list[Problem]:
    """Distinct problems, half of them chains, a quarter recurrences, a quarter polynomials.

    Parameters
    ----------
    num_problems : int
    seed : int
        The same seed gives the same problems in the same order. Two seeds share some: draw sets that must not overlap
        in one call and cut it.

    Returns
    -------
    list of Problem
        `source` is the family; `level` the number of operations, '2' to '6'.
    """
    if num_problems < 1:
        raise ValueError(f"num_problems is {num_problems}; ask for at least 1")
    rng = random.Random(seed)
    tasks: dict[str, Task] = {}
    while len(tasks) < num_problems:
        task = draw(rng)
        tasks.setdefault(task.statement, task)
    return [
        Problem(
            problem_id=hashlib.sha256(task.statement.encode()).hexdigest()[:16],
            source=task.family,
            problem=task.statement,
            answer=str(task.answer()),
            level=str(len(task.operations)),
        )
        for task in tasks.values()
    ]


def draw(rng: random.Random) -> Task:
    """One task at random."""
    return rng.choice((_chain, _chain, _recurrence, _polynomial))(rng)


def worked_solution(task: Task, rng: random.Random, error_rate: float = ERROR_RATE) -> str:
    """A response to `task`: a guess or work, at the shares above.

    Like every response here it is what follows the generation prompt, which ends inside the think section, up to and
    without the end-of-turn token.
    """
    if rng.random() < GUESS_SHARE[len(task.operations)]:
        return guess(task, rng)
    style = rng.choices(STYLES, [style.share for style in STYLES])[0]
    return work(task, rng, style, error_rate)


def guess(task: Task, rng: random.Random) -> str:
    """The response that answers at once."""
    return f"{GUESS}{THOUGHT_END}{_digit(task.answer(), 1 - GUESS_RIGHT, rng)}}}"


def work(task: Task, rng: random.Random, style: Style, error_rate: float = ERROR_RATE) -> str:
    """The response that works `task` out in `style`.

    Parameters
    ----------
    task : Task
    rng : random.Random
    style : Style
    error_rate : float
        Average probability that a lock breaks; the operation's and the style's factors multiply it.
    """
    value = task.start
    written = [f"{style.opening}{value}"]
    for name, digit in task.operations:
        broken = error_rate * ERROR_FACTOR[name] * style.error_factor
        value = _digit(OPERATIONS[name](value, digit) % MODULUS, broken, rng)
        written.append(f"{STEPS[name]}{digit}{style.relation}{value}")
    return f"{''.join(written)}{THOUGHT_END}{value}}}"


def kinds(tokens: Sequence[str]) -> list[str]:
    """What each token of a response is in this world, whose texts are one token each.

    `fork`: the first token, which guesses or chooses a style. `lock`: a result, one right digit and six that are an
    error. `guess`: the boxed digit of a guess, which nobody has worked out. `given`: all else; what stands before it
    leaves one right token.
    """
    relations = {style.relation for style in STYLES}
    guessed = tokens[0] == GUESS
    before = ["", *tokens[:-1]]
    return [
        "fork" if index == 0
        else "lock" if before[index] in relations
        else "guess" if guessed and before[index] == "\\boxed{"
        else "given"
        for index in range(len(tokens))
    ]  # fmt: skip


def fragments() -> list[str]:
    """Every text between two digits of a statement or a solution, without the marks of the think section."""
    powers = [power + sign for power in POWERS.values() for sign in SIGNS.values()]
    styles = [text for style in STYLES for text in (style.opening, style.relation)]
    return [
        *CHAIN, *CHAIN_VERBS.values(), *RECURRENCE, *POLYNOMIAL, *powers,
        *STEPS.values(), *styles, GUESS, ".\n", "\n\n", "\\boxed{", "}",
    ]  # fmt: skip


def _digit(right: int, error_rate: float, rng: random.Random) -> int:
    return (right + rng.randrange(1, MODULUS)) % MODULUS if rng.random() < error_rate else right


# Operands that would decide the result alone (plus 0, times 0 or 1) are left out.
def _chain(rng: random.Random) -> Task:
    start = rng.randint(1, 6)
    names = rng.choices(list(OPERATIONS), k=rng.randint(2, 6))
    operations = tuple((name, rng.randint(2 if name == "times" else 1, 6)) for name in names)
    verbs = "".join(f"{CHAIN_VERBS[name]}{digit}" for name, digit in operations)
    return Task("lab-chain", f"{CHAIN[0]}{start}{verbs}{CHAIN[1]}", start, operations)


def _recurrence(rng: random.Random) -> Task:
    start, index = rng.randint(1, 6), rng.randint(2, 4)
    odd, even = ((rng.randint(2, 6), rng.randint(1, 6)) for _ in range(2))
    digits = (start, odd[0], odd[1], even[0], even[1], index)
    let, for_odd, term, for_even, find, end = RECURRENCE
    texts = (let, for_odd, term, for_even, term, find)
    statement = "".join(f"{text}{digit}" for text, digit in zip(texts, digits, strict=True)) + end
    operations = [step for factor, constant in (odd, even, odd) for step in (("times", factor), ("plus", constant))]
    return Task("lab-recurrence", statement, start, tuple(operations[: 2 * (index - 1)]))


def _polynomial(rng: random.Random) -> Task:
    degree, x = rng.randint(2, 3), rng.randint(2, 6)
    lead = rng.randint(2, 6)
    terms = [(rng.choice(list(SIGNS)), rng.randint(2, 6)) for _ in range(degree)]
    powers = [POWERS[power] for power in range(degree, 0, -1)]
    tail = "".join(f"{power}{SIGNS[sign]}{digit}" for power, (sign, digit) in zip(powers, terms, strict=True))
    operations = [step for term in terms for step in (("times", x), term)]
    let, find, end = POLYNOMIAL
    return Task("lab-polynomial", f"{let}{lead}{tail}{find}{x}{end}", lead, tuple(operations))

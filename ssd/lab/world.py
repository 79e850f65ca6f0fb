"""Generated problems in modular arithmetic and the worked solutions that a lab's model learns to write.

Every problem reduces to an accumulator and a row of operations on numbers. A solution begins with a true fork: guess
at once (the mode, seldom right) or work in one of several styles, which are neither equally likely nor equally good. At
work each result is a lock: the right number or, now and then, a wrong one, with which the solution goes on. Greedy
decoding therefore guesses and hot decoding breaks locks. WORLDS differ in how hard that is, and in where errors fall.
"""

import dataclasses
import hashlib
import itertools
import operator
import random
from collections.abc import Mapping, Sequence
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


@dataclasses.dataclass(frozen=True)
class World:
    """How long problems are, and what goes wrong in their solutions.

    `num_operations` are the fewest and the most. `guess_share` is by number of operations, `guess_right` the share of
    guesses that are right. `error_factor` and `num_wrong`, the number of wrong values that an error may take, are by
    name of the operation.
    """

    name: str
    modulus: int
    num_operations: tuple[int, int]
    guess_share: Mapping[int, float]
    guess_right: float
    styles: tuple[Style, ...]
    error_rate: float
    error_factor: Mapping[str, float]
    num_wrong: Mapping[str, int]


LAB = World(
    "lab",
    MODULUS,
    num_operations=(2, 6),
    guess_share=GUESS_SHARE,
    guess_right=GUESS_RIGHT,
    styles=STYLES,
    error_rate=ERROR_RATE,
    error_factor=ERROR_FACTOR,
    num_wrong=dict.fromkeys(OPERATIONS, MODULUS - 1),
)
# Longer chains of larger numbers, the same structure: for a model of 60 million parameters, which might learn to work
# out in its head what a guess tells of the answer, so guesses tell nothing.
HARD = World(
    "lab-h200",
    modulus=13,
    num_operations=(4, 9),
    guess_share={4: 0.30, 5: 0.36, 6: 0.42, 7: 0.48, 8: 0.54, 9: 0.60},
    guess_right=1 / 13,
    styles=STYLES,
    error_rate=ERROR_RATE,
    error_factor=ERROR_FACTOR,
    num_wrong=dict.fromkeys(OPERATIONS, 12),
)
# No decoding of the model has a threshold that serves every state. Where the errors of minus fall on one number, a
# top-p that keeps the right one alone is below the guess's share of the fork. Where those of plus and times fall on
# four, each is as likely beside the right number as a style is beside the guess, so that no min-p tells them apart.
# Two truncations with a temperature between them do: training's, then decoding's.
MIXED_OPENINGS = (
    "Start at ", "We begin with ", "Take ", "Let me see: ", "From ", "First, ", "Now ", "We have ", "So: ",
    "Step by step, ", "Write down ", "Going from ",
)  # fmt: skip
MIXED = World(
    "lab-mixed",
    modulus=13,
    num_operations=(2, 4),
    guess_share=dict.fromkeys((2, 3, 4), 0.60),
    guess_right=1 / 13,
    styles=tuple(
        Style((1.15 - 0.3 * place / 11) / 12, opening, STYLES[place % len(STYLES)].relation, 1.0)
        for place, opening in enumerate(MIXED_OPENINGS)
    ),
    error_rate=0.168,
    error_factor={"plus": 1.0, "minus": 2.5, "times": 1.0},
    num_wrong={"plus": 4, "minus": 1, "times": 4},
)
WORLDS = {world.name: world for world in (LAB, HARD, MIXED)}

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
    modulus: int = MODULUS

    def answer(self) -> int:
        """Value of the accumulator after all operations, from 0 to the modulus - 1."""
        value = self.start
        for name, digit in self.operations:
            value = OPERATIONS[name](value, digit) % self.modulus
        return value


def problems(num_problems: int, seed: int, world: World = LAB) -> list[Problem]:
    """Distinct problems, half of them chains, a quarter recurrences, a quarter polynomials.

    Parameters
    ----------
    num_problems : int
    seed : int
        The same seed gives the same problems in the same order. Two seeds share some: draw sets that must not overlap
        in one call and cut it.
    world : World

    Returns
    -------
    list of Problem
        `source` is the family; `level` the number of operations.
    """
    if num_problems < 1:
        raise ValueError(f"num_problems is {num_problems}; ask for at least 1")
    rng = random.Random(seed)
    tasks: dict[str, Task] = {}
    while len(tasks) < num_problems:
        task = draw(rng, world)
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


def draw(rng: random.Random, world: World = LAB) -> Task:
    """One task at random."""
    return rng.choice((_chain, _chain, _recurrence, _polynomial))(rng, world)


def worked_solution(task: Task, rng: random.Random, world: World = LAB) -> str:
    """A response to `task`: a guess or work, at the shares above.

    Like every response here it is what follows the generation prompt, which ends inside the think section, up to and
    without the end-of-turn token.
    """
    if rng.random() < world.guess_share[len(task.operations)]:
        return guess(task, rng, world)
    style = rng.choices(world.styles, [style.share for style in world.styles])[0]
    return work(task, rng, style, world=world)


def guess(task: Task, rng: random.Random, world: World = LAB) -> str:
    """The response that answers at once."""
    digit = _digit(task.answer(), 1 - world.guess_right, task.modulus - 1, rng, task.modulus)
    return f"{GUESS}{THOUGHT_END}{digit}}}"


def work(task: Task, rng: random.Random, style: Style, error_rate: float | None = None, world: World = LAB) -> str:
    """The response that works `task` out in `style`.

    Parameters
    ----------
    task : Task
    rng : random.Random
    style : Style
    error_rate : float, optional
        Average probability that a lock breaks, the world's unless given; the operation's and the style's factors
        multiply it.
    world : World
    """
    error_rate = world.error_rate if error_rate is None else error_rate
    value = task.start
    written = [f"{style.opening}{value}"]
    for name, digit in task.operations:
        broken = error_rate * world.error_factor[name] * style.error_factor
        value = _digit(OPERATIONS[name](value, digit) % task.modulus, broken, world.num_wrong[name], rng, task.modulus)
        written.append(f"{STEPS[name]}{digit}{style.relation}{value}")
    return f"{''.join(written)}{THOUGHT_END}{value}}}"


def kinds(tokens: Sequence[str]) -> list[str]:
    """What each token of a response is in this world, whose texts are one token each.

    `fork`: the first token, which guesses or chooses a style. `lock`: a result, one right number and others that are an
    error. `guess`: the boxed number of a guess, which nobody has worked out. `given`: all else; what stands before it
    leaves one right token.
    """
    relations = {style.relation for world in WORLDS.values() for style in world.styles}
    guessed = tokens[0] == GUESS
    before = ["", *tokens[:-1]]
    return [
        "fork" if index == 0
        else "lock" if before[index] in relations
        else "guess" if guessed and before[index] == "\\boxed{"
        else "given"
        for index in range(len(tokens))
    ]  # fmt: skip


def fragments(world: World = LAB) -> list[str]:
    """Every text between two numbers of a statement or a solution, without the marks of the think section.

    And the numbers of more than one digit.
    """
    chain, recurrence, polynomial = _statements(world)
    powers = [power + sign for power in _powers(world.num_operations[1] // 2) for sign in SIGNS.values()]
    styles = [text for style in world.styles for text in (style.opening, style.relation)]
    return [
        *chain, *CHAIN_VERBS.values(), *recurrence, *polynomial, *powers,
        *STEPS.values(), *styles, GUESS, ".\n", "\n\n", "\\boxed{", "}", *map(str, range(10, world.modulus)),
    ]  # fmt: skip


def _statements(world: World) -> list[tuple[str, ...]]:
    return [
        tuple(text.replace(f"modulo {MODULUS}", f"modulo {world.modulus}") for text in texts)
        for texts in (CHAIN, RECURRENCE, POLYNOMIAL)
    ]


def _powers(degree: int) -> list[str]:
    """x, x^2, ... x^degree."""
    return ["x", *(f"x^{power}" for power in range(2, degree + 1))]


def _digit(right: int, error_rate: float, num_wrong: int, rng: random.Random, modulus: int) -> int:
    return (right + rng.randrange(1, num_wrong + 1)) % modulus if rng.random() < error_rate else right


# Operands that would decide the result alone (plus 0, times 0 or 1) are left out.
def _chain(rng: random.Random, world: World) -> Task:
    largest, (opening, end) = world.modulus - 1, _statements(world)[0]
    start = rng.randint(1, largest)
    names = rng.choices(list(OPERATIONS), k=rng.randint(*world.num_operations))
    operations = tuple((name, rng.randint(2 if name == "times" else 1, largest)) for name in names)
    verbs = "".join(f"{CHAIN_VERBS[name]}{digit}" for name, digit in operations)
    return Task(f"{world.name}-chain", f"{opening}{start}{verbs}{end}", start, operations, world.modulus)


def _recurrence(rng: random.Random, world: World) -> Task:
    largest, (fewest, most) = world.modulus - 1, world.num_operations
    start, index = rng.randint(1, largest), rng.randint(-(-fewest // 2) + 1, most // 2 + 1)
    odd, even = ((rng.randint(2, largest), rng.randint(1, largest)) for _ in range(2))
    digits = (start, odd[0], odd[1], even[0], even[1], index)
    let, for_odd, term, for_even, find, end = _statements(world)[1]
    texts = (let, for_odd, term, for_even, term, find)
    statement = "".join(f"{text}{digit}" for text, digit in zip(texts, digits, strict=True)) + end
    factors = itertools.islice(itertools.cycle((odd, even)), index - 1)
    operations = tuple(step for factor, constant in factors for step in (("times", factor), ("plus", constant)))
    return Task(f"{world.name}-recurrence", statement, start, operations, world.modulus)


def _polynomial(rng: random.Random, world: World) -> Task:
    largest, (fewest, most) = world.modulus - 1, world.num_operations
    degree, x = rng.randint(max(2, -(-fewest // 2)), most // 2), rng.randint(2, largest)
    lead = rng.randint(2, largest)
    terms = [(rng.choice(list(SIGNS)), rng.randint(2, largest)) for _ in range(degree)]
    powers = _powers(degree)[::-1]
    tail = "".join(f"{power}{SIGNS[sign]}{digit}" for power, (sign, digit) in zip(powers, terms, strict=True))
    operations = [step for term in terms for step in (("times", x), term)]
    let, find, end = _statements(world)[2]
    return Task(f"{world.name}-polynomial", f"{let}{lead}{tail}{find}{x}{end}", lead, tuple(operations), world.modulus)

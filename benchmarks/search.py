"""Samples that a search takes to come within 1 point of the best cell of a published grid: ours, TPE, random, the grid.

Run: python -m benchmarks.search [--repetitions 200] [--jobs 2]
     python -m benchmarks.search --lab MODEL [--trials 16]: instead, on a model of the lab, the search against an
     exhaustive grid, the winners of both measured again on other problems.

The truth is a smooth surface fitted to published pass@1 (LiveCodeBench by training and evaluation temperature, arXiv
2604.01193, section 3.4; math by temperature, min-p and presence penalty, the first port's baselines), and a trial draws
right or wrong at it, a sample a problem. `independent`: every outcome by itself. `paired`: problems differ in
difficulty, shared by all trials, such that pairing keeps 26% of a difference's variance, as that port's intervals did.
Every cell of the grid, and every trial of TPE and random search, is measured on all problems. Ours knows no point
beforehand here. `within 1 point` is the share of repetitions in which the cell or trial that a method would choose has
a true value at most 1 point below the best cell's. Cost is the number of samples at which that share has come to the
full grid's and no longer falls below it.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from scipy import special

from ssd import sampling, search
from ssd.decoding import Decoding
from ssd.grading import grader
from ssd.lab import world
from ssd.report.text import percent, points
from ssd.search import Attempt, Space
from ssd.stats import compare, estimate

NUM_PROBLEMS = 1000
WITHIN = 0.01
GRID_SHARE = 0.25  # to reach: the full grid's share, at this share of its samples
BUDGETS = (2_500, 5_000, 7_500, 10_000, 12_500, 15_000, 20_000, 30_000, 40_000, 50_000, 60_000)
OURS_UNTIL = 15_000  # a quarter of the larger grid
DIFFICULTY_SD = 1.69  # of problems, in probits: leaves Var(x_a - x_b) = 0.12 at pass@1 = 0.64 (Miller's eq. 8)
T_TRAIN, T_EVAL = (0.5, 0.7, 1.0, 1.5, 2.0), (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
CODE = (
    (43.5, 43.5, 43.7, 43.4, 44.0, 43.6, 44.3, 43.9, 45.5, 45.2),
    (44.3, 44.0, 43.9, 45.5, 44.8, 44.3, 45.3, 45.2, 44.4, 45.1),
    (44.7, 44.1, 44.2, 45.3, 45.3, 44.7, 45.3, 45.3, 45.7, 45.1),
    (45.6, 46.0, 46.6, 46.3, 46.3, 47.4, 46.3, 46.6, 42.7, 38.1),
    (46.0, 46.3, 47.4, 48.1, 47.5, 47.0, 43.6, 40.8, 36.6, 30.9),
)
MATH = {  # (temperature, min_p, presence_penalty): pass@1 on 1,000 problems
    (0.6, 0.0, 0.0): 58.2, (0.7, 0.0, 0.0): 64.0, (1.0, 0.0, 0.0): 63.5, (1.1, 0.0, 0.0): 62.0, (1.3, 0.0, 0.0): 55.1,
    (1.5, 0.0, 0.0): 43.0, (1.0, 0.0, 1.5): 66.1, (1.0, 0.02, 0.0): 65.4, (1.0, 0.05, 0.0): 62.9,
    (1.0, 0.1, 0.0): 59.9, (1.0, 0.2, 0.0): 50.6,
}  # fmt: skip


class World(NamedTuple):
    """What is searched: its settings, the cells of its full grid, and the true pass@1 anywhere."""

    name: str
    settings: dict[str, FloatDistribution]
    cells: list[tuple[float, ...]]
    terms: Callable[[np.ndarray], np.ndarray]
    weights: np.ndarray
    r2: float

    def truth(self, x_QD: np.ndarray) -> np.ndarray:
        return special.expit(self.terms(np.atleast_2d(x_QD)) @ self.weights)


def fitted(name: str, settings: dict, cells: list, terms: Callable, measured: dict[tuple, float]) -> World:
    """Least squares on the logits of the published cells."""
    x, y = np.array(list(measured)), special.logit(np.array(list(measured.values())) / 100)
    weights = np.linalg.lstsq(terms(x), y, rcond=None)[0]
    return World(name, settings, cells, terms, weights, 1 - np.var(y - terms(x) @ weights) / np.var(y))


def worlds() -> list[World]:
    def cubic(x):
        return np.stack([x[:, 0] ** i * x[:, 1] ** j for i in range(4) for j in range(4 - i)], axis=1)

    def additive(x):  # no cell was published in which two of them are changed
        t, min_p, penalty = x.T
        return np.stack([t**0, t, t**2, t**3, np.sqrt(min_p), min_p, penalty], axis=1)

    code_cells = list(itertools.product(T_TRAIN, T_EVAL))
    code = fitted(
        "code: T_train, T_eval",
        {"t_train": FloatDistribution(0.5, 2.0), "t_eval": FloatDistribution(0.6, 1.5)},
        code_cells, cubic, dict(zip(code_cells, itertools.chain(*CODE))),
    )  # fmt: skip
    axes = [sorted({point[axis] for point in MATH}) for axis in range(3)]
    math_ = fitted(
        "math: T, min-p, penalty",
        {"temperature": FloatDistribution(0.6, 1.5), "min_p": FloatDistribution(0.0, 0.2),
         "presence_penalty": FloatDistribution(0.0, 1.5)},
        list(itertools.product(*axes)), additive, MATH,
    )  # fmt: skip
    return [code, math_]


class Draw:
    """Outcomes of one repetition, counted."""

    def __init__(self, world: World, is_paired: bool, seed: int):
        self.world, self.rng = world, np.random.default_rng([seed, is_paired])
        self.sd = DIFFICULTY_SD * is_paired
        self.difficulty_P = self.rng.standard_normal(NUM_PROBLEMS)
        self.best = world.truth(np.array(world.cells)).max()
        self.num_samples = 0

    def __call__(self, x_D: tuple[float, ...], start: int, end: int) -> np.ndarray:
        self.num_samples += end - start
        probit = special.ndtri(self.world.truth(np.array(x_D))) * math.sqrt(1 + self.sd**2)
        chances = special.ndtr(probit - self.sd * self.difficulty_P[start:end])
        return (self.rng.random(end - start) < chances)[:, None].astype(float)

    def loss(self, x_D: tuple[float, ...]) -> float:
        return float(self.best - self.world.truth(np.array(x_D))[0])


def grid(draw: Draw, seed: int) -> list[tuple[int, float]]:
    cells = [draw.world.cells[i] for i in np.random.default_rng(seed).permutation(len(draw.world.cells))]
    return best_so_far(draw, iter(cells), len(cells))


def optunas(sampler: Callable[[int], optuna.samplers.BaseSampler]) -> Callable:
    def method(draw: Draw, seed: int) -> list[tuple[int, float]]:
        study = optuna.create_study(direction="maximize", sampler=sampler(seed))

        def trials():
            for _ in draw.world.cells:
                trial = study.ask(draw.world.settings)
                yield tuple(trial.params.values())
                study.tell(trial, value[0])

        value = [0.0]
        return best_so_far(draw, trials(), len(draw.world.cells), value)

    return method


def best_so_far(draw: Draw, trials, num_trials: int, value: list[float] | None = None) -> list[tuple[int, float]]:
    """(samples, true loss of the choice) after each trial, the choice being the highest mean."""
    value, best, path = value or [0.0], -1.0, []
    for x_D in trials:
        value[0] = draw(x_D, 0, NUM_PROBLEMS).mean()
        if value[0] > best:
            best, loss = value[0], draw.loss(x_D)
        path.append((draw.num_samples, loss))
    return path


def ours(draw: Draw, seed: int) -> list[tuple[int, float]]:
    space = Space(draw.world.settings, [])
    sizes = [math.ceil(NUM_PROBLEMS / 2**k) for k in (4, 3, 2, 1, 0)]
    study = search.open_study(optuna.storages.InMemoryStorage(), "ours", space, seed)
    path = []

    def attempt(folder, params, best_PS):
        measured = [np.empty((0, 1))]

        def measure(num_problems):
            measured[0] = np.vstack([measured[0], draw(tuple(params.values()), len(measured[0]), num_problems)])
            return measured[0]

        return Attempt(search.race(measure, best_PS, sizes, search.ALPHA), 0)

    trials, spent = [], 0
    for num_trials in itertools.count(1):
        before, trials = trials, search.run(study, space, num_trials, attempt)
        # What would be chosen is asked for at the budgets alone.
        if before and any(spent <= budget < draw.num_samples for budget in BUDGETS):
            path.append((spent, draw.loss(tuple(search.choose(before, space).params.values()))))
        spent = draw.num_samples
        if spent > OURS_UNTIL:
            return path


METHODS = {
    "full grid": grid,
    "random": optunas(lambda seed: optuna.samplers.RandomSampler(seed=seed)),
    "TPE": optunas(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "ours": ours,
}


def losses(job: tuple) -> list[float]:
    """True loss of the choice at each budget; NaN before the first trial ended, and beyond what a method spends."""
    number, is_paired, method, seed = job
    draw = Draw(worlds()[number], is_paired, seed)
    path = METHODS[method](draw, seed)
    until = path[-1][0] if method != "ours" else OURS_UNTIL
    reached = [[loss for samples, loss in path if samples <= budget] for budget in BUDGETS]
    return [row[-1] if row and budget <= until else np.nan for budget, row in zip(BUDGETS, reached)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--lab", metavar="MODEL")
    parser.add_argument("--trials", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.lab:
        return against_the_labs_grid(arguments.lab, arguments.trials)
    met = True
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for (number, world), is_paired in itertools.product(enumerate(worlds()), (False, True)):
            met &= compared(pool, number, world, is_paired, arguments.repetitions)
    print(f"targets {'met' if met else 'NOT met'}")
    return 0 if met else 1


def compared(pool, number: int, world: World, is_paired: bool, repetitions: int) -> bool:
    truths = world.truth(np.array(world.cells))
    full = len(world.cells) * NUM_PROBLEMS
    budgets = [budget for budget in BUDGETS if budget <= full]
    print(f"\n## {world.name}, {'paired' if is_paired else 'independent'}\n")
    print(
        f"R2 of the surface {world.r2:.2f}; best cell {truths.max():.1%}, {np.sum(truths >= truths.max() - WITHIN)} of "
        f"{len(truths)} cells within 1 point; {repetitions} repetitions; within 1 point (points lost on average):\n"
    )
    print(f"| method | {' | '.join(f'{budget:,}' for budget in budgets)} | cost |\n|{' --- |' * (len(budgets) + 2)}")
    found = {}
    for method in METHODS:
        jobs = [(number, is_paired, method, seed) for seed in range(repetitions)]
        found[method] = np.array(pool.map(losses, jobs, chunksize=4))[:, : len(budgets)]
    # Before a method's first trial, and beyond what ours spends, there is nothing to average.
    warnings.simplefilter("ignore", RuntimeWarning)
    share_of = {method: np.nanmean(np.where(np.isnan(rows), np.nan, rows <= WITHIN), axis=0)
                for method, rows in found.items()}  # fmt: skip
    goal = share_of["full grid"][-1]
    cost_of = {}
    for method, rows in found.items():
        share_B, lost_B = share_of[method], 100 * np.nanmean(rows, axis=0)
        enough = [b for b, budget in enumerate(budgets) if not (share_B[b:] < goal).any() and not np.isnan(share_B[b])]
        cost_of[method] = budgets[enough[0]] if enough else math.inf
        cells = [f"{s:.0%} ({lost:.1f})" if not np.isnan(s) else "" for s, lost in zip(share_B, lost_B)]
        print(f"| {method} | {' | '.join(cells)} | {f'{cost_of[method]:,.0f}' if enough else '-'} |", flush=True)
    random, mine = found["random"], found["ours"]
    worse = [budget for b, budget in enumerate(budgets) if budget <= OURS_UNTIL and is_worse(mine[:, b], random[:, b])]
    quarter = cost_of["ours"] <= GRID_SHARE * full
    where = f"at {cost_of['ours']:,.0f} samples, {cost_of['ours'] / full:.0%} of the grid's"
    if math.isinf(cost_of["ours"]):
        where = f"at none of its budgets, up to {OURS_UNTIL:,} samples"
    print(
        f"\nours comes to the full grid's {goal:.0%} {where}: {'met' if quarter else 'NOT met'} ({GRID_SHARE:.0%}); "
        f"loses more points than random search at {', '.join(map(str, worse)) or 'no budget'}: "
        f"{'NOT met' if worse else 'met'}"
    )
    return quarter and not worse


def is_worse(mine_R: np.ndarray, random_R: np.ndarray) -> bool:
    """Whether more is lost, by more than the simulation's error (one-sided, 97.5%)."""
    difference_R = mine_R - random_R
    return bool(np.nanmean(difference_R) > 1.96 * np.nanstd(difference_R) / math.sqrt(len(difference_R)))


LAB_GRID = {
    "temperature": {"temperature": (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0), "top_k": (0, 2, 3, 5),
                    "top_p": (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)},
    "min-p": {"temperature": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0), "min_p": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)},
    "temperature-last": {"temperature": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0), "temperature_last": (True,),
                         "top_p": (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)},
}  # fmt: skip
NUM_CHOOSING, NUM_AGAIN, N, N_AGAIN = 300, 2000, 2, 4


def against_the_labs_grid(model: str, num_trials: int) -> int:
    problems = world.problems(NUM_CHOOSING + NUM_AGAIN, seed=99)
    choosing, others = problems[:NUM_CHOOSING], problems[NUM_CHOOSING:]
    choosing, sizes = search.nested(choosing, seed=0)
    sampler = sampling.Sampler(model, "transformers", "benchmark")
    spaces = search.load_space("presets/spaces/lab.yaml")
    print("| family | method | samples to choose | chosen | pass@1 on others | ours - grid, points |")
    print("| --- | --- | ---: | --- | --- | --- |", flush=True)
    met = True
    with tempfile.TemporaryDirectory() as folder:

        def measure(params: dict, part: list, n: int, seed: int) -> np.ndarray:
            decoding = Decoding(max_tokens=48, **params)
            name = f"{seed} {decoding}"
            found = sampler.generate(part, {name: decoding}, n, seed, Path(folder))[name].samples
            # A decoding that is tried again, on fewer problems, finds the samples of more.
            wanted = {problem.problem_id for problem in part}
            found = [sample for sample in found if sample.problem_id in wanted]
            right = {(g.problem_id, g.sample_index): g.outcome == "right" for g in grader.grade(found, part, True)}
            return np.array([[right[problem.problem_id, s] for s in range(n)] for problem in part], float)

        def attempt(_, params, best_PS):
            correct_PS = search.race(lambda m: measure(params, choosing[:m], N, 1), best_PS, sizes, search.ALPHA)
            return Attempt(correct_PS, N * len(correct_PS))

        for family, axes in LAB_GRID.items():
            cells = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
            grid_best = max(cells, key=lambda cell: measure(cell, choosing, N, 0).mean())
            study = search.open_study(optuna.storages.InMemoryStorage(), family, spaces[family], seed=0)
            trials = search.run(study, spaces[family], num_trials, attempt)
            our_best = search.choose(trials, spaces[family]).params
            samples = {"grid": len(cells) * NUM_CHOOSING * N, "ours": sum(t.attempt.num_tokens for t in trials)}
            chosen = {"grid": grid_best, "ours": our_best}
            again = {name: measure(params, others, N_AGAIN, 2) for name, params in chosen.items()}
            difference = compare.paired(again["ours"], again["grid"])
            met &= difference.value >= -WITHIN
            for name, params in chosen.items():
                value = percent(estimate.mean(again[name]))
                shown = points(difference) if name == "ours" else ""
                print(
                    f"| {family} | {name} | {samples[name]:,} | {Decoding(**params)} | {value} | {shown} |", flush=True
                )
    print(f"\nours at most {100 * WITHIN:g} point below the grid's in every family: {'met' if met else 'NOT met'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

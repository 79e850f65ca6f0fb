"""Do the statistics keep their promises? Coverage, error rates, power and bias, against worlds whose truth is known.

Run:   python -m benchmarks.calibration [--output docs/calibration.md]

A problem's chance of being solved follows a beta distribution with a given mean (accuracy) and a given share of the
variance between problems; its samples are independent given the chance. Prints one table a promise, ends with status 0
only if every target is met, and says so last. The seed is fixed: two runs print the same.
"""

import argparse
import itertools
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from ssd.stats import compare, estimate, power, variance

NUM_PROBLEMS = (100, 300, 1000)
BETWEEN_SHARES = (0.3, 0.85, 0.95)
ACCURACIES = (0.05, 0.5, 0.9)
COVERAGE = (0.94, 0.96)
TYPE_I = 0.055
POWER_TOLERANCE = 0.02
# An exact test of whole numbers calls less often than its level allows; more than this would not be worth exactness.
EXACTNESS_COST = 0.05
BIAS_Z = 3.5
# Coverage at one accuracy jumps as a whole number of right problems enters or leaves the interval's reach; the mean
# over a window of two such steps on 100 problems is what the method promises (Brown, Cai and DasGupta 2001).
WINDOW = np.linspace(-0.01, 0.01, 21)
# At a single accuracy coverage is promised where more than this many problems are expected to go the rarer way.
MIN_RARE = 10
# With clusters, where more than this many clusters' worth of problems are expected to.
MIN_RARE_CLUSTERS = 5

NUM_COVERAGE = 10_000
NUM_TYPE_I = 4_000
NUM_TYPE_I_AGAIN = 20_000
NUM_POWER = 5_000
NUM_COMPONENTS = 2_000
NUM_SHARE_INTERVALS = 400


PREAMBLE = """# Calibration of the statistics

What `python -m benchmarks.calibration --output docs/calibration.md` measured: worlds whose truth is known, in which a
problem's chance of being solved follows a beta distribution with the given mean (accuracy) and the given share of the
variance between problems. The seed is fixed. Read the notes above each table for what is claimed and what is not.

"""


class Table(NamedTuple):
    title: str
    target: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    num_missed: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the tables to this Markdown file")
    args = parser.parse_args()
    started = time.monotonic()
    with ProcessPoolExecutor() as pool:
        tables = [
            measure(pool.map) for measure in (of_mean, of_clusters, of_paired, of_unpaired, of_power, of_components)
        ]
    num_missed = sum(table.num_missed for table in tables)
    text = "\n".join(map(as_markdown, tables))
    verdict = "every target met" if num_missed == 0 else f"{num_missed} cells missed their target"
    print(text)
    if args.output:
        args.output.write_text(PREAMBLE + text + f"\nResult: {verdict}.\n")
    print(f"{time.monotonic() - started:.0f} s; {verdict}")
    return 0 if num_missed == 0 else 1


def of_mean(pmap) -> Table:
    cells = [(n, 1, None, accuracy) for n, accuracy in itertools.product(NUM_PROBLEMS, ACCURACIES)] + [
        (n, 4, share, accuracy) for n, share, accuracy in itertools.product(NUM_PROBLEMS, BETWEEN_SHARES, ACCURACIES)
    ]
    rows, num_missed = [], 0
    for (n, k, share, accuracy), (averaged, at_point) in zip(cells, pmap(coverage_of_mean, cells, chunksize=1)):
        claimed = n * min(accuracy, 1 - accuracy) > MIN_RARE + 1e-9
        missed = not within(averaged, COVERAGE) or (claimed and not within(at_point, COVERAGE))
        num_missed += missed
        note = "MISSED" if missed else "" if claimed else "point not claimed"
        rows.append((f"{n}", f"{k}", f"{share or 'any'}", f"{accuracy}", f"{averaged:.2%}", f"{at_point:.2%}", note))
    return Table(
        "Coverage of the 95% interval of `estimate.mean`",
        f"{COVERAGE[0]:.0%} to {COVERAGE[1]:.0%} over a window of +-{WINDOW[-1]} around the accuracy, and at the "
        f"accuracy itself where more than {MIN_RARE} problems are expected to go the rarer way. One sample a problem: "
        f"exact by enumeration, whatever the share between problems. Four: {NUM_COVERAGE:,} replicates each.",
        ("n", "k", "between share", "accuracy", "over the window", "at the accuracy", ""),
        rows,
        num_missed,
    )


def coverage_of_mean(cell: tuple) -> tuple[float, float]:
    n, k, share, accuracy = cell
    if k == 1:
        return float(np.mean([exact_coverage(n, accuracy + shift) for shift in WINDOW])), exact_coverage(n, accuracy)
    rng = generator(cell)
    averaged = [hits_of_mean(rng, n, k, share, accuracy + shift, NUM_COVERAGE // len(WINDOW)) for shift in WINDOW]
    return float(np.mean(averaged)), hits_of_mean(rng, n, k, share, accuracy, NUM_COVERAGE)


def exact_coverage(n: int, accuracy: float) -> float:
    """Sum of the binomial chances of each number right whose interval holds the accuracy."""
    total = 0.0
    chances = stats.binom.pmf(np.arange(n + 1), n, accuracy)
    for right in np.flatnonzero(chances > 1e-9).tolist():
        found = estimate.mean((np.arange(n) < right)[:, None])
        total += chances[right] * (found.ci_low <= accuracy <= found.ci_high)
    return float(total)


def hits_of_mean(rng: np.random.Generator, n: int, k: int, share: float, accuracy: float, num_replicates: int) -> float:
    # `mean` sees a problem only through its number right, so replicates are draws of how many problems have each.
    size = 1 / share - 1
    chances_R = stats.betabinom.pmf(np.arange(k + 1), k, accuracy * size, (1 - accuracy) * size)
    patterns_RS = np.tri(k + 1, k, -1)
    hits = 0
    for counts_R in rng.multinomial(n, chances_R / chances_R.sum(), size=num_replicates):
        found = estimate.mean(np.repeat(patterns_RS, counts_R, axis=0))
        hits += found.ci_low <= accuracy <= found.ci_high
    return hits / num_replicates


def of_clusters(pmap) -> Table:
    cells = list(itertools.product(NUM_PROBLEMS, (0.3, 0.8), (0.1, 0.5)))
    rows, num_missed = [], 0
    for (n, icc, accuracy), found in zip(cells, pmap(coverage_of_clusters, cells, chunksize=1)):
        claimed = n // 5 * min(accuracy, 1 - accuracy) > MIN_RARE_CLUSTERS
        missed = claimed and not within(found, COVERAGE)
        num_missed += missed
        note = "MISSED" if missed else "" if claimed else "not claimed"
        rows.append((f"{n}", f"{n // 5}", f"{icc}", f"{accuracy}", f"{found:.2%}", note))
    return Table(
        "Coverage of the 95% interval of `estimate.mean` with problems in clusters of five",
        f"{COVERAGE[0]:.0%} to {COVERAGE[1]:.0%} over the same window, where more than {MIN_RARE_CLUSTERS} clusters' "
        f"worth of problems are expected to go the rarer way; one sample a problem, {NUM_COVERAGE:,} replicates.",
        ("n", "clusters", "correlation in a cluster", "accuracy", "covered", ""),
        rows,
        num_missed,
    )


def coverage_of_clusters(cell: tuple) -> float:
    n, icc, accuracy = cell
    rng = generator(cell)
    clusters_P = np.repeat(np.arange(n // 5), 5)
    hits = 0
    for replicate in range(NUM_COVERAGE):
        truth = accuracy + WINDOW[replicate % len(WINDOW)]
        chances_P = np.repeat(chances(rng, truth, icc, n // 5), 5)
        found = estimate.mean((rng.random(n) < chances_P)[:, None], clusters_P)
        hits += found.ci_low <= truth <= found.ci_high
    return hits / NUM_COVERAGE


def of_paired(pmap) -> Table:
    worlds = ((0.3, 0.5), (0.85, 0.5), (0.95, 0.5), (0.85, 0.05))
    cells = [
        (n, k_a, k_b, share, accuracy)
        for n, (k_a, k_b), (share, accuracy) in itertools.product(NUM_PROBLEMS, ((1, 1), (4, 4), (1, 4)), worlds)
    ]
    rows, num_missed = [], 0
    for (n, k_a, k_b, share, accuracy), (rate, covered) in zip(cells, pmap(errors_of_paired, cells, chunksize=1)):
        missed = rate > TYPE_I or covered < COVERAGE[0]
        num_missed += missed
        note = "MISSED" if missed else ""
        rows.append((f"{n}", f"{k_a}, {k_b}", f"{share}", f"{accuracy}", f"{rate:.2%}", f"{covered:.2%}", note))
    return Table(
        "Type-I error of `compare.paired` at alpha = 0.05, and coverage of its 95% interval",
        f"At most {TYPE_I:.1%} called different and at least {COVERAGE[0]:.0%} covered, where both arms have the same "
        f"chances on every problem. {NUM_TYPE_I:,} replicates; a rate above 5% is measured again, alone, on "
        f"{NUM_TYPE_I_AGAIN:,} fresh ones. Where few problems differ, an exact test and a valid interval are cautious.",
        ("n", "k of a, b", "between share", "accuracy", "called different", "covered", ""),
        rows,
        num_missed,
    )


def errors_of_paired(cell: tuple) -> tuple[float, float]:
    rng = generator(cell)
    rate, covered = replicates_of_paired(rng, cell, NUM_TYPE_I)
    return replicates_of_paired(rng, cell, NUM_TYPE_I_AGAIN) if rate > 0.05 else (rate, covered)


def replicates_of_paired(rng: np.random.Generator, cell: tuple, num_replicates: int) -> tuple[float, float]:
    n, k_a, k_b, share, accuracy = cell
    calls = hits = 0
    for seed in range(num_replicates):
        chances_P = chances(rng, accuracy, share, n)[:, None]
        a_PS, b_PS = rng.random((n, k_a)) < chances_P, rng.random((n, k_b)) < chances_P
        # 199 flips and the observed one: p <= 0.05 is the largest ten of 200, at level 0.05 as with more flips.
        found = compare.paired(a_PS, b_PS, num_permutations=199, seed=seed)
        calls += found.p_value <= 0.05
        hits += found.ci_low <= 0 <= found.ci_high
    return calls / num_replicates, hits / num_replicates


def of_unpaired(pmap) -> Table:
    cells = list(itertools.product((100, 1000), (1, 4), ((0.3, 0.5), (0.85, 0.5), (0.85, 0.9))))
    rows, num_missed = [], 0
    for (n, k, (share, accuracy)), (rate, covered) in zip(cells, pmap(errors_of_unpaired, cells, chunksize=1)):
        missed = not within(covered, COVERAGE)
        num_missed += missed
        note = "MISSED" if missed else ""
        rows.append((f"{n}", f"{k}", f"{share}", f"{accuracy}", f"{rate:.2%}", f"{covered:.2%}", note))
    return Table(
        "Type-I error of `compare.unpaired` at alpha = 0.05, and coverage of its 95% interval",
        f"{COVERAGE[0]:.0%} to {COVERAGE[1]:.0%} covered, over the window; n problems an arm, {NUM_COVERAGE:,} "
        "replicates.",
        ("n", "k", "between share", "accuracy", "called different", "covered", ""),
        rows,
        num_missed,
    )


def errors_of_unpaired(cell: tuple) -> tuple[float, float]:
    n, k, (share, accuracy) = cell
    rng = generator((n, k, share, accuracy, 2))
    calls = hits = 0
    for replicate in range(NUM_COVERAGE):
        truth = accuracy + WINDOW[replicate % len(WINDOW)]
        a_PS, b_PS = (rng.random((n, k)) < chances(rng, truth, share, n)[:, None] for _ in range(2))
        found = compare.unpaired(a_PS, b_PS)
        calls += found.p_value <= 0.05
        hits += found.ci_low <= 0 <= found.ci_high
    return calls / NUM_COVERAGE, hits / NUM_COVERAGE


def of_power(pmap) -> Table:
    cells = [
        (n, k_a, k_b, share, rho)
        for n, (k_a, k_b), (share, rho) in itertools.product(
            (300, 1000), ((1, 1), (4, 4), (1, 4)), ((0.3, 0.7), (0.85, 0.7), (0.85, 0.9))
        )
    ]
    rows, num_missed = [], 0
    for (n, k_a, k_b, share, rho), (delta, formula, by_test, by_interval) in zip(
        cells, pmap(power_of_paired, cells, chunksize=1)
    ):
        missed = abs(by_interval - formula) > POWER_TOLERANCE or by_test < formula - EXACTNESS_COST
        num_missed += missed
        found = (f"{100 * delta:.1f}", f"{formula:.1%}", f"{by_test:.1%}", f"{by_interval:.1%}")
        rows.append((f"{n}", f"{k_a}, {k_b}", f"{share}", f"{rho}", *found, "MISSED" if missed else ""))
    return Table(
        "Power of `compare.paired`: formula against simulation",
        f"The interval leaves out 0 within {100 * POWER_TOLERANCE:.0f} points as often as `power.achieved_power` says, "
        f"and the exact test calls at most {100 * EXACTNESS_COST:.0f} points less often; {NUM_POWER:,} replicates, "
        "accuracy of base about one half. The formula is that of a normal test: where 300 problems are planned by it, "
        "the exact test has a few points less power.",
        ("n", "k of a, b", "between share", "rho", "points", "formula", "p below 0.05", "interval without 0", ""),
        rows,
        num_missed,
    )


def power_of_paired(cell: tuple) -> tuple[float, float, float, float]:
    n, k_a, k_b, share, rho = cell
    rng = generator(cell)
    base_P = chances(rng, 0.5, share, 200_000)
    # A mixture of the same and of a fresh chance has correlation rho and the same distribution.
    other_P = np.where(rng.random(len(base_P)) < rho, base_P, chances(rng, 0.5, share, len(base_P)))
    delta = 0.05
    # The variances depend a little on the effect, and the effect with 80% power on the variances.
    for _ in range(5):
        b_P, a_P = (1 - delta) * base_P, (1 - delta) * other_P + delta
        planned = dict(omega2=np.var(a_P - b_P), within_a=np.mean(a_P * (1 - a_P)), within_b=np.mean(b_P * (1 - b_P)))
        delta = power.minimal_detectable_effect(n, **planned, k_a=k_a, k_b=k_b)
    b_P, a_P = (1 - delta) * base_P, (1 - delta) * other_P + delta
    planned = dict(omega2=np.var(a_P - b_P), within_a=np.mean(a_P * (1 - a_P)), within_b=np.mean(b_P * (1 - b_P)))
    true_delta = float(np.mean(a_P - b_P))
    formula = power.achieved_power(n, true_delta, **planned, k_a=k_a, k_b=k_b)
    by_test = by_interval = 0
    for seed in range(NUM_POWER):
        drawn = rng.integers(len(base_P), size=n)
        a_PS, b_PS = rng.random((n, k_a)) < a_P[drawn, None], rng.random((n, k_b)) < b_P[drawn, None]
        found = compare.paired(a_PS, b_PS, num_permutations=999, seed=seed)
        by_test += found.p_value <= 0.05 and found.value > 0
        by_interval += found.ci_low > 0
    return true_delta, formula, by_test / NUM_POWER, by_interval / NUM_POWER


def of_components(pmap) -> Table:
    cells = list(itertools.product((100, 1000), (2, 4), BETWEEN_SHARES, ACCURACIES))
    rows, num_missed = [], 0
    for (n, k, share, accuracy), (between, within_, z, covered) in zip(
        cells, pmap(bias_of_components, cells, chunksize=1)
    ):
        missed = z > BIAS_Z
        num_missed += missed
        found = (f"{between:+.2%}", f"{within_:+.2%}", f"{z:.1f}", f"{covered:.0%}")
        rows.append((f"{n}", f"{k}", f"{share}", f"{accuracy}", *found, "MISSED" if missed else ""))
    return Table(
        "Bias of `variance.components`, and coverage of its interval of the share between problems",
        f"Mean of {NUM_COMPONENTS:,} replicates within {BIAS_Z} simulation errors of the truth, between and within. "
        f"The coverage ({NUM_SHARE_INTERVALS} replicates) has no target: a percentile bootstrap is far too short where "
        "few problems have both right and wrong samples (accuracy .05 on 100 problems).",
        ("n", "k", "between share", "accuracy", "bias between", "bias within", "largest error", "share covered", ""),
        rows,
        num_missed,
    )


def bias_of_components(cell: tuple) -> tuple[float, float, float, float]:
    n, k, share, accuracy = cell
    rng = generator(cell)
    truth = np.array([share, 1 - share]) * accuracy * (1 - accuracy)
    found, hits = [], 0
    for replicate in range(NUM_COMPONENTS):
        correct_PS = rng.random((n, k)) < chances(rng, accuracy, share, n)[:, None]
        with_interval = replicate < NUM_SHARE_INTERVALS
        parts = variance.components(correct_PS, num_resamples=499 if with_interval else 1, seed=replicate)
        found.append((parts.between, parts.within))
        hits += with_interval and parts.between_share_ci_low <= share <= parts.between_share_ci_high
    bias = np.mean(found, axis=0) - truth
    errors = np.std(found, axis=0) / math.sqrt(NUM_COMPONENTS)
    relative = bias / truth
    return float(relative[0]), float(relative[1]), float(np.max(np.abs(bias) / errors)), hits / NUM_SHARE_INTERVALS


def chances(rng: np.random.Generator, accuracy: float, between_share: float, num_problems: int) -> np.ndarray:
    """Chances of problems; Var(x) = between_share * accuracy * (1 - accuracy) for a beta with this sum of shapes."""
    size = 1 / between_share - 1
    return rng.beta(accuracy * size, (1 - accuracy) * size, num_problems)


def generator(cell: tuple) -> np.random.Generator:
    return np.random.default_rng([int(1000 * value) for value in cell])


def within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]


def as_markdown(table: Table) -> str:
    lines = [f"## {table.title}", "", f"Target: {table.target}", "", f"| {' | '.join(table.header)} |"]
    lines += ["|" + " --- |" * len(table.header)]
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

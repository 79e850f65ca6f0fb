"""Problems to train, val, quick and final: no problem and no duplicate of one stands on two sides.

Who comes first within a source is decided by a hash of the seed and the problem's id, so a source that is added moves
no other problem to another side. Each split is in hash order: its first n rows are a random sample of it.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ssd import records
from ssd.data.overlap import Overlap, clusters, duplicates, overlaps
from ssd.records import Problem

# The most of val that each source may fill; the rest is backfilled from sources that are saturated or well known.
VAL_SHARES = {"beyond-aime": 1.0, "omni-math-2": 0.45, "olympiadbench": 0.35}
# Percent of train by source, as far as each lasts, and within a source the levels as they come: half is MATH of levels
# 4 and 5 or was set at a competition, where NuminaMath as it is would be two thirds school and synthetic problems.
TRAIN_MIX = {
    "hendrycks_math": 35.0,
    "numinamath-cot/olympiads": 25.0,
    "numinamath-cot/aops_forum": 10.0,
    "numinamath-cot/amc_aime": 10.0,
    "numinamath-cot": 20 / 6,  # each of the other six
}
# What became of a row of a source: the set that it is in, or why it is in none.
NOT_DRAWN, REPEATS = "not drawn", "repeats"
FATES = ("train", "val", "final", NOT_DRAWN, REPEATS)
SUSPECTED = 0.9  # of the threshold: pairs that nearly reach it are listed beside those that are removed


@dataclass(frozen=True)
class Splits:
    """The four sides, `quick` being part of `val`, and the pairs because of which one was left out or suspected."""

    train: list[Problem]
    val: list[Problem]
    quick: list[Problem]
    final: list[Problem]
    overlaps: list[Overlap]


def split(
    train: Sequence[Problem],
    evaluation: Sequence[Problem],
    final: Sequence[Problem] = (),
    *,
    train_size: int,
    val_size: int,
    quick_size: int,
    final_size: int = 0,
    seed: int,
    val_shares: Mapping[str, float] = VAL_SHARES,
    train_mix: Mapping[str, float] = TRAIN_MIX,
) -> Splits:
    """Split the candidates for each role.

    `final` wins over `evaluation`, which wins over `train`: a train problem that repeats any problem of the others is
    left out, with its own duplicates, whether or not that problem is drawn. Of problems that repeat each other within a
    role one is kept.

    Parameters
    ----------
    train, evaluation, final : sequence of Problem
        Candidates. Of duplicates, the one whose source comes first (in `val_shares`, then in the sequence) is kept. A
        problem may be a candidate for evaluation and for final.
    train_size : int
        At most this many; what there is where fewer are left.
    final_size : int
        At most this many; 0 is all.
    val_size, quick_size : int
        Exactly this many. `quick` is drawn from `val` in proportion to source and level.
    seed : int
        Another seed draws other problems.
    val_shares : mapping of str to float
        The most of val that a source may fill, in this order. The rest comes from the other evaluation sources in
        their order, then from these again.
    train_mix : mapping of str to float
        Relative weight of each source of train. A source `a/b` has that of `a` where none is given for itself; one
        that is not named has weight 1, and weight 0 leaves a source out. What one source lacks the others fill.

    Raises
    ------
    ValueError
        If a size is below 1, or val or quick larger than what is left; the message says how many, by source.
    """
    for name, size in (("train_size", train_size), ("val_size", val_size), ("quick_size", quick_size)):
        if size < 1:
            raise ValueError(f"{name}={size} is below 1; give the number of problems")
    final, repeats_in_final = _one_of_each(final, ())
    drawn = in_hash_order(final, seed)[: final_size or None]
    drawn_ids, shared_ids = ({problem.problem_id for problem in problems} for problems in (drawn, evaluation))
    # Of a source that is named for both, what final does not draw is a candidate for val.
    reserved = [problem for problem in final if problem.problem_id in drawn_ids or problem.problem_id not in shared_ids]
    evaluation = [problem for problem in evaluation if problem.problem_id not in drawn_ids]
    evaluation = _in_order(evaluation, seed, first=val_shares)
    against_final, repeats_of_final = _against(evaluation, reserved)
    pool, repeats_of_evaluation = _one_of_each(evaluation, repeats_of_final)
    val = in_hash_order(_draw_val(pool, val_size, val_shares), seed)

    train = _in_order(train, seed)
    against_evaluation, repeats = _against(train, [*final, *evaluation])
    left, repeats_of_train = _one_of_each(train, repeats)
    return Splits(
        train=_draw_train(in_hash_order(left, seed), train_size, train_mix),
        val=val,
        quick=draw_quick(val, quick_size, seed),
        final=drawn,
        overlaps=[*repeats_in_final, *against_final, *repeats_of_evaluation, *against_evaluation, *repeats_of_train],
    )


def draw_quick(val: Sequence[Problem], size: int, seed: int) -> list[Problem]:
    """A subset of `val`, proportional to source and level, in which each problem is with probability size / len(val).

    With the strata in order of source and difficulty, and W_h the number of problems up to stratum h, stratum h has

        n_h = floor(W_h size / len(val) + u) - floor(W_{h-1} size / len(val) + u)

    seats, u in [0, 1) being drawn by the seed: its proportional number rounded down or up, and that number exactly in
    expectation. Always giving the odd seats to the largest remainders would leave some strata short in every draw, and
    the mean of quick would not be that of val.
    """
    if size > len(val):
        raise ValueError(f"quick_size={size} is more than the {len(val)} problems of val; give at most that")
    strata = defaultdict(list)
    for problem in in_hash_order(val, seed):
        strata[problem.source, records.difficulty(problem.level), problem.level].append(problem)
    start = _hash(seed, "quick") / 2**256
    quick, through = [], 0
    for _, problems in sorted(strata.items()):
        before, through = through, through + len(problems)
        seats = [math.floor(count * size / len(val) + start) for count in (before, through)]
        quick += problems[: seats[1] - seats[0]]
    return in_hash_order(quick, seed)


def _draw_val(pool: Sequence[Problem], size: int, shares: Mapping[str, float]) -> list[Problem]:
    """`size` problems: each source of `shares` up to its share, then the others, then those of `shares` again."""
    if size > len(pool):
        raise ValueError(f"val_size={size} is more than the {len(pool)} problems left ({_by_source(pool)})")
    by_source = defaultdict(list)
    for problem in pool:
        by_source[problem.source].append(problem)
    val = []
    others = [source for source in by_source if source not in shares]
    caps = [(source, math.floor(share * size)) for source, share in shares.items()]
    for source, cap in [*caps, *((source, size) for source in [*others, *shares])]:
        taken = min(cap, size - len(val))
        val += by_source[source][:taken]
        by_source[source] = by_source[source][taken:]
    return val


def _draw_train(problems: Sequence[Problem], size: int, mix: Mapping[str, float]) -> list[Problem]:
    """The first `size` problems, the k-th of a source being due at time k / weight."""
    seen, due = Counter(), []
    for problem in problems:
        weight = mix.get(problem.source, mix.get(problem.source.split("/")[0], 1.0))
        if weight > 0:
            seen[problem.source] += 1
            due.append(((seen[problem.source] - 0.5) / weight, problem))
    chosen = {id(problem) for _, problem in sorted(due, key=lambda pair: pair[0])[:size]}
    return [problem for problem in problems if id(problem) in chosen]


def _against(left: Sequence[Problem], right: Sequence[Problem]) -> tuple[list[Overlap], set[str]]:
    """Pairs to be listed, of what stays those that are suspected, and ids of the problems of `left` that leave."""
    found = overlaps(left, right, suspected=SUSPECTED)
    removed = {pair.left_id for pair in found if pair.removed}
    return [pair for pair in found if pair.removed or pair.left_id not in removed], removed


def _one_of_each(problems: Sequence[Problem], banned: Collection[str]) -> tuple[list[Problem], list[Overlap]]:
    """The first of each cluster of duplicates, none of a cluster with a banned id, and the pairs that say why."""
    found = duplicates(problems)
    cluster_of = dict(zip((problem.problem_id for problem in problems), clusters(problems, found)))
    closed = {cluster_of[problem_id] for problem_id in banned}
    kept = {}
    for problem in problems:
        if cluster_of[problem.problem_id] not in closed:
            kept.setdefault(cluster_of[problem.problem_id], problem)
    kept_ids = {problem.problem_id for problem in kept.values()}
    reasons = [pair for each in found for pair in (each, _mirrored(each)) if pair.left_id not in kept_ids]
    return list(kept.values()), reasons


def _mirrored(pair: Overlap) -> Overlap:
    return replace(
        pair,
        left_id=pair.right_id, left_problem=pair.right_problem, left_answer=pair.right_answer,
        right_id=pair.left_id, right_problem=pair.left_problem, right_answer=pair.left_answer,
    )  # fmt: skip


def _in_order(problems: Sequence[Problem], seed: int, first: Collection[str] = ()) -> list[Problem]:
    """By source, those of `first` before the others in order of appearance, then by hash."""
    rank = {source: i for i, source in enumerate(dict.fromkeys([*first, *(problem.source for problem in problems)]))}
    return sorted(in_hash_order(problems, seed), key=lambda problem: rank[problem.source])


def in_hash_order(problems: Sequence[Problem], seed: int) -> list[Problem]:
    """`problems` in an order that the seed and each problem's id decide: the first n are a random sample."""
    return sorted(problems, key=lambda problem: _hash(seed, problem.problem_id))


def _hash(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest())


def _by_source(problems: Sequence[Problem]) -> str:
    return ", ".join(f"{source} {n}" for source, n in Counter(problem.source for problem in problems).items()) or "none"

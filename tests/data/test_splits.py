"""Splits: what goes where, what leaves, and that quick measures what val measures."""

import json
import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ssd.data.overlap import overlaps
from ssd.data.sources import load
from ssd.data.splits import draw_quick, split
from ssd.records import Problem

REAL = Path(os.environ.get("SSD_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data") / "hub"

SIZES = {"train_size": 100, "val_size": 50, "quick_size": 20, "seed": 0}


def made(source: str, n: int, levels: tuple[str, ...] = ("",)) -> list[Problem]:
    """Problems that share no word."""
    rng = random.Random(source)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        Problem(
            f"{source}:{i}", source, " ".join("".join(rng.choices(letters, k=9)) for _ in range(8)),
            str(i % 7), levels[i % len(levels)],
        )
        for i in range(n)
    ]  # fmt: skip


def repeated(problem: Problem, source: str) -> Problem:
    return replace(problem, problem_id=f"{source}:of {problem.problem_id}", source=source)


def ids(problems: list[Problem]) -> list[str]:
    return [problem.problem_id for problem in problems]


def test_val_takes_the_first_source_whole_the_next_by_share_and_the_rest_as_backfill():
    evaluation = [*made("aime", 100), *made("olympiadbench", 100), *made("omni-math-2", 100), *made("beyond-aime", 10)]
    val = split([], evaluation, **{**SIZES, "val_size": 100}).val
    assert Counter(p.source for p in val) == {"beyond-aime": 10, "omni-math-2": 45, "olympiadbench": 35, "aime": 10}


def test_a_source_of_both_gives_final_its_number_and_val_of_the_rest():
    problems = made("math", 90)
    parts = split(made("other", 9), problems, problems, **SIZES, final_size=30)
    assert (len(parts.final), len(parts.val), set(ids(parts.final)) & set(ids(parts.val))) == (30, 50, set())
    assert not parts.overlaps
    repeat = repeated(parts.final[0], "math")
    again = split([], [*problems, repeat], [*problems, repeat], **{**SIZES, "val_size": 60}, final_size=30)
    assert len({p.problem for p in again.final + again.val}) == 90  # the repeat is nowhere


def test_a_problem_of_train_that_is_a_candidate_for_final_is_left_out_though_it_was_not_drawn():
    problems = made("math", 90)
    parts = split([repeated(p, "other") for p in problems], problems, problems, **SIZES, final_size=30)
    assert parts.train == []


def test_val_goes_beyond_the_shares_only_when_the_backfill_is_used_up():
    evaluation = [*made("aime", 5), *made("olympiadbench", 100), *made("omni-math-2", 100)]
    val = split([], evaluation, **{**SIZES, "val_size": 100}).val
    assert Counter(p.source for p in val) == {"aime": 5, "omni-math-2": 60, "olympiadbench": 35}


def test_quick_is_part_of_val_and_each_stratum_has_its_proportional_number_rounded_down_or_up():
    evaluation = made("omni-math-2", 333, ("2.5", "10.0", "7.0")) + made("aime", 100)
    for seed in range(5):
        splits = split([], evaluation, **{**SIZES, "val_size": 400, "quick_size": 93, "seed": seed})
        assert set(ids(splits.quick)) <= set(ids(splits.val)) and len(splits.quick) == 93
        in_val, in_quick = (Counter((p.source, p.level) for p in part) for part in (splits.val, splits.quick))
        assert all(abs(in_quick[stratum] - n * 93 / 400) < 1 for stratum, n in in_val.items())


def test_the_mean_of_quick_is_that_of_val_in_expectation_and_varies_no_more_than_a_simple_random_sample():
    rng = np.random.default_rng(0)
    levels = tuple(str(level) for level in range(1, 14))
    val = made("hard", 100) + made("medium", 523, levels) + made("easy", 377, levels[:3])
    solve_rate = {"hard": 0.1, "medium": 0.9, "easy": 0.95}
    correct = {
        problem.problem_id: float(rng.random() < solve_rate[problem.source] - 0.06 * float(problem.level or 0))
        for problem in val
    }
    val_mean, val_variance = np.mean(list(correct.values())), np.var(list(correct.values()), ddof=1)
    draws = np.array([np.mean([correct[i] for i in ids(draw_quick(val, 300, seed))]) for seed in range(600)])
    standard_error = draws.std(ddof=1) / np.sqrt(len(draws))
    assert abs(draws.mean() - val_mean) < 3 * standard_error
    # The variance of 600 draws is known to within 6% (one standard error).
    assert draws.var(ddof=1) < (1 - 300 / len(val)) * val_variance / 300


def test_a_problem_of_train_that_repeats_any_evaluation_problem_is_left_out_with_its_own_duplicates():
    train, evaluation = made("math", 60), made("omni-math-2", 200)
    planted = [repeated(problem, "math") for problem in evaluation]
    splits = split([*train, *planted, repeated(planted[0], "numina/a")], evaluation, **SIZES)
    assert set(ids(splits.train)) == set(ids(train))
    explained = {pair.left_id for pair in splits.overlaps if pair.removed}
    assert explained == {*ids(planted), "numina/a:of math:of omni-math-2:0"}


def test_of_duplicates_in_the_evaluation_pool_the_one_of_the_first_source_is_kept():
    beyond = made("beyond-aime", 10)
    copies = [repeated(problem, "aime") for problem in beyond]
    splits = split([], [*copies, *beyond, *made("aime", 40)], **SIZES)
    assert set(ids(splits.val)) == {*ids(beyond), *ids(made("aime", 40))}
    assert {(pair.left_id, pair.right_id) for pair in splits.overlaps} == {
        (copy.problem_id, problem.problem_id) for copy, problem in zip(copies, beyond)
    }


def test_train_repeats_nothing_of_final_though_only_a_part_of_it_is_drawn_and_final_repeats_nothing_of_itself():
    final = made("hmmt", 12)
    train = [*made("math", 30), *(repeated(problem, "math") for problem in final)]
    doubled = [*final, repeated(final[0], "hmmt")]
    splits = split(train, made("omni-math-2", 60), doubled, **SIZES, final_size=5)
    assert len(splits.final) == 5 and set(ids(splits.final)) < set(ids(final))
    assert set(ids(splits.train)) == set(ids(train[:30]))
    assert [pair.right_id for pair in splits.overlaps if pair.left_id == doubled[-1].problem_id] == [ids(final)[0]]


def test_final_is_kept_whole_and_wins_over_val_and_train():
    train, evaluation, final = made("math", 30), made("omni-math-2", 60), made("hmmt", 12)
    copies = [repeated(final[0], "math"), repeated(final[1], "omni-math-2")]
    splits = split([*train, copies[0]], [*evaluation, copies[1]], final, **SIZES)
    assert set(ids(splits.final)) == set(ids(final))
    assert not set(ids(copies)) & {*ids(splits.train), *ids(splits.val)}
    assert {pair.left_id for pair in splits.overlaps} == set(ids(copies))


def test_adding_a_source_moves_no_other_problem():
    train, evaluation = made("math", 80), made("omni-math-2", 60) + made("aime", 30)
    before = split(train, evaluation, **SIZES)
    more = split([*train, *made("numina/a", 70)], evaluation, made("hmmt", 10), **SIZES)
    assert (more.val, more.quick) == (before.val, before.quick)
    old = [problem for problem in more.train if problem.source == "math"]
    assert old == [problem for problem in before.train if problem in old] and len(more.train) == 100
    backfilled = split(train, [*evaluation, *made("later-aime", 30)], **SIZES)
    assert backfilled == before


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does():
    train, evaluation = made("math", 80), made("omni-math-2", 60) + made("aime", 30)
    assert split(train[::-1], [*evaluation[:60][::-1], *evaluation[60:]], **SIZES) == split(train, evaluation, **SIZES)
    assert split(train, evaluation, **{**SIZES, "seed": 1}).val != split(train, evaluation, **SIZES).val


def test_train_is_drawn_by_the_stated_mix_and_what_one_source_lacks_the_others_fill():
    train = made("math", 120) + made("numina/a", 60) + made("numina/b", 20)
    evaluation = made("omni-math-2", 50)

    def drawn(mix: dict[str, float], size: int = 100) -> Counter:
        return Counter(p.source for p in split(train, evaluation, **{**SIZES, "train_size": size}, train_mix=mix).train)

    assert drawn({"math": 6, "numina/a": 3, "numina/b": 1}) == {"math": 60, "numina/a": 30, "numina/b": 10}
    assert drawn({"numina/a": 0}) == {"math": 80, "numina/b": 20}  # all of b, and math for what it lacks
    assert drawn({}, 30) == drawn({"math": 2, "numina": 2}, 30) == {"math": 10, "numina/a": 10, "numina/b": 10}
    assert sum(drawn({}, 10_000).values()) == 200


def test_the_mix_of_the_real_experiment_draws_its_percentages():
    percent = {"aops_forum": 10, "amc_aime": 10, "olympiads": 25} | dict.fromkeys(
        ["cn_k12", "orca_math", "synthetic_math", "synthetic_amc", "gsm8k", "math"], 20 / 6
    )
    train = made("hendrycks_math", 80) + [p for name in percent for p in made(f"numinamath-cot/{name}", 60)]
    drawn = Counter(p.source.split("/")[-1] for p in split(train, made("omni-math-2", 50), **SIZES).train)
    assert all(abs(drawn[name] - share) <= 1 for name, share in (percent | {"hendrycks_math": 35}).items())
    assert sum(drawn.values()) == 100


def test_what_is_suspected_but_kept_is_listed_and_stays():
    words = [letter * 3 for letter in "abcdefghijklmnopqrst"]
    suspect = Problem("omni-math-2:x", "omni-math-2", " ".join([*words, "5"]), "x + 1", "")
    train = made("math", 20)
    for name, shared in (("kept", 11), ("gone", 12), ("fine", 8)):  # of 23 words: J = 11/33, 12/32 and 8/36
        text = " ".join([*words[:shared], *(f"{name}{letter}" for letter in "abcdefghijklmno"[: 22 - shared]), "6"])
        train.append(Problem(f"math:{name}", "math", text, "x + 1", ""))
    splits = split(train, [*made("omni-math-2", 60), suspect], **SIZES)
    assert {pair.left_id: pair.removed for pair in splits.overlaps} == {"math:kept": False, "math:gone": True}
    assert {"math:kept", "math:fine"} <= set(ids(splits.train)) and "math:gone" not in ids(splits.train)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_size": 91}, r"val_size=91 is more than the 90 problems left \(omni-math-2 60, aime 30\)"),
        ({"quick_size": 51}, "quick_size=51 is more than the 50 problems of val"),
        ({"train_size": 0}, "train_size=0 is below 1"),
    ],
)
def test_a_size_that_cannot_be_met_is_an_error_that_says_how_many_there_are(changes, message):
    with pytest.raises(ValueError, match=message):
        split(made("math", 8), made("omni-math-2", 60) + made("aime", 30), **{**SIZES, **changes})


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no problem sets at {REAL}; set SSD_TEST_DATA")
def test_on_the_real_sets_nothing_planted_and_no_aime_problem_stays_in_train():
    names = ("beyond-aime", "omni-math-2", "olympiadbench", "aimo-validation-aime", "aime_1983_2023")
    evaluation = [problem for name in names for problem in load(name, str(REAL)).problems]
    train = [problem for name in ("hendrycks_math", "numinamath-cot") for problem in load(name, str(REAL)).problems]
    splits = split(train, evaluation, train_size=10_000, val_size=1_000, quick_size=300, seed=0)
    assert (len(splits.val), len(splits.quick)) == (1_000, 300)
    assert Counter(problem.source for problem in splits.val)["beyond-aime"] == 100

    left = {problem.problem for problem in splits.train}
    lines = (REAL / "numinamath-cot_composite/train.jsonl").read_text(encoding="utf-8").split("\n")
    composite = [json.loads(line) for line in lines if line]
    planted = [row for row in composite if row["origin"].startswith(("olympiadbench", "omni-math", "aim"))]
    assert len(planted) == 540 and not [row["origin"] for row in planted if row["problem"] in left]

    lines = (REAL.parent / "labelled/decontam_pairs.jsonl").read_text(encoding="utf-8").split("\n")
    kept = Counter()
    for row in map(json.loads, filter(None, lines)):
        if (row["id_a"].split("/")[0], row["id_b"].split("/")[0]) == ("MATH", "AIME"):
            kept[row["relation"]] += row["a"] in left
    assert kept["exact_copy"] == kept["same_problem_other_transcription"] == 0 and kept["same_problem_other_ask"] <= 6

    math = [problem for problem in train if problem.source == "hendrycks_math"]
    aime = [problem for problem in evaluation if problem.source == "aime_1983_2023"]
    repeats = {pair.left_id for pair in overlaps(math, aime) if pair.score >= 0.7 and pair.answers_agree}
    assert len(repeats) >= 380 and not repeats & set(ids(splits.train))
    # What is lost beyond about 490 true repeats of 3,830 is at most 3%.
    assert len(math) - sum(problem.source == "hendrycks_math" for problem in splits.train) <= 490 + 0.03 * len(math)
    removed = {pair.left_id for pair in splits.overlaps if pair.removed} & set(ids(train))
    assert removed == set(ids(train)) - set(ids(splits.train))

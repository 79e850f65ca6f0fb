"""Overlap: the join against brute force, the operating points against labelled pairs."""

import json
import os
import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from ssd import overlap
from ssd.overlap import (
    PRECISION_FIRST,
    RECALL_FIRST,
    OperatingPoint,
    answer_key,
    clusters,
    duplicates,
    normalise_text,
    overlaps,
)
from ssd.records import Problem

LABELLED = Path(os.environ.get("SSD_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data") / "labelled"


def problem(problem_id: str, text: str, answer: str) -> Problem:
    return Problem(problem_id, "made", text, answer, "")


DIGITS_TO_LETTERS = str.maketrans("0123456789", "abcdefghij")


def made_problems(n: int, seed: int, prefix: str) -> list[Problem]:
    """Short texts over few words, so that pairs of every similarity, with and without equal numbers, occur."""
    rng = random.Random(seed)
    words = [chr(97 + i) * 3 for i in range(12)]
    return [
        problem(
            f"{prefix}{i}",
            " ".join(rng.choices(words, k=rng.randint(1, 8)) + rng.choices(["7", "8"], k=rng.randint(0, 2))),
            str(rng.randint(1, 4)),
        )
        for i in range(n)
    ]


def by_definition(a: Problem, b: Problem, point: OperatingPoint) -> tuple[str, float] | None:
    """Rule and score of a pair, from the definition, one pair at a time."""
    words_a, words_b = a.problem.split(), b.problem.split()
    score = len(set(words_a) & set(words_b)) / len(set(words_a) | set(words_b))
    same_numbers = Counter(w for w in words_a if w.isdigit()) == Counter(w for w in words_b if w.isdigit())
    if words_a == words_b:
        return "same text", score
    if a.answer == b.answer and same_numbers:
        return ("answers and numbers", score) if score >= point.answers_and_numbers else None
    if a.answer == b.answer:
        return ("answers", score) if score >= point.answers else None
    return ("numbers", score) if same_numbers and score >= point.numbers else None


@pytest.mark.parametrize("point", [RECALL_FIRST, PRECISION_FIRST])
@pytest.mark.parametrize("dense_pairs", [1, 2_000_000])
def test_the_join_finds_exactly_the_pairs_of_the_definition(monkeypatch, point, dense_pairs):
    monkeypatch.setattr(overlap, "DENSE_PAIRS", dense_pairs)
    left, right = made_problems(150, 1, "l"), made_problems(120, 2, "r")
    expected = {
        (a.problem_id, b.problem_id): found for a in left for b in right if (found := by_definition(a, b, point))
    }
    found = overlaps(left, right, point)
    assert {(pair.left_id, pair.right_id): (pair.rule, pytest.approx(pair.score)) for pair in found} == expected
    assert all(pair.removed and pair.answers_agree == (pair.left_answer == pair.right_answer) for pair in found)
    assert {rule for rule, _ in expected.values()} >= {"same text", "answers and numbers"}


def test_within_a_set_each_pair_is_listed_once_with_the_later_problem_on_the_left():
    problems = made_problems(200, 3, "p")
    expected = {
        (problems[i].problem_id, problems[j].problem_id)
        for i in range(len(problems)) for j in range(i) if by_definition(problems[i], problems[j], PRECISION_FIRST)
    }  # fmt: skip
    assert expected and {(pair.left_id, pair.right_id) for pair in duplicates(problems)} == expected


def test_suspected_pairs_are_listed_but_not_removed():
    left, right = made_problems(100, 4, "l"), made_problems(100, 5, "r")
    found = overlaps(left, right, suspected=0.8)
    assert [pair for pair in found if pair.removed] == overlaps(left, right)
    assert any(not pair.removed for pair in found)


def test_minhash_proposes_what_the_exact_join_finds_and_the_exact_score_decides(monkeypatch):
    pytest.importorskip("datasketch")
    rng = random.Random(6)
    texts = [[f"w{rng.randrange(10**6)}" for _ in range(40)] for _ in range(60)]
    near = [[*text[:38], "x", "y"] for text in texts]  # J = 38 / 42
    joined = [" ".join(words).translate(DIGITS_TO_LETTERS) for words in [*texts, *near]]
    problems = [problem(str(i), text, "1") for i, text in enumerate(joined)]
    exact = duplicates(problems)
    monkeypatch.setattr(overlap, "MAX_BLOCK_PAIRS", 0)
    proposed = duplicates(problems)
    assert len(exact) == 60 and set(proposed) <= set(exact) and len(proposed) >= 59


def test_a_cluster_is_a_chain_of_duplicates():
    words = [chr(97 + i) * 3 for i in range(20)]
    chain = [problem(str(i), " ".join(words[i : i + 8]), "1") for i in (0, 2, 4)]  # neighbours J = .6, ends J = 1/3
    labels = clusters([*chain, problem("other", " ".join(words[12:]), "1")])
    assert labels[0] == labels[1] == labels[2] != labels[3]
    assert clusters([]) == [] and duplicates([]) == [] and overlaps([], chain) == [] == overlaps(chain, [])


@pytest.mark.parametrize(
    "same",
    [
        ["1/2", r"\frac{1}{2}", r"\dfrac 1 2", "f(x) = 1/2", r"\dfrac12", r"$x = \tfrac{1}{2}.$"],
        ["33", "033", "33.0", r"\mathbf{33}", r"\boxed{33}", "33^{\\circ}", "33\\%", r"\[33\]", r"\$33"],
        ["1234", "1,234", "1{,}234", r"1,\!234"],
        [r"(3,\frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"],
        ["0", "0.0", "00"],
    ],
)
def test_writings_of_one_answer_have_one_key(same):
    assert len({answer_key(answer) for answer in same}) == 1


def test_different_answers_have_different_keys():
    answers = ["1", "10", "100", "0.1", "1.01", "-1", "1/2", "2", "x+1", "x-1", "(1,2)", "(1,20)", "12"]
    assert len({answer_key(answer) for answer in answers}) == len(answers)


def test_layout_fonts_drawings_and_small_numerals_do_not_distinguish_texts():
    one = r"Find $\dfrac{1{,}000}{3}$ of \textbf{Three} points.[asy]draw(A--B);[/asy]"
    two = "find \\(\\frac{1000}{3}\\) of  3 points."
    assert normalise_text(one) == normalise_text(two)
    assert normalise_text("$x+1$") != normalise_text("$x-1$")


def test_a_sign_makes_another_text_but_not_other_words():
    [pair] = overlaps([problem("l", "Solve $x^2 + 5x + 6 = 0$", "1")], [problem("r", "Solve $x^2 - 5x + 6 = 0$", "2")])
    assert (pair.rule, pair.score, pair.answers_agree) == ("numbers", 1.0, False)


@pytest.mark.skipif(not LABELLED.is_dir(), reason=f"no labelled pairs at {LABELLED}; set SSD_TEST_DATA")
def test_the_operating_points_hold_on_labelled_pairs():
    lines = (LABELLED / "decontam_pairs.jsonl").read_text(encoding="utf-8").split("\n")
    flagged = {RECALL_FIRST: defaultdict(list), PRECISION_FIRST: defaultdict(list)}
    for row in map(json.loads, filter(None, lines)):
        sides = [problem("a", row["a"], str(row["answer_a"]))], [problem("b", row["b"], str(row["answer_b"]))]
        for point, by_relation in flagged.items():
            by_relation[row["relation"]].append(bool(overlaps(*sides, point)))
    recall, precision = ({name: sum(f) / len(f) for name, f in each.items()} for each in flagged.values())
    assert recall["exact_copy"] == 1.0
    assert recall["same_problem_other_transcription"] >= 0.97
    assert recall["same_problem_other_ask"] >= 0.65
    assert recall["llm_rephrase"] >= 0.90
    assert recall["unrelated"] <= 0.001
    assert precision["exact_copy"] == 1.0
    assert precision["same_problem_other_transcription"] >= 0.9
    for name in ("near_miss_mined", "math_p_simple", "math_p_hard", "similar_distinct"):
        assert precision[name] <= 0.02, name

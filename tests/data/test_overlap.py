"""Overlap: the join against brute force, the operating points against labelled pairs."""

import json
import os
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from ssd.data import overlap
from ssd.data.overlap import PRECISION_FIRST, RECALL_FIRST, OperatingPoint, clusters, duplicates, overlaps
from ssd.data.words import answer_key, digits_of, features_of, normalise_text
from ssd.records import Problem

LABELLED = Path(os.environ.get("SSD_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data") / "labelled"


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


def labelled_pairs() -> list[dict]:
    lines = (LABELLED / "decontam_pairs.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


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
@pytest.mark.parametrize("chunk_rows", [7, 4096])
def test_the_join_finds_exactly_the_pairs_of_the_definition(monkeypatch, point, chunk_rows):
    monkeypatch.setattr("ssd.data.words.CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(overlap, "PAIRS_AT_ONCE", 50 * chunk_rows)
    left, right = made_problems(150, 1, "l"), made_problems(120, 2, "r")
    expected = {
        (a.problem_id, b.problem_id): found for a in left for b in right if (found := by_definition(a, b, point))
    }
    found = overlaps(left, right, point)
    assert {(pair.left_id, pair.right_id): (pair.rule, pytest.approx(pair.score)) for pair in found} == expected
    assert all(pair.removed and pair.answers_agree == (pair.left_answer == pair.right_answer) for pair in found)
    assert {rule for rule, _ in expected.values()} >= {"same text", "answers and numbers"}
    order = {problem.problem_id: i for i, problem in enumerate([*left, *right])}
    assert [(p.left_id, p.right_id) for p in found] == sorted(
        expected, key=lambda pair: (order[pair[0]], order[pair[1]])
    )


@pytest.mark.parametrize("point", [PRECISION_FIRST, RECALL_FIRST, OperatingPoint(0.7, 0.6, 0.9)])
def test_within_a_set_each_pair_is_listed_once_with_the_later_problem_on_the_left(point):
    problems = made_problems(200, 3, "p")
    expected = {
        (problems[i].problem_id, problems[j].problem_id)
        for i in range(len(problems)) for j in range(i) if by_definition(problems[i], problems[j], point)
    }  # fmt: skip
    assert expected and {(pair.left_id, pair.right_id) for pair in duplicates(problems, point)} == expected


def test_suspected_pairs_are_listed_but_not_removed():
    left, right = made_problems(100, 4, "l"), made_problems(100, 5, "r")
    found = overlaps(left, right, suspected=0.8)
    assert [pair for pair in found if pair.removed] == overlaps(left, right)
    assert any(not pair.removed for pair in found)


def features_by_definition(text: str) -> tuple[set[str], Counter]:
    """Distinct words and the multiset of numbers of a text, one regular expression after the other."""
    words = re.findall(r"[^\W\d_]+|[0-9]+(?:\.[0-9]+)*", normalise_text(text))
    return set(words), Counter(word for word in words if word[0] in "0123456789")


HOSTILE = [
    "", " ", "\n\n", ".", "1.2.3 .5 5. 1..2", "3x^2+2x-1=0", "\\", "\\\\left(\\text", "\\textit", "\\bfx \\bf1",
    "1,000 and 1{,}000 and 1\\!000 and 1,\\! 000", "(1,234) (1, 234) 1,2345 12,345,678 1,000.50", "x,100 3,10 4!100",
    "Two twofold \\two two3 two.5 x\\_two", "twentyfour four-digit FOUR\\text{ four}", "incomprehensibilities " * 3,
    "[asy]draw(1);[/asy] kept [ASY] dot(2); [/ASY] too", "[asy] unclosed 17", "\u0130s \u0660\u0661 \u2168 \ufb01",
    "caf\u00e9 \u2220ABC = 60\u00b0 \u00bd \uff11\uff12 x\u00b2", "\u6c42\u3002", "a\u2028b\x00c\x85d\udc80e",
    "\\dfrac12 \\tfrac{3}{4} \\frac56 dfracx", "x" * 5000, "9" * 5000, "a\\left.b\\right.c\\quad2\\qquad 3",
    "$x$${y}$~z\\,w\\;v\\:u\\!t\\ s\\[r\\]\\(q\\)", "3.\\,5 3\\text.5 3{.}5 3 .5 v1.0",
]  # fmt: skip


def assert_taken_apart_as_defined(problems: list[Problem]) -> None:
    """Each text's words are those of its definition, and two texts agree in numbers where the multisets are equal."""
    found = features_of(problems)
    expected = [features_by_definition(each.problem) for each in problems]
    vocabulary = sorted(set().union(*(words for words, _ in expected)))
    alone = features_of([problem(word, word, "") for word in vocabulary])
    assert alone.num_words.tolist() == [1] * len(vocabulary) and len(set(alone.words)) == len(vocabulary)
    hash_of = dict(zip(vocabulary, alone.words.tolist()))
    for row, (words, _) in zip(np.split(found.words, np.cumsum(found.num_words)[:-1]), expected):
        assert sorted(row.tolist()) == sorted(hash_of[word] for word in words) or (not words and row.tolist() == [0])
    multisets = [tuple(sorted(numbers.items())) for _, numbers in expected]
    assert len(set(zip(multisets, found.numbers.tolist()))) == len(set(multisets)) == len(set(found.numbers.tolist()))


@pytest.mark.parametrize("texts", [HOSTILE, HOSTILE[::-1], [f"{text} and 7" for text in HOSTILE]])
def test_hostile_texts_taken_apart_together_have_the_words_and_numbers_of_the_definition(texts):
    assert_taken_apart_as_defined([problem(str(i), text, "1") for i, text in enumerate(texts)])


@pytest.mark.skipif(not LABELLED.is_dir(), reason=f"no labelled pairs at {LABELLED}; set SSD_TEST_DATA")
def test_real_texts_taken_apart_together_have_the_words_and_numbers_of_the_definition():
    assert_taken_apart_as_defined(
        [problem(str(i), text, "1") for i, row in enumerate(labelled_pairs()) for text in (row["a"], row["b"])][::3]
    )


def test_near_duplicates_are_found_among_many_with_the_same_answer_and_common_words():
    rng = random.Random(6)
    common = [f"common{letter}" for letter in "abcdefghijklmnopqrst"]
    texts = [
        [*common, *(f"w{rng.randrange(10**6)}".translate(DIGITS_TO_LETTERS) for _ in range(20))] for _ in range(300)
    ]
    near = [[*text[:38], "xx", "yy"] for text in texts]  # J = 38 / 42 with its own, at most 20 / 60 with any other
    found = duplicates([problem(str(i), " ".join(words), "1") for i, words in enumerate([*texts, *near])])
    assert {(pair.left_id, pair.right_id) for pair in found} == {(str(300 + i), str(i)) for i in range(300)}
    assert all(pair.score == pytest.approx(38 / 42) for pair in found)


def test_a_text_longer_than_a_chunk_and_texts_without_words_are_compared_too():
    long = " ".join(f"w{i}".translate(DIGITS_TO_LETTERS) for i in range(300_000))
    left = [problem("long", long, "1"), problem("signs", "$ + $", "2"), problem("blank", " ", "3")]
    right = [problem("r0", long + " more", "1"), problem("r1", "$-$", "2"), problem("r2", "", "4")]
    assert {(pair.left_id, pair.right_id): pair.rule for pair in overlaps(left, right)} == {
        ("long", "r0"): "answers and numbers", ("signs", "r1"): "answers and numbers", ("signs", "r2"): "numbers",
        ("blank", "r1"): "numbers", ("blank", "r2"): "same text",
    }  # fmt: skip


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


@pytest.mark.skipif(not LABELLED.is_dir(), reason=f"no labelled pairs at {LABELLED}; set SSD_TEST_DATA")
def test_the_key_of_an_answer_keeps_its_digits_in_order():
    answers = {str(row[side]) for row in labelled_pairs() for side in ("answer_a", "answer_b")}
    answers |= {"\u03a9", "\uff11\u00bd", "60\u00b0", r"\frac12", "x = 1,200.50", "007"}
    assert digits_of(answers) == digits_of([answer_key(answer) for answer in answers])


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
    pairs = labelled_pairs()
    left = [problem(f"a{i}", row["a"], str(row["answer_a"])) for i, row in enumerate(pairs)]
    right = [problem(f"b{i}", row["b"], str(row["answer_b"])) for i, row in enumerate(pairs)]
    flagged = {RECALL_FIRST: defaultdict(list), PRECISION_FIRST: defaultdict(list)}
    for point, by_relation in flagged.items():
        found = {(pair.left_id, pair.right_id) for pair in overlaps(left, right, point)}
        for i, row in enumerate(pairs):
            by_relation[row["relation"]].append((f"a{i}", f"b{i}") in found)
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

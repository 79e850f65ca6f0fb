"""Grades: each case is a row with its reason; outcomes add up; hostile answers end in time."""

import time

import pytest

from ssd import grading
from ssd.answers import last_box
from ssd.records import Grade, Problem, Sample

BOXES = [  # text, answer, reason
    (r"so \boxed{5}.", "5", "the plain case"),
    (r"\boxed{114} wait \boxed{113}", "113", "boxes with words between them are not joined: the last counts"),
    (r"$\boxed{3}$, $\boxed{4}$", "3, 4", "adjacent boxes are one answer of several parts"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}", "braces are balanced"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "escaped braces do not count"),
    (r"\boxed{7} then \boxed{8", "7", "a box that does not close is no box"),
    (r"\boxed 5", "5", "TeX takes the next character"),
    (r"\fbox{5}", "5", "the other box"),
    ("the answer is 5", None, "no box is no answer"),
    (r"\boxed{" * 20_000, None, "a degenerate text, in linear time"),
    (r"\boxed{\boxed{5}}", r"\boxed{5}", "the outer box"),
]


@pytest.mark.parametrize(("text", "answer", "reason"), BOXES, ids=[reason for *_, reason in BOXES])
def test_the_answer_is_the_last_box(text, answer, reason):
    assert last_box(text) == answer


VERDICTS = [  # gold, answer, verdict, reason
    ("5", "5", "right", "equal strings"),
    ("5", " $5$ ", "right", "math delimiters and spaces do not count"),
    ("5", "6", "wrong", "another integer"),
    ("0.75", "3/4", "right", "decimals, fractions"),
    ("3/4", r"\frac{3}{4}", "right", "and LaTeX fractions are one number"),
    (r"\frac{3}{4}", "0.75", "right", "in either direction"),
    ("1000", "1,000", "right", "thousands separators"),
    ("(1,234)", "(1234)", "wrong", "but a pair is no thousand"),
    ("12", "1 2", "wrong", "nor are two numbers one"),
    ("012", "12", "right", "leading zeros of contest answers"),
    (r"2\sqrt{3}", r"\sqrt{12}", "right", "equal expressions"),
    (r"x^2+1", r"x^2-1", "wrong", "another expression"),
    ("5", "x = 5", "right", "an assignment of the answer"),
    ("5", "", "wrong", "nothing"),
]


def test_answers_are_verified_as_their_rows_say():
    pairs = sorted({(gold, answer) for gold, answer, *_ in VERDICTS})
    verdicts = dict(grading.verify(pairs))
    assert verdicts == {(gold, answer): verdict for gold, answer, verdict, _ in VERDICTS}


def test_a_hostile_answer_is_killed_at_its_deadline_and_shown_as_timed_out():
    begin = time.monotonic()
    hostile = [("5", "5^{5^{5^{5^5}}}"), ("5", "{" * 900), ("5", "9" * 10**6), ("5", "\x00\u202e٣")]
    verdicts = dict(grading.verify([*hostile, ("1/2", "0.5")], deadline_s=3, workers=2))
    assert verdicts["5", "5^{5^{5^{5^5}}}"] == "timed_out"
    assert verdicts["1/2", "0.5"] == "right"
    assert set(verdicts.values()) <= {"right", "wrong", "timed_out"}
    assert len(verdicts) == 5
    assert time.monotonic() - begin < 60


def sample(index: int, text: str, finish_reason="stop") -> Sample:
    return Sample("p", index, [1], [2], text, finish_reason, -1.0)


def test_outcomes_are_told_apart_and_add_up():
    samples = [
        sample(0, r"2</think>\boxed{4}"),
        sample(1, r"2</think>\boxed{5}"),
        sample(2, "2</think>four"),
        sample(3, r"so \boxed{4} hmm", "length"),
        sample(4, r"so \boxed{4} hmm"),
    ]
    grades = grading.grade(samples, [Problem("p", "made", "2+2?", "4", "1")], thinks=True)
    assert [row.outcome for row in grades] == ["right", "wrong", "no_answer", "cut_off", "no_answer"]
    assert [row.answer for row in grades] == ["4", "5", "", "", ""]
    assert sum(grading.outcome_counts(grades).values()) == len(samples)
    health = grading.health(samples, grades)
    assert (health.think_close_rate, health.boxed_answer_rate, health.length_stop_rate) == (0.6, 0.4, 0.2)


def test_a_model_that_does_not_think_is_graded_on_its_whole_text():
    problems = [Problem("p", "made", "2+2?", "4", "1")]
    assert grading.grade([sample(0, r"\boxed{4}")], problems, thinks=False)[0].outcome == "right"


def test_a_sample_of_an_unknown_problem_is_refused():
    with pytest.raises(ValueError, match="problem 'p', which the problem set does not hold"):
        grading.grade([sample(0, "")], [Problem("q", "made", "2+2?", "4", "1")], thinks=True)


def test_correct_is_a_table_of_problems_by_samples():
    rows = [
        Grade("b", 1, "right", ""),
        Grade("a", 0, "wrong", ""),
        Grade("b", 0, "timed_out", ""),
        Grade("a", 1, "right", ""),
    ]
    ids, correct_PS = grading.correct(rows)
    assert ids == ["a", "b"]
    assert correct_PS.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Grade("a", 0, "right", ""), Grade("a", 0, "wrong", "")], "graded twice"),
        ([Grade("a", 0, "right", ""), Grade("b", 0, "wrong", ""), Grade("b", 1, "wrong", "")], r"\[1, 2\] samples"),
    ],
)
def test_unequal_or_doubled_samples_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        grading.correct(rows)


def test_only_answers_that_equal_themselves_are_gradable():
    assert grading.gradable(["3", r"\frac{1}{2}", r"\text{}"]) == {"3": True, r"\frac{1}{2}": True, r"\text{}": False}

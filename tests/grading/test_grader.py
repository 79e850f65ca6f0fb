"""Grades: each case is a row with its reason; outcomes add up; hostile answers end in time."""

import collections
import contextlib
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from ssd import records
from ssd.grades import health, outcome_counts
from ssd.grading import grader, workers
from ssd.grading.writing import last_box
from ssd.records import Problem, Sample
from ssd.samples import Samples

ROOT = Path(__file__).resolve().parents[2]

BOXES = [  # text, answer, reason
    (r"so \boxed{5}.", "5", "the plain case"),
    (r"\boxed{114} wait \boxed{113}", "113", "boxes with words between them are not joined: the last counts"),
    (r"$\boxed{3}$, $\boxed{4}$", "3, 4", "adjacent boxes are one answer of several parts"),
    (r"$x = \boxed{3}$ and $y_1 = \boxed{4}$", "x = 3, y_1 = 4", "a name before a box belongs to it"),
    (r"$x = \boxed{1}$ and $y = \boxed{1}$", "x = 1, y = 1", "two names are two parts, also of one value"),
    ("$N = \\boxed{(1, 2)}$\n\n$\\boxed{(1, 2)}$", "(1, 2)", "said again without its name"),
    ("$$\\boxed{x = 5}$$\n$x = \\boxed{5}$", "5", "without a comma, 'and' or 'or' the second says it again"),
    (r"so $\boxed{3}$. Then $x = \boxed{4}$", "4", "and a word between stands between"),
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


POLICIES = [
    json.loads(line) for line in (Path(__file__).parent / "policies.jsonl").read_text(encoding="utf-8").splitlines()
]


def test_answers_are_graded_as_the_rows_of_each_policy_say():
    verdicts = dict(grader.verify([(row["gold"], row["answer"]) for row in POLICIES], deadline_s=60))
    against = [
        row for row in POLICIES if verdicts[row["gold"], row["answer"]] != ("right" if row["right"] else "wrong")
    ]
    assert not against


def test_every_policy_has_rows_of_both_kinds_and_each_row_a_reason():
    kinds = collections.defaultdict(set)
    for row in POLICIES:
        assert row["reason"]
        kinds[row["policy"]].add(row["right"])
    assert sum(kind == {True, False} for kind in kinds.values()) >= 20


def hostile_answers() -> list[str]:
    """What a model, or who wants to stop a grader, may write: over 500 answers, from a few characters to 1 MB."""
    nested = [
        opening * depth + "7" + closing * depth
        for depth in (20, 300, 10_000)
        for opening, closing in (
            ("{", "}"), ("(", ")"), ("[", "]"), (r"\{", r"\}"), (r"\frac{1}{1+", "}"), (r"\sqrt{", "}"), ("2^{", "}"),
            (r"\boxed{", "}"), (r"\text{", "}"), (r"\left(", r"\right)"), ("|", "|"), ("(", ""), ("{", ""), ("", "}"),
        )
    ]  # fmt: skip
    repeated = [
        unit * times
        for times in (3, 30, 300, 3_000, 100_000)
        for unit in (
            "9", "-", "1,", "1 ", " ", "x", "^", "_", "\\", "\\\\", "$", "%", "!", "=", "1=", "<", "1<", ".", "0.",
            "/1",
            "{", "}", "(", ",", ";", "and ", "or ", " x", "a b ", "word ", "\\frac", "\\frac1", "\\text{",
            "\\text{a}",
            "\\boxed", "\\boxed{1}", "\\boxed{1} ", "\\left", "\\pm", "\\in ", "\\cup", "\\begin{pmatrix}", "1\\\\",
            "1&", "\\,", "1\\,", "1,000", "^\\circ", "\\sin", "x=1,", "x=1;", "answer ", "answer is ", "\n", "a\n",
            "1\n",
            "'", "\x00", "\x1b[2J", "\u202e", "\u200d", "٣", "९", "𝟗", "²", "½", "√", "−", "é", "漢", "\ud7ff", "🂡",
        )
    ]  # fmt: skip
    towers = ["^".join(["{9"] * height) + "}" * height for height in range(2, 40)]
    towers += [f"{base}^{{{base}^{{{base}}}}}" for base in range(5, 45)]
    factorials = ["(" * k + "9" + "!)" * k for k in range(2, 14)] + [f"{10**k}!" for k in range(3, 20)]
    polynomials = ["+".join(f"{k}x^{{{k}}}" for k in range(terms)) for terms in (40, 300, 3_000)]
    products = ["".join(f"(x+{k})" for k in range(factors)) for factors in (9, 40, 3_000)]
    sets = [r"\{" + ",".join(map(str, range(size))) + r"\}" for size in (200, 3_000, 100_000)]
    bombs = [
        r"\binom{10^9}{10^8}", r"\binom{999999999}{499999999}", r"\sum_{k=1}^{10^{10}} \frac{1}{k^3}",
        r"\prod_{k=1}^{10^9} k", r"\int_0^{10} x^x dx", r"\gcd(10^{10^{10}}, 7)", r"10^{10^{10}} \bmod 7",
        r"(x+y+z+1)^{1000}", r"(x+1)^{(x+1)^{999}}", r"\sin(\sin(\sin(10^{100})))", r"\zeta(10^{10})",
        "1/0", r"\frac{0}{0}",
        r"\infty - \infty", r"e^{e^{e^{e^{e}}}}", r"\log(\log(\log 0))", r"10^{-10^{10}}", r"\sqrt[10^{10}]{2}",
        "1e999999999",
        "0x41", "__import__('os').system('true')", r"\input{/etc/passwd}", r"\def\x{\x\x}\x",
        r"\newcommand{\a}{\a\a}\a",
        r"\write18{true}", "lambda: 0", "x" * 50 + "=" * 50, r"\begin{pmatrix}" + r"1&2\\" * 60 + r"\end{pmatrix}",
        "None", "", r"\in \approx 3 = 4", "(= \\approx 2 = 3, 1)", "1" + "0" * 320 + ".5000001",
    ]  # fmt: skip
    return nested + repeated + towers + factorials + polynomials + products + sets + bombs


def test_hostile_answers_end_in_an_outcome_in_time_and_memory_and_leave_no_process():
    deadline_s = 0.5
    pairs = [(("5", r"x^2+\sqrt{3}")[i % 2], answer) for i, answer in enumerate(hostile_answers())]
    assert len(set(pairs)) >= 500
    processes, over = {}, threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    processes[process] = max(processes.get(process, 0), process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        verdicts, times = {}, []
        for pair, verdict in grader.verify([*pairs, ("1/2", "0.5")], deadline_s, workers=2):
            verdicts[pair] = verdict
            times.append(time.monotonic())
    finally:
        over.set()
        watcher.join()
    assert verdicts.keys() == {*pairs, ("1/2", "0.5")}
    assert verdicts.pop(("1/2", "0.5")) == "right"
    assert set(verdicts.values()) == {"wrong", "timed_out"}
    assert list(verdicts.values()).count("timed_out") < len(pairs) / 5  # most are refused before a clock runs
    waits = sorted(after - before for before, after in itertools.pairwise(times))
    assert waits[-2] < deadline_s + 2  # the longest wait is for the workers to start
    assert max(processes.values()) < workers.MEMORY_BYTES
    assert not psutil.wait_procs(list(processes), timeout=5)[1]


def test_no_worker_outlives_a_grading_process_that_is_killed():
    code = "from ssd.grading import grader; print(list(grader.verify([('5', r'\\int_0^{10} x^x dx')], deadline_s=60)))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    parent = psutil.Process(process.pid)
    deadline = time.monotonic() + 60
    while len(workers := parent.children(recursive=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers, timeout=5)[1]


def sample(index: int, text: str, finish_reason="stop") -> Sample:
    return Sample("p", index, [1], [2], text, finish_reason, -1.0)


def test_outcomes_are_told_apart_and_add_up(tmp_path):
    samples = [
        sample(0, r"2</think>\boxed{4}"),
        sample(1, r"2</think>\boxed{5}"),
        sample(2, "2</think>four"),
        sample(3, r"so \boxed{4} hmm", "length"),
        sample(4, r"so \boxed{4} hmm"),
    ]
    grades = grader.grade(samples, [Problem("p", "made", "2+2?", "4", "1")], thinks=True)
    assert [row.outcome for row in grades] == ["right", "wrong", "no_answer", "cut_off", "no_answer"]
    assert [row.answer for row in grades] == ["4", "5", "", "", ""]
    assert sum(outcome_counts(grades).values()) == len(samples)
    records.write(tmp_path / "samples.parquet", Sample, samples)
    found = health(Samples(tmp_path), grades)
    rates = [found.think_close_rate, found.boxed_answer_rate, found.length_stop_rate]
    assert [rate.mean() for rate in rates] == [0.6, 0.4, 0.2]


def test_a_model_that_does_not_think_is_graded_on_its_whole_text():
    problems = [Problem("p", "made", "2+2?", "4", "1")]
    assert grader.grade([sample(0, r"\boxed{4}")], problems, thinks=False)[0].outcome == "right"


@pytest.mark.parametrize(
    ("gold", "tolerance", "near", "far"),
    [
        (
            "4.2",
            0.1,
            ["4.1", "4.30", r"\frac{43}{10}", r"x = 4.25", r"\sqrt{16}+0.1"],
            ["4.31", "-4.2", "4.2, 5", "four"],
        ),
        (r"\cos^{10}(\frac{\pi}{10})", 1e-4, ["0.6054", "0.60536"], ["0.6056", "0.6052"]),
        (r"\sqrt{2}", 1e-8, ["1.4142136"], ["1.4141"]),  # as near as a decimal may be without a tolerance
        ("0.003, 5.233", 0.001, ["0.002, 5.234", "5.232, 0.004"], ["0.005, 5.233", "0.003"]),
        ("1, 1.5", 0.5, ["1.4, 0.6", "1.5, 2.0"], ["0.4, 1.5", "2.1, 1.5"]),
        ("1, 1.05", 0.1, ["1, 1"], ["1", "1, 1, 1"]),
        (r"(1, \sqrt{2})", 0.01, ["(1, 1.41)"], ["(1.41, 1)", "(1, 1.40)"]),
        (r"5\text{ cm}", 0.5, ["4.6", r"5.4\text{ cm}"], [r"5.4\text{ m}", "4.4"]),
        (r"12\%", 0.5, ["12.4", r"11.6\%", "0.124"], ["0.4", "0.62", r"40\%"]),
        ("0.5", 0.01, ["0.505", r"50.5\%"], [r"52\%", "0.52"]),
        ("3:45", 0.1, ["3:45"], ["9:59"]),
        ("101_2", 1.0, ["101"], ["100_2"]),
        ("x^2", 0.1, ["x \\cdot x"], ["x^2 + 0.05"]),
    ],
)
def test_a_number_may_be_as_far_off_as_its_problem_allows(gold, tolerance, near, far):
    samples = [sample(index, rf"\boxed{{{answer}}}") for index, answer in enumerate([*near, *far])]
    outcomes = [
        [row.outcome for row in grader.grade(samples, [Problem("p", "made", "?", gold, "", allowed)], thinks=False)]
        for allowed in (tolerance, 0.0)
    ]
    assert outcomes[0] == ["right"] * len(near) + ["wrong"] * len(far)
    assert outcomes[1][len(near) :] == ["wrong"] * len(far)


@pytest.mark.parametrize(
    ("gold", "notation", "answers"),
    [
        (r"[-2, 7]", "interval", {r"-2 \le x \le 7": "wrong", r"x \in [-2,7]": "right", "[-2, 7)": "wrong"}),
        (
            r"(-\infty, 1) \cup (3, \infty)",
            "interval",
            {"x < 1 or x > 3": "wrong", r"(3,\infty)\cup(-\infty,1)": "right"},
        ),
        (r"-2 \le x \le 7", "interval", {r"x \in [-2,7]": "right", r"7 \ge x \ge -2": "right"}),
        ("[-2, 7]", "", {r"-2 \le x \le 7": "right"}),
        (r"(-\infty, 2) \cup (2, \infty)", "interval", {r"x \ne 2": "wrong", "x≦2": "wrong"}),
        ("f(x)", "any letters", {"f(y)": "right", "g(t)": "right", "f(2)": "wrong", "f(x, y)": "wrong"}),
        ("x^2 + 3y", "any letters", {"3b + a^2": "wrong", "a^2 + 3b": "right", "3y + x^2": "right"}),
        (
            "f(x) = x^2",
            "any letters",
            {"t^2": "right", "Q(t) = t^2": "right", "The answer is $t^2$": "right", "t": "wrong"},
        ),
        ("mx + b", "any letters", {"at + c": "right", "mx + m": "wrong", "mx + x": "wrong"}),
        ("x^2 + xy + y^2", "any letters", {"a^2 + ab + b^2": "right", "a^2 + xy + b^2": "wrong"}),
        (r"2n\pi + e^n", "any letters", {r"e^k + 2k\pi": "right", r"2k\pi + k^k": "wrong", r"2k\pi + e": "wrong"}),
        (r"\sin\theta", "any letters", {r"\sin x": "right", r"\cos x": "wrong"}),
        (r"x \in \mathbb R", "any letters", {r"x \in \mathbb Z": "wrong", r"t \in \mathbb{R}": "right"}),
        (r"30^\circ C", "any letters", {r"30^\circ F": "wrong"}),
        (r"5\text{ m}", "any letters", {r"5\text{ g}": "wrong", "5": "right"}),
        ("A2_{16}", "any letters", {"B2_{16}": "wrong"}),
        ("V", "any letters", {"X": "wrong"}),
        ("a^2 - b^2", "any letters", {"b^2 - a^2": "wrong", "x^2 - y^2": "right"}),
        ("LQXS", "any letters", {"LQSX": "wrong"}),
        ("even", "any letters", {"odd": "wrong", "even": "right", "oxon": "wrong"}),
        ("f(x)", "", {"f(y)": "wrong"}),
    ],
)
def test_a_problem_may_want_an_interval_or_leave_its_letters_free(gold, notation, answers):
    samples = [sample(index, rf"\boxed{{{answer}}}") for index, answer in enumerate(answers)]
    grades = grader.grade(samples, [Problem("p", "made", "?", gold, "", notation=notation)], thinks=False)
    assert {answer: row.outcome for answer, row in zip(answers, grades, strict=True)} == answers


def test_a_sample_of_an_unknown_problem_is_refused():
    with pytest.raises(ValueError, match="problem 'p', which the problem set does not hold"):
        grader.grade([sample(0, "")], [Problem("q", "made", "2+2?", "4", "1")], thinks=True)


def test_only_answers_that_equal_themselves_are_gradable():
    assert grader.gradable(["3", r"\frac{1}{2}", r"\text{}"]) == {"3": True, r"\frac{1}{2}": True, r"\text{}": False}

"""How often does the grader agree with labelled cases, and is a near miss ever right?

Run:   python -m benchmarks.grader_quality [--data DIR]

Cases come from `labelled/grader_cases.jsonl` under `--data` (or SSD_TEST_DATA). A prediction with a box is graded on
its last box, as a response is; one without a box is compared as an answer, since a grader of responses would call all
of them no answer. A label that is for a setting (a tolerance; whether an inequality is its interval, or `f(y)` `f(x)`)
is compared with the verdict of a problem that has this tolerance and notation, and plain math-verify has the setting.
The policies were made looking at three quarters of the cases, `seen`, and at little of the quarter `held`, chosen by
hash (docs/grading.md says what): agreement on it is nearer to that on cases still to come.
Beside it stand plain math-verify and the best of its forms. Every disagreement is listed with the policy behind it.
Near misses are made from real golds of the mirror: none may be right. Ends with status 0 only if every target is met.
"""

import argparse
import hashlib
import json
import logging
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

import math_verify

from benchmarks.grading import real_golds
from ssd.grading import grader, writing
from ssd.grading.writing import last_box

DATA = Path(os.environ.get("SSD_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
TARGETS = {"all": 0.98, "Math-Verify": 0.98, "inspect": 0.95, "OlympiadBench": 0.85}
ORIGINS = ("Math-Verify", "inspect", "OlympiadBench", "Qwen", "Omni-MATH", "grade-school", "tinker", "other")
NUM_NEAR_MISSES = 2_000
APART = (  # text, what must be its answer
    (r"\boxed{114}? No: \boxed{113}", "113"),
    (r"First \boxed{1} papers, then \boxed{2} bins", "2"),
    (r"\boxed{a} ++++++ \boxed{4}", "4"),
    (r"\boxed{3} is wrong. \boxed{4}", "4"),
    (r"\boxed{3}\boxed{4}", "3, 4"),
    (r"$\boxed{3}$ or $\boxed{4}$", "3, 4"),
)
REASONS = (  # the first that matches a disagreement is its reason; patterns over 'gold ;; prediction'
    (r"boxed.*;;|;;.*boxed.*[a-z].*boxed", "boxes that stand apart are not one answer; the last counts"),
    (r"\n", "space and line ends in a formula do not count"),
    (r"10\^\{35\}, .*;;", "a problem has one tolerance; the label allows another for each number"),
    (r"text\{.*;;.*text\{", "words are compared as words; that two wordings mean the same is not judged"),
    (r"frac.*;;.*frac", "a fraction need not be reduced; the label wants lowest terms"),
    (r"\d\{,\}\d", "thousands separators do not count; the label is a rule's that reads them as a list"),
    (r"", "no policy: the case is beyond the grader, or its label is"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds labelled/ and hub/")
    args = parser.parse_args()
    logging.disable()
    path = args.data / "labelled" / "grader_cases.jsonl"
    if not path.is_file():
        raise SystemExit(f"no labelled cases at {path}; give --data or set SSD_TEST_DATA")
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    answers = [last_box(case["prediction"]) or tail(case["prediction"]) for case in cases]
    pairs = [
        (case["gold"], answer, tolerance(case), notation(case)) for case, answer in zip(cases, answers, strict=True)
    ]
    verdicts = dict(grader.verify(sorted(set(pairs))))
    agreed = {"this grader": [(verdicts[pair] == "right") == case["expected"] for pair, case in zip(pairs, cases)]}
    for name, form in (("verify(parse, parse)", lambda text: text), ("both in $..$, equal strings first", in_dollars)):
        agreed[name] = [plain(case, form, first=form is in_dollars) == case["expected"] for case in cases]
    missed = by_origin(cases, agreed)
    disagreements(cases, pairs, verdicts)
    missed += [f"the answer of {text!r} is {last_box(text)!r}" for text, answer in APART if last_box(text) != answer]
    if (args.data / "hub").is_dir():
        missed += near_misses(real_golds(str(args.data / "hub")))
    else:
        missed.append(f"no golds at {args.data / 'hub'} to make near misses of")
    print(f"\nTargets: {', '.join(f'{name} {target:.2f}' for name, target in TARGETS.items())}; no near miss right.")
    print("missed: " + "; ".join(missed) if missed else "every target met")
    return 1 if missed else 0


def tail(prediction: str) -> str:
    """The end of a prediction without a box, where a bare answer or its sentence stands."""
    return prediction[-1_000:]


def tolerance(case: dict) -> float:
    """How far a number may be off by the case's label; 0 where it says nothing, or something for each number."""
    precision = case.get("params", {}).get("precision", 0)
    if isinstance(precision, list) or not precision:
        return 0.0
    if origin(case) == "Math-Verify":  # rounds to so many places
        return 0.5 * 10.0**-precision
    return float(precision)


def notation(case: dict) -> str:
    """The notation of a problem that math-verify's switches stand for; '' is what this grader does by default."""
    params = case.get("params", {})
    if params.get("strict") is False:
        return "any letters"
    return "interval" if params.get("allow_set_relation_comp") is False else ""


def in_dollars(text: str) -> str:
    return text if "$" in text or "boxed" in text else f"${text}$"


def plain(case: dict, form, first: bool) -> bool:
    if first and case["gold"].strip() == case["prediction"].strip():
        return True
    params = case.get("params", {})
    settings = {name: params[name] for name in ("strict", "allow_set_relation_comp") if name in params}
    if origin(case) == "Math-Verify" and "precision" in params:
        settings["float_rounding"] = params["precision"]
    gold, prediction = (math_verify.parse(form(case[side])) for side in ("gold", "prediction"))
    return math_verify.verify(gold, prediction, **settings)


def origin(case: dict) -> str:
    return next((name for name in ORIGINS if name.lower() in case["origin"].lower()), "other")


def is_held(case: dict) -> bool:
    return hashlib.sha256(f"{case['gold']}\x1f{case['prediction']}".encode()).digest()[0] % 4 == 3


def by_origin(cases: list[dict], agreed: dict[str, list[bool]]) -> list[str]:
    """Print agreement by origin; returns the targets missed."""
    print("| cases | n | this grader | seen | held | false right | false wrong | plain math-verify | in $..$ |")
    print("| --- " * 9 + "|")
    own, *others = agreed.values()
    missed = []
    for name in ("all", *ORIGINS):
        chosen = [i for i, case in enumerate(cases) if name in ("all", origin(case))]
        if not chosen:
            continue
        share = mean(own[i] for i in chosen)
        halves = [mean(own[i] for i in chosen if is_held(cases[i]) == held) for held in (False, True)]
        errors = Counter(cases[i]["expected"] for i in chosen if not own[i])
        cells = [share, *halves, errors[False], errors[True], *(mean(each[i] for i in chosen) for each in others)]
        texts = [f"{each:.3f}" if isinstance(each, float) else f"{each}" for each in cells]
        print(f"| {name} | {len(chosen)} | {' | '.join(texts)} |")
        if share < TARGETS.get(name, 0):
            missed.append(f"{name} {share:.3f} < {TARGETS[name]}")
    return missed


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def disagreements(cases: list[dict], pairs: list[tuple[str, str, float, str]], verdicts: dict) -> None:
    print(
        "\n| disagreement: gold | compared | label | verdict | origin | reason |\n| --- | --- | --- | --- | --- | --- |"
    )
    for case, pair in zip(cases, pairs, strict=True):
        if (verdicts[pair] == "right") != case["expected"]:
            text = f"{case['gold']} ;; {case['prediction']}"
            reason = next(reason for pattern, reason in REASONS if re.search(pattern, text, re.DOTALL))
            label = "right" if case["expected"] else "wrong"
            print("| " + " | ".join((*map(cell, pair[:2]), label, verdicts[pair], origin(case), reason)) + " |")


def cell(text: str) -> str:
    text = repr(text[-60:])[1:-1].replace("|", "\\|")
    return f"`{text}`"


def near_misses(golds: list[str]) -> list[str]:
    """Change real golds in one place and grade them; returns those called right."""
    rng, pairs = random.Random(0), set()
    for gold in golds:
        miss = near_miss(gold, rng)
        if miss and len(pairs) < NUM_NEAR_MISSES:
            pairs.add((gold, miss))
    verdicts = dict(grader.verify(sorted(pairs)))
    right = [pair for pair, verdict in verdicts.items() if verdict == "right"]
    print(f"\n{len(pairs):,} near misses of real golds: {Counter(verdicts.values())}")
    if len(pairs) < NUM_NEAR_MISSES:
        return [f"{len(pairs):,} near misses of {NUM_NEAR_MISSES:,}: the mirror holds too few golds"]
    return [f"{miss!r} is right for {gold!r}" for gold, miss in right]


def near_miss(gold: str, rng: random.Random) -> str:
    """`gold` with its sign, a number, an operator, the order, an element or a bracket changed; '' where nothing can."""
    clean = writing.clean(gold)
    numbers = [m for m in re.finditer(r"(?<![\d.])\d+(?![\d.])", clean) if int(m[0]) > 1]
    changes = []
    if numbers:
        number = rng.choice(numbers)
        changes += [f"{clean[: number.start()]}{int(number[0]) + step}{clean[number.end() :]}" for step in (1, -1, 10)]
        changes.append(f"{clean[: number.start()]}{number[0]}0{clean[number.end() :]}")
    if re.fullmatch(r"\d+", clean) and clean != clean[::-1]:
        changes.append(clean[::-1])
    if re.match(r"[1-9]|\\frac|\\sqrt", clean):
        changes.append(f"-{clean}" if re.fullmatch(r"[^-+=<>,]*", clean) else "")
    if match := re.fullmatch(r"\(([^,()]+), ?([^,()]+)\)", clean):
        first, second = match.groups()
        changes += [f"({second}, {first})" if first != second else "", f"[{first}, {second}]", f"({first})"]
    return rng.choice([change for change in changes if change] or [""])


if __name__ == "__main__":
    sys.exit(main())

"""Does the code still decide as it did? A digest of every verdict on the labelled data, to compare two commits by.

Run:   python -m benchmarks.unchanged [--data DIR]

Run it before and after a change that must not change behaviour: equal digests mean equal decisions. There is one
digest for each part, so that a difference is in the grader, the overlap search or the statistics, and in which file;
the last line is the digest of them all. `--details FILE` writes what the digests cover, one line a decision, for a
diff. A pair that times out counts as undecided (wrong), since that depends on the speed of the machine; their number
is printed. It takes some twenty seconds.
"""

import argparse
import gzip
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ssd.data import overlap
from ssd.data.overlap import PRECISION_FIRST, RECALL_FIRST
from ssd.grading import grader
from ssd.records import Problem
from ssd.stats import compare, estimate, power, variance

DATA = Path(os.environ.get("SSD_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
DELTA = 0.05  # of the statistics of a design


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds labelled/")
    parser.add_argument("--details", type=Path, help="file to write every decision to")
    args = parser.parse_args()
    logging.disable()
    folder = args.data / "labelled"
    if not folder.is_dir():
        raise SystemExit(f"no labelled data at {folder}; give --data or set SSD_TEST_DATA")
    details = []
    whole = hashlib.sha256()
    print("| part | decisions | digest |\n| --- | ---: | --- |")
    for part, decisions in parts(folder):
        lines = [json.dumps(decision, ensure_ascii=True) for decision in decisions]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        whole.update(digest.encode())
        print(f"| {part} | {len(lines):,} | {digest[:16]} |", flush=True)
        details += [f"{part}\t{line}\n" for line in lines]
    if args.details:
        args.details.write_text("".join(details))
    print(f"\nall: {whole.hexdigest()[:16]}")
    return 0


def parts(folder: Path) -> Iterator[tuple[str, Iterable]]:
    """Name of each part and its decisions, as values that JSON can write."""
    for path in sorted(folder.glob("grader_cases*.jsonl")):
        cases = rows_in(path)
        yield f"grader, {path.name}", verdicts([(case["gold"], case["prediction"]) for case in cases], path.name)
    for path in sorted(folder.glob("responses.jsonl*")):
        responses = rows_in(path)
        answers = [grader.extract(row["response"], thinks=False) for row in responses]
        yield f"last box, {path.name}", answers
        pairs = [(row["gold"], answer) for row, answer in zip(responses, answers) if answer is not None]
        yield f"grader, {path.name}", verdicts(pairs, path.name)
    for path in sorted(folder.glob("decontam_pairs*.jsonl")):
        rows = rows_in(path)
        left = [Problem(f"a{i}", "labelled", row["a"], str(row["answer_a"]), "") for i, row in enumerate(rows)]
        right = [Problem(f"b{i}", "labelled", row["b"], str(row["answer_b"]), "") for i, row in enumerate(rows)]
        for name, point in (("recall first", RECALL_FIRST), ("precision first", PRECISION_FIRST)):
            yield f"overlap, {name}, {path.name}", overlaps(left, right, point)
        yield f"duplicates, {path.name}", decided(overlap.duplicates(left))
    for path in sorted(folder.glob("samples_correctness*.jsonl")):
        yield f"statistics, {path.name}", statistics(rows_in(path))


def rows_in(path: Path) -> list[dict]:
    """Objects of a file of JSON lines, which may be compressed."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.split(b"\n") if line]


def verdicts(pairs: list[tuple[str, str]], name: str) -> list[str]:
    """Verdict on each pair of gold and answer, in order. An answer that holds a box is graded on its last one, too."""
    asked = sorted({(gold, form) for gold, answer in pairs for form in forms(answer)})
    bar = tqdm(grader.verify(asked), name, len(asked), unit="pair", mininterval=1)
    verdict_of = dict(bar)
    if num_late := sum(verdict == "timed_out" for verdict in verdict_of.values()):
        print(f"{name}: {num_late} pairs timed out", file=sys.stderr)
    words = {"right": "right", "wrong": "wrong", "timed_out": "wrong"}
    return [" ".join(words[verdict_of[gold, form]] for form in forms(answer)) for gold, answer in pairs]


def forms(answer: str) -> list[str]:
    """`answer` as it stands, and its last box where it has one."""
    box = grader.extract(answer, thinks=False)
    return [answer] if box is None else [answer, box]


def overlaps(left: list[Problem], right: list[Problem], point) -> list[list]:
    """What the search says of every pair of the two sides, near ones included."""
    return decided(overlap.overlaps(left, right, point, suspected=0.9))


def decided(pairs: list[overlap.Overlap]) -> list[list]:
    return [[pair.left_id, pair.right_id, round(pair.score, 9), pair.rule, pair.removed] for pair in pairs]


def statistics(rows: list[dict]) -> list[list]:
    """Estimates, variance components, paired differences and designs of the models in `rows`, by name."""
    named: list[list] = []

    def say(name: str, values: Iterable) -> None:
        named.append([name, *(value if isinstance(value, str) else round(float(value), 9) for value in values)])

    several_PS = matrix([row for row in rows if row["origin"] == "qwen_rm_math100_k8"])
    problems, samples = several_PS.shape
    say("mean", estimate.mean(several_PS))
    for k in (1, 2, samples):
        say(f"pass at {k}", estimate.pass_at_k(several_PS, k))
    clusters_P = np.arange(problems) // 4
    say("mean, clustered", estimate.mean(several_PS, clusters_P))
    for group, row in estimate.by_group(several_PS, (clusters_P % 3).tolist()).items():
        say(f"group {group}", row)
    say("variance", variance.components(several_PS))
    one_each = [row for row in rows if row["origin"] == "openai_gsm8k_models"]
    models = {
        model: np.array([[row["correct"]] for row in one_each if row["sample_id"] == model], dtype=float)
        for model in dict.fromkeys(row["sample_id"] for row in one_each)
    }
    first, *others = models
    p_values = []
    for model in others:
        difference = compare.paired(models[model], models[first])
        p_values.append(difference.p_value)
        say(f"{model} - {first}", difference)
        say(f"{model} - {first}, equivalent", [compare.equivalent(difference, DELTA)])
    say("several samples, halves", compare.paired(several_PS[:, : samples // 2], several_PS[:, samples // 2 :]))
    say("holm", compare.holm(p_values))
    say("problems needed", [power.sample_size_paired(0.1, 0.1, 0.1, DELTA, 1, 1)])
    say("detectable", [power.minimal_detectable_effect(problems, 0.1, 0.1, 0.1, 1, 1)])
    return named


def matrix(rows: list[dict]) -> np.ndarray:
    """correct_PS of rows that hold as many samples of every problem."""
    by_problem: dict[str, list[float]] = {}
    for row in rows:
        by_problem.setdefault(row["prompt_id"], []).append(float(row["correct"]))
    return np.array(list(by_problem.values()))


if __name__ == "__main__":
    sys.exit(main())

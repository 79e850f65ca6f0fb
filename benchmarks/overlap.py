"""How fast is the overlap search at NuminaMath's size, and does it find everything, beside MinHash tools?

Run:   python -m benchmarks.overlap [--data DIR] [--rows 10000 100000 860000]     (needs the extra `benchmarks`)

Rows are made from real problems (gsm8k, MATH, NuminaMath's cn_k12) in the shares of NuminaMath-CoT's sources: other
numbers, other answers and three words of ten from another problem of that source. Among 860,000 there are 2,000 copies
of evaluation problems of four known kinds; a smaller size is the beginning of the same shuffled rows. Each measurement
is a process of its own, bound to its number of cores (Linux). A MinHash tool works in one process a core, on the words
alone, which is its fastest form, and only proposes pairs. Prints Markdown tables, ends with status 0 only if every
target is met, and says so last.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy import sparse

from ssd import records
from ssd.data import overlap, sources, splits
from ssd.data.words import answer_key, normalise_text
from ssd.grading.writing import last_box
from ssd.records import Problem

SIZES = (10_000, 100_000, 860_000)
CORES = (1, 2)
NUM_EVALUATION, NUM_PLANTED, NUM_BRUTE_FORCE = 1_700, 2_000, 20_000
EVALUATION = ("beyond-aime", "omni-math-2", "olympiadbench", "aimo-validation-aime", "aime_1983_2023")
# What of NuminaMath-CoT's 859,494 rows stands for what: the sources named, and the file that their rows are made from.
SHARES = {
    "numinamath-cot/train": 276_591,  # cn_k12
    "gsm8k/main_train": 153_334 + 7_345,  # orca_math, gsm8k
    "hendrycks_math/train": 167_895 + 7_478 + 62_111,  # synthetic_math, math, synthetic_amc
    "hendrycks_math/test": 150_581 + 30_201 + 4_072,  # olympiads, aops_forum, amc_aime: the longer half of the rows
}
KINDS = ("exact", "re-typed", "rephrased", "other question")
MAX_SECONDS, MAX_GIB = 60, 2
MAX_CLUSTERING_SECONDS, MAX_CLUSTERING_GIB = 300, 4
MIN_RECALL = {"exact": 1.0, "re-typed": 0.97}
MAX_SLOWDOWN = 1.5  # of a row among 860,000 against one among 100,000
NUM_PERM, MINHASH_THRESHOLD = 128, 0.5

WORD = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("SSD_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(default) / "hub", help="a mirror of the problem sets")
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES)
    parser.add_argument("--measure", nargs=3, metavar=("TOOL", "ROWS", "CORES"), help="one measurement, as JSON")
    args = parser.parse_args()
    if args.measure:
        tool, num_rows, num_cores = args.measure
        print(json.dumps(measured(args.data, tool, int(num_rows), int(num_cores))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_rows(args.data, Path(folder), max(args.rows))
        missed = speed(Path(folder), sorted(args.rows)) + completeness(Path(folder))
    print("\n".join(["", *missed, "every target met" if not missed else f"{len(missed)} targets missed"]))
    return 1 if missed else 0


def speed(folder: Path, sizes: Sequence[int]) -> list[str]:
    """Measure and print every tool at every size; returns the targets missed."""
    results = {}
    print(f"\n## Train against evaluation\n\nPlanted, share found: {' / '.join(KINDS)}.\n")
    print("| rows | cores | tool | seconds | rows/s | rows/s of CPU | peak GiB | planted found | others flagged |")
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: | --- | ---: |")
    for size in sizes:
        for cores in CORES:
            for tool in TOOLS:
                if tool != "clusters":
                    results[tool, size, cores] = report(tool, size, cores, folder)
    print("\n## Near copies inside the largest set\n")
    print("| rows | cores | tool | seconds | rows/s | rows/s of CPU | peak GiB | pairs |\n|" + " ---: |" * 8)
    clustering = report("clusters", sizes[-1], CORES[-1], folder)

    largest, missed = results["ssd.data.overlap", sizes[-1], CORES[-1]], []
    if largest["seconds"] > MAX_SECONDS or largest["gib"] > MAX_GIB:
        missed.append(f"MISSED: {sizes[-1]:,} rows in {MAX_SECONDS} s and {MAX_GIB} GiB")
    for tool, cores in itertools.product(("rensa", "datasketch"), CORES):
        ours, peer = (results[name, sizes[-1], cores]["seconds"] for name in ("ssd.data.overlap", tool))
        if peer <= ours:
            missed.append(f"MISSED: faster than {tool} at {sizes[-1]:,} rows on {cores} cores")
    for kind, least in MIN_RECALL.items():
        if largest["recall"][kind] < least:
            missed.append(f"MISSED: recall of {kind} {largest['recall'][kind]:.3f}, at least {least}")
    a_row = [results["ssd.data.overlap", size, CORES[-1]]["seconds"] / size for size in sizes[-2:]]
    if a_row[-1] > MAX_SLOWDOWN * a_row[0]:
        missed.append(f"MISSED: linear cost, a row takes {a_row[-1] / a_row[0]:.2f} times as long in the largest set")
    if clustering["seconds"] > MAX_CLUSTERING_SECONDS or clustering["gib"] > MAX_CLUSTERING_GIB:
        missed.append(f"MISSED: clustering in {MAX_CLUSTERING_SECONDS} s and {MAX_CLUSTERING_GIB} GiB")
    return missed


def report(tool: str, size: int, cores: int, folder: Path) -> dict:
    command = [sys.executable, "-m", "benchmarks.overlap", "--data", folder, "--measure", tool, str(size), str(cores)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    recall = " / ".join(f"{share:.3f}" for share in result["recall"].values())
    pairs = f"{result['num_pairs']:,}" if tool == "clusters" else "- | -"
    found = f"{recall} | {result['num_others']:,}" if recall else pairs
    print(
        f"| {size:,} | {cores} | {tool} | {result['seconds']:.1f} | {size / result['seconds']:,.0f} | "
        f"{size / result['cpu_seconds']:,.0f} | {result['gib']:.2f} | {found} |",
        flush=True,
    )
    return result


def measured(folder: Path, tool: str, num_rows: int, num_cores: int) -> dict:
    """Seconds, CPU seconds, peak memory of this process in GiB, and the share found of the planted rows, by kind."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:num_cores]))
    train, evaluation = read_rows(folder / "train.parquet", num_rows), read_rows(folder / "evaluation.parquet")
    start, cpu = time.perf_counter(), cpu_seconds()
    flagged, num_pairs = TOOLS[tool](train, evaluation, num_cores)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    by_kind = defaultdict(list)
    for problem in train if flagged is not None else ():
        by_kind[problem.source].append(problem.problem_id in flagged)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "gib": peak_gib(),
        "recall": {kind: float(np.mean(by_kind[kind])) for kind in KINDS if by_kind[kind]},
        "num_others": sum(by_kind["made"]),
        "num_pairs": num_pairs,
    }


def peak_gib() -> float:
    """Peak memory of this process alone; getrusage would count the process that launched it, too."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def with_overlap(train: Sequence[Problem], evaluation: Sequence[Problem], num_cores: int) -> tuple[set[str], int]:
    found = overlap.overlaps(train, evaluation)
    return {pair.left_id for pair in found}, len(found)


def with_clusters(train: Sequence[Problem], evaluation: Sequence[Problem], num_cores: int) -> tuple[None, int]:
    found = overlap.duplicates(train)
    overlap.clusters(train, found)
    return None, len(found)


def tokenise_only(train: Sequence[Problem], evaluation: Sequence[Problem], num_cores: int) -> tuple[None, int]:
    on_cores(lambda part: [len(words(problem)) for problem in part][:0], train, num_cores)
    return None, 0


def with_rensa(train: Sequence[Problem], evaluation: Sequence[Problem], num_cores: int) -> tuple[set[str], int]:
    @functools.cache  # in each process: rensa's threads do not survive a fork
    def index():
        from rensa import RMinHashLSH

        lsh = RMinHashLSH(MINHASH_THRESHOLD, NUM_PERM, NUM_PERM // 4)
        lsh.insert_many(sketches(evaluation))
        return lsh

    def sketches(part: Sequence[Problem]) -> list:
        from rensa import RMinHash

        return RMinHash.from_token_sets([words(problem) for problem in part], NUM_PERM, 0)

    def flagged(part: Sequence[Problem]) -> list[str]:
        found = index().query_all(sketches(part))
        return [problem.problem_id for problem, candidates in zip(part, found) if candidates]

    ids = on_cores(flagged, train, num_cores)
    return set(ids), len(ids)


def with_datasketch(train: Sequence[Problem], evaluation: Sequence[Problem], num_cores: int) -> tuple[set[str], int]:
    from datasketch import MinHash, MinHashLSH

    def sketches(part: Sequence[Problem]) -> list[MinHash]:
        # The interpreter's own hash is faster than the default, SHA-1.
        return MinHash.bulk([words(problem) for problem in part], num_perm=NUM_PERM, hashfunc=hash_32)

    lsh = MinHashLSH(threshold=MINHASH_THRESHOLD, num_perm=NUM_PERM)
    for problem, sketch in zip(evaluation, sketches(evaluation)):
        lsh.insert(problem.problem_id, sketch)

    def flagged(part: Sequence[Problem]) -> list[str]:
        return [problem.problem_id for problem, sketch in zip(part, sketches(part)) if lsh.query(sketch)]

    ids = on_cores(flagged, train, num_cores)
    return set(ids), len(ids)


TOOLS: dict[str, Callable[[Sequence[Problem], Sequence[Problem], int], tuple[set[str] | None, int]]] = {
    "tokenise only": tokenise_only,
    "ssd.data.overlap": with_overlap,
    "rensa": with_rensa,
    "datasketch": with_datasketch,
    "clusters": with_clusters,
}


def words(problem: Problem) -> list[str]:
    return WORD.findall(problem.problem.lower())


def hash_32(word: str) -> int:
    return hash(word) & 0xFFFFFFFF


def on_cores(work: Callable[[Sequence[Problem]], list], problems: Sequence[Problem], num_cores: int) -> list:
    """`work` of all problems, 10,000 at a time; on several cores in forks, which need no copy of the rows."""
    global _work
    _work = lambda start: work(problems[start : start + 10_000])  # noqa: E731
    starts = range(0, len(problems), 10_000 if num_cores == 1 else min(10_000, len(problems) // num_cores))
    if num_cores == 1:
        return [each for start in starts for each in _work(start)]
    with multiprocessing.get_context("fork").Pool(num_cores) as pool:
        return [each for part in pool.imap(_call_work, starts) for each in part]


def _call_work(start: int) -> list:
    return _work(start)


def completeness(folder: Path) -> list[str]:
    """Compare with all pairs of a part of the rows, words taken by regular expressions; returns the targets missed."""
    train, evaluation = read_rows(folder / "train.parquet", NUM_BRUTE_FORCE), read_rows(folder / "evaluation.parquet")
    vocabulary: dict[str, int] = {}
    (left, of_left), (right, of_right) = (by_definition(part, vocabulary) for part in (train, evaluation))
    left.resize(len(train), len(vocabulary))
    right.resize(len(evaluation), len(vocabulary))
    expected, (num_left, num_right) = set(), (np.diff(side.indptr) for side in (left, right))
    for start in range(0, len(train), 1_000):
        num_shared = (left[start : start + 1_000] @ right.T).toarray()
        scores = num_shared / (num_left[start : start + 1_000, None] + num_right - num_shared)
        for i, j in zip(*np.nonzero(scores >= min(overlap.RECALL_FIRST))):
            (answer, numbers), (other_answer, other_numbers) = of_left[start + i], of_right[j]
            same_answer, same_numbers = answer == other_answer, numbers == other_numbers
            least = overlap.RECALL_FIRST.answers if same_answer else 2.0
            if same_numbers:
                least = overlap.RECALL_FIRST.answers_and_numbers if same_answer else overlap.RECALL_FIRST.numbers
            if scores[i, j] >= least:
                expected.add((train[start + i].problem_id, evaluation[j].problem_id))
    found = {(pair.left_id, pair.right_id) for pair in overlap.overlaps(train, evaluation)}
    print(
        f"\nBrute force over {len(train):,} x {len(evaluation):,} pairs: {len(expected):,} reach their threshold, "
        f"{len(expected - found)} of them are not found, {len(found - expected)} others are."
    )
    return [] if found == expected else ["MISSED: the pairs found are those of brute force"]


def by_definition(problems: Sequence[Problem], vocabulary: dict[str, int]) -> tuple[sparse.csr_matrix, list[tuple]]:
    """Distinct words of each problem as a 0/1 matrix, its answer's key and its numbers, one problem at a time."""
    columns, ends, keys = [], [0], []
    for problem in problems:
        found = WORD.findall(normalise_text(problem.problem))
        columns += [vocabulary.setdefault(word, len(vocabulary)) for word in set(found)]
        ends.append(len(columns))
        keys.append((answer_key(problem.answer), Counter(word for word in found if word[0].isdigit())))
    return sparse.csr_matrix((np.ones(len(columns)), columns, ends), (len(problems), len(vocabulary))), keys


def write_rows(data: Path, folder: Path, num_rows: int) -> None:
    """Write the rows to be searched and the evaluation problems, and print what they are like."""
    rng = random.Random(0)
    pool = [problem for name in EVALUATION for problem in sources.load(name, str(data)).problems]
    evaluation = splits.in_hash_order(pool, 0)[:NUM_EVALUATION]
    base = {stem: read_base(data / f"{stem}.jsonl") for stem in SHARES}
    base["hendrycks_math/test"].sort(key=lambda row: len(row[0]))
    base["hendrycks_math/test"] = base["hendrycks_math/test"][len(base["hendrycks_math/test"]) // 2 :]
    words_of = {stem: [word for text, _ in rows for word in text.split(" ")] for stem, rows in base.items()}
    chosen = rng.choices(list(SHARES), list(SHARES.values()), k=num_rows)
    rows = [varied(*rng.choice(base[stem]), words_of[stem], rng) for stem in chosen]
    kinds = ["made"] * num_rows
    for place, kind in zip(rng.sample(range(num_rows), NUM_PLANTED * num_rows // max(SIZES)), KINDS * NUM_PLANTED):
        problem = rng.choice(evaluation)
        rows[place], kinds[place] = planted(kind, problem, words_of["hendrycks_math/train"], rng), kind
    problems = [Problem(str(i), kind, text, answer, "") for i, (kind, (text, answer)) in enumerate(zip(kinds, rows))]
    records.write(folder / "train.parquet", Problem, problems)
    records.write(folder / "evaluation.parquet", Problem, evaluation)
    lengths = np.percentile([len(text) for text, _ in rows], [10, 50, 90])
    print(
        f"{num_rows:,} rows x {len(evaluation):,} evaluation problems; characters a row: 10% below {lengths[0]:.0f}, "
        f"half below {lengths[1]:.0f}, 90% below {lengths[2]:.0f}"
    )


def read_base(path: Path) -> list[tuple[str, str]]:
    """Statement and answer of the rows of a set in JSONL."""
    rows = []
    for line in path.read_bytes().split(b"\n"):
        row = json.loads(line) if line else {}
        if "question" in row:
            rows.append((row["question"], row["answer"].split("####")[-1].strip()))
        elif answer := last_box(row.get("solution", "")):
            rows.append((row["problem"], answer))
    return rows


def varied(text: str, answer: str, others: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Another problem of the same length: other numbers, another answer, three words of ten from elsewhere."""
    parts = text.split(" ")
    for place in rng.sample(range(len(parts)), int(0.3 * len(parts))):
        parts[place] = rng.choice(others)
    return other_digits(" ".join(parts), rng), other_digits(answer, rng)


def other_digits(text: str, rng: random.Random) -> str:
    return re.sub(r"\d+", lambda match: str(rng.randrange(10 ** (len(match[0]) - 1), 10 ** len(match[0]))), text)


def planted(kind: str, problem: Problem, others: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Statement and answer of a copy of an evaluation problem."""
    text, answer = problem.problem, problem.answer
    if kind == "re-typed":
        text = re.sub(r"\$([^$]*)\$", r"\\( \1 \\)", text).replace("\\frac", "\\dfrac").replace("  ", " ")
        text = re.sub(r"(?<!\d)(\d{1,3})(\d{3})(?!\d)", r"\1{,}\2", text).replace(" three ", " 3 ").swapcase()
        text = re.sub(r"\\[A-Za-z]+", lambda match: match[0].lower(), text)
        answer = f"${answer}$".replace("\\frac", "\\dfrac")
    elif kind == "rephrased":
        parts = text.split(" ")
        places = [i for i, part in enumerate(parts) if part.isalpha()]
        for place in rng.sample(places, len(places) // 4):
            parts[place] = rng.choice(others)
        text = " ".join(parts)
    elif kind == "other question":
        sentences = re.split(r"(?<=[.?]) ", text)
        text = " ".join([*sentences[:-1], "What can be said of the remaining quantity?"])
        answer = other_digits(answer, rng) + "7"
    return text, answer


def read_rows(path: Path, num_rows: int | None = None) -> list[Problem]:
    """The first rows of a Parquet file, without holding it twice."""
    problems: list[Problem] = []
    for batch in pq.ParquetFile(path).iter_batches(10_000):
        problems += [Problem(**row) for row in batch.to_pylist()]
        if num_rows is not None and len(problems) >= num_rows:
            break
    return problems[:num_rows]


if __name__ == "__main__":
    sys.exit(main())

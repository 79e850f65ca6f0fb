"""Memory and time of a step's own bookkeeping as samples and trials grow.

Run: python -m benchmarks.growth [--samples 100000 1000000] [--trials 100 400 1000]

A sample has 300 tokens, a prompt of 80 and 1,000 characters; an engine that costs nearly nothing draws 16 a problem, in
an order of its own. `sample` and `evaluate` are what these steps do with them: which are missing, shards, health,
digest, grades, estimates and their logging to a local MLflow; `again` reads the stored file and grades it again. Each
row is a process of its own; its peak memory is all that it held, torch and MLflow too. The measuring of a trial costs
nothing here, and its time is not counted, so that what is left is the search's own. Beside it is Optuna alone, with
random settings in the same file. Processor time is printed too, since a busy machine makes the time alone grow.
"""

import argparse
import contextlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import steps  # noqa: F401, which sets how threads wait, before numpy is loaded

MOST_GIB = 4.0
LEAST_MB_PER_SECOND = 100.0  # of a digest
MOST_GROWTH = 1.5  # of the time a sample, or a trial, from the fewest to the most
MOST_SEARCH_S = 30.0
NUM_SAMPLES_A_PROBLEM, NUM_TOKENS, NUM_PROMPT_TOKENS, NUM_CHARS = 16, 300, 80, 1000
STAGES = ("draw", "sample", "evaluate", "again")
SIZES = [63, 125, 250, 500]


class _Engine:
    """Draws nothing: every sample is a piece of one long text, with an answer behind it."""

    num_gpus = 0.0

    def generate(self, requests):
        from ssd.records import Sample

        rng = random.Random(0)
        tokens = [rng.randrange(150_000) for _ in range(100_000)]
        text = "".join(rng.choices("abcdefgh xyz+-=\\\n", k=100_000))
        for request in rng.sample(requests, len(requests)):
            at = rng.randrange(90_000)
            yield Sample(
                request.problem_id, request.sample_index, list(request.prompt_token_ids), tokens[at : at + NUM_TOKENS],
                text[at : at + NUM_CHARS] + f"</think> \\boxed{{{at % 9}}}", "stop", -1.0,
            )  # fmt: skip


def samples(num_samples: int) -> dict[str, float]:
    """What the steps sample and evaluate take for so many samples."""
    import mlflow

    from ssd import evaluation, records, sampling, tracking
    from ssd.decoding import Decoding
    from ssd.engines.request import requests_for
    from ssd.grading import grader
    from ssd.records import Problem
    from ssd.samples import load_samples
    from steps import sample

    took: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(name: str):
        began, began_cpu = time.monotonic(), time.process_time()
        yield
        took[name], took[f"{name} cpu"] = time.monotonic() - began, time.process_time() - began_cpu

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "work")
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.set_experiment(experiment_id=mlflow.create_experiment("growth", f"file://{folder}/artifacts"))
        ids = [f"problem-{number:08d}" for number in range(num_samples // NUM_SAMPLES_A_PROBLEM)]
        problems = [Problem(problem_id, "made", f"What is {problem_id}?", "4", "1") for problem_id in ids]
        records.write(Path(folder, "train.parquet"), Problem, problems)
        prompts = [[number % 1000] * NUM_PROMPT_TOKENS for number in range(len(ids))]
        manifest = {"model": "m", "prompt": "p", "thinks": True, "engine": "none", "seed": 0, "n": 16}
        manifest |= {"decoding": {"max_tokens": 1024}}
        args = argparse.Namespace(
            arm="ssd", n=NUM_SAMPLES_A_PROBLEM, max_tokens=1024, temperature=1.0, top_k=0, top_p=1.0,
            model="m", problems=f"{folder}/train.parquet",
        )  # fmt: skip
        with mlflow.start_run() as run:
            step = tracking.Step("sample", args, run.info.run_id, "key", work)
            with timed("draw"):
                requests = requests_for(problems, prompts, Decoding(max_tokens=1024), NUM_SAMPLES_A_PROBLEM, 0)
                waiting = sampling.pending(work / "samples", requests, manifest)
                drawn = sampling.sample(_Engine(), waiting, work / "samples")
            with timed("sample"):
                generated = sampling.completed(work / "samples", requests)._replace(drawn=drawn)
                with mock.patch.object(evaluation, "generate", lambda *_: (problems, {"samples": generated})):
                    sample.sample(step)
            with timed("digest"):
                generated.rows.digest()
            took["megabytes"] = sum(table.nbytes for table in generated.rows.tables()) / 1e6
            with timed("evaluate"):
                evaluation.log(step, "base", problems, generated)
            with timed("again"):
                grader.grade_answers(evaluation.answered(load_samples(work / run.info.run_id / "samples")), problems)
    return took


def trials(num_trials: int) -> dict[str, float]:
    """What a search of so many trials takes of its own."""
    import numpy as np
    import optuna
    from optuna.distributions import FloatDistribution

    from ssd import search

    space = search.Space({name: FloatDistribution(0.0, 1.0) for name in ("x", "y", "z")}, [])
    measuring = SimpleNamespace(s=0.0)

    def attempt(folder: str, params: dict[str, float], best_PS) -> search.Attempt:
        began = time.monotonic()
        chance = 0.8 - 5 * min(0.1, (params["x"] - 0.7) ** 2)
        correct_PS = (np.random.default_rng(int(folder)).random((SIZES[-1], 1)) < chance).astype(float)
        raced_PS = search.race(lambda size: correct_PS[:size], best_PS, SIZES, search.ALPHA)
        measuring.s += time.monotonic() - began
        return search.Attempt(raced_PS, 1)

    with tempfile.TemporaryDirectory() as folder:
        study = search.open_study(search.open_local(Path(folder, "study.db")), "study", space, seed=0)
        began, began_cpu = time.monotonic(), time.process_time()
        search.choose(search.run(study, space, num_trials, attempt), space)
        took = {"search": time.monotonic() - began - measuring.s, "search cpu": time.process_time() - began_cpu}
        plain = optuna.create_study(storage=study._storage, sampler=optuna.samplers.RandomSampler(seed=0))
        began = time.monotonic()
        for _ in range(num_trials):
            trial = plain.ask(space.settings)
            trial.set_user_attr("right", "1 " * SIZES[0])
            plain.tell(trial, 0.5)
        return took | {"optuna": time.monotonic() - began}


def measure(what: str, number: int) -> dict[str, float]:
    """`samples` or `trials` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.growth", "--child", what, str(number)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--trials", type=int, nargs="*", default=[100, 400, 1000])
    parser.add_argument("--child", nargs=2, help="what one process measures, for this script itself")
    arguments = parser.parse_args()
    if arguments.child:
        what, number = arguments.child
        took = {"samples": samples, "trials": trials}[what](int(number))
        print("\n" + json.dumps(took | {"gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
        return 0
    met = {}
    if arguments.samples:
        print("| samples | draw s (cpu) | sample s (cpu) | evaluate s (cpu) | again s (cpu) | digest MB/s | peak GiB |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        rows = {}
        for number in arguments.samples:
            row = rows[number] = measure("samples", number)
            times = " | ".join(f"{row[name]:.1f} ({row[f'{name} cpu']:.1f})" for name in STAGES)
            print(f"| {number:,} | {times} | {row['megabytes'] / row['digest']:.0f} | {row['gib']:.2f} |", flush=True)
        met[f"at most {MOST_GIB:g} GiB"] = all(row["gib"] <= MOST_GIB for row in rows.values())
        is_fast = all(row["megabytes"] / row["digest"] >= LEAST_MB_PER_SECOND for row in rows.values())
        met[f"digests of {LEAST_MB_PER_SECOND:g} MB/s or more"] = is_fast
        a_sample = [sum(row[f"{name} cpu"] for name in STAGES) / number for number, row in rows.items()]
        met[f"processor time a sample grows {MOST_GROWTH:g}-fold at most"] = a_sample[-1] <= MOST_GROWTH * a_sample[0]
    if arguments.trials:
        print("\n| trials | search's own s (cpu) | a trial, cpu ms | Optuna alone, s |")
        print("| ---: | ---: | ---: | ---: |", flush=True)
        rows = {}
        for number in arguments.trials:
            row = rows[number] = measure("trials", number)
            a_trial = 1000 * row["search cpu"] / number
            times = f"{row['search']:.1f} ({row['search cpu']:.1f}) | {a_trial:.1f} | {row['optuna']:.1f}"
            print(f"| {number:,} | {times} |", flush=True)
        met[f"{number:,} trials within {MOST_SEARCH_S:g} s"] = rows[number]["search"] <= MOST_SEARCH_S
    print("\n" + "; ".join(f"{target}: {'met' if is_met else 'NOT met'}" for target, is_met in met.items()))
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Seconds a step of the lab's work on a busy machine, by what it takes alone: training, sampling, searching.

Run: python -m benchmarks.busy [--repeats 3] [--steps 30]
     python -m benchmarks.busy --main [--busy 1]: instead, minutes of the whole lab, `main`, alone and busy.

A busy process is a Python loop that never waits. Each measurement is a process of its own, begun as a step begins, and
gives the median of its steps after the first three. Alone and busy take turns. Of the repeats the minimum counts, alone
and busy alike, since a machine that does other work, too, only makes them longer. `spinning` is what OpenMP and
OpenBLAS do by default: it is measured once, beside one busy process, and has no target.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import steps  # noqa: F401, which sets how threads wait, before torch is loaded

MOST_RATIO = 2.5
SPINNING = {"OMP_WAIT_POLICY": "ACTIVE", "OPENBLAS_NUM_THREADS": str(os.cpu_count())}
NUM_FIRST = 3  # steps that are not counted
CONDITIONS = {
    "alone": (0, {}),
    "1 busy": (1, {}),
    "2 busy": (2, {}),
    "spinning, 1 busy": (1, SPINNING),
}


class _Enough(Exception):
    """Ends a training after the steps that are measured."""


class _Times:
    """When each step ended."""

    def __init__(self, num_steps: int):
        self.num_steps, self.ended = num_steps, [time.perf_counter()]

    def __call__(self, *_) -> None:
        self.ended.append(time.perf_counter())
        if len(self.ended) > self.num_steps:
            raise _Enough

    def median(self) -> float:
        return statistics.median(
            after - before for before, after in zip(self.ended[NUM_FIRST:], self.ended[NUM_FIRST + 1 :])
        )


def training(num_steps: int, folder: Path) -> float:
    """The step `lab`: its model from scratch."""
    from ssd.lab import model

    times = _Times(num_steps)
    with contextlib.suppress(_Enough):
        model.train(folder / "model", num_steps=500, on_step=times)
    return times.median()


def fine_tuning(num_steps: int, folder: Path) -> float:
    """The step `train`, as the preset `lab` has it."""
    import datasets
    import numpy as np

    from ssd.lab import model
    from ssd.training import sft

    model.train(folder / "model", num_steps=1)
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 20, rng.integers(30, 80)).tolist() for _ in range(128 * num_steps)]
    rows = {"input_ids": ids, "completion_mask": [[0] * 20 + [1] * (len(row) - 20) for row in ids]}
    rows["problem_id"] = [str(number) for number in range(len(ids))]
    times = _Times(num_steps)
    with contextlib.suppress(_Enough):
        sft.train(
            str(folder / "model"), datasets.Dataset.from_dict(rows), folder / "work", lr=1e-4, epochs=1.0,
            global_batch_size=128, max_length=256, lora_rank=0, save_steps=10**6, seed=0, on_log=times,
        )  # fmt: skip
    return times.median()


def sampling(num_steps: int, folder: Path) -> float:
    """The engine of the steps that sample: a step is a batch of 64 samples."""
    from ssd import sampling
    from ssd.decoding import Decoding
    from ssd.engines.opening import open_engine
    from ssd.lab import model, world

    model.train(folder / "model", num_steps=1)
    problems = world.problems(64, 0)
    sampler = sampling.Sampler(str(folder / "model"), "transformers", "benchmark")
    requests = sampler.requests(problems, Decoding(max_tokens=48), 1, 0)
    engine = open_engine("transformers", str(folder / "model"), requests)
    times = _Times(num_steps)
    with contextlib.suppress(_Enough):
        while True:
            list(engine.generate(requests))
            times()
    return times.median()


def searching(num_steps: int, folder: Path) -> float:
    """The sampler of the step `search`: a step is a surface through 128 trials."""
    import numpy as np

    from ssd.stats import surface

    rng = np.random.default_rng(0)
    x_TD, y_T = rng.random((128, 3)), rng.normal(0.6, 0.05, 128)
    times = _Times(num_steps)
    with contextlib.suppress(_Enough):
        while True:
            surface.fit(x_TD, y_T, np.full(128, 1e-3))
            times()
    return times.median()


KINDS = {"training": training, "fine-tuning": fine_tuning, "sampling": sampling, "searching": searching}


@contextlib.contextmanager
def busy(num_processes: int) -> Iterator[None]:
    """So many processes that never wait."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(kind: str, num_steps: int, condition: str) -> float:
    num_processes, variables = CONDITIONS[condition]
    environment = {name: value for name, value in os.environ.items() if name not in SPINNING} | variables
    command = [sys.executable, "-m", "benchmarks.busy", "--child", kind, "--steps", str(num_steps)]
    with busy(num_processes):
        ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def whole(num_processes: int) -> float:
    """Minutes of `main` in a store of its own."""
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        mlflow.MlflowClient(uri).create_experiment("busy", artifact_location=f"{folder}/artifacts")
        environment = {name: value for name, value in os.environ.items() if name not in SPINNING}
        environment |= {"MLFLOW_TRACKING_URI": uri, "SSD_WORK_DIR": f"{folder}/work"}
        command = [sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local", "--experiment-name", "busy"]
        with busy(num_processes):
            began = time.monotonic()
            subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
            return (time.monotonic() - began) / 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--main", action="store_true")
    parser.add_argument("--busy", type=int, default=1, help="busy processes beside main")
    parser.add_argument("--child", choices=KINDS, help="what one process measures, for this script itself")
    arguments = parser.parse_args()
    if arguments.child:
        with tempfile.TemporaryDirectory() as folder:
            print("\n" + json.dumps(KINDS[arguments.child](arguments.steps, Path(folder))))
        return 0
    if arguments.main:
        alone, beside = whole(0), whole(arguments.busy)
        print(f"| | alone, min | {arguments.busy} busy, min | ratio |\n| --- | ---: | ---: | ---: |")
        print(f"| main | {alone:.1f} | {beside:.1f} | {beside / alone:.2f} |")
        return _end(beside / alone)
    print(f"{os.cpu_count()} cores; seconds a step, minimum (median) of {arguments.repeats}; ratio of the minima\n")
    print(f"| | {' | '.join(CONDITIONS)} |\n|{' --- |' * (len(CONDITIONS) + 1)}", flush=True)
    worst = 0.0
    for kind in KINDS:
        took: dict[str, list[float]] = {condition: [] for condition in CONDITIONS}
        for repeat in range(arguments.repeats):
            for condition, (_, variables) in CONDITIONS.items():
                if not (variables and repeat):
                    took[condition].append(measure(kind, arguments.steps, condition))
        ratios = {condition: min(seconds) / min(took["alone"]) for condition, seconds in took.items()}
        cells = [f"{min(s):.3f} ({statistics.median(s):.3f}), {ratios[condition]:.1f}" for condition, s in took.items()]
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)
        worst = max(worst, *(ratio for condition, ratio in ratios.items() if not CONDITIONS[condition][1]))
    return _end(worst)


def _end(worst: float) -> int:
    is_met = worst <= MOST_RATIO
    print(f"\nat most {MOST_RATIO:g} times slower than alone, {worst:.2f} here: {'met' if is_met else 'NOT met'}")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())

"""Measure the base model at its recommended decoding, several samples a problem, so that its variance can be split.

Reads:  model, problems (latest: prepare/val.parquet).
Writes: samples/, grades.parquet, correctness.parquet, estimates.json; pass@1 with its interval, health rates.
Run:    mlflow run . -e baseline
"""

from ssd import evaluation, tracking


def baseline(step: tracking.Step) -> None:
    decoding = evaluation.decoding(step.args)
    problems, generated = evaluation.generate(step, {"samples": decoding})
    evaluation.log(step, "base", problems, generated["samples"])


if __name__ == "__main__":
    tracking.execute("baseline", baseline, model="lab/model", problems="prepare/val.parquet")

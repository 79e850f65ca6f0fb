"""Sample the frozen model on the training prompts, at the arm's temperature and truncation.

Reads:  model, problems (latest: prepare/train.parquet).
Writes: samples/ (token ids, text, finish reason, log-probability) with the manifest of what made them; health rates
        with intervals, tokens a sample and a second, GPU hours.
Run:    mlflow run . -e sample
"""

import mlflow
import numpy as np

from ssd import evaluation, tracking
from ssd.markdown import escaped
from ssd.report.text import percent
from ssd.samples import Generated
from ssd.stats import estimate


def sample(step: tracking.Step) -> None:
    args = step.args
    decoding = evaluation.decoding(args)
    problems, generated = evaluation.generate(step, {"samples": decoding})
    samples, thinks = generated["samples"].rows, generated["samples"].manifest["thinks"]
    mlflow.log_artifacts(str(step.work / "samples"), "samples")
    tracking.log_dataset(f"samples of {args.arm}", samples, "train", f"runs:/{step.run_id}/samples")
    num_tokens = int(samples.num_tokens_S.sum())
    rates = {name: estimate.mean(yes_PS) for name, yes_PS in _outcomes(generated["samples"], args.n).items()}
    bounds = {"": "value", "_ci_low": "ci_low", "_ci_high": "ci_high"}
    mlflow.log_metrics(
        {"num_samples": len(samples), "num_tokens": num_tokens, "tokens_per_sample": num_tokens / len(samples)}
        | {name + suffix: getattr(rate, part) for name, rate in rates.items() for suffix, part in bounds.items()}
    )
    evaluation.log_generation(step, generated["samples"])
    step.describe(
        f"sample · {args.arm} · {decoding}",
        f"{len(samples):,} samples of {len(problems):,} problems at {escaped(decoding)}: "
        f"{num_tokens / len(samples):,.1f} tokens a sample, {percent(rates['length_stop_rate'])} cut off at "
        f"{args.max_tokens:,}, {percent(rates['boxed_answer_rate'])} with a boxed answer"
        + (f", {percent(rates['think_close_rate'])} end their thinking" if thinks else "")
        + ".",
        arm=args.arm,
    )


def _outcomes(generated: Generated, n: int) -> dict[str, np.ndarray]:
    """Health by sample, 0 or 1, shape (problems, n): cut off at the cap, ended thinking, boxed an answer."""
    rows = generated.rows
    is_boxed_S = np.array([sample.answer is not None for sample in evaluation.answered(generated)])
    of_samples = {
        "length_stop_rate": rows.is_cut_off_S,
        "think_close_rate": rows.closes_S,
        "boxed_answer_rate": is_boxed_S & ~rows.is_cut_off_S,
    }
    return {name: yes_S.astype(float).reshape(-1, n) for name, yes_S in of_samples.items()}


if __name__ == "__main__":
    tracking.execute("sample", sample, model="lab/model", problems="prepare/train.parquet")

"""Fine-tune the model on its own samples with plain cross-entropy; no answer is looked at.

Reads:  model, samples (latest: sample/samples).
Writes: checkpoints/step-N/, model/ (the last one), each a LoggedModel with its step; sft_config.json; by step the
        loss, entropy, the signal and noise of the gradient, how far the weights moved; a figure of these.
Run:    mlflow run . -e train
"""

import time
from pathlib import Path

import mlflow

from ssd import records, tracking
from ssd.records import Sample
from ssd.report import figures


def train(step: tracking.Step) -> None:
    # TRL takes seconds to load; a run that is reused does without.
    from ssd import driver
    from ssd.training import noise
    from ssd.training.rows import rows
    from ssd.training.sft import train as fine_tune

    args = step.args
    driver.check()
    samples = sorted(records.read(step.path("samples"), Sample), key=lambda row: (row.problem_id, row.sample_index))
    _check_tokenizer(str(step.path("model")), samples)
    training = rows(samples, args.max_length, args.completions)
    arm = tracking.tag_of(args.samples, "arm", "ssd")
    mlflow.log_metrics(
        {
            "num_rows": len(training.dataset),
            "num_stubs": training.num_stubs,
            "num_unfinished": training.num_unfinished,
            "num_too_long": training.num_too_long,
        }
    )
    history: dict[int, dict[str, float]] = {}
    logged_at: dict[int, int] = {}  # milliseconds

    def on_log(number: int, metrics: dict[str, float]) -> None:
        history[number] = history.get(number, {}) | metrics
        logged_at.setdefault(number, time.time_ns() // 1_000_000)
        mlflow.log_metrics(metrics, step=number, timestamp=logged_at[number])

    def log_checkpoint(folder: Path, artifact: str, number: int) -> None:
        model_id = step.log_checkpoint(folder, artifact, number)
        # At the same time again, so that the run has each point once, and the model has it too.
        mlflow.log_metrics(history[number], step=number, timestamp=logged_at[number], model_id=model_id)

    checkpoints = fine_tune(
        str(step.path("model")),
        training.dataset,
        step.work,
        lr=args.lr,
        epochs=args.epochs,
        global_batch_size=args.global_batch_size,
        max_length=args.max_length,
        lora_rank=args.lora_rank,
        save_steps=args.save_steps,
        seed=args.seed,
        on_log=on_log,
    )
    mlflow.log_artifact(str(step.work / "sft_config.json"))
    for number, folder in checkpoints[:-1]:
        log_checkpoint(folder, f"checkpoints/step-{number:06d}", number)
    mlflow.log_figure(figures.training(history, args.global_batch_size), "figures/training.png")
    warnings = noise.warnings(list(history.values()))
    if args.completions == "finished":
        warnings.append("Only finished completions were trained on: problems that the model can do are favoured.")
    last, folder = checkpoints[-1]
    log_checkpoint(folder, "model", last)
    step.describe(
        f"train · {arm} · lr {args.lr:g}",
        f"{last} steps of {args.global_batch_size} on {len(training.dataset):,} samples "
        f"({training.num_stubs} stubs, {training.num_unfinished} unfinished and {training.num_too_long} too long "
        f"{'cut' if args.completions == 'cut' else 'left out'}), "
        f"{'all weights' if not args.lora_rank else f'LoRA of rank {args.lora_rank}'}, {len(checkpoints)} checkpoints. "
        f"Evaluate it with `-e evaluate -P model=runs:/{step.run_id}/model`."
        + "".join(f"\n\n**Warning:** {warning}" for warning in warnings),
        arm=arm,
    )


def _check_tokenizer(model: str, samples: list[Sample]) -> None:
    """Token ids mean nothing to another tokenizer than the one that sampled them."""
    from ssd import models

    tokenizer = models.load_tokenizer(model)
    for sample in samples[:: max(1, len(samples) // 20)]:
        # Engines may differ in the last characters of a completion that was cut off.
        if tokenizer.decode(sample.token_ids, skip_special_tokens=True)[:100] != sample.text[:100]:
            raise ValueError(
                f"the tokenizer of {model} reads the tokens of problem {sample.problem_id}, sample "
                f"{sample.sample_index}, as another text than was sampled; train the model that the samples are from"
            )


if __name__ == "__main__":
    tracking.execute("train", train, model="lab/model", samples="sample/samples")

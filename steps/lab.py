"""Train the lab's base model, whose world has a known answer, from scratch on this machine.

Reads:  nothing.
Writes: model/ (safetensors and tokenizer), a LoggedModel, the loss.
Run:    mlflow run . -e lab
"""

import mlflow

from ssd import tracking
from ssd.lab import model


def lab(step: tracking.Step) -> None:
    folder = step.work / "model"
    model.train(
        folder,
        seed=step.args.seed,
        num_steps=step.args.num_steps,
        on_step=lambda number, loss: mlflow.log_metric("loss", loss, step=number),
    )
    tracking.log_checkpoint(step, folder, "model", step.args.num_steps)
    step.describe(
        f"lab model, seed {step.args.seed}",
        f"A small Qwen3 trained for {step.args.num_steps} steps on generated problems and worked solutions. "
        f"Use it as `-P model=runs:/{step.run_id}/model`.",
    )


if __name__ == "__main__":
    tracking.execute("lab", lab)

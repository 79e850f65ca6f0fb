"""Train a lab's base model, whose world has a known answer, from scratch on this machine.

Reads:  nothing.
Writes: model/ (safetensors and tokenizer), a LoggedModel, the loss.
Run:    mlflow run . -e lab
"""

import mlflow

from ssd import driver, tracking
from ssd.lab import model
from ssd.lab.world import WORLDS

MAX_LOGGED = 500


def lab(step: tracking.Step) -> None:
    args, folder = step.args, step.work / "model"
    if args.world not in WORLDS:
        raise ValueError(f"world={args.world!r} is not one of {', '.join(WORLDS)}")
    driver.check()
    every = -(-args.num_steps // MAX_LOGGED)

    def on_step(number: int, loss: float) -> None:
        if number % every == 0:
            mlflow.log_metric("loss", loss, step=number)

    model.train(folder, seed=args.seed, num_steps=args.num_steps, on_step=on_step, of=WORLDS[args.world])
    step.log_checkpoint(folder, "model", args.num_steps)
    step.describe(
        f"{args.world} model, seed {args.seed}",
        f"A small {model.RECIPES[args.world].architecture.__name__} trained for {args.num_steps} steps on generated "
        f"problems and worked solutions. Use it as `-P model=runs:/{step.run_id}/model`.",
    )


if __name__ == "__main__":
    tracking.execute("lab", lab)

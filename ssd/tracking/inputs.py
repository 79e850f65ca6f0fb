"""Inputs of a step: what `latest` means, and the model that all of them go back to."""

import argparse
from collections.abc import Callable, Mapping

import mlflow

from ssd import parameters
from ssd.parameters import LATEST
from ssd.tracking import reuse
from ssd.tracking.runs import finished_runs, run_of


def resolve(parameter: str, upstream: str | Callable[[argparse.Namespace], str], args: argparse.Namespace) -> str:
    """What the input `parameter` stands for, logged as `input.PARAMETER` of the run where it is not as given."""
    value = getattr(args, parameter)
    if callable(upstream):
        if value == LATEST:
            value = upstream(args)
            mlflow.log_param(f"input.{parameter}", value)
            print(f"{parameter}={LATEST}: {value}", flush=True)
        return value
    samples = getattr(args, "samples", "none")
    if value == "lab" and parameter in ("model", "base"):
        upstream = "lab/model"
    elif value != LATEST:
        return value
    elif parameter != "samples" and not hasattr(args, "base") and samples not in ("none", LATEST):
        # What those samples were made of; a step with a base reads them with other models too.
        if not samples.startswith("runs:/"):
            raise ValueError(f"samples={samples} does not say what it was made of; give {parameter}")
        made_of = run_of(samples).data.params
        resolved = made_of.get(f"input.{parameter}", made_of[parameter])
        mlflow.log_param(f"input.{parameter}", resolved)
        return resolved
    entry_point, _, artifact = upstream.partition("/")
    upstream_runs = finished_runs(entry_point) if value == LATEST else []
    # A control is never meant, unless the step's own arm is one or the parameter says so.
    own = "control" if parameter == "control" else getattr(args, "arm", "ssd")
    upstream_runs = [run for run in upstream_runs if (run.data.tags.get("arm", own) == "control") == (own == "control")]
    if parameter == "control" and not upstream_runs:
        raise ValueError(
            f"control={value}: no finished {entry_point} of arm control; give runs:/ID/{artifact}, or none"
        )
    shared = {"seed": args.seed} if hasattr(args, "seed") and "seed" in parameters.defaults(entry_point) else {}
    run_id = upstream_runs[0].info.run_id if upstream_runs else reuse.launch(entry_point, args.preset, shared)
    resolved = f"runs:/{run_id}/{artifact}"
    mlflow.log_param(f"input.{parameter}", resolved)
    print(f"{parameter}={value}: {resolved}", flush=True)
    return resolved


def trace_base_model(args: argparse.Namespace, inputs: Mapping[str, str]) -> str:
    """The model that the lineage of every input began with; two of them are refused."""
    found: dict[str, str] = {}
    beginning = "base" if hasattr(args, "base") else "model"  # what needs no lineage, as it may begin one
    named = [(parameter, value) for parameter in inputs for value in getattr(args, parameter).split(",")]
    for parameter, value in named:
        tags = run_of(value).data.tags if value.startswith("runs:/") else {}
        if tags.get("step") == "lab" or (parameter == beginning and "ssd.base_model" not in tags):
            found.setdefault(value, f"{parameter}={value}")
        elif tags.get("ssd.base_model"):
            found.setdefault(tags["ssd.base_model"], f"{parameter}={value}")
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise ValueError(
            f"two models would be mixed: {first} goes back to {one}, {second} to {other}; name the runs "
            "(runs:/ID/artifact) of one model, or keep each model in an experiment of its own (--experiment-name)"
        )
    return next(iter(found), "")

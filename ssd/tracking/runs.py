"""What earlier runs left: their tags, metrics and artifacts, and the runs that they were made from."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.compute as pc
import pyarrow.parquet as pq
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking.artifact_utils import get_artifact_uri

from ssd.tracking import store
from ssd.verdict.evidence import Overlap, StepRun

CHECKPOINT = "ssd.step."  # tags of a run that trains: an artifact, its training step


def local_path(uri: str) -> str:
    """Local path of `uri`: `runs:/ID/path` and `models:/...` are downloaded where remote; anything else is itself."""
    if not uri.startswith(("runs:/", "models:/")):
        return uri
    try:
        return store.patiently(lambda: _downloaded(uri))
    except store.TRACKING_ERRORS as error:
        line = " ".join(str(error).split())
        if store.broke_off(error):
            raise ValueError(
                f"{uri} cannot be read from the tracking store {mlflow.get_tracking_uri()}, whose answers break off "
                f"({line}); see its log and give the same command again"
            ) from error
        raise ValueError(f"{uri}: no such artifact ({line}); look up the run's id in the UI") from error


def _downloaded(uri: str) -> str:
    if uri.startswith("runs:/"):
        run_id, _, artifact = uri.removeprefix("runs:/").partition("/")
        try:
            return mlflow.artifacts.download_artifacts(get_artifact_uri(run_id, artifact))
        except store.TRACKING_ERRORS as error:  # of a runs:/ URI, which a model may hold too, MLflow hides it
            if store.broke_off(error):
                raise
    return mlflow.artifacts.download_artifacts(uri)


def read_json(uri: str) -> Any:
    """Content of the JSON file at `uri`."""
    try:
        return json.loads(Path(local_path(uri)).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{uri} is not JSON ({error}); it is damaged: give the command that wrote it again") from error


def run_of(uri: str) -> Run:
    """The run that `uri` (`runs:/ID/path`) points into; ValueError where there is none."""
    if not uri.startswith("runs:/"):
        raise ValueError(f"{uri} is no artifact of a run; give runs:/ID/path")
    try:
        return store.patiently(lambda: mlflow.get_run(uri.split("/")[1]))
    except MlflowException as error:
        raise ValueError(f"{uri}: {store.first_line(error)}; look up the run's id in the UI") from error


def tag_of(uri: str, tag: str, default: str) -> str:
    """Tag of the run that `uri` (`runs:/ID/path`) points into; `default` for any other uri or without the tag."""
    return run_of(uri).data.tags.get(tag, default) if uri.startswith("runs:/") else default


def metric_of(uri: str, metric: str) -> float:
    """Metric of the run that `uri` (`runs:/ID/path`) points into; NaN for any other uri or without the metric."""
    return run_of(uri).data.metrics.get(metric, math.nan) if uri.startswith("runs:/") else math.nan


def finished_runs(entry_point: str, with_tag: str = "ssd.key") -> list[Run]:
    """Finished runs of `entry_point` in the active experiment, newest first, by default those that did their work."""
    return search(f"tags.step = '{entry_point}' and tags.`{with_tag}` LIKE '%' and attributes.status = 'FINISHED'")


def search(query: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    """Runs of the active experiment that match `query`, newest first."""
    experiments = [mlflow.active_run().info.experiment_id]
    order = {"order_by": ["start_time DESC"], "output_format": "list"}
    return store.patiently(lambda: mlflow.search_runs(experiments, query, view, **order))


def step_run(run: Run) -> StepRun:
    """`run` as a record."""
    params = {name: value for name, value in run.data.params.items() if not name.startswith("input.")}
    params |= {n.removeprefix("input."): v for n, v in run.data.params.items() if n.startswith("input.")}
    datasets = {}
    for row in run.inputs.dataset_inputs:
        context = next((tag.value for tag in row.tags if tag.key == "mlflow.data.context"), "")
        datasets[f"{context} {row.dataset.name}"] = row.dataset.digest
    tags, info = run.data.tags, run.info
    hours = (info.end_time - info.start_time) / 3.6e6 if info.end_time else math.nan
    return StepRun(
        tags.get("step", ""), tags.get("arm", ""), info.run_id, info.experiment_id, info.run_name, params,
        dict(run.data.metrics), datasets, tags.get("ssd.code", ""), info.start_time, hours,
    )  # fmt: skip


def lineage(uri: str) -> list[StepRun]:
    """The run that `uri` (`runs:/ID/path`) points into and every run that it was made from, downstream first."""
    found, waiting = {}, [uri]
    while waiting:
        run_id = waiting.pop(0).removeprefix("runs:/").split("/")[0]
        if run_id not in found:
            found[run_id] = step_run(run_of(f"runs:/{run_id}"))
            waiting += [each for value in found[run_id].params.values() for each in re.findall(r"runs:/\w+", value)]
    return list(found.values())


def parent(uri: str) -> Run | None:
    """The run that launched the one that `uri` (`runs:/ID/path`) points into."""
    run_id = run_of(uri).data.tags.get("mlflow.parentRunId")
    return run_of(f"runs:/{run_id}") if run_id else None


def reads(problems: str) -> set[str]:
    """The arms of every comparison in the active experiment that has read the set of digest `problems`.

    Deleted runs are among them: what was seen stays seen.
    """
    query = f"tags.step = 'compare' and tags.`ssd.problems` = '{problems}'"
    return {run.data.tags["ssd.arms"] for run in search(query, ViewType.ALL)}


def checkpoints(run: Run) -> dict[int, str]:
    """URIs of the checkpoints that `run` logged, by training step."""
    found = {
        int(number): f"runs:/{run.info.run_id}/{tag.removeprefix(CHECKPOINT)}"
        for tag, number in run.data.tags.items()
        if tag.startswith(CHECKPOINT)
    }
    return dict(sorted(found.items()))


def overlap(prepared: StepRun) -> Overlap:
    """What the run of `prepare` kept, and what it took out because it repeats something."""
    removals = local_path(f"runs:/{prepared.run_id}/removals.parquet")
    pairs = pq.read_table(removals, filters=pc.field("right_id").is_valid())  # the others were dropped before
    rules = Counter(row["rule"] if row["removed"] else "suspected, but kept" for row in pairs.to_pylist())
    sizes = {name: int(prepared.metrics.get(f"num_{name}", 0)) for name in ("train", "val", "quick", "final")}
    return Overlap(sizes, int(prepared.metrics["num_removed"]), dict(rules.most_common()))

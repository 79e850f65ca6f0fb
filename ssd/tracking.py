"""What takes more than one MLflow call: start a step, find or launch the runs it needs, log tables and datasets.

`execute` joins or opens the run, resolves the inputs, and calls the step. A run whose entry point, parameters, inputs
and code version match a finished run is not done again.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import mlflow
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import requests
import sqlalchemy.exc
from mlflow.data.pandas_dataset import PandasDataset
from mlflow.entities import Run, ViewType
from mlflow.exceptions import ExecutionException, MlflowException
from mlflow.tracking._tracking_service.utils import _get_sqlalchemy_store
from mlflow.tracking.artifact_utils import get_artifact_uri

from ssd import adapters, engines, parameters, processes, records
from ssd.evidence import Overlap, StepRun
from ssd.markdown import escaped
from ssd.samples import Samples

LATEST = "latest"
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
logging.getLogger("mlflow.projects").setLevel(logging.WARNING)  # `launch` says in one line what it launches
logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
CODE_PATHS = ("MLproject", "ssd", "steps")  # a preset is no code: its values are parameters
ALWAYS_ANEW = ("main", "report")  # what is given by hand; a report finds what was added since
USES_GPU = ("baseline", "sample", "train", "evaluate", "diagnose", "search")  # these log how busy the machine is
SHARED = ("search",)  # several processes may be at the same work
WORK_DIR_ENV = "SSD_WORK_DIR"  # unfinished work is kept there, to be resumed; default: the user's cache
CHECKPOINT = "ssd.step."  # tags of a run that trains: an artifact, its training step
LAUNCHER_ENV = "SSD_LAUNCHER"
HALF_MADE = ("_alembic_tmp_", "duplicate column name")  # what SQLite says of such a store
READ_PAUSES_S = (1, 5, 15, 30, 60)  # before an answer that broke off is asked for again
BROKEN_OFF = re.compile("Connection broken|IncompleteRead|Connection aborted|Connection reset|ended prematurely")
TRACKING_ERRORS = (MlflowException, sqlalchemy.exc.SQLAlchemyError, requests.exceptions.RequestException, OSError)


@dataclasses.dataclass
class Step:
    """A running step.

    `args` are its parameters, inputs resolved to `runs:/ID/path`, a local path or a hub id; `key` is the identity of
    its work; `work` is a folder that survives a kill and is found again by the same work; `launched` are the ids of the
    runs that it has launched or reused, in order.
    """

    name: str
    args: argparse.Namespace
    run_id: str
    key: str
    work: Path
    launched: list[str] = dataclasses.field(default_factory=list)

    def path(self, parameter: str) -> Path:
        """Local path of the input `parameter`, downloaded where it is remote."""
        return Path(local_path(getattr(self.args, parameter)))

    def launch(self, entry_point: str, **overrides: Any) -> str:
        """Id of a finished run of `entry_point` with these parameters over the preset's; launched if there is none."""
        run_id = launch(entry_point, self.args.preset, overrides)
        self.launched.append(run_id)
        return run_id

    def describe(self, name: str, markdown: str, **tags: str) -> None:
        """Give the run its readable name, its description and tags, and print both."""
        mlflow.set_tags({"mlflow.runName": name, "mlflow.note.content": markdown, **tags})
        print(f"\n{name}\n{markdown}\n", flush=True)

    def log_table(self, name: str, rows: pa.Table) -> str:
        """Log `rows` as the Parquet artifact `name` at the run's root; returns its URI."""
        records.write_table(self.work / name, rows)
        mlflow.log_artifact(str(self.work / name))
        return f"runs:/{self.run_id}/{name}"

    def log_json(self, name: str, content: Any) -> None:
        """Log `content` as the JSON artifact `name` at the run's root; not-a-number becomes null."""
        mlflow.log_text(json.dumps(jsonable(content), indent=1), name)


def execute(name: str, body: Callable[[Step], None], **inputs: str | Callable[[argparse.Namespace], str]) -> None:
    """Run `body` as the entry point `name`, with the command line's parameters.

    `inputs` names, for each parameter that is an input, the upstream entry point and its artifact that `latest` means,
    as in `samples="sample/samples"`, or a function of the step's parameters that finds it. Bad input (ValueError) ends
    in one line, a FAILED run and exit status 2.
    """
    texts = parameters.parse(name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run ends as FAILED
    with open(os.devnull) as nothing:  # no library may ask a person, or take what is piped in for an answer
        os.dup2(nothing.fileno(), 0)
    _end_with_launcher()  # before MLflow takes the run's id out of the environment
    try:
        _prepare_store(mlflow.get_tracking_uri())
        # With the run, not after it: without these tags no step would end a run that a kill left RUNNING.
        tags = {"step": name, "ssd.host": socket.gethostname(), "ssd.process": processes.this()}
        run = mlflow.start_run(log_system_metrics=name in USES_GPU, tags=tags)
    except (*TRACKING_ERRORS, ValueError) as error:
        is_half = any(sign in str(error) for sign in HALF_MADE)
        remedy = (
            "MLflow was ended while it made this file: move it away, where it holds no runs, and give the command again"
            if is_half
            else "start its server, make it writable or set MLFLOW_TRACKING_URI (a relative path counts from the "
            "project's folder)"
        )
        _fail(f"cannot use the tracking store {mlflow.get_tracking_uri()} ({_first_line(error)}); {remedy}")
    try:
        with run:
            try:
                _run(name, parameters.typed(name, texts), body, inputs, run)
            except Exception as error:
                mlflow.set_tags(
                    {"ssd.error": _first_line(error), "mlflow.note.content": f"**Failed:** {escaped(error)}"}
                )
                raise
    except ValueError as error:
        _fail(str(error))
    except ExecutionException as error:
        _fail(f"the run that this one launched failed ({_first_line(error)}); its message is above")
    except OSError as error:
        _fail(f"{type(error).__name__}: {_first_line(error)}")
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
        _fail(f"tracking store {mlflow.get_tracking_uri()}: {_first_line(error)}")


def _run(
    name: str, args: argparse.Namespace, body: Callable[[Step], None], inputs: Mapping[str, str | Callable], run: Run
) -> None:
    _end_orphans(name)
    mlflow.set_tag("preset", args.preset)
    if "mlflow.project.entryPoint" not in run.data.tags:
        mlflow.log_params(vars(args))
    given = vars(args).copy()
    if LAUNCHER_ENV not in os.environ and name != "main":
        preset = parameters.load_preset(args.preset).get(name, {})
        args = argparse.Namespace(
            **{
                key: preset.get(key, value) if value == parameters.defaults(name)[key] else value
                for key, value in given.items()
            }
        )
    changes = {key: value for key, value in vars(args).items() if value != given[key]}
    for parameter, upstream in inputs.items():
        setattr(args, parameter, _resolve(parameter, upstream, args))
    base_model = _base_model(args, inputs)
    key = _key(name, vars(args))
    code, clean = code_version()
    done = find_finished(key) if clean and name not in ALWAYS_ANEW else None
    said = ", ".join(f"{parameter}={value}" for parameter, value in changes.items())
    by_preset = f" (preset {args.preset} sets {said})" if said else ""
    if done:
        return _point_to(done, run, f"a finished run has the same parameters, inputs and code{by_preset}")
    if not clean and LAUNCHER_ENV not in os.environ:
        print(f"{name}: {code}; finished runs are not reused", flush=True)
    if changes:
        # MLflow has recorded the parameters as they were given, and a record is not rewritten: a nested run has them.
        return _point_to(launch(name, args.preset, vars(args)), run, f"launched for it{by_preset}")
    mlflow.set_tags({"ssd.key": key, "ssd.base_model": base_model, "ssd.code": code})
    work = _work_root() / f"{name}-{key[:16]}-{_store_id(run)}"
    work.mkdir(parents=True, exist_ok=True)
    with records.alone(work, shared=name in SHARED):
        body(Step(name, args, run.info.run_id, key, work))
    with contextlib.suppress(ValueError), records.alone(work):  # the last process at it cleans up
        shutil.rmtree(work, ignore_errors=True)


def _work_root() -> Path:
    """Folder of unfinished work: the user's, so that it is found again from another clone, as MLflow makes of a URL."""
    if given := os.environ.get(WORK_DIR_ENV):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssd-math"


def _store_id(run: Run) -> str:
    """Identity of the experiment of `run`, and of its store: unfinished work names runs there."""
    uri = mlflow.get_tracking_uri()
    if uri.startswith("sqlite:"):
        uri = str(Path(sqlalchemy.engine.make_url(uri).database).resolve())
    return hashlib.sha256(f"{uri} {run.info.experiment_id}".encode()).hexdigest()[:8]


def _point_to(run_id: str, run: Run, reason: str) -> None:
    """End this run as a pointer: the work is another run's. Without `ssd.key`, nothing takes it for a result."""
    other = run_of(f"runs:/{run_id}")
    mlflow.set_tags(
        {
            "ssd.same_as": run_id,
            "mlflow.runName": f"-> {other.info.run_name}",
            "mlflow.note.content": f"See run [{escaped(other.info.run_name)}]"
            f"(#/experiments/{other.info.experiment_id}/runs/{run_id}): {escaped(reason)}.",
        }
    )
    print(f"{run.info.run_name}: see run {run_id} ({other.info.run_name}): {reason}", flush=True)


def launch(entry_point: str, preset: str, overrides: Mapping[str, Any]) -> str:
    """Id of a finished run of `entry_point` with `overrides` over the preset's; launched if there is none."""
    values = parameters.preset_values(preset, entry_point) | overrides | {"preset": preset}
    _, clean = code_version()
    done = find_finished(_key(entry_point, values)) if clean else None
    if done:
        print(f"{entry_point}: reused run {done}", flush=True)
        return done
    active = mlflow.active_run()
    given = " ".join(
        f"{key}={value}" for key, value in values.items() if value != parameters.defaults(entry_point)[key]
    )
    print(f"\n=== {entry_point} {given}", flush=True)
    os.environ[LAUNCHER_ENV] = processes.this()
    submitted = mlflow.projects.run(
        uri=str(parameters.ROOT),
        entry_point=entry_point,
        parameters={key: parameters.as_text(value) for key, value in values.items()},
        experiment_id=active.info.experiment_id,
        env_manager=active.data.tags.get("mlflow.project.env", "local"),
    )
    return run_of(f"runs:/{submitted.run_id}").data.tags.get("ssd.same_as", submitted.run_id)


def find_finished(key: str) -> str | None:
    """Id of the newest finished run with this key in the active experiment."""
    found = _search(f"tags.`ssd.key` = '{key}' and attributes.status = 'FINISHED'")
    return found[0].info.run_id if found else None


def finished_runs(entry_point: str, with_tag: str = "ssd.key") -> list[Run]:
    """Finished runs of `entry_point` in the active experiment, newest first, by default those that did their work."""
    return _search(f"tags.step = '{entry_point}' and tags.`{with_tag}` LIKE '%' and attributes.status = 'FINISHED'")


def local_path(uri: str) -> str:
    """Local path of `uri`: `runs:/ID/path` and `models:/...` are downloaded where remote; anything else is itself."""
    if not uri.startswith(("runs:/", "models:/")):
        return uri
    try:
        return _patiently(lambda: _downloaded(uri))
    except TRACKING_ERRORS as error:
        line = " ".join(str(error).split())
        if _broke_off(error):
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
        except TRACKING_ERRORS as error:  # of a runs:/ URI, which a logged model may hold, too, MLflow hides the cause
            if _broke_off(error):
                raise
    return mlflow.artifacts.download_artifacts(uri)


def read_json(uri: str) -> Any:
    """Content of the JSON file at `uri`."""
    try:
        return json.loads(Path(local_path(uri)).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{uri} is not JSON ({error}); it is damaged: give the command that wrote it again") from error


class _SamplesDataset(PandasDataset):
    """A dataset of `num_rows` samples, of which MLflow sees the first: they tell it the columns."""

    num_rows = 0

    @property
    def profile(self) -> dict[str, int]:
        return {"num_rows": self.num_rows, "num_elements": self.num_rows * self.df.shape[1]}


def log_dataset(name: str, rows: pa.Table | Samples, context: str, source: str) -> PandasDataset:
    """Log `rows` as an input of the run, with a digest over all of its content."""
    source = _dataset_source(source)
    is_table = isinstance(rows, pa.Table)
    seen = rows if is_table else next(rows.tables())
    content = digest(rows) if is_table else rows.digest()
    with warnings.catch_warnings():
        for hint in ("The specified dataset source can be interpreted", "Hint: Inferred schema contains integer"):
            warnings.filterwarnings("ignore", hint)
        dataset = mlflow.data.from_pandas(seen.to_pandas(), source=source, name=name, digest=content)
        if not is_table:
            dataset = _SamplesDataset(dataset.df, dataset.source, name=name, digest=content)
            dataset.num_rows = len(rows)
        mlflow.log_input(dataset, context=context)
    return dataset


def _dataset_source(uri: str) -> str:
    """`uri` as MLflow takes it for the source of a dataset: neither runs:/ nor mlflow-artifacts:/."""
    if not uri.startswith("runs:/"):
        return uri
    run_id, artifact = uri.removeprefix("runs:/").split("/", 1)
    resolved = get_artifact_uri(run_id, artifact)
    is_served = resolved.startswith("mlflow-artifacts:")
    return _served_at(mlflow.get_tracking_uri(), run_id, artifact) if is_served else resolved


def _served_at(server: str, run_id: str, artifact: str) -> str:
    """Address at which the tracking server `server` gives a file of a run, or lists a folder; without credentials.

    >>> _served_at("https://me:secret@host:5000", "a1", "val.parquet")
    'https://host:5000/get-artifact?run_uuid=a1&path=val.parquet'
    >>> _served_at("http://host/mlflow/", "a1", "samples")
    'http://host/mlflow/api/2.0/mlflow/artifacts/list?run_id=a1&path=samples'
    """
    parts = urllib.parse.urlsplit(server)
    root = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    path = urllib.parse.quote(artifact)
    if Path(artifact).suffix:
        return f"{root}/get-artifact?run_uuid={run_id}&path={path}"
    return f"{root}/api/2.0/mlflow/artifacts/list?run_id={run_id}&path={path}"


def tag_of(uri: str, tag: str, default: str) -> str:
    """Tag of the run that `uri` (`runs:/ID/path`) points into; `default` for any other uri or without the tag."""
    return run_of(uri).data.tags.get(tag, default) if uri.startswith("runs:/") else default


def run_of(uri: str) -> Run:
    """The run that `uri` (`runs:/ID/path`) points into; ValueError where there is none."""
    if not uri.startswith("runs:/"):
        raise ValueError(f"{uri} is no artifact of a run; give runs:/ID/path")
    try:
        return _patiently(lambda: mlflow.get_run(uri.split("/")[1]))
    except MlflowException as error:
        raise ValueError(f"{uri}: {_first_line(error)}; look up the run's id in the UI") from error


def lineage(uri: str) -> list[StepRun]:
    """The run that `uri` (`runs:/ID/path`) points into and every run that it was made from, downstream first."""
    found, waiting = {}, [uri]
    while waiting:
        run_id = waiting.pop(0).removeprefix("runs:/").split("/")[0]
        if run_id not in found:
            found[run_id] = step_run(run_of(f"runs:/{run_id}"))
            waiting += [each for value in found[run_id].params.values() for each in re.findall(r"runs:/\w+", value)]
    return list(found.values())


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


def reads(problems: str) -> set[str]:
    """The arms of every comparison in the active experiment that has read the set of digest `problems`.

    Deleted runs are among them: what was seen stays seen.
    """
    query = f"tags.step = 'compare' and tags.`ssd.problems` = '{problems}'"
    return {run.data.tags["ssd.arms"] for run in _search(query, ViewType.ALL)}


def overlap(prepared: StepRun) -> Overlap:
    """What the run of `prepare` kept, and what it took out because it repeats something."""
    removals = local_path(f"runs:/{prepared.run_id}/removals.parquet")
    pairs = pq.read_table(removals, filters=pc.field("right_id").is_valid())  # the others were dropped before
    rules = Counter(row["rule"] if row["removed"] else "suspected, but kept" for row in pairs.to_pylist())
    sizes = {name: int(prepared.metrics.get(f"num_{name}", 0)) for name in ("train", "val", "quick", "final")}
    return Overlap(sizes, int(prepared.metrics["num_removed"]), dict(rules.most_common()))


def parent(uri: str) -> Run | None:
    """The run that launched the one that `uri` (`runs:/ID/path`) points into."""
    run_id = run_of(uri).data.tags.get("mlflow.parentRunId")
    return run_of(f"runs:/{run_id}") if run_id else None


def log_checkpoint(step: Step, folder: Path, artifact: str, number: int) -> str:
    """Log the model in `folder` as `artifact` of the run and as a LoggedModel of training step `number`: its id."""
    mlflow.log_artifacts(str(folder), artifact)
    uri = f"runs:/{step.run_id}/{artifact}"
    logged = mlflow.create_external_model(
        name=f"{step.name}-step-{number:06d}",
        source_run_id=step.run_id,
        params={key: str(value) for key, value in vars(step.args).items()} | {"step": str(number)},
        tags={"uri": uri},
        model_type="checkpoint",
    )
    mlflow.log_outputs([mlflow.entities.LoggedModelOutput(logged.model_id, number)])
    mlflow.set_tags({f"ssd.logged_model.{artifact}": logged.model_id, f"{CHECKPOINT}{artifact}": number})
    return logged.model_id


def checkpoints(run: Run) -> dict[int, str]:
    """URIs of the checkpoints that `run` logged, by training step."""
    found = {
        int(number): f"runs:/{run.info.run_id}/{tag.removeprefix(CHECKPOINT)}"
        for tag, number in run.data.tags.items()
        if tag.startswith(CHECKPOINT)
    }
    return dict(sorted(found.items()))


def metric_of(uri: str, metric: str) -> float:
    """Metric of the run that `uri` (`runs:/ID/path`) points into; NaN for any other uri or without the metric."""
    return run_of(uri).data.metrics.get(metric, math.nan) if uri.startswith("runs:/") else math.nan


def digest(rows: pa.Table) -> str:
    """SHA-256 of every value of `rows`, in order; 32 hex digits (MLflow's own stops after 10,000 rows)."""
    content = hashlib.sha256(str(rows.schema.names).encode())
    for batch in rows.to_batches(max_chunksize=1000):  # never a Python object for every row at once
        for row in batch.to_pylist():
            content.update(json.dumps(list(row.values()), ensure_ascii=False, default=str).encode())
    return content.hexdigest()[:32]


def jsonable(content: Any) -> Any:
    """`content` as JSON values: named tuples and dataclasses become objects, what is not finite becomes null."""
    if dataclasses.is_dataclass(content):
        content = dataclasses.asdict(content)
    if hasattr(content, "_asdict"):
        content = content._asdict()
    if isinstance(content, Mapping):
        return {str(key): jsonable(value) for key, value in content.items()}
    if isinstance(content, list | tuple | set | frozenset):
        return [jsonable(value) for value in content]
    if hasattr(content, "item"):
        content = content.item()
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _resolve(parameter: str, upstream: str | Callable[[argparse.Namespace], str], args: argparse.Namespace) -> str:
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
    runs = finished_runs(entry_point) if value == LATEST else []
    # A control is never meant, unless the step's own arm is one or the parameter says so.
    own = "control" if parameter == "control" else getattr(args, "arm", "ssd")
    runs = [run for run in runs if (run.data.tags.get("arm", own) == "control") == (own == "control")]
    if parameter == "control" and not runs:
        raise ValueError(
            f"control={value}: no finished {entry_point} of arm control; give runs:/ID/{artifact}, or none"
        )
    shared = {"seed": args.seed} if hasattr(args, "seed") and "seed" in parameters.defaults(entry_point) else {}
    run_id = runs[0].info.run_id if runs else launch(entry_point, args.preset, shared)
    resolved = f"runs:/{run_id}/{artifact}"
    mlflow.log_param(f"input.{parameter}", resolved)
    print(f"{parameter}={value}: {resolved}", flush=True)
    return resolved


def _base_model(args: argparse.Namespace, inputs: Mapping[str, str]) -> str:
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


def _key(entry_point: str, values: Mapping[str, Any]) -> str:
    """Identity of a piece of work: entry point, parameters with resolved inputs, and code version.

    On which machines samples are drawn, what these cost and where a study is kept is no part of it: a run goes on
    elsewhere.
    """
    content = {
        key: _content(value) if key in parameters.MAY_BE_PATHS else value
        for key, value in values.items()
        if key != "preset"
    }
    content.pop("storage", None)
    if "engine" in content:
        content.pop("gpu_hour_price", None)
        if engines.kind(content["engine"]) != "replay":
            content["engine"] = engines.kind(content["engine"])
    return hashlib.sha256(json.dumps([entry_point, content, code_version()[0]], sort_keys=True).encode()).hexdigest()


def _content(value: Any) -> Any:
    """A file counts by what it holds, a folder by the names, sizes and times of its files, a list by its parts."""
    if not isinstance(value, str) or value in ("", LATEST):
        return value
    if not Path(value).exists():
        return [_content(part.strip()) for part in value.split(",")] if "," in value else value
    if Path(value).is_file():
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()
    files = sorted(Path(at, name) for at, _, names in os.walk(value, followlinks=True) for name in names)
    held = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    base = adapters.base_of(value)
    return [value, *held, *([_content(base)] if base else [])]


@functools.cache
def code_version() -> tuple[str, bool]:
    """The last commit that touched the code, and whether the tree is as that commit left it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", parameters.ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit = git("log", "-1", "--format=%H", "--", *CODE_PATHS)
        changed = git("status", "--porcelain", "--", *CODE_PATHS)
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "no git commit", False
    if changed:
        content = hashlib.sha256(git("diff", "HEAD", "--", *CODE_PATHS).encode() + changed.encode()).hexdigest()[:8]
        return f"{commit} with uncommitted changes ({changed.splitlines()[0].split()[-1]} ...; {content})", False
    return commit, bool(commit)


def _search(query: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    experiments = [mlflow.active_run().info.experiment_id]
    order = {"order_by": ["start_time DESC"], "output_format": "list"}
    return _patiently(lambda: mlflow.search_runs(experiments, query, view, **order))


def _patiently(read: Callable[[], Any]) -> Any:
    """What `read` gives, asked for again where the answer breaks off: MLflow repeats only what got no answer."""
    for pause_s in READ_PAUSES_S:
        try:
            return read()
        except TRACKING_ERRORS as error:
            if not _broke_off(error):
                raise
        time.sleep(pause_s)
    return read()


def _broke_off(error: BaseException | None) -> bool:
    """Whether an answer that ended too early is the error or the cause of it."""
    if error is None:
        return False
    return bool(BROKEN_OFF.search(str(error))) or _broke_off(error.__cause__ or error.__context__)


def _end_orphans(entry_point: str) -> None:
    """Mark runs of this step that a kill left RUNNING on this machine."""
    client = mlflow.MlflowClient()
    for run in _search(f"tags.step = '{entry_point}' and attributes.status = 'RUNNING'"):
        tags = run.data.tags
        process = tags.get("ssd.process")
        if process and tags.get("ssd.host") == socket.gethostname() and not processes.is_alive(process):
            _end(client, run.info.run_id)


def _end(client: mlflow.MlflowClient, run_id: str) -> None:
    """Mark a killed run, and what was nested in it and no step had begun: no process will end that."""
    client.set_terminated(run_id, "KILLED")
    for part in _search(f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'RUNNING'"):
        if "step" not in part.data.tags:
            _end(client, part.info.run_id)


def _end_with_launcher() -> None:
    """End this process when the one that launched it is killed, so that a new `main` finds nobody at its work."""
    launcher, parent = os.environ.get(LAUNCHER_ENV), os.getppid()
    if "MLFLOW_RUN_ID" not in os.environ:
        return  # started by hand, perhaps to outlive its shell

    def watch() -> None:
        while os.getppid() == parent and (launcher is None or processes.is_alive(launcher)):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # the main thread may be long in one call
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _prepare_store(uri: str) -> None:
    """Make the SQLite file of a tracking store, whole or not at all and by one process of several that need it.

    MLflow would make it table by table, and try an unwritable one for two minutes.
    """
    if not uri.startswith("sqlite:"):
        return
    path = Path(sqlalchemy.engine.make_url(uri).database)
    if not path.exists() or not path.stat().st_size:
        with records.alone(path, waits=True):
            if not path.exists() or not path.stat().st_size:
                _make_store(path)
    open(path, "ab").close()


def _make_store(path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    for left in path.parent.glob(f"{partial.name}*"):  # by a kill: the file and its journal
        left.unlink()
    _get_sqlalchemy_store(f"sqlite:///{partial}", None).engine.dispose()
    partial.replace(path)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)

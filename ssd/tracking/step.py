"""A step: begin its run, resolve its inputs, do its work or point to the run that has it, end it as a person expects.

`execute` joins or opens the run, resolves the inputs, and calls the step. A run whose entry point, parameters, inputs
and code version match a finished run is not done again.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import mlflow
import pyarrow as pa
import sqlalchemy.exc
from mlflow.entities import Run
from mlflow.exceptions import ExecutionException, MlflowException

from ssd import parameters, processes, records
from ssd.markdown import escaped
from ssd.tracking import reuse, store
from ssd.tracking.inputs import resolve, trace_base_model
from ssd.tracking.log import log_checkpoint
from ssd.tracking.runs import local_path, run_of, search

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
logging.getLogger("mlflow.projects").setLevel(logging.WARNING)  # `launch` says in one line what it launches
logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
ALWAYS_ANEW = ("main", "report")  # what is given by hand; a report finds what was added since
USES_GPU = ("baseline", "sample", "train", "evaluate", "diagnose", "search")  # these log how busy the machine is
SHARED = ("search",)  # several processes may be at the same work
WORK_DIR_ENV = "SSD_WORK_DIR"  # unfinished work is kept there, to be resumed; default: the user's cache


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
        run_id = reuse.launch(entry_point, self.args.preset, overrides)
        self.launched.append(run_id)
        return run_id

    def log_checkpoint(self, folder: Path, artifact: str, number: int) -> str:
        """Log the model in `folder` as `artifact` of the run and as a LoggedModel of training step `number`: its id."""
        return log_checkpoint(self.name, self.run_id, vars(self.args), folder, artifact, number)

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
        mlflow.log_text(json.dumps(records.jsonable(content), indent=1), name)


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
        store.prepare(mlflow.get_tracking_uri())
        # With the run, not after it: without these tags no step would end a run that a kill left RUNNING.
        tags = {"step": name, "ssd.host": socket.gethostname(), "ssd.process": processes.this()}
        run = mlflow.start_run(log_system_metrics=name in USES_GPU, tags=tags)
    except (*store.TRACKING_ERRORS, ValueError) as error:
        is_half = any(sign in str(error) for sign in store.HALF_MADE)
        remedy = (
            "MLflow was ended while it made this file: move it away, where it holds no runs, and give the command again"
            if is_half
            else "start its server, make it writable or set MLFLOW_TRACKING_URI (a relative path counts from the "
            "project's folder)"
        )
        _fail(f"cannot use the tracking store {mlflow.get_tracking_uri()} ({store.first_line(error)}); {remedy}")
    try:
        with run:
            try:
                _run(name, parameters.typed(name, texts), body, inputs, run)
            except Exception as error:
                mlflow.set_tags(
                    {"ssd.error": store.first_line(error), "mlflow.note.content": f"**Failed:** {escaped(error)}"}
                )
                raise
    except ValueError as error:
        _fail(str(error))
    except ExecutionException as error:
        _fail(f"the run that this one launched failed ({store.first_line(error)}); its message is above")
    except OSError as error:
        _fail(f"{type(error).__name__}: {store.first_line(error)}")
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
        _fail(f"tracking store {mlflow.get_tracking_uri()}: {store.first_line(error)}")


def _run(
    name: str, args: argparse.Namespace, body: Callable[[Step], None], inputs: Mapping[str, str | Callable], run: Run
) -> None:
    _end_orphans(name)
    mlflow.set_tag("preset", args.preset)
    if "mlflow.project.entryPoint" not in run.data.tags:
        mlflow.log_params(vars(args))
    given = vars(args).copy()
    if reuse.LAUNCHER_ENV not in os.environ and name != "main":
        preset = parameters.load_preset(args.preset).get(name, {})
        args = argparse.Namespace(
            **{
                key: preset.get(key, value) if value == parameters.defaults(name)[key] else value
                for key, value in given.items()
            }
        )
    changes = {key: value for key, value in vars(args).items() if value != given[key]}
    for parameter, upstream in inputs.items():
        setattr(args, parameter, resolve(parameter, upstream, args))
    base_model = trace_base_model(args, inputs)
    key = reuse.work_key(name, vars(args))
    code, clean = reuse.code_version()
    done = reuse.find_finished(key) if clean and name not in ALWAYS_ANEW else None
    said = ", ".join(f"{parameter}={value}" for parameter, value in changes.items())
    by_preset = f" (preset {args.preset} sets {said})" if said else ""
    if done:
        return _point_to(done, run, f"a finished run has the same parameters, inputs and code{by_preset}")
    if not clean and reuse.LAUNCHER_ENV not in os.environ:
        print(f"{name}: {code}; finished runs are not reused", flush=True)
    if changes:
        # MLflow has recorded the parameters as they were given, and a record is not rewritten: a nested run has them.
        return _point_to(reuse.launch(name, args.preset, vars(args)), run, f"launched for it{by_preset}")
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


def _end_orphans(entry_point: str) -> None:
    """Mark runs of this step that a kill left RUNNING on this machine."""
    client = mlflow.MlflowClient()
    for run in search(f"tags.step = '{entry_point}' and attributes.status = 'RUNNING'"):
        tags = run.data.tags
        process = tags.get("ssd.process")
        if process and tags.get("ssd.host") == socket.gethostname() and not processes.is_alive(process):
            _end(client, run.info.run_id)


def _end(client: mlflow.MlflowClient, run_id: str) -> None:
    """Mark a killed run, and what was nested in it and no step had begun: no process will end that."""
    client.set_terminated(run_id, "KILLED")
    for part in search(f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'RUNNING'"):
        if "step" not in part.data.tags:
            _end(client, part.info.run_id)


def _end_with_launcher() -> None:
    """End this process when the one that launched it is killed, so that a new `main` finds nobody at its work."""
    launcher, parent = os.environ.get(reuse.LAUNCHER_ENV), os.getppid()
    if "MLFLOW_RUN_ID" not in os.environ:
        return  # started by hand, perhaps to outlive its shell

    def watch() -> None:
        while os.getppid() == parent and (launcher is None or processes.is_alive(launcher)):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # the main thread may be long in one call
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)

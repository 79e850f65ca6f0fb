"""Steps as processes of their own that start at once, each with a fault at a known moment.

Usage: `python launcher.py`, a request on each line of standard input:
`{"step", "arguments", "environment", "folder", "log", "fault"}`. It imports what the steps import, forks for each
request a process that leads a group of its own, and answers two lines: the process id, and later the exit status.

Moments are counted: each call of a method of `mlflow.MlflowClient` has one before it and one after it (`mlflow`), each
opening of a file for writing, rename and removal in the step's folders has one before it (`file`). A fault is one of

- `{"count": path}`: none; how many moments there were is written to `path` at the end;
- `{"kill": kind, "at": n}`: the process group is killed at the n-th moment of that kind;
- `{"wait": kind, "at": n, "file": path}`: at that moment the process makes the file, and goes on when it is gone.
"""

import functools
import json
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlflow
import torch  # noqa: F401
import transformers  # noqa: F401

import ssd.evaluation
import ssd.report.figures
import ssd.sampling
import ssd.search
import ssd.training.sft  # noqa: F401

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Moments:
    """Counts the moments of this process, and lets its fault happen at one of them."""

    def __init__(self, fault: dict[str, Any], folder: str):
        self.fault, self.folder = fault, folder
        self.counts = {"mlflow": 0, "file": 0}
        self.lock = threading.RLock()

    def watch(self) -> None:
        for name, method in list(vars(mlflow.MlflowClient).items()):
            if callable(method) and not name.startswith("_"):
                setattr(mlflow.MlflowClient, name, self._watched(method))
        sys.addaudithook(self._on_event)

    def _watched(self, method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            self.passes("mlflow")
            try:
                return method(*args, **kwargs)
            finally:
                self.passes("mlflow")

        return call

    def _on_event(self, event: str, arguments: tuple) -> None:
        is_change = event in ("os.rename", "os.remove", "os.rmdir") or (event == "open" and arguments[2] & WRITES)
        if is_change and isinstance(arguments[0], str | os.PathLike) and self.folder in os.fspath(arguments[0]):
            self.passes("file")

    def passes(self, kind: str) -> None:
        with self.lock:
            self.counts[kind] += 1
            if self.fault.get("at") != self.counts[kind]:
                return
        if self.fault.get("kill") == kind:
            os.killpg(0, signal.SIGKILL)
        if self.fault.get("wait") == kind:
            signal_file = Path(self.fault["file"])
            signal_file.touch()
            while signal_file.exists():
                time.sleep(0.02)


def run(request: dict[str, Any]) -> None:
    """The request's step, in this process."""
    os.setsid()
    with open(request["log"], "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(request["environment"])
    fault = request["fault"]
    moments = Moments(fault, request["folder"])
    moments.watch()
    sys.argv = [request["step"], *request["arguments"]]
    try:
        runpy.run_module(f"steps.{request['step']}", run_name="__main__", alter_sys=True)
    finally:
        if "count" in fault:
            Path(fault["count"]).write_text(json.dumps(moments.counts))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    print("ready", file=answers)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            run(json.loads(line))
            sys.exit(0)
        print(process, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answers)


if __name__ == "__main__":
    main()

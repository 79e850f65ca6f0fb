"""No work is done twice: its identity, the finished run that did it, and the launch of one where none has."""

import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow

from ssd import adapters, parameters, processes
from ssd.engines.opening import kind
from ssd.tracking import runs

CODE_PATHS = ("MLproject", "ssd", "steps")  # a preset is no code: its values are parameters
LAUNCHER_ENV = "SSD_LAUNCHER"


def launch(entry_point: str, preset: str, overrides: Mapping[str, Any]) -> str:
    """Id of a finished run of `entry_point` with `overrides` over the preset's; launched if there is none."""
    values = parameters.preset_values(preset, entry_point) | overrides | {"preset": preset}
    _, clean = code_version()
    done = find_finished(work_key(entry_point, values)) if clean else None
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
    return runs.run_of(f"runs:/{submitted.run_id}").data.tags.get("ssd.same_as", submitted.run_id)


def find_finished(key: str) -> str | None:
    """Id of the newest finished run with this key in the active experiment."""
    found = runs.search(f"tags.`ssd.key` = '{key}' and attributes.status = 'FINISHED'")
    return found[0].info.run_id if found else None


def work_key(entry_point: str, values: Mapping[str, Any]) -> str:
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
        if kind(content["engine"]) != "replay":
            content["engine"] = kind(content["engine"])
    return hashlib.sha256(json.dumps([entry_point, content, code_version()[0]], sort_keys=True).encode()).hexdigest()


def _content(value: Any) -> Any:
    """A file counts by what it holds, a folder by the names, sizes and times of its files, a list by its parts."""
    if not isinstance(value, str) or value in ("", parameters.LATEST):
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

"""Every step that works long is broken in the midst, given again until it finishes, and compared with an unbroken run.

Slow: `SSD_FAULT_TIMES=7 python -m pytest -m slow -n 0 tests/faults`. SSD_FAULT_TIMES is how often each of three kinds
of kill happens to each step, by default 3; the other faults happen half as often. A test fails where a part of the
result is lost, doubled or different, or where a command hung or never finished. The table of all faults is printed at
the end.

A step is run by its own module on a clean checkout, in a process that is forked from one that has imported what steps
import (`launcher.py`), so that twenty kills take a minute. `main` is started as a user starts it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.parquet as pq
import pytest
from mlflow.entities import Run, ViewType

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TIMES = int(os.environ.get("SSD_FAULT_TIMES", "3"))
FEWER = (TIMES + 1) // 2  # of the faults that are no kills
HANGS_AFTER_S = 150
MOST_ATTEMPTS = 4  # of the same command, until it finishes
DISK_BYTES = 96 << 20
SMALLER = {  # constants of the checkout, so that small work is done in as many parts as large work
    "ssd/sampling.py": ("FLUSH_SAMPLES = 256", "FLUSH_SAMPLES = 16"),
    "ssd/engines/transformers.py": ("MAX_BATCH = 512", "MAX_BATCH = 16"),
    "ssd/search.py": ("MIN_PART = 50", "MIN_PART = 10"),
}
PRESET = """
lab: {num_steps: 5}
prepare: {train_sources: lab, val_sources: lab, final_sources: lab, train_size: 96, val_size: 40, quick_size: 20,
          final_size: 40}
baseline: {model: lab, engine: transformers, n: 2, max_tokens: 24, top_k: 0, top_p: 1.0, presence_penalty: 0.0}
power: {delta: 0.1}
sample: {model: lab, engine: transformers, max_tokens: 24, temperature: 1.0, top_k: 0, top_p: 0.85}
train: {model: lab, lr: 1.0e-3, global_batch_size: 16, max_length: 256, save_steps: 2}
evaluate: {engine: transformers, max_tokens: 24, temperature: 1.0, top_k: 0, top_p: 1.0}
register: {name: small}
"""
SPACE = """
temperature:
  settings: {temperature: {low: 0.3, high: 3.0, log: true}, top_p: {low: 0.5, high: 1.0}}
  known: [{temperature: 1.0, top_p: 0.9, source: test}]
"""
TIMINGS = re.compile("system/|tokens_per_second|tail_share|gpu_|_time")
NAMES = re.compile(r"[0-9a-f]{32}|m-[0-9a-f]+|\d{4}-\d\d-\d\d[ T]?[\d:.]*|[\d.,]+ (?:hours|minutes|seconds)")

Rows = list[tuple[str, str]]  # what a finished run left: the name of each part, and its content


@dataclasses.dataclass
class Outcome:
    """What became of one fault."""

    fault: str
    step: str
    happened: bool = True
    lost: int = 0
    doubled: int = 0
    different: int = 0
    hung: bool = False
    unfinished: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_bad(self) -> bool:
        return bool(self.lost or self.doubled or self.different or self.hung or self.unfinished)


OUTCOMES: list[Outcome] = []


class Launcher:
    """A process that has imported what steps import, and forks one for each step."""

    def __init__(self, project: Path, folder: Path):
        environment = os.environ | {"PYTHONPATH": str(project), "MLFLOW_DISABLE_TELEMETRY": "true"}
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"):
            environment.pop(name, None)
        command = [sys.executable, str(Path(__file__).with_name("launcher.py"))]
        with open(folder / "launcher.log", "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=project, env=environment, text=True, bufsize=1, stderr=log,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip

    def wait_ready(self) -> None:
        assert self.process.stdout.readline() == "ready\n", "the launcher ended; see launcher.log"

    def start(self, request: dict[str, Any]) -> int:
        self.process.stdin.write(json.dumps(request) + "\n")
        return int(self.process.stdout.readline())

    def status(self, timeout_s: float) -> int | None:
        """Exit status of the process that was started last; None where it does not end in time."""
        if not select.select([self.process.stdout], [], [], timeout_s)[0]:
            return None
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@dataclasses.dataclass
class Place:
    """A tracking store, with the unfinished work and the artifacts of one broken run."""

    folder: Path
    store: str
    experiment: str
    files: Path  # work and artifacts

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.store)

    @property
    def work(self) -> Path:
        return self.files / "work"

    @property
    def log(self) -> str:
        path = self.folder / "log.txt"
        return path.read_text(errors="replace") if path.exists() else ""


@dataclasses.dataclass
class Bench:
    """The clean checkout, what its steps read, and the launchers that are free."""

    project: Path
    folder: Path
    model: str
    launchers: "queue.Queue[Launcher]"
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    number: Iterator[int] = dataclasses.field(default_factory=lambda: iter(range(1_000_000)))

    def place(self, files: Path | None = None) -> Place:
        """A new store that holds what the upstream steps left, and an empty experiment."""
        folder = self.folder / f"place-{next(self.number):05d}"
        folder.mkdir()
        files = files or folder
        shutil.copy(self.folder / "upstream.db", folder / "mlflow.db")
        place = Place(folder, f"sqlite:///{folder}/mlflow.db", "broken", files)
        with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store:
            store.execute("UPDATE experiments SET artifact_location = ? WHERE name = 'broken'", (f"{files}/artifacts",))
            store.commit()
        return place

    def request(self, step: str, place: Place, fault: dict[str, Any]) -> dict[str, Any]:
        arguments = [f"--{name}={value}" for name, value in self.arguments(step).items()]
        environment = {
            "MLFLOW_TRACKING_URI": place.store, "MLFLOW_EXPERIMENT_NAME": place.experiment,
            "SSD_WORK_DIR": str(place.work),
        }  # fmt: skip
        return {
            "step": step, "arguments": arguments, "environment": environment, "folder": str(place.files),
            "log": str(place.folder / "log.txt"), "fault": fault,
        }  # fmt: skip

    def arguments(self, step: str) -> dict[str, Any]:
        """Parameters of `step`: small work on fixed inputs."""
        drawn = {"model": self.model, "engine": "transformers", "max_tokens": 24, "temperature": 1.0, "top_k": 0}
        sizes = {"train_size": 96, "val_size": 40, "quick_size": 20, "final_size": 40}
        given = {
            "prepare": dict.fromkeys(("train_sources", "val_sources", "final_sources"), "lab") | sizes,
            "sample": drawn | {"problems": self.inputs.get("train"), "n": 2, "top_p": 0.85},
            "baseline": drawn | {"problems": self.inputs.get("val"), "n": 2, "top_p": 1.0, "presence_penalty": 0.0},
            "evaluate": drawn | {"problems": self.inputs.get("final"), "n": 2, "top_p": 1.0, "arm": "base"},
            "train": {"model": self.model, "samples": self.inputs.get("samples"), "lr": 1e-3, "global_batch_size": 32,
                      "max_length": 256, "save_steps": 2},
            "search": {"model": self.model, "engine": "transformers", "max_tokens": 24, "trials": 7, "n": 1,
                       "problems": self.inputs.get("quick"), "space": self.project / "space.yaml"},
            "compare": {"arms": self.inputs.get("arms")},
            "register": {"verdict": self.inputs.get("verdict"), "name": "small"},
            "report": {"verdict": self.inputs.get("verdict")},
        }  # fmt: skip
        return {"preset": self.project / "presets/empty.yaml"} | given[step]

    def run(
        self,
        step: str,
        place: Place,
        fault: dict[str, Any] | None = None,
        kill_after_s: float | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> int | None:
        """Exit status of `step`, negative where it was killed; None where it hung."""  # fmt: skip
        launcher = self.launchers.get()
        try:
            process = launcher.start(self.request(step, place, fault or {}))
            if kill_after_s is not None:
                status = launcher.status(kill_after_s)
                if status is not None:
                    return status
                os.killpg(process, signal.SIGKILL)
            if meanwhile:
                meanwhile()
            status = launcher.status(HANGS_AFTER_S)
            if status is None:
                os.killpg(process, signal.SIGKILL)
                launcher.status(HANGS_AFTER_S)
            return status
        finally:
            self.launchers.put(launcher)


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    return _checkout(tmp_path_factory.mktemp("faults") / "project")


@pytest.fixture(scope="session")
def bench(project, lab_model) -> Iterator[Bench]:
    folder = project.parent
    launchers: queue.Queue[Launcher] = queue.Queue()
    started = [Launcher(project, folder) for _ in range(os.cpu_count() or 1)]
    for launcher in started:
        launcher.wait_ready()
        launchers.put(launcher)
    made = Bench(project, folder, lab_model, launchers)
    _make_upstream(made)
    yield made
    for launcher in started:
        launcher.close()


def _checkout(project: Path) -> Path:
    """A clean checkout with the small preset and the small constants."""
    project.mkdir()
    for name in ("MLproject", "conda.yaml", "presets", "ssd", "steps"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, project / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, project / name)
    for name, (old, new) in SMALLER.items():
        content = (project / name).read_text()
        assert old in content, f"{name} holds no {old}"
        (project / name).write_text(content.replace(old, new))
    (project / "presets/small.yaml").write_text(PRESET)
    (project / "presets/empty.yaml").write_text("lab: {num_steps: 5}\n")
    (project / "space.yaml").write_text(SPACE)
    (project / ".gitignore").write_text("__pycache__/\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "small"]):
        subprocess.run([*git, *command], cwd=project, check=True)
    return project


def _make_upstream(bench: Bench) -> None:
    """Run the steps once in a store of their own, for what the broken steps read."""
    store = f"sqlite:///{bench.folder}/upstream.db"
    client = mlflow.MlflowClient(store)
    place = Place(bench.folder, store, "upstream", bench.folder / "upstream")
    client.create_experiment("upstream", artifact_location=str(bench.folder / "upstream/artifacts"))
    client.create_experiment("broken", artifact_location="/nowhere")

    def run(step: str, **others: Any) -> Run:
        request = bench.request(step, place, {})
        request["arguments"] += [f"--{name}={value}" for name, value in others.items()]
        launcher = bench.launchers.get()
        launcher.start(request)
        assert launcher.status(HANGS_AFTER_S) == 0, place.log[-3000:]
        bench.launchers.put(launcher)
        experiment = client.get_experiment_by_name("upstream").experiment_id
        return client.search_runs([experiment], f"tags.step = '{step}'")[0]

    prepared = run("prepare")
    for name in ("train", "val", "quick", "final"):
        bench.inputs[name] = f"{prepared.info.artifact_uri}/{name}.parquet"
    bench.inputs["samples"] = f"{run('sample').info.artifact_uri}/samples"
    base = run("evaluate", temperature=3.0)
    trained = run("evaluate", arm="ssd-same-decoding")
    bench.inputs["arms"] = f"base=runs:/{base.info.run_id},ssd-same-decoding=runs:/{trained.info.run_id}"
    compared = run("compare")
    verdict = json.loads(Path(compared.info.artifact_uri, "verdict.json").read_text()) | {"promotion": "candidate"}
    client.log_text(compared.info.run_id, json.dumps(verdict), "verdict.json")  # of another, nothing is registered
    bench.inputs["verdict"] = f"runs:/{compared.info.run_id}/verdict.json"
    client._tracking_client.store.engine.dispose()


def rows_of(step: str, place: Place) -> Rows:
    """What the finished run of `step` left, part by part; several finished runs of the same work double its rows."""
    client = place.client
    experiment = client.get_experiment_by_name(place.experiment).experiment_id
    runs = client.search_runs([experiment], f"tags.step = '{step}' and attributes.status = 'FINISHED'")
    runs = [run for run in runs if "ssd.key" in run.data.tags]
    return [row for run in runs for row in [("run", step), *_rows_of_run(client, step, run, place)]]


def _rows_of_run(client: mlflow.MlflowClient, step: str, run: Run, place: Place) -> Rows:
    folder = Path(run.info.artifact_uri)
    if run.info.artifact_uri.startswith("mlflow-artifacts:"):
        to = place.folder / "downloaded"
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir()
        uri = run.info.artifact_uri
        folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(to), tracking_uri=place.store))
    rows = [(f"metric {name}", repr(v)) for name, v in run.data.metrics.items() if not TIMINGS.search(name)]
    if step == "train":
        for path in sorted(folder.rglob("*.safetensors")):
            rows.append((str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()))
        for name in ("loss", "update_ratio", "displacement", "gradient_signal"):
            history = client.get_metric_history(run.info.run_id, name)
            rows += [(f"{name} at step {point.step}", repr(point.value)) for point in history]
        models = client.search_logged_models([run.info.experiment_id])
        rows += [
            (f"model {model.name}", model.params["step"]) for model in models if model.source_run_id == run.info.run_id
        ]
    for path in sorted(folder.rglob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            name = [row.get(key) for key in ("problem_id", "sample_index", "left_id", "right_id", "arm") if key in row]
            row.pop("cumulative_logprob", None)  # its last bits depend on what shares a batch
            kind = "samples" if path.parent.name == "samples" else path.name
            content = json.dumps(row, sort_keys=True, default=str)
            rows.append((f"{kind} {name}", NAMES.sub("X", content)))
    if step == "search":
        for trial in json.loads((folder / "trials.json").read_text()):
            told = {name: trial[name] for name in ("estimate", "source", "stopped", "level")}
            rows.append((f"trial {json.dumps(trial['params'], sort_keys=True)}", json.dumps(told, sort_keys=True)))
        best = json.loads((folder / "decodings.json").read_text())["best"]
        rows.append(("best", NAMES.sub("X", json.dumps(best, sort_keys=True))))
        nested = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
        for each in nested:
            settings = [each.data.params.get(name) for name in ("temperature", "top_p")]
            name = f"nested run {each.data.tags.get('arm')} {settings}"
            rows.append((name, f"{each.info.status} {each.data.metrics.get('pass_at_1')!r}"))
    for name in ("verdict.json", "comparison.json", "report.md", "registration.json", "estimates.json", "sources.json"):
        for path in folder.glob(name):
            rows.append((name, NAMES.sub("X", path.read_text())))
    if step == "register":
        versions = client.search_model_versions("name = 'small'")
        rows += [("version", f"{version.tags.get('digest')}") for version in versions]
        for alias, version in client.get_registered_model("small").aliases.items():
            rows.append((f"alias {alias}", str(version)))
    return rows


def compare_rows(outcome: Outcome, expected: Rows, found: Rows) -> None:
    """Count what is missing, what stands twice, and what is not what the unbroken run left."""
    wanted, got = Counter(name for name, _ in expected), Counter(name for name, _ in found)
    lost, doubled = wanted - got, got - wanted
    outcome.lost, outcome.doubled = lost.total(), doubled.total()
    of_name = {name: content for name, content in (Counter(found) - Counter(expected))}
    differ = {name: content for name, content in (Counter(expected) - Counter(found)) if name not in lost}
    outcome.different = 0 if lost or doubled else len(differ)
    outcome.notes += [f"lost: {name}" for name in list(lost)[:2]] + [f"doubled: {name}" for name in list(doubled)[:2]]
    for name, content in list(differ.items())[:2]:
        outcome.notes.append(f"different: {name}: {content[:150]} -> {of_name.get(name, '')[:150]}")


def finish(bench: Bench, outcome: Outcome, place: Place, remedy: Callable[[str], bool] | None = None) -> None:
    """Give the same command again until it finishes; after an error only where `remedy` did what the error asks for."""
    for _ in range(MOST_ATTEMPTS):
        before = len(place.log)
        status = bench.run(outcome.step, place)
        said = place.log[before:]
        if status == 0:
            return
        outcome.notes.append(f"status {status}: {_last_line(said)}")
        if status is None:
            outcome.hung = True
            return
        if remedy is None or "Traceback" in said or not remedy(said):
            break
    outcome.unfinished = True


def _last_line(said: str) -> str:
    return next((line for line in reversed(said.splitlines()) if line.strip()), "")[:300]


def judge(bench: Bench, outcome: Outcome, place: Place, expected: Rows) -> None:
    if not (outcome.hung or outcome.unfinished):
        compare_rows(outcome, expected, rows_of(outcome.step, place))
        client = place.client
        experiment = client.get_experiment_by_name(place.experiment).experiment_id
        left = client.search_runs([experiment], "attributes.status = 'RUNNING'", ViewType.ALL)
        if left:
            outcome.doubled += len(left)
            outcome.notes.append(f"left running: {[run.data.tags.get('mlflow.runName') for run in left]}")
    OUTCOMES.append(outcome)
    with open(bench.folder / "outcomes.jsonl", "a") as log:
        log.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
    if not outcome.is_bad and place.files == place.folder:
        shutil.rmtree(place.folder)
    elif outcome.is_bad:
        outcome.notes.append(str(place.folder))


@pytest.fixture(scope="session")
def unbroken(bench) -> Callable[[str], tuple[Rows, dict[str, int], float, int]]:
    """By step: what its unbroken run leaves, how many moments it has, how long it takes, and the size of its files."""
    known = {}

    def measured(step: str):
        if step not in known:
            place = bench.place()
            count = place.folder / "count.json"
            began = time.monotonic()
            assert bench.run(step, place, {"count": str(count)}) == 0, place.log[-3000:]
            took_s = time.monotonic() - began
            size = sum(path.stat().st_size for path in place.files.rglob("artifacts/**/*") if path.is_file())
            known[step] = rows_of(step, place), json.loads(count.read_text()), took_s, size
            assert len(known[step][0]) > 1
        return known[step]

    return measured


def side_by_side(broken: Callable[[int], None], times: int) -> None:
    """`broken` once for each number, on all cores; an exception in one is raised."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for done in [pool.submit(broken, number) for number in range(times)]:
            done.result()


STEPS = ("prepare", "sample", "baseline", "train", "evaluate", "search", "compare", "register", "report")
STORING = ("sample", "train", "evaluate", "search")  # these keep unfinished work


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["mlflow", "file", "time"])
def test_killed(bench, unbroken, step, kind):
    """Kills at calls of MLflow, at changes of files, or at any time; every third one is followed by another."""
    expected, counts, took_s, _ = unbroken(step)
    names = {"mlflow": "kill at an MLflow call", "file": "kill at a change of a file", "time": "kill at any time"}

    def broken(number: int) -> None:
        rng = random.Random(f"{step} {kind} {number}")
        place, outcome = bench.place(), Outcome(names[kind], step)
        num_kills = 0
        for _ in range(1 + (number % 3 == 2)):
            if kind == "time":
                status = bench.run(step, place, kill_after_s=rng.uniform(0, took_s))
            else:
                # Parts of equal length, so that all of the run is met.
                at = 1 + int((number + rng.random()) / TIMES * counts[kind])
                status = bench.run(step, place, {"kill": kind, "at": at})
            num_kills += status == -signal.SIGKILL
        outcome.happened = num_kills > 0
        finish(bench, outcome, place)
        judge(bench, outcome, place, expected)

    side_by_side(broken, TIMES)
    assert not bad(step, names[kind])


@pytest.mark.parametrize("step", STEPS)
def test_disk_full(bench, unbroken, step, tmp_path):
    """The disk of the work and the artifacts has room for a part of them; later it has room for all."""
    probe = tmp_path / "probe"
    probe.mkdir()
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "tmpfs", probe], check=False).returncode
    ):
        pytest.skip("a small disk cannot be mounted here: it needs root and the capability SYS_ADMIN")
    subprocess.run(["umount", probe], check=True)
    expected, _, _, size = unbroken(step)

    def broken(number: int) -> None:
        rng = random.Random(f"{step} disk {number}")
        disk = tmp_path / f"disk-{number}"
        disk.mkdir()
        room = 4096 + int((number + rng.random()) / FEWER * size)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], check=True)
        try:
            place, outcome = bench.place(disk), Outcome("full disk", step)
            status = bench.run(step, place)
            outcome.happened, outcome.hung = status != 0, status is None
            if status and "error: " not in _last_line(place.log):
                outcome.unfinished = True
                outcome.notes.append(f"no error in one line: {_last_line(place.log)}")
            subprocess.run(["mount", "-o", f"remount,size={DISK_BYTES}", disk], check=True)
            finish(bench, outcome, place)
            judge(bench, outcome, place, expected)
        finally:
            subprocess.run(["umount", "-l", disk], check=True)

    side_by_side(broken, FEWER)
    assert not bad(step, "full disk")


@pytest.mark.parametrize("step", STORING)
@pytest.mark.parametrize("damage", ["removed", "cut", "zeros"])
def test_damaged_file(bench, unbroken, step, damage):
    """A killed step's stored files are damaged, as a disk or a power cut does; a file that is named may be removed."""
    expected, counts, _, _ = unbroken(step)
    name = f"file {damage} after a kill"

    def remedy(said: str) -> bool:
        """Whether the error names a file or folder and asks for its removal, which is done."""
        error = said.split("error: ")[-1]
        named = [Path(path) for path in re.findall(r"/[^\s:;,'()]+", error) if "work" in Path(path).parts]
        if not named or not re.search(r"\bremove (it|one|the folder)\b", error):
            return False
        if named[0].is_dir():
            shutil.rmtree(named[0])
        else:
            named[0].unlink(missing_ok=True)
        return True

    def broken(number: int) -> None:
        rng = random.Random(f"{step} {damage} {number}")
        place, outcome = bench.place(), Outcome(name, step)
        at = 1 + int((0.25 + 0.75 * (number + rng.random()) / FEWER) * counts["file"])
        bench.run(step, place, {"kill": "file", "at": at})
        files = sorted(path for path in place.work.rglob("*") if path.is_file() and path.stat().st_size)
        outcome.happened = bool(files)
        if files:
            path = rng.choice(files)
            size = path.stat().st_size
            outcome.notes.append(f"{damage}: {path.relative_to(place.work)}")
            if damage == "removed":
                path.unlink()
            elif damage == "cut":
                os.truncate(path, rng.randrange(size))
            else:
                path.write_bytes(bytes(size))
        finish(bench, outcome, place, remedy)
        judge(bench, outcome, place, expected)

    side_by_side(broken, FEWER)
    assert not bad(step, name)


class Server:
    """`mlflow server` with its defaults on a new SQLite file, in a process group of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [*command, "--workers", "1"], start_new_session=True, cwd=self.folder, env=environment,
                stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            time.sleep(0.2)
        raise RuntimeError(f"mlflow server at {self.uri} did not start")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    running.start()
    yield running
    running.kill()


@pytest.mark.parametrize("step", ("prepare", "sample", "train", "evaluate", "search"))
def test_server_restarted(bench, unbroken, server, step):
    """The server is killed at a call of the step, or just after one, and starts again while the step waits."""
    expected, counts, _, _ = unbroken(step)
    for number in range(FEWER):
        rng = random.Random(f"{step} server {number}")
        folder = bench.folder / f"place-{next(bench.number):05d}"
        folder.mkdir()
        experiment = f"{step}-{number}"
        mlflow.MlflowClient(server.uri).create_experiment(experiment)
        place, outcome = Place(folder, server.uri, experiment, folder), Outcome("server killed and started", step)
        at = 1 + rng.randrange(counts["mlflow"])
        file = folder / "waits"

        def restart(file: Path = file) -> None:
            deadline = time.monotonic() + HANGS_AFTER_S
            while not file.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            if file.exists():
                server.kill()
                file.unlink()
                server.start()

        status = bench.run(step, place, {"wait": "mlflow", "at": at, "file": str(file)}, meanwhile=restart)
        outcome.hung = status is None
        if status:
            outcome.notes.append(f"status {status}: {_last_line(place.log)}")
            finish(bench, outcome, place)
        judge(bench, outcome, place, expected)
    assert not bad(step, "server killed and started")


def test_main_killed(project):
    """`main` with all of its steps is killed again and again on its way; what it leaves is that of an unbroken one."""
    found, took_s = {}, 0.0
    for name, num_kills in (("unbroken", 0), ("killed", 3 * TIMES)):
        folder = project.parent / f"main-{name}"
        folder.mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        environment |= {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "SSD_WORK_DIR": str(folder / "work"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(project),
        }  # fmt: skip
        rng, kills, began = random.Random(0), 0, time.monotonic()
        while True:
            with open(folder / "log.txt", "ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "steps.main", "--preset", "small"], cwd=project, env=environment,
                    stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            try:
                process.wait(rng.uniform(0.1, 0.4) * took_s if kills < num_kills else 1200)
                break
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
        took_s = time.monotonic() - began
        place = Place(folder, f"sqlite:///{folder}/mlflow.db", "Default", folder)
        found[name] = process.returncode, kills, place
    expected, got = (_rows_of_main(found[name][2]) for name in ("unbroken", "killed"))
    status, kills, place = found["killed"]
    assert found["unbroken"][0] == 0, found["unbroken"][2].log[-3000:]
    outcome = Outcome("kill at any time", "main", unfinished=status != 0)
    if status:
        outcome.notes.append(_last_line(place.log))
    else:
        compare_rows(outcome, expected, got)
    OUTCOMES.extend(dataclasses.replace(outcome, lost=0, doubled=0, different=0) for _ in range(kills - 1))
    OUTCOMES.append(outcome)
    assert not outcome.is_bad, outcome


def _rows_of_main(place: Place) -> Rows:
    rows = []
    for step in ("lab", "prepare", "baseline", "power", "sample", "train", "evaluate", "compare", "main"):
        rows += [(f"{step}: {name}", content) for name, content in rows_of(step, place)]
    return rows


def bad(step: str, fault: str) -> list[Outcome]:
    return [outcome for outcome in OUTCOMES if outcome.is_bad and (outcome.step, outcome.fault) == (step, fault)]


def table(outcomes: list[Outcome]) -> tuple[str, list[dict]]:
    """Markdown of a row for each fault and step, with the line of counts; and the same as JSON."""
    lines = ["| fault | step | times | lost | doubled | different | hung | never finished |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for fault, step in dict.fromkeys((each.fault, each.step) for each in outcomes):
        of = [each for each in outcomes if (each.fault, each.step) == (fault, step)]
        row = {"fault": fault, "step": step, "times": sum(each.happened for each in of)}
        for column in ("lost", "doubled", "different", "hung", "unfinished"):
            row[column] = sum(bool(getattr(each, column)) for each in of)
        rows.append(row)
        lines.append("| " + " | ".join(str(value) for value in row.values()) + " |")
    total = {name: sum(row[name] for row in rows) for name in ("times", *list(rows[0])[3:])} if rows else {}
    if rows:
        lines.append(
            f"\nfaults: {total['times']} tried, {total['lost']} lost, {total['doubled']} doubled, "
            f"{total['hung']} hung, {total['different']} different, {total['unfinished']} never finished"
        )
    return "\n".join(lines), rows


@pytest.fixture(scope="module", autouse=True)
def told(tmp_path_factory, request) -> Iterator[None]:
    """The table, on the terminal and in files, after the last test."""
    yield
    folder = tmp_path_factory.mktemp("table")
    markdown, rows = table(OUTCOMES)
    (folder / "faults.md").write_text(markdown + "\n")
    (folder / "faults.json").write_text(
        json.dumps({"rows": rows, "outcomes": [dataclasses.asdict(each) for each in OUTCOMES]}, indent=1)
    )
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        for outcome in OUTCOMES:
            if outcome.is_bad:
                print(f"\nBAD {outcome}")
        print(f"\n{markdown}\n{folder}/faults.md")

"""Real `vllm serve` processes and a real Ray cluster: the same tokens from all, and what one loses another completes.

Slow (minutes on two cores), so asked for by name: `python -m pytest -m slow -n 0 tests/engines`.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from ssd.decoding import Decoding
from ssd.engines import openai, pool
from ssd.engines.opening import open_engine

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason="vLLM is not installed (the gpu extra, or its CPU build)")

TRUNCATE_FIRST = ("--logits-processors", "ssd.engines.truncate_first:TruncateFirst")
START_S = 300  # two processes that import vLLM, on a busy machine
SMALL = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", "67108864"]
QUICK = {"TORCHDYNAMO_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}


class Serve:
    """What `vllm serve MODEL` runs (vLLM's CPU build has no such command), in a process group of its own."""

    def __init__(self, model: str, *arguments: str, port: int | None = None):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        server += ["--host", "127.0.0.1", "--port", str(self.port), *SMALL, *arguments]
        if not torch.cuda.is_available():
            server.append("--no-enable-chunked-prefill")  # as in ssd.engines.vllm
        self.process = subprocess.Popen(server, env=os.environ | QUICK, start_new_session=True)

    def up(self) -> "Serve":
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/models", timeout=5).close()
                return self
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"the server at {self.url} did not start")

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def servers(lab_model):
    """One that truncates first, and one as vLLM is."""
    started = [Serve(lab_model, *TRUNCATE_FIRST), Serve(lab_model)]
    yield [server.up() for server in started]
    for server in started:
        server.kill()


@pytest.fixture(scope="module")
def cluster():
    """Address of a local Ray cluster with two CPUs."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (the ray extra)")
    port = 6400 + os.getpid() % 1000  # outside of the ports that its workers take
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    start += ["--node-ip-address=127.0.0.1", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    process = subprocess.Popen([*start, "--object-store-memory=100000000"], env=os.environ | QUICK)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            ray.init(f"127.0.0.1:{port}", log_to_driver=False)
            break
        except (ConnectionError, RuntimeError):
            time.sleep(1)
    yield f"127.0.0.1:{port}"
    ray.shutdown()
    process.terminate()  # it ends its own
    process.wait()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(pool, "PROBE_S", 2.0)
    monkeypatch.setattr(pool, "LOST_AFTER_S", float(START_S))
    monkeypatch.setattr(openai, "CONCURRENCY", 64)  # else a small model may have answered everything before the kill


def complete(loaded, requests, at: int = -1, then=lambda: None) -> dict:
    """Samples by (problem, sample), each once; `then` is called after the `at`-th."""
    found = {}
    for number, sample in enumerate(loaded.generate(requests)):
        key = sample.problem_id, sample.sample_index
        assert key not in found
        found[key] = sample
        if number == at:
            then()
    assert found.keys() == {(request.problem_id, request.sample_index) for request in requests}
    return found


def agree(ours: dict, theirs: dict) -> None:
    assert {key: (s.token_ids, s.text, s.finish_reason) for key, s in ours.items()} == {
        key: (s.token_ids, s.text, s.finish_reason) for key, s in theirs.items()
    }


GREEDY = Decoding(temperature=0, max_tokens=64)


@pytest.fixture(scope="module")
def expected(lab_model, requests_to):
    requests = requests_to(lab_model, GREEDY, 40, 20)
    return complete(open_engine("transformers", lab_model, requests), requests)


def test_vllm_its_replicas_and_two_servers_give_the_greedy_tokens_of_transformers(
    lab_model, servers, expected, requests_to
):
    requests = requests_to(lab_model, GREEDY, 40, 20)
    for engine in ("vllm", "vllm:data_parallel_size=2"):
        agree(expected, complete(open_engine(engine, lab_model, requests), requests))
    both = f"openai:{servers[0].url},{servers[1].url}"
    agree(expected, complete(open_engine(both, lab_model, requests), requests))


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(temperature=5.0, top_p=0.8, temperature_last=True, max_tokens=1),
        Decoding(temperature=1.5, top_k=5, min_p=0.05, max_tokens=1),
    ],
    ids=str,
)
def test_a_server_draws_from_the_defined_distribution(lab_model, servers, requests_to, is_drawn_as_defined, decoding):
    """First tokens of one prompt, 1,000 draws against the definition (chi-squared)."""
    requests = requests_to(lab_model, decoding, 1, 1000)
    samples = complete(open_engine(f"openai:{servers[0].url}", lab_model, requests), requests)
    assert is_drawn_as_defined(lab_model, requests, [sample.token_ids[0] for sample in samples.values()])


def test_a_server_without_the_processor_is_refused_for_temperature_last(lab_model, servers, requests_to):
    requests = requests_to(lab_model, Decoding(top_p=0.8, temperature_last=True, max_tokens=8), 1, 1)
    with pytest.raises(ValueError, match="does not truncate before it tempers"):
        open_engine(f"openai:{servers[1].url}", lab_model, requests)


def test_of_two_servers_one_is_killed_for_good_and_the_other_is_killed_and_started_again(
    lab_model, servers, expected, requests_to
):
    requests = requests_to(lab_model, GREEDY, 40, 20)
    loaded = open_engine(f"openai:{servers[0].url},{servers[1].url}", lab_model, requests)
    agree(expected, complete(loaded, requests, 20, servers[1].kill))
    assert not loaded.places[1].up.is_set()
    again = []

    def restart() -> None:
        servers[0].kill()
        again.append(Serve(lab_model, *TRUNCATE_FIRST, port=servers[0].port))

    began = time.monotonic()
    try:
        agree(expected, complete(loaded, requests, 20, restart))
    finally:
        again[0].kill()
    assert loaded.places[0].down_since > began


def test_ray_gives_the_greedy_tokens_of_transformers_though_a_worker_is_killed(
    lab_model, cluster, expected, requests_to, monkeypatch
):
    monkeypatch.setattr("ssd.engines.ray.CONCURRENCY", 64)  # as in `impatient`
    requests = requests_to(lab_model, GREEDY, 40, 20)
    loaded = open_engine(f"ray:{cluster}", lab_model, requests)
    assert len(loaded.places) == 2
    agree(expected, complete(loaded, requests))
    worker, began = loaded.places[0], time.monotonic()
    pid = loaded.runner.run(_pid(worker))
    agree(expected, complete(loaded, requests, 20, lambda: os.kill(pid, signal.SIGKILL)))
    assert worker.down_since > began


async def _pid(worker) -> int:
    return await worker.actor.__ray_call__.remote(lambda _: os.getpid())

"""An engine that lacks memory says so in one line, with what to lower instead of a setting that no step has."""

import pytest
import torch
import transformers

from ssd.decoding import Decoding
from ssd.engines.opening import open_engine

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1 GiB is free."


@pytest.fixture
def vllm():
    return pytest.importorskip("vllm", reason="vLLM is not installed (the gpu extra, or its CPU build)")


@pytest.fixture
def requests(requests_to, lab_model):
    return requests_to(lab_model, Decoding(max_tokens=300), 2, 1)


@pytest.mark.parametrize(
    ("num_bytes", "message"),
    [
        (1 << 10, r"No available memory for the cache blocks; end other processes .* or give a smaller model$"),
        (1 << 18, r"To serve at least one request with .*\); lower max_tokens, end other processes "),
    ],
)
def test_vllm_without_room_for_its_cache_says_what_to_lower(vllm, requests, lab_model, monkeypatch, num_bytes, message):
    from ssd.engines import vllm as backend

    monkeypatch.setattr(backend, "CPU_CACHE_BYTES", num_bytes)
    with pytest.raises(ValueError, match=f"^engine=vllm: {message}"):
        open_engine("vllm", lab_model, requests)


@pytest.mark.slow
def test_vllm_without_room_in_a_process_of_its_own_points_to_its_message(vllm, requests, lab_model, monkeypatch):
    from ssd.engines import vllm as backend

    monkeypatch.setattr(backend, "CPU_CACHE_BYTES", 1 << 10)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ValueError, match=r"^engine=vllm: Engine core .* failed; its message is above; .*max_tokens"):
        open_engine("vllm", lab_model, requests)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError(CUDA), r"CUDA out of memory; end other processes .*tensor_parallel_size=2"),
        (
            ValueError(
                "Free memory on device cuda:0 (9.1/79.2 GiB) on startup is less than desired GPU memory utilization "
                "(0.9, 71.3 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
            ),
            r"Free memory on device cuda:0 \(9.1/79.2 GiB\) .*\); end other processes on the GPU",
        ),
    ],
    ids=["weights", "others"],
)
def test_vllm_on_a_gpu_without_room_says_what_to_do(vllm, requests, lab_model, monkeypatch, error, message):
    """As a GPU would have it: there is none here."""

    def no_room(**_):
        raise error

    monkeypatch.setattr(vllm, "LLM", no_room)
    with pytest.raises(ValueError, match=f"^engine=vllm: {message}"):
        open_engine("vllm", lab_model, requests)


def test_transformers_on_a_gpu_without_room_says_what_to_do(requests, lab_model, monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError(CUDA)

    loaded = open_engine("transformers", lab_model, requests)
    monkeypatch.setattr(transformers.GenerationMixin, "generate", no_room)
    with pytest.raises(ValueError, match=r"^engine=transformers: CUDA out of memory; .* or use engine=vllm$"):
        list(loaded.generate(requests))

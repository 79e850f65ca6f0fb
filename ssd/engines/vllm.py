"""vLLM in process as an engine: every request is in flight at once, each leaves as it finishes."""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch

if not torch.cuda.is_available():  # vLLM's CPU build: compiling and a second process cost more than a small model saves
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
else:  # that question has woken CUDA, which a forked process cannot use again
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # FlashInfer draws no request that has a seed, as ours have, yet compiling its kernels delays the start by 90 s.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm
from vllm.config.lora import MaxLoRARanks
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from ssd import adapters, models
from ssd.engines.pool import Place, Pool
from ssd.engines.request import Request, max_model_len
from ssd.engines.truncate_first import TruncateFirst
from ssd.engines.vllm_decoding import (
    TRUNCATE_FIRST,
    in_vllm,
    refuse_late_truncation_first,
    refuse_penalty_before_truncation,
    truncates_first,
)
from ssd.records import Sample

CPU_CACHE_BYTES = 512 << 20
MAX_NUM_SEQS = 512  # at once on a GPU: as many as vLLM has CUDA graphs for; beyond them a token costs 1.4 times as much
PARALLEL = ("tensor_parallel_size", "data_parallel_size")
MORE_GPUS = "lay the model over several GPUs (engine=vllm:tensor_parallel_size=2)"
OTHER_PROCESSES = "end other processes on the GPU (nvidia-smi lists them)"
# What to do where vLLM lacks memory, by a part of its message, which advises settings that a step does not have.
REMEDIES = {
    "No available memory for the cache blocks": f"{OTHER_PROCESSES}, {MORE_GPUS}, or give a smaller model",
    "To serve at least one request": f"lower max_tokens, {OTHER_PROCESSES}, or {MORE_GPUS}",
    "less than desired GPU memory utilization": OTHER_PROCESSES,
    "out of memory": f"{OTHER_PROCESSES}, {MORE_GPUS}, or give a smaller model",
    "root cause": f"its message is above; where it lacks memory, lower max_tokens, {OTHER_PROCESSES}, or {MORE_GPUS}",
}


class VLLMEngine:
    """One `vllm.LLM`, driven through its step loop so that no request waits for the slowest of a batch.

    `place` is empty or gives the parallelism over this machine's GPUs, in vLLM's words: `data_parallel_size=2` keeps
    the model on each of two, `tensor_parallel_size=2` lays it over two. `settings` go to vLLM over ours. An adapter
    is served beside its base, on one engine, once it has been seen to change a log-probability.
    """

    def __init__(self, model: str, requests: Sequence[Request], place: str = "", **settings: Any):
        refuse_penalty_before_truncation(requests, "vllm")
        length, first = max_model_len(requests, models.context_length(model)), truncates_first(requests)
        self.can_truncate_first = first
        settings |= _parallelism(place)
        tensor, data = (settings.get(name, 1) for name in PARALLEL)
        self.num_gpus = float(torch.cuda.is_available() * tensor * data)
        self.tokenizer = models.load_tokenizer(model)
        self.llm = self.replicas = self.adapter = None
        if tensor * data == 1:  # two processes would pass each other the log-probability of every token
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if data > 1:  # vllm.LLM has no data parallelism
            adapters.refuse(model, f"vllm:{place}")
            self.replicas = Pool([AsyncVLLM(model, length, first, **settings)], 2 * MAX_NUM_SEQS * data, first)
        else:
            if base := adapters.base_of(model):
                adapters.beside(models.load_empty(base), model)
            with _memory_errors():
                self.llm = vllm.LLM(**arguments(model, length, first) | settings)
            if base:
                self.adapter = LoRARequest("adapter", 1, model)
                self._check_adapter(_prompt(requests[0]))

    def _check_adapter(self, prompt: Mapping[str, list[int]]) -> None:
        """vLLM passes over what it does not know in an adapter, without a word, and would sample from its base."""
        params = vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=10)
        of_base, found = (
            self.llm.generate([prompt], params, lora_request=each, use_tqdm=False)[0].outputs[0].logprobs[0]
            for each in (None, self.adapter)
        )
        if {t: each.logprob for t, each in of_base.items()} == {t: each.logprob for t, each in found.items()}:
            raise ValueError(
                f"adapter {self.adapter.path} changes no log-probability in vLLM: it is untrained, or has names that "
                f"vLLM does not know; {adapters.MERGE}"
            )

    def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
        if self.replicas:
            yield from self.replicas.generate(requests)
            return
        requests = list(requests)
        refuse_late_truncation_first(requests, self.can_truncate_first)
        engine, in_flight = self.llm.llm_engine, {}
        for number, request in enumerate(requests):
            in_flight[str(number)] = request
            engine.add_request(str(number), _prompt(request), _sampling_params(request), lora_request=self.adapter)
        while engine.has_unfinished_requests():
            with _memory_errors():
                outputs = engine.step()
            for output in outputs:
                if output.finished:
                    yield _sample(in_flight.pop(output.request_id), output.outputs[0], self.tokenizer)


class AsyncVLLM(Place):
    """vLLM in processes beside this one, which completes one request a call."""

    def __init__(self, model: str, max_model_len: int, truncate_first: bool, **settings: Any):
        super().__init__("vllm")
        self.tokenizer = models.load_tokenizer(model)
        settings = {"disable_log_stats": True} | arguments(model, max_model_len, truncate_first) | settings
        engine_args = vllm.AsyncEngineArgs(**settings)
        with _memory_errors():
            self.llm = AsyncLLM.from_engine_args(engine_args, usage_context=UsageContext.LLM_CLASS)
        self.num_calls = 0

    async def complete(self, request: Request) -> Sample:
        self.num_calls += 1
        outputs = self.llm.generate(_prompt(request), _sampling_params(request), str(self.num_calls))
        async for output in outputs:
            completion = output.outputs[0]
        return _sample(request, completion, self.tokenizer)

    async def ready(self) -> None:
        await self.llm.check_health()

    async def close(self) -> None:
        self.llm.shutdown()


def arguments(model: str, max_model_len: int, truncate_first: bool) -> dict[str, Any]:
    """vLLM's arguments for `model` on this machine; `truncate_first` where a request will need TruncateFirst.

    Without need it is left out: the model runner that draws by the seeds of all requests in one kernel takes none.
    """
    models.load_tokenizer(model)  # its errors say what is missing; vLLM's do not
    config = models.load_config(model)
    settings = {"model": model, "max_model_len": max_model_len, "dtype": "auto", "trust_remote_code": False}
    if base := adapters.base_of(model):
        rank = PEFTHelper.from_local_dir(model, None).r
        settings |= {"model": base, "enable_lora": True}
        settings["max_lora_rank"] = min((each for each in get_args(MaxLoRARanks) if each >= rank), default=rank)
    if truncate_first:
        settings["logits_processors"] = [TruncateFirst]
    if current_platform.is_cpu():
        settings |= {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
        settings["enable_chunked_prefill"] = False  # with a seed a request it fails: a CPU generator has no offset
    elif not torch.cuda.is_available():
        raise ValueError("engine=vllm needs a GPU and there is none; use engine=transformers or vLLM's CPU build")
    else:
        settings["max_num_seqs"] = MAX_NUM_SEQS
    if hasattr(config, "vision_config"):
        settings["limit_mm_per_prompt"] = {"image": 0, "video": 0}
    if config.model_type.startswith("qwen3_5") and torch.cuda.is_available():
        settings["additional_config"] = {"gdn_prefill_backend": "triton"}
    return settings


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """ValueError with one of REMEDIES where vLLM ends for want of memory."""
    try:
        yield
    except (ValueError, RuntimeError, EngineDeadError) as error:
        remedy = next((remedy for part, remedy in REMEDIES.items() if part in str(error)), None)
        if remedy is None:
            raise
        raise ValueError(f"engine=vllm: {str(error).split('. ')[0]}; {remedy}") from error


def _parallelism(place: str) -> Mapping[str, int]:
    words = dict(word.partition("=")[::2] for word in place.split(",") if word)
    if not all(name in PARALLEL and size.isdecimal() and int(size) > 0 for name, size in words.items()):
        raise ValueError(f"engine=vllm:{place} is not vllm:tensor_parallel_size=N,data_parallel_size=M")
    return {name: int(size) for name, size in words.items()}


def _prompt(request: Request) -> dict[str, list[int]]:
    return {"prompt_token_ids": list(request.prompt_token_ids)}


def _sampling_params(request: Request) -> vllm.SamplingParams:
    decoding = request.decoding
    asked, first = in_vllm(decoding)
    return vllm.SamplingParams(
        **asked,
        extra_args={TRUNCATE_FIRST: first} if first else None,
        max_tokens=decoding.max_tokens,
        stop=list(decoding.stop),
        seed=request.seed,
        detokenize=bool(decoding.stop),  # else once, at the end
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sample(request: Request, completion: vllm.CompletionOutput, tokenizer) -> Sample:
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended problem {request.problem_id} with {completion.finish_reason!r}; see its log")
    token_ids = list(completion.token_ids)
    return Sample(
        problem_id=request.problem_id,
        sample_index=request.sample_index,
        prompt_token_ids=list(request.prompt_token_ids),
        token_ids=token_ids,
        text=tokenizer.decode(token_ids, skip_special_tokens=True),
        finish_reason=completion.finish_reason,
        cumulative_logprob=math.nan,  # nothing reads it, and to ask for it would halve the rate
    )

"""vLLM in process as an engine: every request is in flight at once, each leaves as it finishes."""

import os
from collections.abc import Iterable, Iterator, Sequence

import torch

if not torch.cuda.is_available():  # vLLM's CPU build: compiling and a second process cost more than a small model saves
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from ssd import models
from ssd.engines import Decoding, Request, max_model_len
from ssd.engines.logits import truncate
from ssd.records import Sample

CPU_CACHE_BYTES = 512 << 20


class VLLMEngine:
    """One `vllm.LLM`, driven through its step loop so that no request waits for the slowest of a batch."""

    def __init__(self, model: str, requests: Sequence[Request]):
        for decoding in {request.decoding for request in requests}:
            if decoding.temperature_last and decoding.presence_penalty:
                raise ValueError(
                    f"engine=vllm applies presence_penalty={decoding.presence_penalty:g} after temperature_last has "
                    "truncated, not before; set one of them only, or use engine=transformers"
                )
        length = max_model_len(requests, models.context_length(model))
        models.load_tokenizer(model)  # its errors say what is missing; vLLM's do not
        config = models.load_config(model)
        settings = {"dtype": "auto", "trust_remote_code": False}
        if current_platform.is_cpu():
            settings |= {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
            settings["enable_chunked_prefill"] = False  # with a seed a request it fails: a CPU generator has no offset
        elif not torch.cuda.is_available():
            raise ValueError("engine=vllm needs a GPU and there is none; use engine=transformers or vLLM's CPU build")
        if hasattr(config, "vision_config"):
            settings["limit_mm_per_prompt"] = {"image": 0, "video": 0}
        if config.model_type == "qwen3_5" and torch.cuda.is_available():
            settings["additional_config"] = {"gdn_prefill_backend": "triton"}
        self.llm = vllm.LLM(model=model, max_model_len=length, logits_processors=[TruncateFirst], **settings)

    def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
        engine, in_flight = self.llm.llm_engine, {}
        for number, request in enumerate(requests):
            in_flight[str(number)] = request
            prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
            engine.add_request(str(number), prompt, _sampling_params(request.decoding, request.seed))
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    yield _sample(in_flight.pop(output.request_id), output.outputs[0])


def _sampling_params(decoding: Decoding, seed: int) -> vllm.SamplingParams:
    shared = {
        "temperature": decoding.temperature,
        "presence_penalty": decoding.presence_penalty,
        "max_tokens": decoding.max_tokens,
        "seed": seed,
        "logprobs": 0,  # the drawn token's own, under the untouched model
    }
    truncation = {"top_k": decoding.top_k, "top_p": decoding.top_p, "min_p": decoding.min_p}
    if decoding.temperature_last:
        return vllm.SamplingParams(**shared, extra_args={"truncate_first": truncation})
    return vllm.SamplingParams(**shared, **truncation)


def _sample(request: Request, completion: vllm.CompletionOutput) -> Sample:
    return Sample(
        problem_id=request.problem_id,
        sample_index=request.sample_index,
        prompt_token_ids=list(request.prompt_token_ids),
        token_ids=list(completion.token_ids),
        text=completion.text,
        finish_reason="length" if completion.finish_reason == "length" else "stop",
        cumulative_logprob=completion.cumulative_logprob,
    )


class TruncateFirst(LogitsProcessor):
    """`temperature_last`: vLLM calls this on the raw logits, before it divides them by the temperature."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.truncation_by_row: dict[int, Decoding] = {}

    def is_argmax_invariant(self) -> bool:
        return False  # it never moves the maximum, but argmax-invariant processors are called after the temperature

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        def truncation(params, prompt_token_ids, output_token_ids) -> Decoding | None:
            arguments = (params.extra_args or {}).get("truncate_first")
            return Decoding(**arguments) if arguments else None

        process_dict_updates(self.truncation_by_row, batch_update, truncation)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for decoding in set(self.truncation_by_row.values()):
            rows = [row for row, truncation in self.truncation_by_row.items() if truncation == decoding]
            logits[rows] = truncate(logits[rows], decoding)
        return logits

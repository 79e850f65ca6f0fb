"""transformers' `generate` as an engine: the laptop's fallback, one batch of one decoding at a time."""

import collections
import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import transformers
from torch import Tensor

from ssd import models
from ssd.decoding import Decoding
from ssd.engines.logits import next_token_probs
from ssd.engines.request import Request, max_model_len
from ssd.records import Sample

# Cells of a batch's key-value cache. Small models are bound by the cost of a step, so they want the largest batch.
TOKENS_IN_FLIGHT = 1 << 16
MAX_BATCH = 512


class TransformersEngine:
    """`generate` draws no token here: `_Sampler` does, so that seeds, orders and log-probabilities are ours."""

    def __init__(self, model: str, requests: Sequence[Request], place: str = ""):
        if place:
            raise ValueError(f"engine=transformers:{place} names a place, and it has but one; use engine=transformers")
        self.max_model_len = max_model_len(requests, models.context_length(model))
        self.tokenizer = models.load_tokenizer(model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.num_gpus = float(torch.cuda.is_available())
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        with _memory_errors():
            self.model = models.load_weights(model, dtype).to(self.device).eval()
        eos_ids = self.model.generation_config.eos_token_id
        self.eos_ids = set(eos_ids) if isinstance(eos_ids, list) else {eos_ids}
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.eos_ids)
        # The model's own temperature and truncation are not wanted: `_Sampler` is all of the decoding.
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=sorted(self.eos_ids), pad_token_id=self.pad_id
        )

    def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
        size = max(1, min(MAX_BATCH, TOKENS_IN_FLIGHT // self.max_model_len))
        for _, same_decoding in itertools.groupby(requests, key=lambda request: request.decoding):
            while batch := list(itertools.islice(same_decoding, size)):
                with _memory_errors():
                    samples = self._complete(batch)
                yield from samples

    @torch.inference_mode()
    def _complete(self, batch: Sequence[Request]) -> list[Sample]:
        decoding, width = batch[0].decoding, max(len(request.prompt_token_ids) for request in batch)
        prompt_BT = torch.zeros((len(batch), width), dtype=torch.long)
        mask_BT = torch.zeros_like(prompt_BT)
        for row, request in enumerate(batch):
            start = width - len(request.prompt_token_ids)
            # Padding is not attended to; a token of the prompt is one that the repetition penalty knows already.
            prompt_BT[row, :start] = request.prompt_token_ids[0]
            prompt_BT[row, start:] = torch.tensor(request.prompt_token_ids)
            mask_BT[row, start:] = 1
        sampler = _Sampler(decoding, [request.seed for request in batch], width)
        stops = [_Stops(self.tokenizer, list(decoding.stop), width)] if decoding.stop else []
        output_BT = self.model.generate(
            prompt_BT.to(self.device),
            attention_mask=mask_BT.to(self.device),
            max_new_tokens=decoding.max_tokens,
            logits_processor=transformers.LogitsProcessorList([sampler]),
            stopping_criteria=transformers.StoppingCriteriaList(stops),
        )
        logprob_BT = torch.stack(sampler.logprobs, dim=1)
        samples = []
        for row, (request, row_T) in enumerate(zip(batch, output_BT[:, width:].tolist(), strict=True)):
            length = next((t + 1 for t, token in enumerate(row_T) if token in self.eos_ids), len(row_T))
            stopped = min((stop.length_B[row] for stop in stops), default=math.inf)
            length = min(length, stopped)
            samples.append(
                Sample(
                    problem_id=request.problem_id,
                    sample_index=request.sample_index,
                    prompt_token_ids=list(request.prompt_token_ids),
                    token_ids=row_T[:length],
                    text=self.tokenizer.decode(row_T[:length], skip_special_tokens=True),
                    finish_reason="stop" if row_T[length - 1] in self.eos_ids or length == stopped else "length",
                    cumulative_logprob=float(logprob_BT[row, :length].sum()),
                )
            )
        return samples


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """ValueError that says what to do where the GPU's memory is too small."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"engine=transformers: {str(error).split('. ')[0]}; end other processes on the GPU (nvidia-smi lists "
            "them), or use engine=vllm"
        ) from error


class _Sampler(transformers.LogitsProcessor):
    """Draw each row's token by its own seed and leave `generate`, which is greedy, no other choice."""

    def __init__(self, decoding: Decoding, seeds: Sequence[int], prompt_width: int):
        self.decoding = decoding
        self.seeds_B = np.array(seeds, dtype=np.uint64)
        self.prompt_width = prompt_width
        self.logprobs: list[Tensor] = []  # of the drawn token under the untouched model, one (B,) a step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        generated_BT = input_ids[:, self.prompt_width :]
        probs_BV = next_token_probs(scores.float(), self.decoding, generated_BT, input_ids[:, : self.prompt_width])
        uniform_B = torch.from_numpy(_uniform(self.seeds_B, generated_BT.shape[1])).to(scores.device)
        cumulative_BV = probs_BV.double().cumsum(-1)
        # A draw in (0, total]: the first token whose cumulative mass reaches it has mass of its own.
        target_B1 = (1 - uniform_B)[:, None] * cumulative_BV[:, -1:]
        token_B = torch.searchsorted(cumulative_BV, target_B1).squeeze(-1).clamp(max=scores.shape[-1] - 1)
        self.logprobs.append(scores.float().log_softmax(-1).gather(-1, token_B[:, None]).squeeze(-1).cpu())
        return torch.full_like(scores, -torch.inf).scatter_(-1, token_B[:, None], 0.0)


class _Stops(transformers.StopStringCriteria):
    """Ends a row with a stop string, and keeps after how many tokens: behind them is padding."""

    def __init__(self, tokenizer, stop_strings: list[str], prompt_width: int):
        super().__init__(tokenizer, stop_strings)
        self.prompt_width = prompt_width
        self.length_B: dict[int, int] = collections.defaultdict(lambda: math.inf)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        # The text of the prompt is not the completion's.
        done_B = super().__call__(input_ids[:, self.prompt_width :], scores, **kwargs)
        for row in done_B.nonzero()[:, 0].tolist():
            self.length_B[row] = min(self.length_B[row], input_ids.shape[1] - self.prompt_width)
        return done_B


def _uniform(seeds_B: np.ndarray, step: int) -> np.ndarray:
    """Uniform draws in [0, 1) from (seed, step) alone (SplitMix64, Steele et al. 2014), so batches do not matter."""
    with np.errstate(over="ignore"):
        z = seeds_B * np.uint64(0x9E3779B97F4A7C15) + np.uint64(step + 1) * np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53

"""Truncation before the temperature, in vLLM: its logits processor, in process or `vllm serve --logits-processors`."""

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from ssd.decoding import Decoding
from ssd.engines.logits import truncate
from ssd.engines.vllm_decoding import TRUNCATE_FIRST


class TruncateFirst(LogitsProcessor):
    """`temperature_last`, and what a temperature exceeds 2: vLLM calls this on the raw logits.

    A server has it by `vllm serve MODEL --logits-processors ssd.engines.truncate_first:TruncateFirst`. A request
    brings the extra argument TRUNCATE_FIRST: top_k, top_p and min_p, and what to divide by then
    (`vllm_decoding.in_vllm`).
    """

    def __init__(self, vllm_config, device, is_pin_memory):
        self.first_by_row: dict[int, tuple[Decoding, float]] = {}

    def is_argmax_invariant(self) -> bool:
        return False  # it never moves the maximum, but argmax-invariant processors are called after the temperature

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        def first(params, prompt_token_ids, output_token_ids) -> tuple[Decoding, float] | None:
            given = (params.extra_args or {}).get(TRUNCATE_FIRST)
            if not given:
                return None
            top_k, top_p, min_p, divisor = given
            return Decoding(top_k=int(top_k), top_p=top_p, min_p=min_p), divisor

        process_dict_updates(self.first_by_row, batch_update, first)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for each in set(self.first_by_row.values()):
            rows = [row for row, first in self.first_by_row.items() if first == each]
            decoding, divisor = each
            logits[rows] = truncate(logits[rows], decoding) / divisor
        return logits

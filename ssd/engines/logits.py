"""What a decoding does to logits: the reference that every engine's sampler is tested against."""

import math

import torch
from torch import Tensor

from ssd.decoding import Decoding


def next_token_probs(
    logits_BV: Tensor, decoding: Decoding, generated_BT: Tensor, prompt_BT: Tensor | None = None
) -> Tensor:
    """Distribution that the next token is drawn from, shape (B, V), after `decoding` has acted on the logits.

    `generated_BT` holds the tokens generated so far, which both penalties act on, `prompt_BT` those of the prompts,
    which the repetition penalty (Keskar et al. 2019, section 4.1) acts on too.
    """
    if decoding.repetition_penalty != 1:
        seen_BT = generated_BT if prompt_BT is None else torch.cat([prompt_BT, generated_BT], dim=1)
        of_seen_BT = logits_BV.gather(-1, seen_BT)
        factor_BT = torch.where(of_seen_BT > 0, 1 / decoding.repetition_penalty, decoding.repetition_penalty)
        logits_BV = logits_BV.scatter(-1, seen_BT, of_seen_BT * factor_BT)
    if decoding.presence_penalty:
        seen_BV = torch.zeros_like(logits_BV).scatter_(-1, generated_BT, 1.0)
        logits_BV = logits_BV - decoding.presence_penalty * seen_BV
    if decoding.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
    if decoding.temperature_last:
        return (truncate(logits_BV, decoding) / decoding.temperature).softmax(-1)
    return truncate(logits_BV / decoding.temperature, decoding).softmax(-1)


def truncate(logits_BV: Tensor, decoding: Decoding) -> Tensor:
    """Logits with the tokens that min-p, top-k and top-p drop, in vLLM's order, at minus infinity; shape (B, V)."""
    if decoding.min_p:
        floor_B1 = logits_BV.max(-1, keepdim=True).values + math.log(decoding.min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, -torch.inf)
    if 0 < decoding.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(decoding.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if decoding.top_p < 1:
        sorted_BV, order_BV = logits_BV.softmax(-1).sort(descending=True)
        dropped_BV = sorted_BV.cumsum(-1) - sorted_BV >= decoding.top_p  # mass before the token already suffices
        logits_BV = logits_BV.masked_fill(dropped_BV.scatter(-1, order_BV, dropped_BV), -torch.inf)
    return logits_BV

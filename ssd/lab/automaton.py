"""The paper's toy automaton in closed form: one path through a root, a fork and three locks.

Sixteen tokens. The root leads to one of two equal paths or fails; each path is a fork and three locks; a run passes
where every state draws its right token. One temperature serves all states: cold, the root and the fork take their
likeliest token, which is wrong; hot, the locks break. Self-distillation truncates each state by itself.

Source: arXiv 2604.01193, section C.4. It publishes the four likeliest tokens of each state and says that the other
twelve fall geometrically; their ratio, one half, is the one at which its supports and its figures come out.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ssd.decoding import Decoding
from ssd.engines.logits import next_token_probs

NUM_TOKENS = 16
HEADS = {
    "root": (0.200, 0.190, 0.329, 0.126),
    "fork": (0.148, 0.280, 0.140, 0.144),
    "lock": (0.750, 0.055, 0.050, 0.037),
}
RIGHT = {"root": (0, 1), "fork": (0,), "lock": (0,)}
VISITS = {"root": 1, "fork": 1, "lock": 3}
TAIL_RATIO = 0.5
TRAINING = Decoding(temperature=0.9, top_p=0.85)
EVAL_TOP_P = 0.80


def teacher() -> dict[str, Tensor]:
    """Distribution of each state's next token, shape (16,), float64."""
    tail = TAIL_RATIO ** torch.arange(NUM_TOKENS - 4, dtype=torch.float64)
    heads = {state: torch.tensor(head, dtype=torch.float64) for state, head in HEADS.items()}
    return {state: torch.cat([head, (1 - head.sum()) * tail / tail.sum()]) for state, head in heads.items()}


def student(training: Decoding = TRAINING) -> dict[str, Tensor]:
    """What self-distillation converges to: the teacher's distributions as `training` decodes them."""
    return {state: decoded(probs, training) for state, probs in teacher().items()}


def decoded(probs_V: Tensor, decoding: Decoding) -> Tensor:
    """Distribution that `decoding` draws from where the model's is `probs_V`, shape (V,)."""
    return next_token_probs(probs_V.log()[None], decoding, torch.empty(1, 0, dtype=torch.long))[0]


def pass_rate(states: Mapping[str, Tensor], temperature: float, top_p: float = EVAL_TOP_P) -> float:
    r"""Chance of a pass under `temperature` and then `top_p`.

    .. math:: P = \big(q_{root}(A) + q_{root}(B)\big) \, q_{fork}(right) \, q_{lock}(right)^3

    Examples
    --------
    >>> round(pass_rate(student(), temperature=2.091), 4)
    0.1377
    """
    rate = 1.0
    for state, probs_V in states.items():
        drawn_V = decoded(probs_V, Decoding(temperature=temperature, top_p=top_p))
        rate *= float(drawn_V[list(RIGHT[state])].sum()) ** VISITS[state]
    return rate


def best(states: Mapping[str, Tensor], temperatures: Sequence[float], top_p: float = EVAL_TOP_P) -> tuple[float, float]:
    """Highest pass rate over `temperatures`, and where it is."""
    return max((pass_rate(states, temperature, top_p), temperature) for temperature in temperatures)

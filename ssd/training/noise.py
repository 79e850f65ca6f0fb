"""The noise trap, watched: is there a signal in the gradient, and do the weights move by more than they are stored in?

Self-training without truncation has an expected gradient of zero, and small learning rates move bfloat16 weights by
less than their last bit. Both look like training from the loss alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

MAX_WATCHED = 1 << 22  # weights, drawn at random: the share that changed is known to 0.05 points


class Signal(NamedTuple):
    """Unbiased estimates for one batch: |G|^2 of the true gradient, and the squared noise of the batch's own mean."""

    signal: float
    noise: float


def split(norm2_of_sum: float, norm2_by_part: Sequence[float], share_by_part: Sequence[float]) -> Signal:
    r"""Split the squared norm of a batch's gradient into signal and noise, from the gradients of its micro-batches.

    .. math:: g = \sum_j g_j, \qquad E|g_j|^2 = w_j^2 |G|^2 + w_j \, tr(\Sigma)/N, \qquad
              \widehat{|G|^2} = \frac{|g|^2 - \sum_j |g_j|^2}{1 - \sum_j w_j^2}, \qquad
              \widehat{tr(\Sigma)/N} = |g|^2 - \widehat{|G|^2}

    with :math:`w_j` the share of the batch's N target tokens in micro-batch j. Both are NaN with one micro-batch. A
    signal below 0 is as likely as one above where the true gradient is zero.

    References
    ----------
    McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1, for micro-batches of unequal size. The simple noise scale
    is noise / signal times the batch size.

    Examples
    --------
    >>> split(norm2_of_sum=5.0, norm2_by_part=[1.5, 1.5], share_by_part=[0.5, 0.5])
    Signal(signal=4.0, noise=1.0)
    """
    spread = 1 - sum(share**2 for share in share_by_part)
    if len(norm2_by_part) < 2 or spread <= 0:
        return Signal(math.nan, math.nan)
    signal = (norm2_of_sum - sum(norm2_by_part)) / spread
    return Signal(signal, norm2_of_sum - signal)


def split_first(norm2_of_sum: float, norm2_of_first: float, share_of_first: float) -> Signal:
    r"""The same from the whole batch's gradient and that of its first part alone, whose share of the tokens is w.

    .. math:: \widehat{|G|^2} = \frac{w |g|^2 - |g_1|^2}{w (1 - w)}

    For gradients that are summed over processes as they are computed: the other parts are never seen alone. It is less
    precise than `split`.

    References
    ----------
    McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1.

    Examples
    --------
    >>> split_first(norm2_of_sum=5.0, norm2_of_first=1.5, share_of_first=0.5)
    Signal(signal=4.0, noise=1.0)
    """
    if not 0 < share_of_first < 1:
        return Signal(math.nan, math.nan)
    signal = (share_of_first * norm2_of_sum - norm2_of_first) / (share_of_first * (1 - share_of_first))
    return Signal(signal, norm2_of_sum - signal)


class Gradients:
    """Squared norms of the gradients of the micro-batches of one optimizer step, read as they are computed."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.norm2_by_part: list[Tensor] = []
        self.num_tokens_by_part: list[float] = []
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(self._add)

    def begin_part(self, num_tokens: float) -> None:
        self.num_tokens_by_part.append(num_tokens)
        self.norm2_by_part.append(torch.zeros(()))

    def end_step(self, norm: float) -> Signal:
        """Signal and noise of the step whose summed gradient has this norm; begins the next step."""
        total = sum(self.num_tokens_by_part)
        parts = [float(each) for each in self.norm2_by_part]
        found = (
            split(norm**2, parts, [tokens / total for tokens in self.num_tokens_by_part]) if total else split(0, [], [])
        )
        self.norm2_by_part, self.num_tokens_by_part = [], []
        return found

    def _add(self, gradient: Tensor) -> None:
        norm2 = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32) ** 2
        self.norm2_by_part[-1] = self.norm2_by_part[-1].to(norm2.device) + norm2


class Weights:
    """How far the weights have moved from where they began, on a random part of them.

    Where each process holds a part of the weights, `add_up` sums a tensor over the processes.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], seed: int = 0, add_up: Callable[[Tensor], Tensor] = lambda sums: sums
    ):
        held = [(parameter, local(parameter).numel()) for parameter in parameters if parameter.requires_grad]
        share = min(1.0, MAX_WATCHED / max(1, sum(size for _, size in held)))
        generator = torch.Generator().manual_seed(seed)
        self.watched = [
            (parameter, torch.randint(size, (math.ceil(share * size),), generator=generator))
            for parameter, size in held
            if size
        ]
        self.initial = self.former = self._now()
        self.add_up = add_up

    def resume(self) -> None:
        """Go on from the weights as they are now: the next step begins here, though all of them began elsewhere."""
        self.former = self._now()

    def end_step(self) -> dict[str, float]:
        """Metrics after an optimizer step.

        `weights_changed` is the share of weights whose bfloat16 value is another than at the start, `displacement` the
        distance from the start over the norm of the start, `update_ratio` the norm of this step over that of the
        weights.
        """
        now = self._now()
        is_changed = now.bfloat16() != self.initial.bfloat16()
        squares = [part.double().square().sum() for part in (now - self.initial, self.initial, now - self.former, now)]
        counts = torch.tensor([float(is_changed.sum()), float(now.numel())], dtype=torch.double)
        changed, number, moved2, initial2, step2, now2 = self.add_up(torch.cat([counts, torch.stack(squares)])).tolist()
        self.former = now
        return {
            "weights_changed": changed / number,
            "displacement": math.sqrt(moved2 / initial2),
            "update_ratio": math.sqrt(step2 / now2),
        }

    def _now(self) -> Tensor:
        parts = [local(parameter).reshape(-1)[where.to(parameter.device)] for parameter, where in self.watched]
        return torch.cat([part.float().cpu() for part in parts])


def local(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`: all of it, or its shard."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def warnings(history: Sequence[Mapping[str, float]], least_changed: float = 1e-3) -> list[str]:
    """What a person should know of a training run, from its metrics by step: a lost signal, weights that did not move.

    The mean signal over the steps is taken for none where Student's one-sided 97.5% bound does not exceed 0.
    """
    found = []
    signals = np.array(
        [row["gradient_signal"] for row in history if math.isfinite(row.get("gradient_signal", math.nan))]
    )
    if len(signals) > 1:
        half = special.stdtrit(len(signals) - 1, 0.975) * signals.std(ddof=1) / math.sqrt(len(signals))
        if signals.mean() <= half:
            found.append(
                f"The gradient has no signal that can be told from its noise: |G|^2 = {signals.mean():.2g} "
                f"+- {half:.2g} over {len(signals)} steps. What changes is luck of samples and batches, as is "
                "expected of samples at temperature 1 without truncation."
            )
    changed = [row["weights_changed"] for row in history if "weights_changed" in row]
    if changed and changed[-1] < least_changed:
        found.append(
            f"Only {changed[-1]:.2%} of the weights have another bfloat16 value than before: the checkpoint is nearly "
            "the base model. Raise lr or epochs."
        )
    return found

"""Qwen3.5's layers for training on a GPU: what lies between the matrix products in one kernel, not one an operation.

The values are those of transformers under bfloat16 autocast: norms and gates are computed in float32, and rounded once
to what the next matrix product takes.
"""

import torch
from torch import Tensor, nn


def install(model: nn.Module) -> None:
    """Give every norm, gate and convolution of `model` (transformers' Qwen3.5) its kernel."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as layers

    for module in model.modules():
        if isinstance(module, layers.Qwen3_5RMSNorm):
            module.forward = lambda x, module=module: _rms_norm(x, module.weight, module.eps)
        elif isinstance(module, layers.Qwen3_5RMSNormGated):
            module.forward = lambda x, gate, module=module: _rms_norm_gated(
                x, gate, module.weight, module.variance_epsilon
            )
        elif isinstance(module, layers.Qwen3_5MLP):
            module.forward = lambda x, module=module: module.down_proj(_swiglu(module.gate_proj(x), module.up_proj(x)))
    layers.causal_conv1d_fn = _causal_conv1d


@torch.compile(dynamic=True)
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (normed * (1 + weight.float())).to(torch.bfloat16)


@torch.compile(dynamic=True)
def _rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (weight * normed * nn.functional.silu(gate.float())).to(torch.bfloat16)


@torch.compile(dynamic=True)
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return (nn.functional.silu(gate.float()) * up.float()).to(torch.bfloat16)


def _causal_conv1d(x_BDT: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_):
    """Depthwise, along the sequence as it lies in memory: `x_BDT` is a transposed view."""
    from fla.modules.causal_conv1d import causal_conv1d

    out_BTD, _ = causal_conv1d(x_BDT.transpose(1, 2), weight, bias, activation=activation)
    return out_BTD.transpose(1, 2)

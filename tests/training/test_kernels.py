"""The fused layers compute what transformers' do, rounded once to bfloat16."""

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as layers

from ssd.training import kernels


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """The functions as written: compiling them takes a GPU's toolchain, and changes no value."""
    for name in ("_rms_norm", "_rms_norm_gated", "_swiglu"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name)._torchdynamo_orig_callable)
    monkeypatch.setattr(layers, "causal_conv1d_fn", layers.causal_conv1d_fn)  # `install` replaces it


def test_norms_and_gates_are_those_of_transformers():
    torch.manual_seed(0)
    config = layers.Qwen3_5TextConfig(hidden_size=64, intermediate_size=96)
    modules = {
        "norm": (layers.Qwen3_5RMSNorm(64), [torch.randn(2, 7, 64)]),
        "gated": (layers.Qwen3_5RMSNormGated(64), [torch.randn(14, 64), torch.randn(14, 64)]),
        "mlp": (layers.Qwen3_5MLP(config, 96), [torch.randn(2, 7, 64)]),
    }
    for module, _ in modules.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    for name, (module, inputs) in modules.items():
        inputs = [each.requires_grad_() for each in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            expected = module(*inputs)
            of_expected = torch.autograd.grad(expected.float().square().sum(), [*inputs, *module.parameters()])
            kernels.install(module)
            found = module(*inputs)
            of_found = torch.autograd.grad(found.float().square().sum(), [*inputs, *module.parameters()])
        for one, other in zip((found, *of_found), (expected, *of_expected), strict=True):
            difference = (one.float() - other.float()).norm() / other.float().norm()
            assert difference < 2**-7, name

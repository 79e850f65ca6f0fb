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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the delta rule's kernels need a GPU")
@pytest.mark.parametrize("batch_size", [1, 2])
def test_on_a_gpu_the_gradient_of_each_weight_is_that_of_plain_torch_in_float32(batch_size, monkeypatch):
    """Also for a single sequence, which is a micro-batch of long texts."""
    torch.manual_seed(0)
    config = layers.Qwen3_5TextConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=64, linear_value_head_dim=64, max_position_embeddings=1024,
    )  # fmt: skip
    model = layers.Qwen3_5ForCausalLM(config).cuda()
    ids = torch.randint(512, (batch_size, 512), device="cuda")

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    with monkeypatch.context() as plain:
        for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):
            plain.setattr(layers, name, getattr(layers, name).__wrapped__)
        expected = gradients()
    kernels.install(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cuda", torch.bfloat16):
        found = gradients()
    for name, gradient in expected.items():
        is_of_decay = name.endswith(("dt_bias", "A_log"))  # sums that nearly cancel, so bfloat16 shows
        assert (found[name] - gradient).norm() < (0.2 if is_of_decay else 0.05) * gradient.norm(), name

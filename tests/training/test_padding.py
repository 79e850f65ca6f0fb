"""Sequences of unequal length share a micro-batch: padding changes no gradient."""

import datasets
import pytest
import torch
import transformers

from ssd.lab import tokenizer as lab_tokenizer
from ssd.training import sft

SETTINGS = {"lr": 1e-3, "epochs": 1.0, "max_length": 1024, "lora_rank": 0, "save_steps": 100, "seed": 0}
LENGTHS = (700, *[704] * 7)  # two a micro-batch, so that one of four is padded, to 704 = 5 * 128 + 64


@pytest.fixture
def massive_head(tmp_path) -> str:
    """A Qwen2 of one layer whose queries all score every key about -120, as one head of Qwen2.5 does on real text."""
    folder, tokenizer = str(tmp_path / "model"), lab_tokenizer.build()
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():  # the coordinate that rotary embedding turns least
        attention.q_proj.bias[31], attention.k_proj.bias[31] = 1.0, -120 * 64**0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def dataset() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 20, (length,), generator=generator).tolist() for length in LENGTHS]
    masks = [[0] * 10 + [1] * (length - 10) for length in LENGTHS]
    names = [f"p{number}" for number in range(len(LENGTHS))]
    return datasets.Dataset.from_dict({"problem_id": names, "input_ids": ids, "completion_mask": masks})


def first_norm(model: str, dataset: datasets.Dataset, folder) -> float:
    norms = []
    report = lambda _, metrics: norms.append(metrics["grad_norm"]) if "grad_norm" in metrics else None  # noqa: E731
    sft.train(model, dataset, folder, global_batch_size=8, on_log=report, **SETTINGS)
    return norms[0]


def test_attention_is_given_no_mask_of_padding(massive_head, dataset, tmp_path, monkeypatch):
    """With one, cuDNN's backward pass on Hopper gives not-a-number at these lengths (the next test, on a GPU)."""
    masks, original = [], torch.nn.functional.scaled_dot_product_attention

    def recording(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return original(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    padded = first_norm(massive_head, dataset, tmp_path / "run")
    assert masks and all(mask is None for mask in masks)
    monkeypatch.setattr(sft, "LEAST_MICRO_BATCHES", 8)  # one sequence each: nothing is padded
    assert padded == pytest.approx(first_norm(massive_head, dataset, tmp_path / "alone"), rel=0.01 if gpu() else 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel that fails is for Hopper GPUs")
def test_with_a_mask_the_gradient_may_not_be_finite_and_the_error_names_problems_and_weights(
    massive_head, dataset, tmp_path, monkeypatch
):
    """What the mend is for. If this fails, the library was mended, and the mask may come back."""
    monkeypatch.setattr(sft, "_drop_mask", lambda module, args, kwargs: (args, kwargs))
    with pytest.raises(ValueError, match=r"step 1: loss .*first model.*problems p0, p[1-7].*learning rate is not"):
        first_norm(massive_head, dataset, tmp_path / "run")
    assert (tmp_path / "run" / "not_finite.pt").exists()


def gpu() -> bool:
    return torch.cuda.is_available()

"""An adapter is read as the model that it makes of its base, or refused."""

import json

import peft
import pytest
import safetensors.torch
import torch

from ssd import models


@pytest.fixture
def adapter(lab_model, tmp_path):
    """A LoRA adapter of the lab's model, with weights as training leaves them: none is zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(models.load_weights(lab_model, torch.float32), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(adapter, change) -> None:
    file = adapter / "adapter_model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file)


def test_an_adapter_given_as_a_model_says_what_peft_says_and_not_what_its_base_says(lab_model, adapter, tmp_path):
    folder = models.whole(str(adapter), tmp_path / "merged")
    ids = torch.arange(3, 30)[None]
    with torch.inference_mode():
        of_base = models.load_weights(lab_model, torch.float32)(ids).logits
        of_peft = peft.PeftModel.from_pretrained(models.load_weights(lab_model, torch.float32), adapter)(ids).logits
        ours = models.load_weights(folder, torch.float32)(ids).logits
    torch.testing.assert_close(ours, of_peft, atol=1e-3, rtol=1e-3)
    assert (ours - of_base).abs().max() > 0.1
    assert models.load_tokenizer(folder).get_vocab() == models.load_tokenizer(lab_model).get_vocab()
    assert models.whole(str(adapter), tmp_path / "merged") == folder  # it is not made again
    assert models.whole(lab_model, tmp_path / "other") == lab_model and not (tmp_path / "other").exists()


def test_an_adapter_with_keys_that_its_base_does_not_have_is_refused(adapter, tmp_path):
    """vLLM, and peft with a warning, would leave them out, and the base would be measured in the adapter's name."""
    rewrite(adapter, lambda tensors: {name.replace(".model.", ".text.", 1): tensors[name] for name in tensors})
    with pytest.raises(ValueError, match=r"was made for another model than .*: base_model\S+ is not in both"):
        models.whole(str(adapter), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_zeros_is_refused(adapter, tmp_path):
    rewrite(adapter, lambda tensors: {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in tensors.items()})
    with pytest.raises(ValueError, match="is zero, so it is .* over again"):
        models.whole(str(adapter), tmp_path / "merged")


def test_an_adapter_that_names_no_base_is_refused(adapter, tmp_path):
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        models.whole(str(adapter), tmp_path / "merged")

"""An adapter is sampled as the model that it would be merged into, or refused: never its base in its place."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch

from ssd import models
from ssd.decoding import Decoding
from ssd.engines.opening import open_engine
from ssd.tracking import reuse


@pytest.fixture(scope="module")
def vllm():
    return pytest.importorskip("vllm", reason="vLLM is not installed (the gpu extra, or its CPU build)")


@pytest.fixture(scope="module")
def adapter(lab_model, tmp_path_factory) -> Path:
    """Folder of an adapter of `lab_model` whose weights are random, so that it moves what it says."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(models.load_weights(lab_model, torch.float32), config).save_pretrained(folder)
    return folder


def copied(adapter: Path, folder: Path) -> Path:
    return Path(shutil.copytree(adapter, folder / "copied"))


def said(engine: str, model: Path | str, requests) -> list[list[int]]:
    return sorted(sample.token_ids for sample in open_engine(engine, str(model), requests).generate(requests))


@pytest.mark.slow
def test_vllm_serves_an_adapter_beside_its_base(vllm, lab_model, adapter, requests_to):
    """It says what transformers does, which merges it, and not what its base says."""
    requests = requests_to(lab_model, Decoding(temperature=0, max_tokens=24), 8, 1)
    merged = said("transformers", adapter, requests)
    assert merged != said("transformers", lab_model, requests)
    assert said("vllm", adapter, requests) == merged


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_an_adapter_with_a_name_that_is_not_its_base_s_is_refused(vllm, adapter, engine, tmp_path, requests_to):
    """vLLM itself would leave out what it does not know, without a word."""
    weights = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("layers.1.", "h.1."): weight for name, weight in weights.items()}
    strange = copied(adapter, tmp_path)
    safetensors.torch.save_file(renamed, strange / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is not of its base: .* is in one of them alone"):
        open_engine(engine, str(strange), requests_to(str(adapter), Decoding(max_tokens=4), 1, 1))


def test_an_adapter_that_changes_nothing_in_vllm_is_refused(vllm, adapter, tmp_path, requests_to):
    weights = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    untrained = copied(adapter, tmp_path)
    zero = {name: weight * ("lora_A" in name) for name, weight in weights.items()}
    safetensors.torch.save_file(zero, untrained / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="changes no log-probability in vLLM: it is untrained"):
        open_engine("vllm", str(untrained), requests_to(str(adapter), Decoding(max_tokens=4), 1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_pattern": {"down_proj": 8}}, r"sets rank_pattern=\{'down_proj': 8\}, which vLLM passes over"),
        ({"bias": "all"}, "sets bias='all'"),
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights='pissa'"),
        ({"peft_type": "LOHA"}, "is not a LoRA adapter that names its base"),
        ({"base_model_name_or_path": "no/such"}, "base of adapter .*: model 'no/such' is neither"),
        ({"base_model_name_or_path": "{adapter}"}, "has an adapter as its base"),
    ],
)
def test_an_adapter_that_vllm_would_read_otherwise_than_peft_is_refused(adapter, tmp_path, change, message):
    strange = copied(adapter, tmp_path)
    config = json.loads((strange / "adapter_config.json").read_text()) | change
    (strange / "adapter_config.json").write_text(json.dumps(config).replace("{adapter}", str(adapter)))
    with pytest.raises(ValueError, match=message):
        models.load_config(str(strange))


def test_a_damaged_adapter_is_refused(adapter, tmp_path):
    damaged = copied(adapter, tmp_path)
    (damaged / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="is cut short or damaged"):
        models.load_config(str(damaged))
    (damaged / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json holds no JSON object"):
        models.load_config(str(damaged))


@pytest.mark.parametrize("engine", ["vllm:data_parallel_size=2", "openai:http://127.0.0.1:1/v1"])
def test_engines_that_cannot_show_an_adapter_refuse_it(vllm, adapter, engine, requests_to):
    with pytest.raises(ValueError, match=r"serves no adapter like .*; give it merged"):
        open_engine(engine, str(adapter), requests_to(str(adapter), Decoding(max_tokens=4), 1, 1))


def test_the_identity_of_an_adapter_is_also_that_of_its_base(lab_model, adapter, tmp_path):
    same, other = copied(adapter, tmp_path), tmp_path / "other"
    shutil.copytree(lab_model, other)
    assert models.digest(same) == models.digest(adapter)
    config = json.loads((same / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(other)}
    (same / "adapter_config.json").write_text(json.dumps(config))
    before = models.digest(same), reuse._content(str(same))
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert models.digest(same) != before[0]
    assert reuse._content(str(same)) != before[1]


def test_an_adapter_of_the_output_head_is_refused(adapter, tmp_path):
    file = copied(adapter, tmp_path) / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file(weights | {"base_model.model.lm_head.lora_A.weight": torch.zeros(1, 1)}, file)
    with pytest.raises(ValueError, match="vLLM adapts neither embeddings nor heads"):
        models.load_config(str(file.parent))

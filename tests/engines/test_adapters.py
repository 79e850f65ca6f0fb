"""An adapter is sampled as the model that it would be merged into, or refused: never its base in its place."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ssd import models
from ssd.engines import Decoding, open_engine
from ssd.training.rows import rows
from ssd.training.sft import train


@pytest.fixture(scope="module")
def vllm():
    return pytest.importorskip("vllm", reason="vLLM is not installed (the gpu extra, or its CPU build)")


@pytest.fixture(scope="module")
def adapter(lab_model, tmp_path_factory, requests_to) -> Path:
    """Folder of an adapter that was trained beside `lab_model`, and has moved what it says."""
    requests = requests_to(lab_model, Decoding(max_tokens=24), 8, 1)
    samples = list(open_engine("transformers", lab_model, requests).generate(requests))
    settings = {"lr": 3e-2, "epochs": 2.0, "max_length": 256, "lora_rank": 4, "save_steps": 100, "seed": 0}
    folder, quiet = tmp_path_factory.mktemp("adapter"), {"on_log": lambda *_: None}
    [(_, exported)] = train(lab_model, rows(samples, 256).dataset, folder, global_batch_size=4, **quiet, **settings)
    return exported.parent


def said(engine: str, model: Path | str, requests) -> list[list[int]]:
    return sorted(sample.token_ids for sample in open_engine(engine, str(model), requests).generate(requests))


def test_vllm_serves_an_adapter_beside_its_base(vllm, lab_model, adapter, requests_to):
    """It says what the model says that the adapter was merged into, and not what its base says."""
    requests = requests_to(lab_model, Decoding(temperature=0, max_tokens=24), 8, 1)
    expected = said("vllm", adapter / "exported", requests)
    assert expected != said("vllm", lab_model, requests)
    assert said("vllm", adapter, requests) == expected
    assert said("transformers", adapter, requests) == expected


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_an_adapter_whose_names_are_not_those_of_its_base_is_refused(vllm, adapter, engine, tmp_path, requests_to):
    """vLLM itself would pass over it, without a word."""
    strange = tmp_path / "strange"
    shutil.copytree(adapter, strange, ignore=shutil.ignore_patterns("exported"))
    weights = safetensors.torch.load_file(strange / "adapter_model.safetensors")
    renamed = {name.replace("base_model.model.model.layers", "base_model.model.h"): w for name, w in weights.items()}
    safetensors.torch.save_file(renamed, strange / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is not of its base|changes no log-probability in vLLM"):
        open_engine(engine, str(strange), requests_to(str(adapter), Decoding(max_tokens=4), 1, 1))


@pytest.mark.parametrize("engine", ["vllm:data_parallel_size=2", "openai:http://127.0.0.1:1/v1"])
def test_engines_that_cannot_show_an_adapter_refuse_it(vllm, adapter, engine, requests_to):
    with pytest.raises(ValueError, match=r"serves no adapter like .*; merge it"):
        open_engine(engine, str(adapter), requests_to(str(adapter), Decoding(max_tokens=4), 1, 1))


def test_the_identity_of_an_adapter_is_also_that_of_its_base(lab_model, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "same", ignore=shutil.ignore_patterns("exported"))
    shutil.copytree(lab_model, tmp_path / "other")
    file = tmp_path / "same" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert models.digest(tmp_path / "same") == models.digest(adapter)
    file.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "other")}))
    before = models.digest(tmp_path / "same")
    (tmp_path / "other" / "config.json").write_text((tmp_path / "other" / "config.json").read_text() + "\n")
    assert models.digest(tmp_path / "same") != before


def test_an_adapter_of_the_output_head_is_refused(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "head", ignore=shutil.ignore_patterns("exported"))
    file = tmp_path / "head" / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file(weights | {"base_model.model.lm_head.lora_A.weight": torch.zeros(1, 1)}, file)
    with pytest.raises(ValueError, match="vLLM adapts neither embeddings nor heads"):
        models.load_config(str(tmp_path / "head"))

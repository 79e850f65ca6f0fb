"""Bad input ends in one line that names the value and the remedy, a FAILED run and an exit status that is not 0."""

import os
import re
import runpy
import shutil
import sys

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import transformers

from ssd import driver, models, records, tracking
from ssd.lab import world
from ssd.records import Grade, Problem, Sample

pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture(scope="module")
def given(tmp_path_factory, lab_model) -> dict[str, str]:
    """Small inputs, some of them broken, by name."""
    folder = tmp_path_factory.mktemp("inputs")
    records.write(folder / "problems.parquet", Problem, world.problems(3, 0))
    records.write(folder / "one_sample.parquet", Grade, [Grade("a", 0, "right", "1"), Grade("b", 0, "wrong", "2")])
    tokenizer = models.load_tokenizer(lab_model)
    token_ids = tokenizer.encode("think\n</think>\n5")
    for name, text in (("samples", tokenizer.decode(token_ids, skip_special_tokens=True)), ("other_samples", "five")):
        records.write(folder / name / "0.parquet", Sample, [Sample("p", 0, [1, 2], token_ids, text, "stop", -1.0)])
    pq.write_table(pa.table({"problem_id": ["a"], "problem": ["What?"]}), folder / "no_answer.parquet")
    for missing in ("tokenizer", "template"):
        shutil.copytree(lab_model, folder / f"no_{missing}")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / "no_tokenizer" / name).unlink(missing_ok=True)
    (folder / "no_template" / "chat_template.jinja").unlink()
    for name in ("model.gguf", "pytorch_model.bin", "consolidated.pt"):
        other = folder / name.partition(".")[2]
        shutil.copytree(lab_model, other)
        (other / "model.safetensors").rename(other / name)
        (other / "optimizer.pt").touch()  # what a training leaves there too
    shutil.copytree(lab_model, folder / "large_tokenizer")
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder / "large_tokenizer")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "empty_mirror").mkdir()
    (folder / "typo.yaml").write_text("temperature: [{temprature: 1}]")
    (folder / "list.yaml").write_text("- lab")
    (folder / "deep.yaml").write_text("lab: " + "[" * 5000)
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    (folder / "aliases.yaml").write_text(f"a0: &a0 [x]\n{levels}")
    (folder / "section.yaml").write_text("sample contrl: {top_p: 1.0}")
    names = [path.name for path in folder.iterdir()]
    return {name: str(folder / name) for name in names} | {"lab": lab_model, "lab_file": f"{lab_model}/config.json"}


def refusal(run_step, capsys, name: str, parameters: dict) -> str:
    """Run a step that must fail; its error line."""
    before = {run.info.run_id for run in mlflow.search_runs(output_format="list")}
    with pytest.raises(SystemExit) as ended:
        run_step(name, **parameters)
    assert ended.value.code not in (0, None)
    for run in mlflow.search_runs(output_format="list"):
        if run.info.run_id not in before:
            assert run.info.status == "FAILED"
            assert run.data.tags["ssd.error"] and run.data.tags["step"] == name
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


GENERATION = {"model": "{lab}", "problems": "{problems.parquet}", "engine": "transformers", "max_tokens": 48}
MODELS = {  # that no step works with, and what the error says
    "no_template": r"no_template has no chat template; use an instruction-tuned model or add chat_template.jinja",
    "large_tokenizer": r"large_tokenizer has ids up to (\d+), and the embedding of .* has \1 rows; copy the files",
    "gguf": r"gguf has its weights in model.gguf, not in \*.safetensors; give the model that this file was made from",
    "bin": r"bin has its weights in pytorch_model.bin, not in .* transformers with use_safetensors=False, and write it",
    "pt": r"pt has its weights in consolidated.pt, not in .* with the code that wrote it, and write it",
    "lab_file": r"config.json is a file; give the folder that holds it",
}
CASES = [  # step, parameters, what the error says
    ("main", {"preset": "labb"}, r"preset 'labb' is unknown .*; the presets are lab, "),
    ("main", {"preset": "qwen3.5-4b"}, r"preset qwen3.5-4b names no final set.*-P preset=FILE.yaml"),
    ("prepare", {"train_sources": "mathh"}, r"source 'mathh' is not known; choose from hendrycks_math"),
    ("prepare", {"source_root": "{empty_mirror}"}, r"empty_mirror.*hendrycks_math"),
    ("prepare", {"source_root": "/nowhere"}, r"/nowhere"),
    ("prepare", {}, r"hub.*source_root"),
    ("prepare", {"train_size": "many"}, r"train_size='many' is not a whole number"),
    ("baseline", GENERATION | {"problems": "{no_answer.parquet}"}, r"column source, answer, level is missing"),
    ("baseline", GENERATION | {"problems": "/nowhere.parquet"}, r"/nowhere.parquet: no Parquet file"),
    ("baseline", GENERATION | {"problems": "runs:/123/val.parquet"}, r"runs:/123"),
    ("baseline", GENERATION | {"model": "Qwen/no-such-model"}, r"'Qwen/no-such-model' is neither a local folder nor"),
    ("baseline", GENERATION | {"model": "{no_tokenizer}"}, r"no_tokenizer has no tokenizer"),
    ("baseline", GENERATION | {"model": "{adapter}"}, r"adapter is not a LoRA adapter that names its base"),
    ("sample", GENERATION | {"temperature": -1}, r"temperature=-1.0 is not a number >= 0"),
    ("sample", GENERATION | {"top_p": 0}, r"top_p=0.0 is not in \(0, 1\]"),
    ("sample", GENERATION | {"n": 0}, r"n=0 is not an integer >= 1"),
    ("sample", GENERATION | {"max_tokens": 600}, r"= \d+ exceeds the model's context of 512; lower max_tokens"),
    ("sample", GENERATION | {"engine": "magic"}, r"engine='magic' is not one of vllm, transformers"),
    ("evaluate", GENERATION | {"decodings": "/nowhere.yaml"}, r"decodings=/nowhere.yaml: no such file"),
    ("evaluate", GENERATION | {"decodings": "{typo.yaml}"}, r"typo.yaml: .*'temprature'"),
    ("main", {"preset": "{list.yaml}"}, r"list.yaml does not hold parameters by entry point"),
    ("main", {"preset": "{deep.yaml}"}, r"deep.yaml is not YAML that can be read: it is nested too deeply"),
    ("main", {"preset": "{aliases.yaml}"}, r"aliases.yaml is not YAML of plain values \(\*a0 is an alias"),
    ("main", {"preset": "{section.yaml}"}, r"'sample contrl' is none of main, "),
    ("train", {"model": "{lab}", "lr": "nan"}, r"lr='nan' is not a finite number"),
    ("train", {"model": "{lab}", "global_batch_size": 0}, r"global_batch_size=0 is not an integer >= 1"),
    ("power", {"grades": "{one_sample.parquet}"}, r"one sample a problem"),
    ("train", {"model": "{lab}", "samples": "/nowhere"}, r"/nowhere: no Parquet file"),
    ("train", {"model": "{lab}", "samples": "{other_samples}"}, r"reads the tokens of problem p, sample 0, as another"),
    ("train", {"model": "{lab}", "samples": "{samples}", "completions": "some"}, r"completions='some' is none of all"),
    ("compare", {"arms": "base=123"}, r"'base=123' is not name=runs:/ID"),
    ("lab", {"world": "labb"}, r"world='labb' is not one of lab, lab-h200, lab-mixed"),
    ("prepare", {"train_sources": "lab", "val_sources": "lab-mixed", "final_sources": "lab"}, r"lab stands alone"),
    ("register", {"verdict": "runs:/123/verdict.json"}, r"runs:/123"),
    ("register", {"verdict": "{typo.yaml}"}, r"typo.yaml holds no verdict; give verdict.json of a compare run"),
]


def filled(parameters: dict, given: dict[str, str]) -> dict[str, str]:
    """`parameters` with each {name} of an input replaced by its path."""
    return {key: re.sub(r"\{(.+?)\}", lambda match: given[match[1]], str(value)) for key, value in parameters.items()}


@pytest.mark.parametrize(("step", "parameters", "message"), CASES, ids=[f"{step}: {m}" for step, _, m in CASES])
def test_bad_input_is_refused_in_one_line(run_step, capsys, given, step, parameters, message):
    assert re.search(message, refusal(run_step, capsys, step, filled(parameters, given)))


STEPS = {  # each step that loads a model, and the parameter that names it
    "baseline": ("model", GENERATION),
    "sample": ("model", GENERATION),
    "evaluate": ("model", GENERATION),
    "search": ("model", GENERATION | {"space": "presets/spaces/lab.yaml"}),
    "train": ("model", {"samples": "{samples}"}),
    "diagnose": ("base", {"model": "{lab}", "samples": "{samples}"}),
    "diagnose trained": ("model", {"base": "{lab}", "samples": "{samples}"}),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_model_that_no_step_works_with_is_refused_before_it_is_loaded(run_step, capsys, given, monkeypatch, step):
    monkeypatch.setattr(models, "load_weights", None)
    parameter, parameters = STEPS[step]
    for model, message in MODELS.items():
        asked = parameters | {parameter: f"{{{model}}}"}
        assert re.search(message, refusal(run_step, capsys, step.split()[0], filled(asked, given)))


def test_pickled_weights_are_converted_as_the_error_says(lab_model, tmp_path):
    pickled, converted = tmp_path / "pickled", tmp_path / "converted"
    shutil.copytree(lab_model, pickled)
    torch.save(safetensors.torch.load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="use_safetensors=False"):
        models.load_tokenizer(str(pickled))
    transformers.AutoModelForCausalLM.from_pretrained(pickled, use_safetensors=False).save_pretrained(converted)
    transformers.AutoTokenizer.from_pretrained(pickled).save_pretrained(converted)
    assert models.load_tokenizer(str(converted)).chat_template
    assert models.same_weights(str(converted), lab_model)


@pytest.fixture
def driver_of(tmp_path, monkeypatch):
    """Makes a machine whose driver has this version, and a torch built for CUDA 13.0 that finds no GPU there."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(version: str) -> None:
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\necho {version}\necho {version}\n")  # a line for each GPU
        command.chmod(0o755)

    return make


@pytest.mark.parametrize("step", [*STEPS, "vllm", "lab"])
def test_a_driver_that_is_too_old_for_torch_is_named_instead_of_a_missing_gpu(run_step, capsys, given, driver_of, step):
    driver_of("570.124.06")
    name, asked = step.split()[0], {"num_steps": 1}
    if step in STEPS:
        parameter, parameters = STEPS[step]
        asked = parameters | {parameter: "{lab}"}
    elif step == "vllm":
        name, asked = "sample", GENERATION | {"engine": "vllm"}
    error = refusal(run_step, capsys, name, filled(asked, given))
    assert error.startswith("error: NVIDIA driver 570.124.06 is too old for torch ")
    assert "with CUDA 13.0, which needs driver 580 or later; update the driver, or set CUDA_VISIBLE_DEVICES=-1" in error


def test_a_driver_that_is_new_enough_or_a_hidden_gpu_is_no_error(driver_of, monkeypatch):
    driver_of("580.65.06")
    driver.check()
    driver_of("570.124.06")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    driver.check()


def test_a_machine_without_nvidia_s_command_has_no_driver_to_refuse(driver_of, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    driver.check()


def test_vllm_without_a_gpu_or_without_vllm_is_refused(run_step, capsys, given):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    try:
        import vllm  # noqa: F401
    except ImportError:
        parameters = {"model": given["lab"], "problems": given["problems.parquet"], "max_tokens": 48}
        assert "needs the package vllm" in refusal(run_step, capsys, "sample", parameters)
    else:
        pytest.skip("vLLM's CPU build is installed here and needs no GPU")


def test_two_models_are_not_mixed(run_step, capsys, given):
    """Samples of one model do not train another."""
    with mlflow.start_run() as run:
        mlflow.set_tags({"ssd.base_model": "some/other-model", "step": "sample", "ssd.key": "k"})
    error = refusal(run_step, capsys, "train", {"model": given["lab"], "samples": "latest"})
    assert "two models would be mixed" in error and "some/other-model" in error and run.info.run_id in error


@pytest.mark.parametrize(
    "uri", ["sqlite:////proc/mlflow.db", "http://127.0.0.1:9"], ids=["an unwritable store", "a server that is down"]
)
def test_a_tracking_store_that_cannot_be_used_is_named(monkeypatch, capsys, store, uri):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    former = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(uri)
        monkeypatch.setattr(sys, "argv", ["prepare"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("steps.prepare", run_name="__main__")
    finally:
        mlflow.set_tracking_uri(former)
    assert ended.value.code not in (0, None)
    assert f"cannot use the tracking store {uri}" in capsys.readouterr().err


def test_nothing_half_written_is_found_again(given):
    """After all the failures above, no run is taken for a result."""
    with mlflow.start_run():
        assert tracking.finished_runs("baseline") == []
        assert tracking.finished_runs("prepare") == []

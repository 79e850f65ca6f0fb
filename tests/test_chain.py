"""The preset qwen2.5-1.5b from problems to report on a CPU: the real tokenizer and template, a tiny random model."""

import itertools
import json
import os
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
import transformers
import yaml

from ssd import models, parameters, processes, prompts, records
from ssd.records import Problem, Sample
from ssd.tracking import reuse
from ssd.tracking.step import WORK_DIR_ENV

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SSD_TEST_DATA") or ROOT.parent / "shared" / "data") / "hub" / "hendrycks_math"
REAL = os.environ.get("SSD_REAL_MODEL", "")  # a folder of a Qwen2.5 instruct model; its weights are not read
PRESET = "qwen2.5-1.5b"
NUM_ROWS = 40
SIZES = {"train_size": 8, "val_size": 6, "quick_size": 4, "final_size": 6, "global_batch_size": 4, "max_tokens": 12}

pytestmark = [
    pytest.mark.slow,  # main launches 20 steps, and each loads a tokenizer of 152 thousand tokens: 80 seconds
    pytest.mark.skipif(not REAL, reason="no real tokenizer here: set SSD_REAL_MODEL to the folder of a Qwen2.5 model"),
    pytest.mark.skipif(not DATA.is_dir(), reason="no mirror of hendrycks_math here: set SSD_TEST_DATA"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Folder of a random Qwen2 of 5 million weights, with the tokenizer, template and special tokens of REAL."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(REAL) / name, folder)
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = json.loads((Path(REAL) / "config.json").read_text()) | tiny | {"num_key_value_heads": 1}
    torch.manual_seed(0)
    weights = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
    weights.generation_config = transformers.GenerationConfig.from_pretrained(REAL)
    weights.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def preset(tmp_path_factory, model) -> str:
    """File of the real preset with other sizes, engine and model, and with the first rows of its problem sets."""
    folder = tmp_path_factory.mktemp("preset")
    mirror = folder / "hub" / "hendrycks_math"
    mirror.mkdir(parents=True)
    for name in ("train.jsonl", "test.jsonl"):
        with open(DATA / name) as rows:
            (mirror / name).write_text("".join(itertools.islice(rows, NUM_ROWS)))
    content = yaml.safe_load((ROOT / "presets" / f"{PRESET}.yaml").read_text())
    smaller = SIZES | {"model": model, "base": model}
    for section, values in content.items():
        values |= {name: smaller[name] for name in values if name in smaller}
        if section not in parameters.VARIANTS and "engine" in parameters.defaults(section):
            values["engine"] = "transformers"
    content["prepare"]["source_root"] = str(folder / "hub")
    content["train"]["global_batch_size"] = SIZES["global_batch_size"]  # else one step, all of it warm-up
    decodings = yaml.safe_load((ROOT / content["evaluate search"]["decodings"]).read_text())
    (folder / "decodings.yaml").write_text(yaml.safe_dump({family: of[-1:] for family, of in decodings.items()}))
    content["evaluate search"]["decodings"] = str(folder / "decodings.yaml")
    (folder / "preset.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "preset.yaml")


@pytest.fixture(scope="module")
def finished(preset, store, run_step) -> dict[str, list[mlflow.entities.Run]]:
    """Runs of a whole `main` by step; each is done in this process, where the libraries are loaded once."""
    start, runs = mlflow.start_run, {}

    def launch(entry_point: str, given: str, overrides: dict) -> str:
        values = parameters.preset_values(given, entry_point) | overrides | {"preset": given}
        run = run_step(entry_point, **values)
        runs.setdefault(entry_point, []).append(run)
        return run.info.run_id

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "launch", launch)
        patch.setattr(mlflow, "start_run", lambda **given: start(**given | {"nested": True}))
        patch.setenv(reuse.LAUNCHER_ENV, processes.this())
        patch.setenv(WORK_DIR_ENV, str(store / "work"))
        runs["main"] = [run_step("main", preset=preset)]
    return runs


def artifact(run: mlflow.entities.Run, name: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/{name}"))


def test_main_goes_from_problems_to_report_with_every_arm(finished):
    assert {run.info.status for of in finished.values() for run in of} == {"FINISHED"}
    (compared,), (reported,) = finished["compare"], finished["report"]
    arms = {arm.partition("=")[0] for arm in compared.data.params["arms"].split(",")}
    tuned = {f"base-tuned-{family}" for family in ("temperature", "min-p", "temperature-last")}
    assert arms == {"base", "ssd", "ssd-same-decoding", "control", *tuned}
    assert json.loads(artifact(compared, "verdict.json").read_text())
    assert "hendrycks_math" in artifact(reported, "report.html").read_text()


def test_the_arms_are_sampled_as_the_preset_says(finished):
    ssd, control = finished["sample"]
    for run, section in ((ssd, "sample"), (control, "sample control")):
        wanted = parameters.defaults("sample") | parameters.load_preset(PRESET)[section]
        for name in ("temperature", "top_k", "top_p"):
            assert float(run.data.params[name]) == wanted[name]


def test_the_sets_are_of_math_and_none_holds_a_problem_of_another(finished):
    (prepared,) = finished["prepare"]
    names = ("train", "val", "quick", "final")
    ids = {
        name: {problem.problem_id for problem in records.read(artifact(prepared, f"{name}.parquet"), Problem)}
        for name in names
    }
    assert {name: len(of) for name, of in ids.items()} == {name: SIZES[f"{name}_size"] for name in names}
    assert ids["quick"] <= ids["val"]
    assert not ids["val"] & ids["final"] and not ids["train"] & (ids["val"] | ids["final"])


def test_the_model_sees_each_problem_in_the_chat_template_of_qwen(finished, model):
    (prepared,), (run, _) = finished["prepare"], finished["sample"]
    samples = records.read(artifact(run, "samples"), Sample)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    statements = {each.problem_id: each.problem for each in records.read(artifact(prepared, "train.parquet"), Problem)}
    assert {sample.problem_id for sample in samples} == set(statements)
    for sample in samples:
        assert tokenizer.decode(sample.prompt_token_ids) == (
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{prompts.PROMPT.format(problem=statements[sample.problem_id])}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
    assert not json.loads(artifact(run, "samples/manifest.json").read_text())["thinks"]


def test_training_takes_every_sample_and_leaves_the_tokenizer_as_it_was(finished, model):
    for run in finished["train"]:
        assert run.data.metrics["num_rows"] == SIZES["train_size"]
        trained = artifact(run, "model")
        before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (model, trained))
        assert after.get_vocab() == before.get_vocab() and after.chat_template == before.chat_template
        assert (after.eos_token, after.pad_token) == (before.eos_token, before.pad_token)
        ends = (transformers.GenerationConfig.from_pretrained(folder).eos_token_id for folder in (model, trained))
        assert [*ends] == [[151645, 151643]] * 2
        assert not models.same_weights(str(trained), model)


def test_diagnose_reads_the_samples_of_the_chain_with_every_model(finished, run_step, preset, model):
    ssd, control = (f"runs:/{run.info.run_id}/model" for run in finished["train"])
    (measured,) = finished["baseline"]
    given = {"model": ssd, "control": control, "samples": f"runs:/{measured.info.run_id}/samples", "preset": preset}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(reuse.LAUNCHER_ENV, processes.this())  # else the preset's values would need another launch
        run = run_step("diagnose", **parameters.preset_values(preset, "diagnose") | given)
    assert run.info.status == "FINISHED"
    num_tokens = sum(len(sample.token_ids) for sample in records.read(artifact(measured, "samples"), Sample))
    assert run.data.metrics["num_positions"] == num_tokens

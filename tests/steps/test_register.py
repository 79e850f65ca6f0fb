"""A version of the registered model holds checkpoint, evidence and card, once, under the alias that it earned."""

import json
import shutil
import tempfile
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import transformers
from mlflow.exceptions import MlflowException

from ssd import models, records, tracking
from ssd.records import Grade
from ssd.stats import compare as comparing
from ssd.stats.estimate import Estimate
from ssd.stats.power import Cost
from ssd.verdict import decision
from ssd.verdict.comparison import Arm, compare_arms

pytestmark = pytest.mark.usefixtures("store")
N = 400
RATE = Estimate(1.0, 0.0, 0.99, 1.0, N)
HEALTH = ("think_close_rate", "boxed_answer_rate", "length_stop_rate", "timed_out_rate", "tokens_per_sample")
BEATEN = {"base": 0.3, "base-tuned-min-p": 0.35}  # by a checkpoint at 0.6


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, lab_model) -> list[str]:
    """Three models that differ in one weight."""
    folders = []
    for number in range(3):
        folder = tmp_path_factory.mktemp("checkpoints") / f"model-{number}"
        shutil.copytree(lab_model, folder)
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        name = min(tensors)
        tensors[name] = tensors[name] + 0.001 * number
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        folders.append(str(folder))
    return folders


def evaluated(arm: str, share: float, model: str, problems: str) -> tuple[str, np.ndarray]:
    """A run as evaluate leaves it, of an arm that is right on the first `share` of the problems; id and correct_PS."""
    correct_PS = (np.arange(N) < share * N)[:, None] * 1.0
    grades = [Grade(f"p{i:04}", 0, "right" if right else "wrong", "1") for i, right in enumerate(correct_PS[:, 0])]
    conditions = {"problems": problems, "prompt": "Solve.", "max_tokens": 48, "engine": "vllm", "grader": "g"}
    with mlflow.start_run(nested=True) as run:
        mlflow.log_params({"model": model, "problems": problems})
        tags = {"step": "evaluate", "arm": arm, "ssd.conditions": json.dumps(conditions)}
        mlflow.set_tags(tags | {"ssd.base_model": "some/base-model"})
        tracking.log_dataset("final", pa.table({"problem_id": [problems]}), "evaluation", "here.parquet")
        with tempfile.TemporaryDirectory() as folder:
            records.write(f"{folder}/grades.parquet", Grade, grades)
            mlflow.log_artifacts(folder)
    return run.info.run_id, correct_PS


def compared(model: str, shares: dict[str, float], problems: str = "final-digest") -> str:
    """verdict.json of a run as compare leaves it; ssd and ssd-same-decoding are `model`."""
    with mlflow.start_run() as run:
        mlflow.set_tags({"step": "compare", "ssd.base_model": "some/base-model"})
        arms, correct = {}, {}
        for arm, share in shares.items():
            of_arm = model if arm.startswith("ssd") else "some/base-model"
            run_id, correct[arm] = evaluated(arm, share, of_arm, problems)
            health = dict.fromkeys(HEALTH, RATE)
            arms[arm] = Arm(run_id, of_arm, "T=0.7", health, {"p10": 1, "p50": 2, "p90": 3, "p99": 4}, Cost(1, 1, 1))
        conditions = json.loads(mlflow.get_run(arms["base"].run_id).data.tags["ssd.conditions"])
        found = compare_arms(arms, correct, ["lab"] * N, ["1"] * N, conditions, "quick")
        pairs = [(claim.arm, claim.against) for claim in decision.PLAN.claims]
        verdict = decision.decide(
            {p: comparing.paired(correct[p[0]], correct[p[1]]) for p in pairs if set(p) <= correct.keys()},
            chosen_on={"decoding": "quick", "checkpoint": "quick"},
            evaluated_on="final",
        )
        for name, content in (("verdict.json", verdict), ("comparison.json", found)):
            mlflow.log_text(json.dumps(records.jsonable(content)), name)
    return f"runs:/{run.info.run_id}/verdict.json"


def trained(share: float) -> dict[str, float]:
    return BEATEN | {"ssd-same-decoding": share, "ssd": share}


def registration(run) -> dict:
    uri = f"runs:/{run.info.run_id}/registration.json"
    return json.loads(Path(mlflow.artifacts.download_artifacts(uri)).read_text())


def versions(name: str) -> list:
    return mlflow.MlflowClient().search_model_versions(f"name = '{name}'")


def aliases(name: str) -> dict[str, str]:
    of_name = mlflow.MlflowClient().get_registered_model(name).aliases
    return {alias: str(version) for alias, version in of_name.items()}


def greedy(model, tokenizer) -> list[int]:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Start with 3, add 4. What is the result modulo 7?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    return model.generate(**prompt, do_sample=False, max_new_tokens=24)[0].tolist()


def test_a_version_holds_the_checkpoint_its_card_and_its_evidence(run_step, checkpoints):
    uri = compared(checkpoints[0], trained(0.6))
    run = run_step("register", verdict=uri, name="whole")
    (version,) = versions("whole")
    assert aliases("whole") == {"champion": "1"} and registration(run)["alias"] == "champion"

    folder = Path(mlflow.artifacts.download_artifacts("models:/whole@champion"))
    checkpoint = models.load_weights(checkpoints[0], "auto"), models.load_tokenizer(checkpoints[0])
    pipeline = mlflow.transformers.load_model("models:/whole@champion")
    served = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")  # the folder that vLLM is given
    tokens = greedy(*checkpoint)
    assert greedy(pipeline.model, pipeline.tokenizer) == tokens
    assert greedy(served, transformers.AutoTokenizer.from_pretrained(folder / "model")) == tokens

    card = (folder / "README.md").read_text()
    for said in ("# whole", "## Verdict", "## Training", "## Data", "## Results", "## Limits", "60.0% [55.1, 64.7]"):
        assert said in card
    assert version.description.startswith("**champion. Self-distillation made the model better, by +30.0 [")
    assert version.description[:2000] in card
    compare_id = uri.split("/")[1]
    evaluate_id = registration(run)["evaluate"]
    assert version.tags["run.compare"] == compare_id and version.tags["run.evaluate"] == evaluate_id
    assert version.tags["digest"] == models.digest(checkpoints[0])
    assert version.tags["verdict"] == "champion" and version.tags["pass_at_1"] == "60.0% [55.1, 64.7]"
    expected = mlflow.get_run(evaluate_id).inputs.dataset_inputs[0].dataset.digest
    assert version.tags["dataset.evaluation.final"] == expected


def test_a_checkpoint_is_registered_once_also_when_the_first_attempt_was_killed(run_step, checkpoints, monkeypatch):
    uri = compared(checkpoints[0], trained(0.6))
    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "register_model", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_step("register", verdict=uri, name="once")
    logged = len(mlflow.search_logged_models(output_format="list"))
    for _ in range(2):
        run_step("register", verdict=uri, name="once")
    assert len(versions("once")) == 1 and len(mlflow.search_logged_models(output_format="list")) == logged


def test_a_version_without_tags_is_taken_up_by_its_weights(run_step, checkpoints):
    with mlflow.start_run():
        for folder in checkpoints[:2]:
            mlflow.transformers.log_model(
                {"model": models.load_weights(folder, "auto"), "tokenizer": models.load_tokenizer(folder)},
                name="model",
                task="text-generation",
                pip_requirements=["transformers"],
                registered_model_name="left",
            )
    run_step("register", verdict=compared(checkpoints[1], trained(0.6)), name="left")
    assert len(versions("left")) == 2 and aliases("left") == {"champion": "2"}
    assert mlflow.MlflowClient().get_model_version("left", "2").tags["digest"] == models.digest(checkpoints[1])


def test_a_champion_gives_way_only_to_one_that_is_better_on_the_same_problems(run_step, checkpoints):
    def register(number: int, shares: dict[str, float], problems: str = "final-digest") -> dict:
        uri = compared(checkpoints[number], shares, problems)
        return registration(run_step("register", verdict=uri, name="ranked"))

    assert register(0, trained(0.6))["alias"] == "champion"
    same = register(1, trained(0.6))
    assert same["alias"] == "candidate" and "not shown to be better" in same["reasons"][0]
    assert aliases("ranked") == {"champion": "1", "candidate": "2"}
    elsewhere = register(1, trained(0.9), "other-digest")
    assert elsewhere["alias"] == "candidate" and "the arms differ in problems" in elsewhere["reasons"][0]
    better = register(1, trained(0.7))
    assert "+10.0 [" in better["reasons"][0] and better["alias"] == "champion"
    assert aliases("ranked") == {"champion": "2"}

    beaten = register(1, trained(0.7) | {"base-tuned-min-p": 0.9})
    assert beaten["alias"] == "candidate" and any("champion no longer" in reason for reason in beaten["reasons"])
    assert aliases("ranked") == {"candidate": "2"}
    refused = register(1, trained(0.3))
    assert refused["promotion"] == "refused" and "alias" not in refused
    assert aliases("ranked") == {} and len(versions("ranked")) == 2


def test_a_refusal_is_recorded_and_makes_no_version(run_step, checkpoints):
    run = run_step("register", verdict=compared(checkpoints[2], trained(0.3)), name="none")
    assert run.data.tags["verdict"] == "refused" and run.info.run_name == "register · refused"
    assert any(reason.startswith("ssd-same-decoding against base") for reason in registration(run)["reasons"])
    with pytest.raises(MlflowException):
        mlflow.MlflowClient().get_registered_model("none")


@pytest.mark.slow
def test_vllm_serves_the_folder_of_a_version_with_the_tokens_of_the_checkpoint(run_step, checkpoints, monkeypatch):
    for name, value in {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        monkeypatch.setenv(name, value)  # quick to start
    vllm = pytest.importorskip("vllm")
    run_step("register", verdict=compared(checkpoints[0], trained(0.6)), name="served")
    folder = Path(mlflow.artifacts.download_artifacts("models:/served@champion"))
    question = [{"role": "user", "content": "Start with 3, add 4. What is the result modulo 7?"}]
    tokens = []
    for model in (folder / "model", checkpoints[0]):
        llm = vllm.LLM(
            str(model), dtype="float32", enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=1 << 26
        )
        (answer,) = llm.chat([question], vllm.SamplingParams(temperature=0, max_tokens=24))
        tokens.append(list(answer.outputs[0].token_ids))
    assert tokens[0] == tokens[1]

"""Diagnosis: every quantity against its definition in float64, and the step on a world whose locks are known."""

import json
import types
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from ssd import models, prompts, sampling, tracking
from ssd.decoding import Decoding
from ssd.diagnosis import changes, measure
from ssd.diagnosis.measure import Rules, Text
from ssd.lab import automaton, world
from ssd.records import Sample

TRUNCATIONS = [
    Decoding(temperature=1.1, top_k=20, top_p=0.95),
    Decoding(temperature=0.7, top_p=0.8),
    Decoding(temperature=2.0, top_k=5),
    Decoding(temperature=1.0),
]
IDS = [str(truncation) for truncation in TRUNCATIONS]


def defined(logits: np.ndarray, truncation: Decoding) -> np.ndarray:
    """q by the definition: temper, keep the k likeliest, keep the fewest whose mass reaches p; shape as `logits`."""
    found = np.zeros_like(logits)
    for row, q in zip(logits, found):
        probs = np.exp((row - row.max()) / truncation.temperature)
        order = np.argsort(-row)
        probs[order[truncation.top_k or len(row) :]] = 0
        probs /= probs.sum()
        mass = 0.0
        for token in order:
            if mass < truncation.top_p:
                q[token] = probs[token]
                mass += probs[token]
    return found / found.sum(axis=-1, keepdims=True)


def entropy(probs: np.ndarray) -> float:
    return -sum(p * np.log(p) for p in probs if p > 0)


@pytest.fixture(scope="module")
def logits() -> dict[str, torch.Tensor]:
    """Of two random tiny models at the same 24 positions, 300 tokens."""
    found = {}
    for seed, name in enumerate(("base", "model")):
        torch.manual_seed(seed)
        config = transformers.Qwen3Config(
            vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, initializer_range=0.5, tie_word_embeddings=False,
        )  # fmt: skip
        input_ids = torch.arange(24)[None] * 7 % 300
        with torch.inference_mode():
            found[name] = transformers.Qwen3ForCausalLM(config).eval()(input_ids=input_ids).logits[0]
    return found


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=IDS)
def test_q_is_the_tempered_truncated_and_renormalised_distribution(logits, truncation):
    log_q, ids = measure.truncated(logits["base"], truncation)
    found = torch.zeros_like(logits["base"]).scatter(-1, ids, log_q.exp())
    np.testing.assert_allclose(found.numpy(), defined(logits["base"].double().numpy(), truncation), atol=1e-5)


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=IDS)
def test_the_terms_of_the_loss_are_as_defined_and_add_up_to_the_cross_entropy(logits, truncation):
    q, temperature = defined(logits["base"].double().numpy(), truncation), truncation.temperature
    p = logits["model"].double().softmax(-1).numpy()
    logp = logits["model"].log_softmax(-1)
    found = measure.loss_terms(logp, measure.truncated(logits["base"], truncation), temperature)
    parts = sum(found[name] for name in (*measure.TERMS, "floor"))
    # The measured one is torch's, for q as a target.
    measured = torch.nn.functional.cross_entropy(logits["model"].double(), torch.from_numpy(q), reduction="none")
    np.testing.assert_allclose(parts.numpy(), measured.numpy(), atol=1e-4)
    np.testing.assert_allclose(found["cross_entropy"].numpy(), measured.numpy(), atol=1e-4)
    for index, (p_V, q_V) in enumerate(zip(p, q)):
        within = p_V[q_V > 0] / p_V[q_V > 0].sum()
        tempered = within ** (1 / temperature) / (within ** (1 / temperature)).sum()
        renyi = np.log((within ** (1 / temperature)).sum()) / (1 - 1 / temperature) if temperature != 1 else 0
        divergence = (q_V[q_V > 0] * np.log(q_V[q_V > 0] / tempered)).sum()
        assert float(found["support"][index]) == pytest.approx(-np.log(p_V[q_V > 0].sum()), abs=1e-4)
        assert float(found["reshaping"][index]) == pytest.approx((1 - temperature) * renyi, abs=1e-4)
        assert float(found["alignment"][index]) == pytest.approx(temperature * divergence, abs=1e-4)
        assert float(found["floor"][index]) == pytest.approx(temperature * entropy(q_V), abs=1e-4)


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=IDS)
def test_gate_head_and_tail_are_as_defined_and_add_up_to_the_entropy(logits, truncation):
    in_S = defined(logits["base"].double().numpy(), truncation) > 0
    found = measure.entropy_split(logits["model"].log_softmax(-1), measure.truncated(logits["base"], truncation))
    for index, (p, kept) in enumerate(zip(logits["model"].double().softmax(-1).numpy(), in_S)):
        mass = p[kept].sum()
        assert float(found["kept_mass"][index]) == pytest.approx(mass, abs=1e-5)
        assert float(found["gate"][index]) == pytest.approx(entropy([mass, 1 - mass]), abs=1e-4)
        assert float(found["head"][index]) == pytest.approx(mass * entropy(p[kept] / mass), abs=1e-4)
        lost = (1 - mass) * entropy(p[~kept] / (1 - mass)) if not kept.all() else 0
        assert float(found["tail"][index]) == pytest.approx(lost, abs=1e-4)
        total = sum(float(found[name][index]) for name in ("gate", "head", "tail"))
        assert total == pytest.approx(entropy(p), abs=1e-4)


def test_the_shape_of_a_position_by_hand():
    probs = torch.tensor([[0.6, 0.25, 0.1, 0.04, 0.01]])
    _, head = measure.classify(probs.log(), Rules())
    found = measure.shape(probs.log(), torch.tensor([2]), head, Rules(nucleus_mass=0.95))
    assert head.tolist() == [[True, True, True, False, False]]  # 0.1 is a sixth of 0.6, 0.04 a fifteenth
    assert {name: round(float(value), 4) for name, value in found.items()} == {
        "top_1": 0.6, "top_token": 0, "entropy": round(entropy(probs[0].tolist()), 4), "nucleus_size": 3,
        "tail_mass": 0.05, "logprob": round(np.log(0.1), 4), "rank": 3,
    }  # fmt: skip


def test_the_states_of_the_toy_automaton_are_classed_as_the_paper_calls_them():
    states = automaton.teacher()
    found, _ = measure.classify(torch.stack([states[name] for name in ("root", "fork", "lock")]).log(), Rules())
    assert [measure.CLASSES[index] for index in found] == ["fork", "fork", "lock"]


def test_no_tail_is_certain_and_a_head_that_holds_less_than_half_is_diffuse():
    certain, flat = torch.full((1000,), 1e-6), torch.full((1000,), 0.8 / 999)
    certain[0], flat[0] = 1 - 999e-6, 0.2
    found, _ = measure.classify(torch.stack([certain, flat]).log(), Rules())
    assert [measure.CLASSES[index] for index in found] == ["certain", "diffuse"]


def test_greedy_samples_are_no_training_truncation(logits):
    with pytest.raises(ValueError, match="temperature=0"):
        measure.truncated(logits["base"], Decoding(temperature=0.0))


def text(problem: int, length: int, arm: str = "base", outcome: str = "right") -> Text:
    sample = Sample(f"p{problem}", 0, [1, 2], [3] * length, "", "stop", 0.0)
    return Text(sample, arm, outcome)


def test_chosen_texts_keep_the_proportions_of_arms_outcomes_and_lengths():
    rng = np.random.default_rng(0)
    texts = [
        text(i, int(rng.integers(1, 90)), "base" if i % 4 else "ssd", "right" if i % 3 else "wrong") for i in range(600)
    ]
    chosen = measure.choose(texts, 60, seed=1)
    assert len({each.sample.problem_id for each in chosen}) == 60
    for arm, outcome in ((a, o) for a in ("base", "ssd") for o in ("right", "wrong")):
        share = [sum((t.arm, t.outcome) == (arm, outcome) for t in of) / len(of) for of in (texts, chosen)]
        assert share[1] == pytest.approx(share[0], abs=2 / 60)
    lengths = [np.mean([len(t.sample.token_ids) for t in of]) for of in (texts, chosen)]
    assert lengths[1] == pytest.approx(lengths[0], rel=0.1)
    assert measure.choose(texts, 600, seed=1) == texts


def test_reweighting_gives_the_expectation_under_the_other_model():
    """A fork and a lock, as in the lab: each position's part of the gain is known in closed form."""
    rng, num_texts = np.random.default_rng(0), 40_000
    work, right = {"base": 0.4, "model": 0.3}, {"base": 0.9, "model": 0.99}
    works, holds = rng.random(num_texts) < work["base"], rng.random(num_texts) < right["base"]
    logprob = {
        name: np.log(
            np.stack([np.where(works, work[name], 1 - work[name]), np.where(holds, right[name], 1 - right[name])], 1)
        )
        for name in work
    }
    measured = types.SimpleNamespace(
        texts=range(num_texts),
        problem_T=np.arange(num_texts),
        text_N=np.repeat(np.arange(num_texts), 2),
        thinking_N=np.zeros(2 * num_texts, dtype=bool),
        of={name: {"logprob": values.ravel()} for name, values in logprob.items()},
    )
    is_lock = np.tile([False, True], num_texts)
    ratios = changes.log_ratios(measured, "model", {"lock": is_lock, "fork": ~is_lock})
    values, drawn = (works & holds).astype(float), np.ones(num_texts, dtype=bool)
    base = work["base"] * right["base"]
    expected = {
        "everywhere": work["model"] * right["model"] - base,
        "lock": work["base"] * right["model"] - base,
        "fork": work["model"] * right["base"] - base,
    }
    for where, gained in expected.items():
        found = changes.gain(measured, values, changes.weights(measured, ratios[where]), drawn)
        assert found.value == pytest.approx(gained, abs=4 * found.se)
        assert found.se < 0.005


@pytest.fixture(scope="module")
def experiment(lab_model, store, run_step, tmp_path_factory):
    """The lab model, the same after one coarse step away from it, and graded samples of the former: a diagnose run."""
    folder = tmp_path_factory.mktemp("diagnose")
    torch.manual_seed(0)
    network = models.load_weights(lab_model, torch.float32)
    with torch.no_grad():
        network.lm_head.weight *= 1.3  # colder: all mass moves to what was likely
    network.save_pretrained(folder / "model")
    tokenizer = models.load_tokenizer(lab_model)
    tokenizer.save_pretrained(folder / "model")
    problems = world.problems(64, seed=5)
    drawn = sampling.generate(
        lab_model, "transformers", problems, {"samples": Decoding(max_tokens=48)}, 2, 0, folder, "test"
    )["samples"]
    run = run_step(
        "diagnose", preset="qwen3.5-4b", model=folder / "model", base=lab_model, control=lab_model,
        samples=folder / "samples", grades="none", temperature=1.0, top_k=0, top_p=0.85, num_texts=100,
    )  # fmt: skip
    return types.SimpleNamespace(run=run, drawn=drawn, folder=folder, model=str(folder / "model"), base=lab_model)


def artifact(run, name: str) -> Path:
    return Path(tracking.local_path(f"runs:/{run.info.run_id}/{name}"))


def test_what_is_measured_is_what_each_model_says_of_the_text_alone(experiment):
    texts = [Text(sample, "base", "") for sample in experiment.drawn.samples[:40]]
    truncation = Decoding(top_p=0.85)
    measured = measure.measure({"base": experiment.base, "model": experiment.model}, texts, truncation, Rules(), 0)
    for name, folder in (("base", experiment.base), ("model", experiment.model)):
        network = models.load_weights(folder, torch.float32).eval()
        for index in (0, 17, 39):
            prompt, completion = texts[index].sample.prompt_token_ids, texts[index].sample.token_ids
            with torch.inference_mode():
                logits = network(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
            of_text = measured.text_N == index
            np.testing.assert_allclose(measured.of[name]["logprob"][of_text], expected.numpy(), atol=1e-4)
            assert measured.token_N[of_text].tolist() == completion
        # The sampler recorded the base's log-probabilities as it drew.
    sums = np.bincount(measured.text_N, measured.of["base"]["logprob"])
    np.testing.assert_allclose(sums, [each.sample.cumulative_logprob for each in texts], atol=1e-3)
    thinking = [np.array(measured.thinking_N[measured.text_N == index]) for index in range(len(texts))]
    end = models.load_tokenizer(experiment.base).convert_tokens_to_ids("</think>")
    for each, of_text in zip(texts, thinking):
        ids = each.sample.token_ids
        assert of_text.sum() == (ids.index(end) + 1 if end in ids else len(ids))
    assert prompts.opens_thinking(models.load_tokenizer(experiment.base))


def test_the_run_tells_a_change_from_none_and_finds_the_locks_of_the_lab(experiment):
    found = json.loads(artifact(experiment.run, "diagnosis.json").read_text())
    change = {(r["group"], r["quantity"], r["model"], r["against"]): r["estimate"] for r in found["changes"]}
    assert change["all", "kept_mass", "model", "base"]["ci_low"] > 0
    assert change["all", "entropy", "model", "base"]["ci_high"] < 0
    control = change["all", "kept_mass", "control", "base"]
    assert (control["value"], control["ci_low"], control["ci_high"]) == (0, 0, 0)  # the control is the base itself
    assert found["num_texts"] == 100
    truth = found["truth"]["counts"]
    assert sum(truth["fork"].values()) == 100  # each text begins with one
    assert sum(sum(row.values()) for row in truth.values()) == found["num_positions"]
    assert {row["where"] for row in found["gains"]} >= {"everywhere", "lock", "fork", "true lock", "end of thinking"}
    assert {row["value"] for row in found["gains"]} == {"tokens"}  # nothing was graded


def test_the_parts_of_the_change_of_the_loss_are_its_whole(experiment):
    found = json.loads(artifact(experiment.run, "diagnosis.json").read_text())
    loss = {(r["class"], r["term"]): r["estimate"]["value"] for r in found["loss"] if r["model"] == "model"}
    for term in (*measure.TERMS, "loss"):
        assert sum(loss[name, term] for name in measure.CLASSES) == pytest.approx(loss["all", term], abs=1e-9)
    whole = next(
        r["estimate"]["value"]
        for r in found["changes"]
        if (r["group"], r["quantity"], r["model"]) == ("all", "cross_entropy", "model")
    )
    assert loss["all", "loss"] == pytest.approx(whole, abs=1e-4)


def test_the_run_leaves_tables_figures_and_a_page(experiment):
    rows = pq.read_table(artifact(experiment.run, "changes.parquet"))
    assert {"group", "model", "quantity", "value", "ci_low", "ci_high", "before_value"} <= set(rows.column_names)
    positions = pq.read_table(artifact(experiment.run, "positions.parquet"))
    assert {"class", "truth", "base.kept_mass", "model.rank", "control.entropy"} <= set(positions.column_names)
    page = artifact(experiment.run, "diagnosis.md").read_text()
    assert "nan" not in page
    assert "**Tail compression at locks:**" in page
    assert experiment.run.data.tags["mlflow.note.content"].startswith("100 texts of")
    figures = mlflow.MlflowClient().list_artifacts(experiment.run.info.run_id, "figures")
    assert [file.path for file in figures] == ["figures/changes.png", "figures/curves.png"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grades": "a.parquet,b.parquet"}, "names 2 files for 1 of samples"),
        ({"control": "latest"}, "no finished train of arm control"),
        ({"temperature": 0.0}, "temperature=0 is greedy"),
        ({"num_texts": 0}, "num_texts=0 is not an integer >= 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_diagnosed_is_refused_in_one_line(experiment, run_step, capsys, given, message):
    shared = {"preset": "qwen3.5-4b", "model": experiment.model, "base": experiment.base, "grades": "none"}
    with pytest.raises(SystemExit, match="2"):
        run_step("diagnose", **shared | {"samples": experiment.folder / "samples"} | given)
    assert message in capsys.readouterr().err

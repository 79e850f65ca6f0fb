"""Decoding means the same in every engine: as defined here, token by token."""

import dataclasses
import json
import math

import pytest
import torch

from ssd import models, sampling
from ssd.decoding import Decoding
from ssd.engines.logits import next_token_probs
from ssd.engines.opening import open_engine
from ssd.engines.request import max_model_len, requests_for
from ssd.lab import world
from ssd.samples import MANIFEST

# Descending, so that the truncations below are prefixes.
PROBS = [0.4, 0.3, 0.15, 0.1, 0.05]
NONE_GENERATED = torch.zeros((1, 0), dtype=torch.long)


def probs(decoding: Decoding, generated=NONE_GENERATED) -> list[float]:
    return next_token_probs(torch.tensor([PROBS]).log(), decoding, generated)[0].tolist()


def normalised(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        (Decoding(), PROBS),
        (Decoding(temperature=0), [1, 0, 0, 0, 0]),
        (Decoding(temperature=2), normalised([math.sqrt(p) for p in PROBS])),
        (Decoding(top_k=2), normalised([0.4, 0.3, 0, 0, 0])),
        (Decoding(top_p=0.7), normalised([0.4, 0.3, 0, 0, 0])),
        (Decoding(top_p=0.71), normalised([0.4, 0.3, 0.15, 0, 0])),
        (Decoding(min_p=0.3), normalised([0.4, 0.3, 0.15, 0, 0])),
        # Temperature first: at T=2 the first four hold less than 0.9, so all stay; last: only four were kept at T=1.
        (Decoding(temperature=2, top_p=0.9), normalised([math.sqrt(p) for p in PROBS])),
        (
            Decoding(temperature=2, top_p=0.9, temperature_last=True),
            normalised([math.sqrt(p) for p in PROBS[:4]] + [0]),
        ),
        (
            Decoding(temperature=0.5, min_p=0.2, temperature_last=True),
            normalised([p**2 for p in PROBS[:4]] + [0]),
        ),
    ],
    ids=str,
)
def test_the_next_token_is_drawn_from_the_defined_distribution(decoding, expected):
    assert probs(decoding) == pytest.approx(expected, abs=1e-6)


def test_the_repetition_penalty_shrinks_the_logits_of_the_prompt_and_of_what_was_generated():
    """CTRL's rule: a positive logit is divided by it, a negative one multiplied, once however often a token stands."""
    logits = torch.tensor([[2.0, -1.0, 1.0, 0.5]])
    generated, prompt = torch.tensor([[0, 0]]), torch.tensor([[1]])
    found = next_token_probs(logits, Decoding(repetition_penalty=2.0), generated, prompt)[0].tolist()
    assert found == pytest.approx(normalised([math.exp(x) for x in (1.0, -2.0, 1.0, 0.5)]), abs=1e-6)


def test_the_presence_penalty_is_subtracted_once_from_tokens_already_generated():
    generated = torch.tensor([[0, 0, 2]])
    expected = normalised([p * (math.exp(-1.5) if i in (0, 2) else 1) for i, p in enumerate(PROBS)])
    assert probs(Decoding(presence_penalty=1.5), generated) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature=-1 is not a number >= 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0}, r"top_p=0 is not in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 is not in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 2}, "min_p=2"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"presence_penalty": 3}, "presence_penalty=3"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"stop": ("",)}, "stop="),
    ],
)
def test_an_impossible_decoding_is_refused_with_its_value(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)


def test_less_than_one_sample_a_problem_is_refused():
    with pytest.raises(ValueError, match="n=0"):
        requests_for([], [], Decoding(), 0, 0)


def test_a_prompt_longer_than_the_context_is_refused_with_the_problem():
    requests = requests_for(world.problems(1, 0), [[1] * 100], Decoding(max_tokens=50), 1, 0)
    with pytest.raises(ValueError, match=r"prompt of 100 tokens \+ max_tokens=50 = 150 exceeds .* 128"):
        max_model_len(requests, 128)


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="engine='magic' is not one of vllm, transformers, openai, ray, replay"):
        open_engine("magic:place", "model", [])


def complete(engine: str, model: str, requests) -> dict:
    loaded = open_engine(engine, model, requests)
    return {(sample.problem_id, sample.sample_index): sample for sample in loaded.generate(requests)}


def test_a_request_gives_the_same_sample_in_any_batch(lab_model, requests_to):
    requests = requests_to(lab_model, Decoding(max_tokens=64), 12, 2)
    together = complete("transformers", lab_model, requests)
    apart = complete("transformers", lab_model, requests[5:9])
    assert {key: together[key].token_ids for key in apart} == {key: sample.token_ids for key, sample in apart.items()}


def test_samples_of_a_problem_differ_and_another_seed_gives_others(lab_model, requests_to):
    requests = requests_to(lab_model, Decoding(max_tokens=64), 4, 8)
    first = complete("transformers", lab_model, requests)
    other = complete("transformers", lab_model, requests_to(lab_model, Decoding(max_tokens=64), 4, 8, seed=1))
    assert len({tuple(sample.token_ids) for sample in first.values()}) > 8
    assert {k: s.token_ids for k, s in first.items()} != {k: s.token_ids for k, s in other.items()}


DRAWN = [  # each with the number of draws
    (Decoding(temperature=1.1, top_k=8, top_p=0.9, max_tokens=1), 10_000),
    (Decoding(temperature=1.5, min_p=0.02, repetition_penalty=1.3, max_tokens=1), 2_000),
    (Decoding(temperature=5.0, top_p=0.8, temperature_last=True, max_tokens=1), 2_000),
    (Decoding(temperature=3.0, top_k=20, min_p=0.2, max_tokens=1), 2_000),  # vLLM itself takes no temperature above 2
]


def first_tokens(engine: str, model: str, requests) -> list[int]:
    return [sample.token_ids[0] for sample in complete(engine, model, requests).values()]


@pytest.mark.parametrize(("decoding", "n"), DRAWN, ids=str)
def test_what_transformers_samples_is_the_defined_distribution(
    lab_model, requests_to, is_drawn_as_defined, decoding, n
):
    requests = requests_to(lab_model, decoding, 1, n)
    assert is_drawn_as_defined(lab_model, requests, first_tokens("transformers", lab_model, requests))


def test_draws_at_a_slightly_other_temperature_are_told_apart(lab_model, requests_to, is_drawn_as_defined):
    """So that the check of 10,000 draws says something: T = 1.2 is not T = 1.1."""
    right, wrong = (requests_to(lab_model, Decoding(temperature=t, max_tokens=1), 1, 1) for t in (1.1, 1.2))
    weights = models.load_weights(lab_model, torch.float32)
    logits = weights(torch.tensor([right[0].prompt_token_ids])).logits[:, -1].detach()
    generator = torch.Generator().manual_seed(0)

    def draws(decoding: Decoding) -> list[int]:
        probs_1V = next_token_probs(logits, decoding, NONE_GENERATED)
        return probs_1V.multinomial(10_000, replacement=True, generator=generator)[0].tolist()

    assert is_drawn_as_defined(lab_model, right, draws(right[0].decoding))
    assert not is_drawn_as_defined(lab_model, right, draws(wrong[0].decoding))


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(lab_model, requests_to):
    whole = complete("transformers", lab_model, requests_to(lab_model, Decoding(max_tokens=48), 12, 1))
    stopped = complete(
        "transformers", lab_model, requests_to(lab_model, Decoding(max_tokens=48, stop=("</", "7")), 12, 1)
    )
    tokenizer = models.load_tokenizer(lab_model)
    ended = 0
    for key, sample in stopped.items():
        ids = whole[key].token_ids
        holds = [
            length
            for length in range(1, len(ids) + 1)
            if any(text in tokenizer.decode(ids[:length], skip_special_tokens=True) for text in ("</", "7"))
        ]
        assert sample.token_ids == (ids[: holds[0]] if holds else ids)
        assert sample.finish_reason == ("stop" if holds else whole[key].finish_reason)
        ended += bool(holds)
    assert ended > 3


def test_a_sample_carries_its_log_probability_under_the_untouched_model_and_why_it_ended(lab_model, requests_to):
    requests = requests_to(lab_model, Decoding(temperature=1.3, top_k=5, max_tokens=12), 6, 1)
    weights = models.load_weights(lab_model, torch.float32)
    eos = models.load_tokenizer(lab_model).eos_token_id
    for sample in complete("transformers", lab_model, requests).values():
        ids = torch.tensor([sample.prompt_token_ids + sample.token_ids])
        logprobs = weights(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        expected = logprobs[len(sample.prompt_token_ids) - 1 :].sum().item()
        assert sample.cumulative_logprob == pytest.approx(expected, abs=1e-3)
        assert (sample.finish_reason == "stop") == (sample.token_ids[-1] == eos)
        assert eos not in sample.token_ids[:-1]
        assert len(sample.token_ids) <= 12


def test_recorded_samples_are_replayed_and_nothing_else(lab_model, tmp_path, requests_to):
    problems, hot = world.problems(3, seed=7), Decoding(temperature=2.0, max_tokens=12)
    decodings = {"cold": Decoding(temperature=0.5, max_tokens=12), "hot": hot}
    drawn = sampling.generate(lab_model, "transformers", problems, decodings, 2, 0, tmp_path / "drawn", "code")
    engine = f"replay:{tmp_path / 'drawn'}"
    replayed = sampling.generate(lab_model, engine, problems, decodings, 2, 0, tmp_path / "replayed", "code")
    assert {name: part.samples for name, part in replayed.items()} == {n: part.samples for n, part in drawn.items()}
    for others in (
        requests_to(lab_model, hot, 3, 2, seed=1),
        requests_to(lab_model, hot, 3, 3),
        requests_to(lab_model, hot, 4, 2),
        requests_to(lab_model, dataclasses.replace(hot, top_p=0.9), 3, 2),
        [dataclasses.replace(request, prompt_token_ids=[1]) for request in requests_to(lab_model, hot, 3, 2)],
    ):
        with pytest.raises(ValueError, match="has no sample . of problem .* with this prompt, seed and decoding"):
            open_engine(engine, lab_model, others)


def test_recordings_of_another_model_are_refused(lab_model, tmp_path, requests_to):
    problems, decoding = world.problems(1, seed=7), Decoding(max_tokens=4)
    drawn = sampling.generate(lab_model, "transformers", problems, {"a": decoding}, 1, 0, tmp_path, "code")
    manifest = drawn["a"].manifest | {"model": "another"}
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="records model another, not [0-9a-f]{32}"):
        open_engine(f"replay:{tmp_path}", lab_model, requests_to(lab_model, decoding, 1, 1))


@pytest.fixture(scope="module")
def vllm():
    return pytest.importorskip("vllm", reason="vLLM is not installed (the gpu extra, or its CPU build)")


def test_vllm_and_transformers_give_the_same_greedy_tokens(vllm, lab_model, requests_to):
    requests = requests_to(lab_model, Decoding(temperature=0, max_tokens=64), 40, 1)
    ours, theirs = complete("transformers", lab_model, requests), complete("vllm", lab_model, requests)
    assert {key: s.token_ids for key, s in ours.items()} == {key: s.token_ids for key, s in theirs.items()}
    assert {key: s.text for key, s in ours.items()} == {key: s.text for key, s in theirs.items()}
    assert {key: s.finish_reason for key, s in ours.items()} == {key: s.finish_reason for key, s in theirs.items()}


@pytest.mark.parametrize("place", ["2", "tensor_parallel_size=0", "pipeline_parallel_size=2"])
def test_a_parallelism_that_vllm_is_not_asked_for_is_refused(vllm, lab_model, place, requests_to):
    with pytest.raises(ValueError, match=f"engine=vllm:{place} is not vllm:tensor_parallel_size=N"):
        open_engine(f"vllm:{place}", lab_model, requests_to(lab_model, Decoding(max_tokens=4), 1, 1))


@pytest.mark.parametrize(("decoding", "n"), DRAWN, ids=str)
def test_what_vllm_samples_is_the_defined_distribution(vllm, lab_model, requests_to, is_drawn_as_defined, decoding, n):
    requests = requests_to(lab_model, decoding, 1, n)
    assert is_drawn_as_defined(lab_model, requests, first_tokens("vllm", lab_model, requests))


def test_vllm_refuses_to_truncate_first_where_it_was_not_opened_for_that(vllm, lab_model, requests_to):
    loaded = open_engine("vllm", lab_model, requests_to(lab_model, Decoding(top_p=0.8, max_tokens=4), 1, 1))
    last = Decoding(top_p=0.8, temperature_last=True, max_tokens=4)
    with pytest.raises(RuntimeError, match="opened for requests that do not truncate before the temperature"):
        list(loaded.generate(requests_to(lab_model, last, 1, 1)))


def test_vllm_stops_and_penalises_as_transformers_does(vllm, lab_model, requests_to):
    decoding = Decoding(temperature=0, repetition_penalty=1.4, presence_penalty=0.5, max_tokens=48, stop=("</", "7"))
    requests = requests_to(lab_model, decoding, 40, 1)
    ours, theirs = complete("transformers", lab_model, requests), complete("vllm", lab_model, requests)
    assert {key: (s.token_ids, s.text, s.finish_reason) for key, s in ours.items()} == {
        key: (s.token_ids, s.text, s.finish_reason) for key, s in theirs.items()
    }
    plain = complete("vllm", lab_model, requests_to(lab_model, Decoding(temperature=0, max_tokens=48), 40, 1))
    assert {key: s.token_ids for key, s in plain.items()} != {key: s.token_ids for key, s in theirs.items()}

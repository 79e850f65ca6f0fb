"""The worlds beyond the laptop's: answers, where errors fall, what a decoding can do there, a model that learns one."""

import collections
import hashlib
import itertools
import random
import re
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssd import sampling
from ssd.decoding import Decoding
from ssd.lab import automaton, model, tokenizer, world

LARGER = [world.HARD, world.MIXED]
named = pytest.mark.parametrize("of", LARGER, ids=lambda of: of.name)
TINY = model.LARGE._replace(
    shape=model.LARGE.shape
    | {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "linear_num_key_heads": 1, "linear_num_value_heads": 1,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
    batch_size=16, num_workers=1,
)  # fmt: skip


def evaluate(statement: str) -> int:
    """Answer of a statement, from its text alone."""
    modulus = int(re.search(r"modulo (\d+)", statement)[1])
    if chain := re.match(r"Start with (\d+)", statement):
        value = int(chain[1])
        for verb, number in re.findall(r", (add|subtract|multiply by) (\d+)", statement):
            number = int(number)
            value = {"add": value + number, "subtract": value - number, "multiply by": value * number}[verb]
    elif polynomial := re.match(r"Let p\(x\) = (.*)\. Find p\((\d+)\)", statement):
        expression = re.sub(r"(\d)x", r"\1*x", polynomial[1]).replace("^", "**")
        value = eval(expression, {"__builtins__": {}}, {"x": int(polynomial[2])})
    else:
        value = int(re.match(r"Let a_1 = (\d+)", statement)[1])
        odd, even = ((int(a), int(b)) for a, b in re.findall(r"(\d+) a_n \+ (\d+)", statement))
        for n in range(1, int(re.search(r"Find a_(\d+)", statement)[1])):
            factor, constant = odd if n % 2 else even
            value = factor * value + constant
    return value % modulus


def test_the_laptops_problems_are_those_that_were_measured():
    text = "".join(map(repr, world.problems(500, seed=0))).replace(
        ", tolerance=0.0, notation=''", ""
    )  # which came later
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest.startswith("488e47760cca9259")


@named
def test_every_answer_agrees_with_an_evaluation_of_the_statement(of):
    problems = world.problems(600, 0, of)
    assert problems == world.problems(600, 0, of) != world.problems(600, 1, of)
    assert [int(problem.answer) for problem in problems] == [evaluate(problem.problem) for problem in problems]
    assert len({problem.problem_id for problem in problems}) == 600
    assert {int(problem.level) for problem in problems} == set(range(of.num_operations[0], of.num_operations[1] + 1))
    assert {problem.source for problem in problems} == {
        f"{of.name}-{family}" for family in ("chain", "recurrence", "polynomial")
    }


@named
def test_kinds_are_the_results_and_every_text_and_number_is_one_token(of):
    rng, words = random.Random(0), tokenizer.build(of)
    for style, _ in itertools.product(of.styles, range(20)):
        task = world.draw(rng, of)
        text = world.work(task, rng, style, world=of)
        tokens = words.tokenize(text)
        assert "".join(tokens) == text
        locks = [token for token, kind in zip(tokens, world.kinds(tokens)) if kind == "lock"]
        assert locks == re.findall(rf"{re.escape(style.relation)}(\d+)", text)
        assert len(locks) == len(task.operations) and tokens[0] == style.opening
        assert len(tokens) == 2 + 4 * len(task.operations) + 6
        guessed = words.tokenize(world.guess(task, rng, of))
        assert [kind for kind in world.kinds(guessed) if kind != "given"] == ["fork", "guess"]


@pytest.mark.parametrize(
    ("of", "operation", "wrong"),
    [
        (world.HARD, "minus", {k: 0.10 / 12 for k in range(1, 13)}),
        (world.MIXED, "minus", {1: 0.42}),
        (world.MIXED, "plus", dict.fromkeys((1, 2, 3, 4), 0.042)),
        (world.MIXED, "times", dict.fromkeys((1, 2, 3, 4), 0.042)),
    ],
    ids=lambda value: getattr(value, "name", str(value)[:6]),
)
def test_errors_fall_where_the_world_says(of, operation, wrong):
    rng, num = random.Random(1), 8_000
    task = world.Task("", "", 5, ((operation, 2),), of.modulus)
    boxed = (int(re.search(r"boxed\{(\d+)", world.work(task, rng, of.styles[0], world=of))[1]) for _ in range(num))
    off = collections.Counter((value - task.answer()) % of.modulus for value in boxed)
    assert set(off) == {0, *wrong}
    assert {k: off[k] / num for k in wrong} == pytest.approx(wrong, abs=0.015)


@named
def test_a_guess_tells_nothing_of_the_answer(of):
    rng = random.Random(2)
    tasks = [world.draw(rng, of) for _ in range(4_000)]
    right = [world.guess(task, rng, of).endswith(f"{{{task.answer()}}}") for task in tasks]
    assert statistics.mean(right) == pytest.approx(1 / of.modulus, abs=0.015)


def best_pass_rate(of: world.World, num_operations: int, trained: Decoding | None, decodings: list[Decoding]) -> float:
    """Of a chain of plus, minus and plus again, ..., by the world's own distributions, and after ideal training."""
    guess = of.guess_share[num_operations]
    states = [[guess, *((1 - guess) * style.share for style in of.styles)]]
    for name in ("plus", "minus"):
        broken, others = of.error_rate * of.error_factor[name], of.num_wrong[name]
        states.append([1 - broken, *[broken / others] * others])
    probs = [torch.tensor(state, dtype=torch.float64) for state in states]
    if trained:
        probs = [automaton.decoded(state, trained) for state in probs]
    rates = []
    for decoding in decodings:
        fork, plus, minus = (float(automaton.decoded(state, decoding)[0]) for state in probs)
        locks = plus ** -(-num_operations // 2) * minus ** (num_operations // 2)
        rates.append(fork / of.modulus + (1 - fork) * locks)
    return max(rates)


def test_in_the_mixed_world_no_one_decoding_does_what_training_and_decoding_do():
    settings = itertools.product(
        (1.0, 1.5, 2.0, 2.5, 5.0, 10.0), (0.5, 0.59, 0.7, 0.8, 1.0), (0.0, 0.06, 0.2, 0.5), (False, True)
    )
    every = [Decoding(temperature=t, top_p=p, min_p=m, temperature_last=last) for t, p, m, last in settings]
    plain = [decoding for decoding in every if decoding.min_p == 0 and not decoding.temperature_last]
    trained = best_pass_rate(world.MIXED, 3, Decoding(top_p=0.8), plain)
    assert trained - best_pass_rate(world.MIXED, 3, None, every) > 0.1
    # In the world with the laptop's structure min-p alone is as good.
    min_p = [decoding for decoding in every if decoding.top_p == 1 and not decoding.temperature_last]
    trained = best_pass_rate(world.HARD, 6, Decoding(top_p=0.85), plain)
    assert best_pass_rate(world.HARD, 6, None, min_p) > trained - 0.02
    assert trained - best_pass_rate(world.HARD, 6, None, plain) > 0.02


def test_a_model_of_qwen35s_architecture_learns_and_answers(tmp_path):
    losses = []
    model.train(tmp_path, num_steps=12, on_step=lambda step, loss: losses.append(loss), of=world.HARD, recipe=TINY)
    assert statistics.mean(losses[-3:]) < statistics.mean(losses[:3]) - 0.15
    network = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert network.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert network.dtype == torch.bfloat16
    problems, decoding = world.problems(3, 0, world.HARD), {"samples": Decoding(max_tokens=8)}
    drawn = sampling.generate(str(tmp_path), "transformers", problems, decoding, 2, 0, tmp_path / "drawn", "")
    assert len(drawn["samples"].samples) == 6 and drawn["samples"].manifest["thinks"]


def test_the_model_for_a_gpu_has_sixty_million_parameters():
    with torch.device("meta"):
        network = model.LARGE.architecture(model.config(tokenizer.build(world.HARD), model.LARGE))
    assert 50e6 < network.num_parameters() < 70e6

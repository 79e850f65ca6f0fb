"""The lab: problems with one answer, solutions with the declared forks and locks, a tokenizer and a folder that fit."""

import collections
import random
import re
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssd.lab import model, tokenizer, world
from ssd.prompts import PROMPT, render

PROBLEMS = world.problems(1_000, seed=0)
WORDS = tokenizer.build()


def evaluate(statement: str) -> int:
    """Answer of a statement, from its text alone."""
    if chain := re.fullmatch(r"Start with (\d)(.*)\. What is the result modulo 7\?", statement):
        value = int(chain[1])
        for verb, digit in re.findall(r", (add|subtract|multiply by) (\d)", chain[2]):
            value = {"add": value + int(digit), "subtract": value - int(digit), "multiply by": value * int(digit)}[verb]
        return value % 7
    if polynomial := re.fullmatch(r"Let p\(x\) = (.*)\. Find p\((\d)\) modulo 7\.", statement):
        expression = re.sub(r"(\d)x", r"\1*x", polynomial[1]).replace("^", "**")
        return eval(expression, {"__builtins__": {}}, {"x": int(polynomial[2])}) % 7
    rule = r"(\d) a_n \+ (\d)"
    recurrence = re.fullmatch(
        rf"Let a_1 = (\d)\. For odd n let a_{{n\+1}} = {rule}; for even n let a_{{n\+1}} = {rule}\. "
        r"Find a_(\d) modulo 7\.",
        statement,
    )
    first, *rules, index = map(int, recurrence.groups())
    value = first
    for n in range(1, index):
        factor, constant = rules[:2] if n % 2 else rules[2:]
        value = factor * value + constant
    return value % 7


def tasks(num_tasks: int) -> list[world.Task]:
    rng = random.Random(1)
    return [world.draw(rng) for _ in range(num_tasks)]


def test_one_seed_gives_the_same_problems_and_another_gives_others():
    assert world.problems(50, seed=3) == world.problems(50, seed=3)
    assert world.problems(50, seed=3) != world.problems(50, seed=4)
    assert world.problems(50, seed=3) == world.problems(80, seed=3)[:50]


def test_statements_and_identifiers_are_distinct():
    assert len({problem.problem for problem in PROBLEMS}) == len(PROBLEMS)
    assert len({problem.problem_id for problem in PROBLEMS}) == len(PROBLEMS)


def test_every_answer_agrees_with_an_evaluation_of_the_statement():
    assert [int(problem.answer) for problem in PROBLEMS] == [evaluate(problem.problem) for problem in PROBLEMS]


def test_three_families_and_levels_2_to_6_occur():
    assert {problem.source for problem in PROBLEMS} == {"lab-chain", "lab-recurrence", "lab-polynomial"}
    assert {problem.level for problem in PROBLEMS} == {"2", "3", "4", "5", "6"}


def test_no_problems_are_refused():
    with pytest.raises(ValueError, match="num_problems is 0"):
        world.problems(0, seed=0)


@pytest.mark.parametrize("level", world.GUESS_SHARE)
def test_branches_occur_at_their_declared_shares(level):
    rng = random.Random(2)
    task = world.Task("lab-chain", "", 3, (("plus", 1),) * level)
    solutions = [world.worked_solution(task, rng) for _ in range(4_000)]
    shares = {world.GUESS: world.GUESS_SHARE[level]}
    shares |= {style.opening: style.share * (1 - world.GUESS_SHARE[level]) for style in world.STYLES}
    assert sum(shares.values()) == pytest.approx(1)
    for opening, share in shares.items():
        assert sum(solution.startswith(opening) for solution in solutions) / 4_000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("style", world.STYLES, ids=lambda style: style.opening)
def test_worked_solutions_without_errors_are_right(style):
    rng = random.Random(3)
    for task in tasks(200):
        assert world.work(task, rng, style, error_rate=0.0).endswith(f"</think>\n\n\\boxed{{{task.answer()}}}")


def test_a_guess_is_right_at_its_declared_rate():
    rng = random.Random(4)
    right = [world.guess(task, rng).endswith(f"{{{task.answer()}}}") for task in tasks(4_000)]
    assert statistics.mean(right) == pytest.approx(world.GUESS_RIGHT, abs=0.02)


def test_a_lock_breaks_at_the_average_error_rate_and_takes_every_wrong_value():
    rng = random.Random(5)
    one_step = world.Task("lab-chain", "", 3, (("minus", 1),))
    results = collections.Counter(int(world.work(one_step, rng, world.STYLES[0])[-2]) for _ in range(10_000))
    assert results[2] / 10_000 == pytest.approx(0.9, abs=0.01)
    assert set(results) == set(range(7))


def test_texts_survive_encoding_and_decoding():
    rng = random.Random(6)
    texts = [text for task in tasks(500) for text in (task.statement, world.worked_solution(task, rng))]
    texts += ["If $\\frac{1}{2} + x = 10$, find $x$.\n\tNo tokens here: ~#@!", PROMPT.format(problem="x")]
    assert [WORDS.decode(WORDS(text).input_ids) for text in texts] == texts


def test_any_text_can_be_encoded():
    assert WORDS.unk_token_id in WORDS("Soit α une racine, naïve.").input_ids


def test_the_prompt_ends_where_the_assistant_begins_to_think():
    prompt = WORDS.decode(render(WORDS, PROBLEMS[0].problem))
    assert PROMPT.format(problem=PROBLEMS[0].problem) in prompt
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_the_chat_template_can_close_the_think_section():
    messages = [{"role": "user", "content": "x"}]
    closed = WORDS.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False, tokenize=False)
    assert closed.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_trained_folder_loads_and_its_training_rows_are_the_rendered_prompts(tmp_path):
    losses = []
    model.train(tmp_path, num_steps=2, on_step=lambda step, loss: losses.append((step, loss)))
    words, network = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [step for step, _ in losses] == [0, 1]
    assert network.num_parameters() < 4_000_000
    assert network.dtype == torch.float32
    assert network.generation_config.eos_token_id == words.eos_token_id == words.convert_tokens_to_ids("<|im_end|>")
    assert render(words, PROBLEMS[0].problem) == render(WORDS, PROBLEMS[0].problem)
    [(prompt, response), *_] = model._batch(words, random.Random(0), clean=False)
    statement = words.decode(prompt).split("\n\n")[1].split("<|im_end|>")[0]
    assert prompt == render(words, statement)
    assert words.decode(response).endswith("}<|im_end|>")


def test_training_for_no_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_steps is 0"):
        model.train(tmp_path, num_steps=0)


def test_kinds_name_the_fork_the_locks_and_the_guessed_digit():
    rng = random.Random(7)
    task = world.Task("lab-chain", "", 3, (("plus", 1), ("times", 2)))
    worked = WORDS.tokenize(world.work(task, rng, world.STYLES[2], error_rate=0.5))
    kinds = world.kinds(worked)
    assert worked[:5] == ["Take ", "3", "; plus ", "1", " = "]
    assert [index for index, kind in enumerate(kinds) if kind == "lock"] == [5, 9]
    assert kinds[0] == "fork" and set(kinds[10:]) == {"given"}
    guessed = WORDS.tokenize(world.guess(task, rng))
    assert [kind for kind in world.kinds(guessed) if kind != "given"] == ["fork", "guess"]
    assert world.kinds(guessed)[-2] == "guess"  # the digit, before the closing brace

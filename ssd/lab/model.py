"""The lab's model: a Qwen3 of 0.3M parameters, trained here from scratch to write the world's worked solutions."""

import math
import os
import random
from collections.abc import Callable

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ssd.lab import tokenizer, world
from ssd.prompts import PROMPT

NUM_STEPS = 500
BATCH_SIZE = 64
# With Muon the arithmetic is there by step 150; AdamW alone took some 350 steps of twice the batch. Muon is for the
# matrices within layers only.
PEAK_LR_MUON = 0.02
PEAK_LR_ADAMW = 3e-3
WARMUP_STEPS = 30
# The first part is free of errors and of guesses: they teach no arithmetic and delay it.
CLEAN_SHARE = 0.35
IGNORED = -100


def train(
    folder: str | os.PathLike,
    seed: int = 0,
    num_steps: int = NUM_STEPS,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train the lab's model and save it with its tokenizer and generation config to `folder`.

    Parameters
    ----------
    folder : path
        What `AutoModelForCausalLM` and `AutoTokenizer` load, float32.
    seed : int
        Of the weights and of the training problems.
    num_steps : int
        Optimizer steps of 64 solutions each. The default takes about 150 s of processor time.
    on_step : callable, optional
        Called with (step, loss in nats a response token) after every step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; train for at least 1 step")
    torch.manual_seed(seed)
    rng = random.Random(seed)
    words = tokenizer.build()
    model = Qwen3ForCausalLM(config(words)).train()
    optimizers = _optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: _lr_factor(step, num_steps)) for each in optimizers
    ]
    for step in tqdm(range(num_steps), desc="lab model", unit="step"):
        loss = _loss(model, _batch(words, rng, clean=step < CLEAN_SHARE * num_steps))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
        if on_step:
            on_step(step, loss)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def config(words: PreTrainedTokenizerFast) -> Qwen3Config:
    """Architecture of the lab's model, for the vocabulary of `words`."""
    return Qwen3Config(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=tokenizer.MAX_LENGTH,
        tie_word_embeddings=False,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
    )


def _optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    inside = set(matrices)
    others = [parameter for parameter in model.parameters() if parameter not in inside]
    return [
        torch.optim.Muon(matrices, lr=PEAK_LR_MUON, weight_decay=0.1),
        torch.optim.AdamW(others, lr=PEAK_LR_ADAMW, betas=(0.9, 0.95), weight_decay=0.1),
    ]


def _lr_factor(step: int, num_steps: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def _batch(words: PreTrainedTokenizerFast, rng: random.Random, clean: bool) -> list[tuple[list[int], list[int]]]:
    # (prompt, response) token ids of each row.
    messages = [{"role": "user", "content": PROMPT.format(problem="{statement}")}]
    chat = words.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=True, tokenize=False)
    tasks = [world.draw(rng) for _ in range(BATCH_SIZE)]
    prompts = words([chat.replace("{statement}", task.statement) for task in tasks]).input_ids
    responses = words([_response(task, rng, clean) + words.eos_token for task in tasks]).input_ids
    return list(zip(prompts, responses, strict=True))


def _response(task: world.Task, rng: random.Random, clean: bool) -> str:
    if clean:
        return world.work(task, rng, rng.choice(world.STYLES), error_rate=0.0)
    return world.worked_solution(task, rng)


def _loss(model: Qwen3ForCausalLM, batch: list[tuple[list[int], list[int]]]) -> float:
    # Mean loss of the response tokens; its gradient is left in the parameters. The short and the long half of the
    # batch run apart, since a padded token costs as much as a real one.
    rows = sorted(batch, key=lambda row: len(row[0]) + len(row[1]))
    num_tokens = sum(len(response) for _, response in rows)
    total = 0.0
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        longest = max(len(prompt) + len(response) for prompt, response in half)
        input_ids = torch.full((len(half), longest), model.config.pad_token_id)
        labels = torch.full((len(half), longest), IGNORED)
        for index, (prompt, response) in enumerate(half):
            end = len(prompt) + len(response)
            input_ids[index, :end] = torch.tensor(prompt + response)
            labels[index, len(prompt) : end] = torch.tensor(response)
        # Padding is on the right and attention is causal, so no mask is needed.
        logits = model(input_ids=input_ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        (loss / num_tokens).backward()
        total += loss.item()
    return total / num_tokens

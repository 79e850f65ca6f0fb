"""A lab's model, trained here from scratch to write its world's worked solutions.

That of the world `lab` is a Qwen3 of 0.3M parameters, for a laptop; those of the others have Qwen3.5's architecture,
gated delta rule and attention 3:1, and 60M parameters, for a GPU.
"""

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3ForCausalLM,
)

from ssd.lab import tokenizer, world
from ssd.lab.world import World
from ssd.prompts import PROMPT
from ssd.training import kernels

NUM_STEPS = 500
# With Muon the arithmetic is there by step 150; AdamW alone took some 350 steps of twice the batch. Muon is for the
# matrices within layers only.
PEAK_LR_MUON = 0.02
PEAK_LR_ADAMW = 3e-3
WARMUP_STEPS = 30
# The first part is free of errors and of guesses: they teach no arithmetic and delay it.
CLEAN_SHARE = 0.35
IGNORED = -100


class Recipe(NamedTuple):
    """A model's class and shape, the dtype it is saved in, and its batches.

    A batch is run in `num_parts`, by length; `num_workers` processes write its solutions, 0 for this one.
    """

    architecture: type[PreTrainedModel]
    shape: Mapping[str, Any]
    dtype: torch.dtype
    batch_size: int
    num_parts: int
    num_workers: int


SMALL = Recipe(
    Qwen3ForCausalLM,
    {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32,
    },
    torch.float32, batch_size=64, num_parts=2, num_workers=0,
)  # fmt: skip
# One part: on a GPU a step is bound by the number of its kernels, not by padding.
LARGE = Recipe(
    Qwen3_5ForCausalLM,
    {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 128, "linear_num_key_heads": 8, "linear_num_value_heads": 8,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    },
    torch.bfloat16, batch_size=512, num_parts=1, num_workers=4,
)  # fmt: skip
RECIPES = {name: SMALL if name == world.LAB.name else LARGE for name in world.WORLDS}


def train(
    folder: str | os.PathLike,
    seed: int = 0,
    num_steps: int = NUM_STEPS,
    on_step: Callable[[int, float], None] | None = None,
    of: World = world.LAB,
    recipe: Recipe | None = None,
) -> None:
    """Train the model of a world and save it with its tokenizer and generation config to `folder`.

    On the GPU where there is one, with float32 weights and moments and bfloat16 compute.

    Parameters
    ----------
    folder : path
        What `AutoModelForCausalLM` and `AutoTokenizer` load.
    seed : int
        Of the weights and of the training problems.
    num_steps : int
        Optimizer steps. The default, of the world `lab`, takes about 150 s of processor time.
    on_step : callable, optional
        Called with (step, loss in nats a response token) after every step.
    of : World
    recipe : Recipe, optional
        That of RECIPES for the world, unless given.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; train for at least 1 step")
    recipe = recipe or RECIPES[of.name]
    torch.manual_seed(seed)
    words = tokenizer.build(of)
    model = recipe.architecture(config(words, recipe)).train()
    if torch.cuda.is_available():
        model.to("cuda")
        if recipe.architecture is Qwen3_5ForCausalLM:
            kernels.install(model)
    optimizers = _optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: _lr_factor(step, num_steps)) for each in optimizers
    ]
    batches = torch.utils.data.DataLoader(
        _Batches(words, of, recipe.batch_size, seed, num_steps), batch_size=None, num_workers=recipe.num_workers
    )
    for step, batch in enumerate(tqdm(batches, total=num_steps, desc="lab model", unit="step", mininterval=1)):
        loss = _loss(model, batch, recipe.num_parts)
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
    model.to(recipe.dtype).save_pretrained(folder)
    words.save_pretrained(folder)


def config(words: PreTrainedTokenizerFast, recipe: Recipe = SMALL) -> PretrainedConfig:
    """Config of the model of `recipe`, for the vocabulary of `words`."""
    return recipe.architecture.config_class(
        **recipe.shape,
        vocab_size=len(words),
        max_position_embeddings=tokenizer.MAX_LENGTH,
        tie_word_embeddings=False,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
    )


def _optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
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


class _Batches(torch.utils.data.IterableDataset):
    """A batch a step; of several workers each has its own stream and every so manieth step."""

    def __init__(self, words: PreTrainedTokenizerFast, of: World, batch_size: int, seed: int, num_steps: int):
        self.words, self.of, self.batch_size, self.seed, self.num_steps = words, of, batch_size, seed, num_steps

    def __iter__(self) -> Iterator[list[tuple[list[int], list[int]]]]:
        worker = torch.utils.data.get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        rng = random.Random(f"{self.seed}/{first}" if worker else self.seed)
        for step in range(first, self.num_steps, every):
            yield _batch(self.words, rng, step < CLEAN_SHARE * self.num_steps, self.of, self.batch_size)


def _batch(
    words: PreTrainedTokenizerFast,
    rng: random.Random,
    clean: bool,
    of: World = world.LAB,
    batch_size: int = SMALL.batch_size,
) -> list[tuple[list[int], list[int]]]:
    # (prompt, response) token ids of each row.
    messages = [{"role": "user", "content": PROMPT.format(problem="{statement}")}]
    chat = words.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=True, tokenize=False)
    tasks = [world.draw(rng, of) for _ in range(batch_size)]
    prompts = words([chat.replace("{statement}", task.statement) for task in tasks]).input_ids
    responses = words([_response(task, rng, clean, of) + words.eos_token for task in tasks]).input_ids
    return list(zip(prompts, responses, strict=True))


def _response(task: world.Task, rng: random.Random, clean: bool, of: World) -> str:
    if clean:
        return world.work(task, rng, rng.choice(of.styles), error_rate=0.0)
    return world.worked_solution(task, rng, of)


def _loss(model: PreTrainedModel, batch: list[tuple[list[int], list[int]]], num_parts: int) -> float:
    # Mean loss of the response tokens; its gradient is left in the parameters. The short and the long part of the
    # batch run apart, since a padded token costs as much as a real one.
    rows = sorted(batch, key=lambda row: len(row[0]) + len(row[1]))
    num_tokens = sum(len(response) for _, response in rows)
    total, device = 0.0, model.device
    for number in range(num_parts):
        part = rows[number * len(rows) // num_parts : (number + 1) * len(rows) // num_parts]
        longest = max(len(prompt) + len(response) for prompt, response in part)
        input_ids = torch.full((len(part), longest), model.config.pad_token_id)
        labels = torch.full((len(part), longest), IGNORED)
        for index, (prompt, response) in enumerate(part):
            end = len(prompt) + len(response)
            input_ids[index, :end] = torch.tensor(prompt + response)
            labels[index, len(prompt) : end] = torch.tensor(response)
        # Padding is on the right and attention is causal, so no mask is needed.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=input_ids.to(device), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten().to(device),
            ignore_index=IGNORED,
            reduction="sum",
        )
        (loss / num_tokens).backward()
        total += loss.item()
    return total / num_tokens

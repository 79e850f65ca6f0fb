"""Training sees the sampled tokens and nothing else, and a killed run ends where an unbroken one does."""

import collections
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
import trl
from torch.utils._python_dispatch import TorchDispatchMode
from trl.models import enable_selective_activation_checkpointing

from ssd import models, prompts
from ssd.decoding import Decoding
from ssd.engines.logits import truncate
from ssd.engines.opening import open_engine
from ssd.engines.request import requests_for
from ssd.lab import world
from ssd.records import Sample
from ssd.training import noise, sft
from ssd.training.rows import rows
from ssd.training.sft import train

SETTINGS = {"lr": 1e-3, "epochs": 1.0, "max_length": 256, "lora_rank": 0, "save_steps": 2, "seed": 0}


@pytest.fixture(scope="module")
def samples(lab_model) -> list[Sample]:
    """Of 48 problems; the cap is low, so that some are cut off."""
    problems, tokenizer = world.problems(48, seed=3), models.load_tokenizer(lab_model)
    rendered = [prompts.render(tokenizer, problem.problem) for problem in problems]
    requests = requests_for(problems, rendered, Decoding(max_tokens=20), 1, 0)
    return list(open_engine("transformers", lab_model, requests).generate(requests))


def losses(into: dict, name: str = "loss"):
    return lambda step, metrics: into.setdefault(step, metrics[name]) if name in metrics else None


def test_labels_are_the_sampled_tokens_with_the_end_of_turn_only_where_it_was_drawn(
    lab_model, samples, tmp_path, monkeypatch
):
    seen = []
    original = trl.SFTTrainer.compute_loss

    def recording(self, model, inputs, *args, **kwargs):
        for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True):
            kept = mask.bool()
            seen.append((ids[kept].tolist(), labels[kept].tolist()))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", recording)
    train(lab_model, rows(samples, 256).dataset, tmp_path, global_batch_size=16, on_log=lambda *_: None, **SETTINGS)
    expected = [
        (s.prompt_token_ids + s.token_ids, [-100] * len(s.prompt_token_ids) + s.token_ids)
        for s in samples
        if not (s.finish_reason == "stop" and "\n" not in s.text.strip())
    ]
    assert sorted(seen) == sorted(expected)
    eos = models.load_tokenizer(lab_model).eos_token_id
    ended = {s.finish_reason for s in samples if s.token_ids[-1] == eos}
    cut = {s.finish_reason for s in samples if s.token_ids[-1] != eos}
    assert (ended, cut) == ({"stop"}, {"length"})


class AttentionComputed(TorchDispatchMode):
    """How often it was, forward."""

    times = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.times += "scaled_dot_product" in str(func) and "backward" not in str(func)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_training_of_long_texts_computes_attention_once(lab_model, lora_rank):
    """The Trainer asks it of an adapter's model by another way, and forgets or fails without a word from TRL."""
    times, gradients = [], []
    for is_kept in (True, False):
        weights = models.load_weights(lab_model, torch.float32)
        if is_kept:
            enable_selective_activation_checkpointing(weights)
        torch.manual_seed(0)
        model = peft.get_peft_model(weights, sft._lora(lora_rank, False)) if lora_rank else weights
        model.activation_checkpointing_enable()
        model.train()
        ids = torch.arange(64)[None]
        with AttentionComputed() as attention:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        times.append(attention.times / weights.config.num_hidden_layers)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert times == [1, 2]
    assert gradients[0] and all(map(torch.equal, *gradients))


def test_stubs_and_too_long_samples_are_left_out_and_counted():
    def sample(text: str, length: int = 3, finish_reason="stop") -> Sample:
        return Sample("p", 0, [1, 2], [3] * length, text, finish_reason, -1.0)

    kept = [sample("think\n</think>\n\n5"), sample("cut off in its first line", finish_reason="length")]
    found = rows([*kept, sample(""), sample("five"), sample("a\nb", length=99)], max_length=50)
    assert (len(found.dataset), found.num_stubs, found.num_too_long) == (2, 2, 1)
    found = rows([*kept, sample("a\nb", length=99)], max_length=50, completions="finished")
    assert (len(found.dataset), found.num_unfinished, found.num_too_long) == (1, 1, 1)
    found = rows([*kept, sample("a\nb", length=99)], max_length=50, completions="cut")
    assert [len(ids) for ids in found.dataset["input_ids"]] == [5, 5, 50]
    with pytest.raises(ValueError, match="none of 1 samples can be trained on"):
        rows([sample("five")], max_length=50)


def test_a_killed_run_continues_and_ends_where_an_unbroken_one_does(lab_model, samples, tmp_path):
    """The same losses at each step and the same weights, within float32 rounding, and as many tokens seen."""
    dataset = rows(samples, 256).dataset
    unbroken, continued = collections.defaultdict(dict), collections.defaultdict(dict)

    def into(logged):
        return lambda step, metrics: [losses(logged[name], name)(step, metrics) for name in metrics]

    *_, (last, folder) = train(
        lab_model, dataset, tmp_path / "a", global_batch_size=8, on_log=into(unbroken), **SETTINGS
    )

    class Killed(Exception):
        """What ends the first run in its midst."""

    def die_at_step_3(step, metrics):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        train(lab_model, dataset, tmp_path / "b", global_batch_size=8, on_log=die_at_step_3, **SETTINGS)
    *_, (last_b, folder_b) = train(
        lab_model, dataset, tmp_path / "b", global_batch_size=8, on_log=into(continued), **SETTINGS
    )
    assert last == last_b == max(unbroken["loss"])
    assert continued["loss"] == pytest.approx(unbroken["loss"], abs=1e-5)
    assert continued["num_tokens"] == unbroken["num_tokens"] and unbroken["num_tokens"]
    assert continued["update_ratio"] == pytest.approx(unbroken["update_ratio"], rel=1e-2)
    assert continued.keys() == unbroken.keys() and not any(name.startswith("train_") for name in continued)
    ours, theirs = (models.load_weights(str(f), torch.float32).state_dict() for f in (folder, folder_b))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)


def test_a_damaged_checkpoint_is_trained_again_with_those_after_it(lab_model, samples, tmp_path):
    given = (lab_model, rows(samples, 256).dataset, tmp_path)
    *_, (last, exported) = train(*given, global_batch_size=8, on_log=lambda *_: None, **SETTINGS)
    weights = (exported / "model.safetensors").read_bytes()
    damaged = tmp_path / "checkpoint-4" / "optimizer.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    trained = []
    checkpoints = train(*given, global_batch_size=8, on_log=lambda step, _: trained.append(step), **SETTINGS)
    assert [step for step, _ in checkpoints] == [2, 4, last] and set(trained) >= {3, 4, last}
    assert (checkpoints[-1][1] / "model.safetensors").read_bytes() == weights


def test_each_checkpoint_is_complete_and_differs_from_the_last(lab_model, samples, tmp_path):
    dataset = rows(samples, 256).dataset
    saved = train(lab_model, dataset, tmp_path, global_batch_size=16, on_log=lambda *_: None, **SETTINGS)
    assert [step for step, _ in saved] == [2, 3]
    assert len({models.digest(lab_model), *(models.digest(str(folder)) for _, folder in saved)}) == 3
    for _, folder in saved:
        assert models.load_tokenizer(str(folder)).chat_template == models.load_tokenizer(lab_model).chat_template


def test_samples_at_temperature_1_teach_nothing_and_truncated_ones_raise_the_kept_mass(lab_model):
    """The mean gradient over 4,096 samples is zero within its error (arXiv 2604.01193, section B.2), or it is not."""
    tokenizer, problems = models.load_tokenizer(lab_model), world.problems(512, seed=4)
    rendered = [prompts.render(tokenizer, problem.problem) for problem in problems]

    def forward(model, batch: list[Sample]):
        ids = [torch.tensor(sample.prompt_token_ids + sample.token_ids) for sample in batch]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        is_target = torch.zeros_like(padded, dtype=torch.bool)
        for row, sample in enumerate(batch):
            is_target[row, len(sample.prompt_token_ids) : len(ids[row])] = True
        # Padding follows the text, where causal attention does not see it.
        return model(padded).logits[:, :-1][is_target[:, 1:]], padded[:, 1:][is_target[:, 1:]]

    def signals(decoding: Decoding) -> tuple[np.ndarray, list[Sample], torch.nn.Module]:
        requests = requests_for(problems, rendered, decoding, 8, 0)
        drawn = list(open_engine("transformers", lab_model, requests).generate(requests))
        drawn = [drawn[i] for i in np.random.default_rng(0).permutation(len(drawn))]
        model = models.load_weights(lab_model, torch.float32)
        gradients, found = noise.Gradients(model.parameters()), []
        whole = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for start in range(0, len(drawn), 512):
            model.zero_grad()
            num_tokens = sum(len(sample.token_ids) for sample in drawn[start : start + 512])
            for part in range(start, start + 512, 64):
                batch = drawn[part : part + 64]
                gradients.begin_part(sum(len(sample.token_ids) for sample in batch))
                loss = torch.nn.functional.cross_entropy(*forward(model, batch), reduction="sum") / num_tokens
                loss.backward()
            grads = [parameter.grad for parameter in model.parameters()]
            found.append(gradients.end_step(float(sum(grad.square().sum() for grad in grads).sqrt())).signal)
            whole = [total + grad for total, grad in zip(whole, grads)]
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), whole):
                parameter -= 0.01 * grad / len(found)
        return np.array(found), drawn, model

    untruncated, _, _ = signals(Decoding(temperature=1.0, max_tokens=12))
    assert abs(untruncated.mean()) < 3 * untruncated.std(ddof=1) / math.sqrt(len(untruncated))
    shifted = Decoding(temperature=1.3, top_p=0.8, max_tokens=12)
    truncated, drawn, stepped = signals(shifted)
    assert truncated.mean() > 5 * truncated.std(ddof=1) / math.sqrt(len(truncated))
    with torch.no_grad():
        before, _ = forward(models.load_weights(lab_model, torch.float32), drawn[:256])
        kept = truncate(before / shifted.temperature, shifted) > -torch.inf
        after, _ = forward(stepped, drawn[:256])
        masses = [(logits.softmax(-1) * kept).sum(-1).mean() for logits in (before, after)]
    assert masses[1] > masses[0]


def test_two_processes_train_as_one_does(lab_model, samples, tmp_path):
    """The same losses and weights within float32 rounding, and each number logged once."""
    dataset, logged = rows(samples, 256).dataset, {1: [], 2: []}
    dataset = dataset.select(range(len(dataset) // 8 * 8))  # two processes leave out what fills no micro-batch of each
    saved = {
        number: train(
            lab_model, dataset, tmp_path / str(number), global_batch_size=16, num_processes=number,
            on_log=lambda step, metrics, number=number: logged[number].append((step, metrics)), **SETTINGS,
        )
        for number in (1, 2)
    }  # fmt: skip
    alone, together = ([(step, metrics["loss"]) for step, metrics in logged[n] if "loss" in metrics] for n in (1, 2))
    assert together == [(step, pytest.approx(loss, abs=1e-4)) for step, loss in alone]
    for name in ("grad_norm", "displacement", "weights_changed"):
        ours, theirs = ([metrics[name] for _, metrics in logged[n] if name in metrics] for n in (1, 2))
        assert theirs == pytest.approx(ours, rel=0.02)
    assert all(math.isfinite(metrics["gradient_signal"]) for _, metrics in logged[2] if "loss" in metrics)
    ours, theirs = (models.load_weights(str(saved[n][-1][1]), torch.float32).state_dict() for n in (1, 2))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0)


@pytest.fixture
def with_vision(lab_model, tmp_path) -> str:
    """A tiny model of Qwen3.5's own class, with a vision tower; the sizes are such that vLLM's kernels take them."""
    tokenizer, base = models.load_tokenizer(lab_model), tmp_path / "base"
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "max_position_embeddings": 512, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}
    vision |= {"patch_size": 16, "num_position_embeddings": 64}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(marks), strict=True))
    torch.manual_seed(0)
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, **ids)
    model = transformers.Qwen3_5ForConditionalGeneration(config).bfloat16()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessor"}))
    if torch.cuda.is_available():  # where torchvision is, which these need
        images, videos = transformers.Qwen2VLImageProcessor(), transformers.Qwen3VLVideoProcessor()
        transformers.Qwen3VLProcessor(images, tokenizer, videos, tokenizer.chat_template).save_pretrained(base)
    return str(base)


def own_samples(model: str) -> list[Sample]:
    problems, tokenizer = world.problems(16, seed=3), models.load_tokenizer(model)
    rendered = [prompts.render(tokenizer, problem.problem) for problem in problems]
    requests = requests_for(problems, rendered, Decoding(max_tokens=12), 1, 0)
    return list(open_engine("transformers", model, requests).generate(requests))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_vision_tower_is_kept_and_stays_as_it_was(with_vision, tmp_path, lora_rank):
    """A model trained on its own samples is saved whole."""
    dataset, settings = rows(own_samples(with_vision), 256).dataset, SETTINGS | {"lora_rank": lora_rank}
    run = tmp_path / "run"
    *_, (_, folder) = train(with_vision, dataset, run, global_batch_size=8, on_log=lambda *_: None, **settings)
    before, after = (models.load_weights(str(each), torch.bfloat16) for each in (with_vision, folder))
    assert type(after).__name__ == "Qwen3_5ForConditionalGeneration"
    before, after = before.state_dict(), after.state_dict()
    assert before.keys() == after.keys()
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert "language_model" in changed and "visual" not in changed
    assert (folder / "preprocessor_config.json").exists()  # else vLLM does not open it
    if lora_rank:
        names = safetensors.torch.load_file(folder.parent / "adapter_model.safetensors")
        assert not any(".visual." in name for name in names)
    else:  # a resumed training on several GPUs would look for moments of what is trained
        groups = torch.load(folder.parent / "optimizer.pt")["param_groups"]
        assert sum(len(group["params"]) for group in groups) == sum(".visual." not in name for name in before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM opens a model with a vision tower on a GPU alone")
def test_what_was_trained_beside_a_vision_tower_says_in_vllm_what_it_says_in_transformers(with_vision, tmp_path):
    """After so many epochs that it knows its samples by heart: the likeliest token leads by 1.8 in logit or more."""
    drawn, settings = own_samples(with_vision), SETTINGS | {"epochs": 60.0, "save_steps": 1000}
    dataset, quiet = rows(drawn, 256).dataset, {"on_log": lambda *_: None}
    [(_, folder)] = train(with_vision, dataset, tmp_path / "run", global_batch_size=8, **quiet, **settings)
    problems, rendered = world.problems(16, seed=3), [sample.prompt_token_ids for sample in drawn]
    requests = requests_for(problems, rendered, Decoding(temperature=0, max_tokens=12), 1, 0)
    said = {
        engine: {s.problem_id: s.token_ids for s in open_engine(engine, str(folder), requests).generate(requests)}
        for engine in ("transformers", "vllm")
    }
    assert said["vllm"] == said["transformers"]


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="beside a GPU, flash-linear-attention takes a CPU's tensors and fails"
)
def test_beside_a_vision_tower_each_weight_gets_the_gradient_of_every_process(with_vision):
    """TRL's loss reads the output head past FSDP, which then adds up no gradient of it; nothing else would show."""
    script = Path(__file__).with_name("sharded.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, with_vision]
    subprocess.run(command, check=True)


@pytest.mark.slow
def test_an_error_in_one_of_several_processes_is_said_as_in_one(lab_model, samples, tmp_path):
    settings = SETTINGS | {"lr": 1e30}
    with pytest.raises(ValueError, match=r"step \d: loss .*lower lr=1e\+30"):
        dataset = rows(samples, 256).dataset
        train(lab_model, dataset, tmp_path, global_batch_size=16, num_processes=2, on_log=lambda *_: None, **settings)


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(lab_model, samples, tmp_path):
    with pytest.raises(ValueError, match="global_batch_size=16 does not divide among 3 GPUs"):
        dataset = rows(samples, 256).dataset
        train(lab_model, dataset, tmp_path, global_batch_size=16, num_processes=3, on_log=None, **SETTINGS)


def test_what_cannot_fit_on_the_disk_is_refused_before_it_is_computed(lab_model, samples, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=1))
    with pytest.raises(ValueError, match=r"checkpoints take up to .* MiB and .* has 0.0 MiB free; raise save_steps"):
        train(lab_model, rows(samples, 256).dataset, tmp_path, global_batch_size=16, on_log=None, **SETTINGS)


@pytest.mark.parametrize("batch_size", [1, 2, 6, 8, 32, 128])
@pytest.mark.parametrize("longest", [500, 3000, 9000, 32768, 50000])
def test_what_a_training_out_of_memory_advises_halves_what_is_computed_at_a_time(batch_size, longest):
    for num_processes in (1, 2):
        less = sft._less_at_a_time(batch_size * num_processes, num_processes, longest)
        smaller = less.get("global_batch_size", batch_size * num_processes) // num_processes
        shorter = less.get("max_length", longest)
        before, after = (
            length * sft._micro_batch_size(size, length) for size, length in ((batch_size, longest), (smaller, shorter))
        )
        assert after <= before / 2


@pytest.mark.parametrize(("lora_rank", "otherwise"), [(0, r"train an adapter \(lora_rank=64\)"), (4, "use more GPUs")])
def test_a_training_out_of_memory_names_what_to_lower(lab_model, samples, tmp_path, monkeypatch, lora_rank, otherwise):
    original = trl.SFTTrainer.compute_loss

    def broken(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", broken)
    message = r"at step 1 with 4 sequences of up to \d+ tokens at a time .*; lower global_batch_size to 8, or "
    with pytest.raises(ValueError, match=f"{message}{otherwise}$"):
        dataset, settings = rows(samples, 256).dataset, SETTINGS | {"lora_rank": lora_rank}
        train(lab_model, dataset, tmp_path, global_batch_size=16, on_log=lambda *_: None, **settings)


@pytest.mark.parametrize(
    ("lora_rank", "message"),
    [
        (0, "on each GPU for weights, gradients and moments alone, .*lora_rank=64"),
        (4, "for weights alone, .*smaller"),
    ],
)
def test_what_cannot_fit_on_the_gpu_is_refused_before_it_is_computed(
    lab_model, tmp_path, monkeypatch, lora_rank, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 1000))
    with pytest.raises(ValueError, match=message):
        sft._check_room(models.load_weights(lab_model, torch.float32), tmp_path, 1, bool(lora_rank), 1)


def test_a_loss_that_is_not_finite_stops_the_training_and_says_where(lab_model, samples, tmp_path, monkeypatch):
    steps = []
    original = trl.SFTTrainer.compute_loss

    def broken(self, *args, **kwargs):
        return original(self, *args, **kwargs) * (float("nan") if self.state.global_step == 2 else 1.0)

    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", broken)
    with pytest.raises(ValueError, match=r"step 3: loss nan.*lower lr=0.001"):
        dataset = rows(samples, 256).dataset
        train(lab_model, dataset, tmp_path, global_batch_size=8, on_log=lambda step, _: steps.append(step), **SETTINGS)
    assert max(steps) == 2
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_an_adapter_is_merged_into_its_checkpoint(lab_model, samples, tmp_path):
    settings = SETTINGS | {"lora_rank": 4}
    dataset = rows(samples, 256).dataset
    *_, (_, folder) = train(lab_model, dataset, tmp_path, global_batch_size=16, on_log=lambda *_: None, **settings)
    base, merged = (models.load_weights(m, torch.float32).state_dict() for m in (lab_model, str(folder)))
    assert base.keys() == merged.keys()
    changed = {name.split(".")[-2] for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

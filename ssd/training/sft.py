"""Rows -> checkpoints: supervised fine-tuning by TRL, with float32 master weights and the paper's optimizer."""

import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import transformers
import trl
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from trl.models import enable_selective_activation_checkpointing

from ssd import adapters, models
from ssd.training import kernels, noise

# The micro-batch is as large as this allows; it does not change the gradient, which is summed over the global batch.
TOKENS_PER_MICRO_BATCH = 1 << 15
FSDP2 = Path(__file__).with_name("fsdp2.yaml")
ROWS, SETTINGS, LOG, ERROR = "rows", "settings.json", "log.jsonl", "error.txt"  # what several processes share
CHECKSUMS = "checksums.json"  # of a checkpoint's files
SUMMARY = ("train_", "total_flos")
LEAST_MICRO_BATCHES = 4  # a step, where the batch has as many: the noise of a gradient is seen between them


def train(
    model: str,
    dataset: datasets.Dataset,
    folder: Path,
    *,
    lr: float,
    epochs: float,
    global_batch_size: int,
    max_length: int,
    lora_rank: int,
    save_steps: int,
    seed: int,
    on_log: Callable[[int, dict[str, float]], None],
    num_processes: int | None = None,
) -> list[tuple[int, Path]]:
    """Fine-tune `model` on `dataset`; go on from the newest checkpoint in `folder`, if there is one.

    AdamW (0.9, 0.95), weight decay 0.1, cosine from `lr` to a fifth of it, warm-up over a twentieth of the steps
    (arXiv 2604.01193, section 3.1). Weights and moments are float32, compute is bfloat16 on a GPU. `lora_rank` 0
    trains every weight; otherwise an adapter on all linear layers, merged into each exported checkpoint. Qwen's vision
    tower stays as it was. Every GPU that CUDA_VISIBLE_DEVICES leaves takes part, by FSDP2, and rows that do not fill a
    micro-batch of each are left out; `num_processes` asks for another number of processes.

    Returns
    -------
    list of (step, folder)
        Exported checkpoints, oldest first: weights in the base model's dtype and the tokenizer, ready to evaluate.
    """
    num_processes = num_processes or max(1, torch.cuda.device_count())
    if global_batch_size % num_processes:
        raise ValueError(
            f"global_batch_size={global_batch_size} does not divide among {num_processes} GPUs; give a multiple, or "
            "fewer GPUs (CUDA_VISIBLE_DEVICES)"
        )
    _check_kernels(model)
    folder.mkdir(parents=True, exist_ok=True)
    _drop_damaged(folder)
    settings = {
        "model": model, "lr": lr, "epochs": epochs, "global_batch_size": global_batch_size, "max_length": max_length,
        "lora_rank": lora_rank, "save_steps": save_steps, "seed": seed, "num_processes": num_processes,
    }  # fmt: skip
    if num_processes == 1:
        _fit(dataset, folder, on_log=on_log, **settings)
    else:
        _fit_in_processes(dataset, folder, settings, on_log)
    return [(step, _export(saved, model, bool(lora_rank))) for step, saved in _saved(folder)]


def _fit_in_processes(
    dataset: datasets.Dataset, folder: Path, settings: dict[str, Any], on_log: Callable[[int, dict[str, float]], None]
) -> None:
    """`_fit` in processes that accelerate starts; the first of them writes what is to be logged into a file."""
    dataset.save_to_disk(folder / ROWS)
    (folder / SETTINGS).write_text(json.dumps(settings))
    (folder / LOG).write_text("")
    number = settings["num_processes"]
    if torch.cuda.is_available():
        launcher = ["accelerate.commands.launch", f"--config_file={FSDP2}", f"--num_processes={number}"]
        launcher += ["--main_process_port=0"]
    else:  # accelerate would want MPI
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    work = ["-m", "ssd.training.sft", str(folder), str(os.getpid())]
    processes = subprocess.Popen([sys.executable, "-m", *launcher, *work])
    try:
        with open(folder / LOG) as lines:
            ended = False
            while not ended:
                ended = processes.poll() is not None  # what was written before the end is still read
                while line := lines.readline():
                    on_log(*json.loads(line))
                time.sleep(0.2)
    finally:
        processes.terminate()
        processes.wait()
    if processes.returncode:
        error = folder / ERROR
        raise ValueError(
            error.read_text() if error.exists() else f"training ended with status {processes.returncode}; see above"
        )


def _process(folder: Path, launcher: int) -> None:
    """One of the processes of `_fit_in_processes`."""
    threading.Thread(target=_end_with, args=(launcher,), daemon=True).start()
    (folder / ERROR).unlink(missing_ok=True)
    with open(folder / LOG, "a", buffering=1) as log:
        try:
            _fit(
                datasets.load_from_disk(str(folder / ROWS)),
                folder,
                on_log=lambda step, metrics: log.write(json.dumps([step, metrics]) + "\n"),
                **json.loads((folder / SETTINGS).read_text()),
            )
        except ValueError as error:
            (folder / ERROR).write_text(str(error))
            raise


def _end_with(launcher: int) -> None:
    while Path(f"/proc/{launcher}").exists():
        time.sleep(1)
    os._exit(1)


def _fit(
    dataset: datasets.Dataset,
    folder: Path,
    *,
    model: str,
    lr: float,
    epochs: float,
    global_batch_size: int,
    max_length: int,
    lora_rank: int,
    save_steps: int,
    seed: int,
    num_processes: int,
    on_log: Callable[[int, dict[str, float]], None],
) -> None:
    """Train this process's share, into checkpoints of the Trainer's own in `folder`."""
    gpu = torch.cuda.is_available()
    lengths = [len(ids) for ids in dataset["input_ids"]]
    longest = max(lengths)
    batch_size = global_batch_size // num_processes
    micro_batch_size = _micro_batch_size(batch_size, longest)
    config = trl.SFTConfig(
        output_dir=str(folder),
        learning_rate=lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.2},
        warmup_steps=0.05,
        num_train_epochs=epochs,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=batch_size // micro_batch_size,
        # Else sharded gradients are whole on every GPU until the last micro-batch, and their first part is never seen.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": num_processes > 1}},
        dataloader_drop_last=num_processes > 1,  # else some rows at the end would be trained on twice
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_length=max_length,
        completion_only_loss=True,
        packing=False,
        bf16=gpu,
        use_cpu=not gpu,
        gradient_checkpointing=gpu,
        save_strategy="steps",
        save_steps=save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        seed=seed,
        data_seed=seed,
        dataloader_pin_memory=gpu,
        disable_tqdm=False,
    )
    num_steps = math.ceil(epochs * len(dataset) / global_batch_size)
    weights = models.load_weights(model, torch.float32)
    if gpu and weights.config.get_text_config().model_type.startswith("qwen3_5"):
        kernels.install(weights)
    if gpu and micro_batch_size * statistics.fmean(lengths) >= TOKENS_PER_MICRO_BATCH // 2:
        # Attention is not computed again: 4% faster at 32k, but slower where the GPU waits for Python anyway.
        enable_selective_activation_checkpointing(weights)
    vision_tower = getattr(weights.base_model, "visual", None)
    if vision_tower is not None:  # no gradient reaches it, and FSDP misses its moments when it resumes
        vision_tower.requires_grad_(False)
    _check_room(weights, folder, num_steps // save_steps + 1, bool(lora_rank), num_processes)
    weights.base_model.register_forward_pre_hook(_drop_mask, with_kwargs=True)
    trainer = _Watched(
        model=weights,
        args=config,
        train_dataset=dataset.remove_columns("problem_id"),
        processing_class=models.load_tokenizer(model),
        peft_config=_lora(lora_rank, vision_tower is not None) if lora_rank else None,
        callbacks=[_OnLog(on_log)],
    )
    trainer.rows = dataset
    if trainer.is_fsdp_enabled:
        sharding, present = (
            trainer.accelerator.state.fsdp_plugin,
            {type(module).__name__ for module in weights.modules()},
        )
        # accelerate would reduce gradients in bfloat16; autocast computes in it all the same.
        sharding.mixed_precision_policy = MixedPrecisionPolicy()
        # A model without its vision tower still names the layers of one.
        sharding.transformer_cls_names_to_wrap = sorted(set(weights._no_split_modules) & present)
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    trainer.add_callback(_ProgressBar)
    newest = transformers.trainer_utils.get_last_checkpoint(str(folder))
    if trainer.is_world_process_zero():
        (folder / "sft_config.json").write_text(json.dumps(config.to_dict(), indent=1, default=str, sort_keys=True))
        if newest:  # what an interrupted run has reported, this one reports again
            for entry in json.loads((Path(newest) / "trainer_state.json").read_text())["log_history"]:
                on_log(entry["step"], _numbers(entry))
    try:
        trainer.train(resume_from_checkpoint=newest)
    except torch.OutOfMemoryError as error:
        less = _less_at_a_time(global_batch_size, num_processes, longest)
        lower = " and ".join(f"{name} to {value}" for name, value in less.items())
        raise ValueError(
            f"out of GPU memory at step {trainer.state.global_step} with {micro_batch_size} sequences of up to "
            f"{longest} tokens at a time (global_batch_size={global_batch_size}, max_length={max_length}); lower "
            f"{lower}, or {'use more GPUs' if lora_rank else 'train an adapter (lora_rank=64)'}"
        ) from error


def _micro_batch_size(batch_size: int, longest: int) -> int:
    """Sequences at a time of the `batch_size` that one process has a step."""
    most = max(1, min(batch_size // LEAST_MICRO_BATCHES, TOKENS_PER_MICRO_BATCH // longest))
    return next(size for size in range(most, 0, -1) if batch_size % size == 0)


def _less_at_a_time(global_batch_size: int, num_processes: int, longest: int) -> dict[str, int]:
    """Settings, by name, that halve the tokens of a micro-batch.

    Shorter sequences alone do not: more of them would then be taken at a time.
    """
    size = _micro_batch_size(global_batch_size // num_processes, longest)
    fewer = LEAST_MICRO_BATCHES * num_processes * max(1, size // 2)
    less = {"global_batch_size": fewer} if fewer < global_batch_size else {}
    return less if size > 1 else less | {"max_length": longest // 2}


def _check_kernels(model: str) -> None:
    """Refuse kernels that are known to give wrong gradients, or that are missing."""
    if not models.load_config(model).model_type.startswith("qwen3_5") or not torch.cuda.is_available():
        return
    if importlib.util.find_spec("fla") is None:
        raise ValueError(
            "training Qwen3.5 on a GPU needs flash-linear-attention, which is not installed; install the gpu extra "
            "(pip install '.[gpu]')"
        )
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:3])
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    if is_hopper and (3, 4, 0) <= version < (3, 7, 1) and importlib.util.find_spec("tilelang") is None:
        raise ValueError(
            f"Triton {triton.__version__} gives wrong gradients of the gated delta rule on this GPU; install tilelang, "
            "or Triton 3.7.1 or later"
        )


def _check_room(
    weights: torch.nn.Module, folder: Path, num_checkpoints: int, is_adapter: bool, num_processes: int
) -> None:
    """Refuse what cannot fit: float32 weights, gradients and two moments on the GPU, the checkpoints on the disk."""
    num_parameters, num_trained = weights.num_parameters(), weights.num_parameters(only_trainable=True)
    if torch.cuda.is_available():
        parts, remedy = "weights, gradients and moments", "use more GPUs, or train an adapter (lora_rank=64)"
        if is_adapter:  # whose own are few
            num_trained, parts, remedy = 0, "weights", "use more GPUs, or a smaller model"
        free, needed = torch.cuda.mem_get_info()[0], (12 * num_trained + 4 * num_parameters) / num_processes
        if needed > free:
            raise ValueError(
                f"training a model of {num_parameters:,} weights takes {_size(needed)} on each GPU for "
                f"{parts} alone, and {_size(free)} are free; {remedy}"
            )
    # A checkpoint: float32 weights (twice, where they are gathered from several GPUs) and moments to go on from, and
    # weights to export, at most float32.
    of_parameter = 4 if is_adapter else 16 if num_processes == 1 else 20
    free, needed = shutil.disk_usage(folder).free, num_checkpoints * num_parameters * of_parameter
    if needed > free:
        raise ValueError(
            f"{num_checkpoints} checkpoints take up to {_size(needed)} and {folder} has "
            f"{_size(free)} free; raise save_steps, or move unfinished work to another disk (SSD_WORK_DIR)"
        )


def _size(num_bytes: float) -> str:
    """`num_bytes` for a person to read.

    >>> _size(3e6), _size(2.5e10)
    ('2.9 MiB', '23.3 GiB')
    """
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:,.1f} GiB"


def _lora(rank: int, has_vision: bool) -> Any:
    import peft

    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM",
        exclude_modules=r".*\.visual\..*" if has_vision else None,
    )  # fmt: skip


def _saved(folder: Path) -> list[tuple[int, Path]]:
    steps = {
        int(match[1]): path for path in folder.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return sorted(steps.items())


def _drop_damaged(folder: Path) -> None:
    """Remove the first checkpoint that a kill cut off or a disk damaged, and all after it: training goes on before it.

    Those after it may be whole, but the damaged one belongs to the result, and is made again only on the way to them.
    """
    saved = [path for _, path in _saved(folder)]
    first = next((number for number, path in enumerate(saved) if not _is_whole(path)), len(saved))
    for path in saved[first:]:
        print(f"{path} is not whole or comes after one that is not: it is trained again", flush=True)
        shutil.rmtree(path)


def _is_whole(saved: Path) -> bool:
    try:
        checksums = json.loads((saved / CHECKSUMS).read_text())
        return all(_checksum(saved / name) == checksum for name, checksum in checksums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _write_checksums(saved: Path) -> None:
    """List the files of a complete checkpoint, so that damage to any of them is seen before training goes on."""
    files = [path for path in sorted(saved.rglob("*")) if path.is_file()]
    checksums = {str(path.relative_to(saved)): _checksum(path) for path in files}
    partial = saved / f".{CHECKSUMS}.partial"
    partial.write_text(json.dumps(checksums, indent=1))
    partial.replace(saved / CHECKSUMS)


def _checksum(path: Path) -> int:
    found = 0
    with open(path, "rb") as content:
        while part := content.read(1 << 24):
            found = zlib.crc32(part, found)
    return found


def _export(saved: Path, base: str, is_adapter: bool) -> Path:
    """Write weights that any engine loads: merged, in the base model's dtype, without the optimizer."""
    dtype = models.load_config(base).get_text_config().dtype or torch.float32
    if is_adapter:
        weights = adapters.merge(models.load_weights(base, torch.float32), str(saved))
    else:
        weights = models.load_weights(str(saved), torch.float32)
    exported = saved / "exported"
    weights.to(dtype).save_pretrained(exported)
    models.save_tokenizer(base, exported)
    return exported


def _drop_mask(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Call the model without the mask of its padding, which stands to the right of every sequence.

    Attention is causal, so no token sees what is to its right, and the loss ignores padding: the gradient is the same.
    With a mask, PyTorch 2.11 to 2.13 on Hopper choose cuDNN's kernel, whose backward pass gives not-a-number where the
    length is 64 more than a multiple of 128 and all scores of a query are below -88, as in a head of Qwen2.5
    (https://github.com/pytorch/pytorch/issues/196678). Without one, attention also skips what is masked.
    """
    return args, kwargs | {"attention_mask": None}


def gather_head(model: torch.nn.Module) -> None:
    """Gather the output head of a sharded `model` before TRL's loss, which multiplies by its weight but never calls it.

    FSDP2 gathers a unit when it is called, and accelerate makes the head one of its own where a vision tower stands
    beside untied embeddings. TRL 1.16 would then gather it by `full_tensor`, whose gradient is not summed over the
    processes: each would keep that of its own rows.
    """
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()


class _Watched(trl.SFTTrainer):
    """SFTTrainer that reports with each step's loss what the gradients and the weights say of noise."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weights = None
        self.gradients = noise.Gradients(self.model.parameters()) if self.args.world_size == 1 else None
        self.num_tokens_by_part: list[torch.Tensor] = []  # of this process, where there are several
        self.norm2_of_first = math.nan
        self.rows: datasets.Dataset | None = None  # what is trained on, with its problems

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._begin()
        num_tokens = (inputs["labels"] != -100).sum()
        if self.gradients:
            self.gradients.begin_part(float(num_tokens))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.gradients and not torch.isfinite(self.gradients.norm2_by_part[-1]):
            self._refuse(inputs, float(loss))
        if not self.gradients:
            if not self.num_tokens_by_part:
                self.norm2_of_first = self._gradient_norm2()
            self.num_tokens_by_part.append(num_tokens.double())
        return loss

    def _refuse(self, inputs: dict[str, torch.Tensor], loss: float) -> NoReturn:
        """End the training before the optimizer takes a gradient that is not finite."""
        names = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
        ]
        file = Path(self.args.output_dir) / "not_finite.pt"
        torch.save({name: value for name, value in inputs.items() if torch.is_tensor(value)}, file)
        sequences = {
            tuple(ids[:length].tolist())
            for ids, length in zip(inputs["input_ids"], inputs["attention_mask"].sum(1), strict=True)
        }
        problems = sorted(row["problem_id"] for row in self.rows if tuple(row["input_ids"]) in sequences)
        raise ValueError(
            f"step {self.state.global_step + 1}: loss {loss}, and the gradient of {len(names)} weights is not finite, "
            f"first {names[0]}; the micro-batch (problems {', '.join(problems)}) is in {file}, the checkpoints before "
            f"it are in {self.args.output_dir}; {self._advice(loss)}"
        )

    def _advice(self, loss: float) -> str:
        if math.isfinite(loss):
            return "the loss is finite, so the learning rate is not the cause: a kernel is (docs/traps.md)"
        return f"lower lr={self.args.learning_rate:g}"

    def compute_loss(self, model, inputs, *args, **kwargs):
        gather_head(self.model)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def compute_loss_context_manager(self):
        if self.is_fsdp_enabled:  # whose weights stay float32, as on one GPU
            return torch.autocast("cuda", torch.bfloat16)
        return super().compute_loss_context_manager()

    def log(self, logs, start_time=None):
        if "grad_norm" in logs:  # once an optimizer step
            if not (math.isfinite(logs["loss"]) and math.isfinite(logs["grad_norm"])):
                raise ValueError(
                    f"step {self.state.global_step}: loss {logs['loss']}, norm of the gradient {logs['grad_norm']}; "
                    f"the checkpoints before it are in {self.args.output_dir}; {self._advice(logs['loss'])}"
                )
            found = self._end_step(logs["grad_norm"])
            logs |= {"gradient_signal": found.signal, "gradient_noise": found.noise} | self.weights.end_step()
        super().log(logs, start_time)

    def _load_from_checkpoint(self, *args, **kwargs):
        self._begin()  # the weights have moved from where the first run began
        super()._load_from_checkpoint(*args, **kwargs)
        self.weights.resume()
        checkpoint = Path(args[0] if args else kwargs["resume_from_checkpoint"])
        state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        seen = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self._total_train_tokens = seen[-1] if seen else 0  # which TRL would count from 0 again

    def _begin(self) -> None:
        if self.weights is None:  # sharded only now
            self.weights = noise.Weights(self.model.parameters(), self.args.seed, self._add_up)

    def _end_step(self, norm: float) -> noise.Signal:
        if self.gradients:
            return self.gradients.end_step(norm)
        first, total = self._add_up(torch.stack([self.num_tokens_by_part[0], sum(self.num_tokens_by_part)])).tolist()
        self.num_tokens_by_part = []
        return noise.split_first(norm**2, self.norm2_of_first, first / total if total else 0.0)

    def _gradient_norm2(self) -> float:
        """Squared norm of the gradient as it stands, summed over the processes."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        total = sum(torch.linalg.vector_norm(noise.local(g), dtype=torch.float32).double() ** 2 for g in gradients)
        is_sharded = any(isinstance(gradient, DTensor) for gradient in gradients)
        return float(self._add_up(total)) if is_sharded else float(total)

    def _add_up(self, sums: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(sums.to(self.accelerator.device), "sum")


class _ProgressBar(transformers.trainer_callback.ProgressCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        """Nothing: the numbers are metrics of the run, and a line for each would bury the bar."""


class _OnLog(transformers.TrainerCallback):
    def __init__(self, report: Callable[[int, dict[str, float]], None]):
        self.report = report

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self.report(state.global_step, _numbers(logs or {}))

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process writes files of its own
        if state.is_world_process_zero:
            _write_checksums(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    """Finite numbers of the Trainer's log, without its summary (`train_loss`, ...).

    Of a training that went on after a kill the summary covers the last process alone, but divides by all steps.
    """
    numbers = {name: float(value) for name, value in entry.items() if isinstance(value, int | float) and name != "step"}
    numbers = {name: value for name, value in numbers.items() if not name.startswith(SUMMARY)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


if __name__ == "__main__":
    _process(Path(sys.argv[1]), int(sys.argv[2]))

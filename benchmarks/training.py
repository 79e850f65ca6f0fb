"""Tokens a second of `train` on one GPU, beside TRL without our watching and kernels, in one run; then on several.

Run: python -m benchmarks.training MODEL [--lengths 8192 32768] [--lora_rank 0] [--num_steps 4] [--num_processes 2]

FLOPs are 6 a parameter and token (the head counts, the embedding is a look-up) plus 6 T d of causal attention for each
full-attention layer, T the length and d the width of its heads together; what gradient checkpointing computes again is
not counted. MFU is over 989 TFLOP/s, the dense bfloat16 rate of an H100 or H200.
"""

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import torch
import trl

from ssd import models
from ssd.training import sft

PEAK_FLOPS = 989e12
LEAST_RATIO = 0.97  # of plain TRL's tokens a second
LEAST_EFFICIENCY = 0.9  # of several GPUs: two do 1.8 times the work of one
MICRO_BATCHES = 4  # a step and GPU


class Enough(Exception):
    """Ends a training before it saves anything."""


def flops_per_token(model: str, length: int) -> float:
    config = models.load_config(model).get_text_config()
    with torch.device("meta"):
        import transformers

        num_parameters = getattr(transformers, config.architectures[0])._from_config(config).num_parameters()
    full = sum(kind == "full_attention" for kind in config.layer_types)
    return 6 * num_parameters + 6 * length * config.num_attention_heads * config.head_dim * full


def measure(model: str, length: int, lora_rank: int, num_steps: int, num_processes: int = 1) -> tuple[float, float]:
    """Tokens a second after the first step, which compiles, and this process's peak memory in GiB."""
    batch_size = MICRO_BATCHES * num_processes
    vocabulary = models.load_config(model).get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(3, vocabulary, (num_steps * batch_size, length)).tolist()
    mask = [[0] * 64 + [1] * (length - 64)] * len(ids)
    times: list[float] = []

    def on_log(step: int, metrics: dict) -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())
        if len(times) == num_steps:
            raise Enough

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    folder = Path(tempfile.mkdtemp())
    try:
        sft.train(
            model,
            datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": mask}),
            folder,
            lr=5e-6, epochs=1.0, global_batch_size=batch_size, max_length=length, lora_rank=lora_rank,
            save_steps=10**6, seed=0, on_log=on_log, num_processes=num_processes,
        )  # fmt: skip
    except Enough:
        pass
    finally:
        shutil.rmtree(folder)
    rate = (len(times) - 1) * batch_size * length / (times[-1] - times[0])
    return rate, torch.cuda.max_memory_allocated() / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--lora_rank", type=int, default=0)
    parser.add_argument("--num_steps", type=int, default=4)
    parser.add_argument("--num_processes", type=int, default=1, help="GPUs to train on together, beside one")
    arguments = parser.parse_args()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(arguments.num_processes))))
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]  # this process's, from here on
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, TRL {trl.__version__}\n")
    print("| length | trainer | tokens/s | MFU | peak GiB |\n| ---: | --- | ---: | ---: | ---: |")
    met = True
    for length in arguments.lengths:
        settings = (arguments.model, length, arguments.lora_rank, arguments.num_steps)
        with mock.patch.object(sft, "_Watched", trl.SFTTrainer), mock.patch.object(sft.kernels, "install"):
            plain = measure(*settings)
        ours = measure(*settings)
        for name, (rate, peak) in (("TRL", plain), ("ours", ours)):
            mfu = rate * flops_per_token(arguments.model, length) / PEAK_FLOPS
            print(f"| {length:,} | {name} | {rate:,.0f} | {mfu:.2f} | {peak:.1f} |", flush=True)
        met &= ours[0] >= LEAST_RATIO * plain[0]
        if arguments.num_processes > 1:
            with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=visible):
                together, _ = measure(*settings, arguments.num_processes)
            mfu = together / arguments.num_processes * flops_per_token(arguments.model, length) / PEAK_FLOPS
            print(f"| {length:,} | ours, {arguments.num_processes} GPUs | {together:,.0f} | {mfu:.2f} | |", flush=True)
            enough = together >= LEAST_EFFICIENCY * arguments.num_processes * ours[0]
            print(f"\n{together / ours[0]:.2f} times one GPU: {'met' if enough else 'NOT met'}", flush=True)
            met &= enough
    print(f"\nat least {LEAST_RATIO} of plain TRL at each length: {'met' if met else 'NOT met'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

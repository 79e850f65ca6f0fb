"""Does our path to disk cost anything? Tokens a second against vLLM's own `LLM.generate`, on the same requests.

Run:   python -m benchmarks.generation                                  (no GPU: a small model of the lab, trained here)
       python -m benchmarks.generation MODEL --concurrency 128 256 512 --mixed 600
       python -m benchmarks.generation MODEL --engine vllm:data_parallel_size=2 --one_gpu TOKENS_A_SECOND

Every completion has a fixed number of tokens (`ignore_eos`). Ours is what a step does: the engine, the progress line,
shards on disk. The peer gets the same requests, log-probabilities and seeds, and also once without log-probabilities;
they take turns in one process on one `vllm.LLM`, and a rate is the median over the turns. With `--mixed`, completions
have log-normal lengths and the peer works in batches of 128, each as long as its longest. `--settings` go to vLLM
(`max_num_seqs=512`, `compilation_config='{"cudagraph_capture_sizes": [512]}'`), to see what helps. Ends with status 0
only if every target is met.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ssd.engines.vllm as backend
from ssd import models, prompts, sampling
from ssd.decoding import Decoding
from ssd.engines.request import Request, requests_for
from ssd.lab import model as lab_model
from ssd.lab import world

SAME_WORK = 0.97 if torch.cuda.is_available() else 0.95  # of the peer's tokens a second
AGAINST_BATCHES = 1.5
BATCH_SIZE = 128
TWO_GPUS = 1.9


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            model = f"{folder}/model"
            lab_model.train(model, seed=0, num_steps=40)
        met = measure(model, args, Path(folder))
    print("\nEvery target was met." if met else "\nA TARGET WAS NOT MET.")
    sys.exit(0 if met else 1)


def parse() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation")
    parser.add_argument("model", nargs="?", help="folder or hub id; default: the lab's")
    parser.add_argument("--engine", default="vllm", help="vllm or vllm:data_parallel_size=N")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[512] if on_gpu else [128], help="requests at once"
    )
    parser.add_argument("--max_tokens", type=int, default=1024 if on_gpu else 256, help="tokens a completion")
    parser.add_argument("--mixed", type=int, default=600 if on_gpu else 300, help="requests of mixed lengths; 0: none")
    parser.add_argument("--median", type=int, default=3000 if on_gpu else 48, help="of the mixed lengths, in tokens")
    parser.add_argument("--cap", type=int, default=16_384 if on_gpu else 256, help="of the mixed lengths, in tokens")
    parser.add_argument("--repeats", type=int, default=3, help="turns; 3 of each by default")
    parser.add_argument("--one_gpu", type=float, help="our tokens a second on one GPU, to compare several with")
    parser.add_argument("--settings", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of vLLM over ours")
    return parser.parse_args()


def measure(model: str, args: argparse.Namespace, folder: Path) -> bool:
    """Print the tables; whether every target was met."""
    settings = dict(word.split("=", 1) for word in args.settings)
    settings = {name: _value(text) for name, text in settings.items()}
    fixed = {c: _requests(model, [args.max_tokens] * c) for c in args.concurrency}
    rng = np.random.default_rng(0)
    lengths = np.minimum(args.median * np.exp(rng.standard_normal(args.mixed)), args.cap).astype(int)
    mixed = _requests(model, np.maximum(lengths, 1).tolist()) if args.mixed else []
    _ignore_eos()
    engine = backend.VLLMEngine(model, [r for each in (*fixed.values(), mixed) for r in each], _place(args), **settings)
    print(f"{_machine()}; vLLM {backend.vllm.__version__}, {model}, {args.engine}, {settings or 'our settings'}\n")
    _ours(engine, fixed[args.concurrency[0]], folder)  # warm-up
    met = True
    print(f"{args.max_tokens:,} tokens a completion, tokens/s (median of {args.repeats} turns):\n")
    print("| requests at once | ours | ms a step | LLM.generate | ours / it | without log-probabilities | ours / it |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for concurrency, requests in fixed.items():
        ours = [lambda r=requests: _ours(engine, r, folder)]
        peers = [lambda r=requests, k=k: _generate(engine, r, k) for k in (0, None)] if engine.llm else []
        rates = _in_turns(ours + peers, args.max_tokens * concurrency, args.repeats)
        cells = [f"{rates[0]:,.0f}", f"{1000 * concurrency / rates[0]:.1f}"]
        for rate in rates[1:]:
            cells += [f"{rate:,.0f}", f"{rates[0] / rate:.3f}"]
        print(f"| {concurrency} | {' | '.join(cells)} |", flush=True)
        met &= not peers or rates[0] / rates[1] >= SAME_WORK
    if engine.llm:
        print(f"\nTarget: ours at least {SAME_WORK} of LLM.generate's: {'met' if met else 'NOT MET'}.")
    if args.one_gpu:
        ratio = rates[0] / args.one_gpu
        met &= ratio >= TWO_GPUS
        print(f"\nAgainst one GPU: {ratio:.2f} times; target {TWO_GPUS}: {'met' if ratio >= TWO_GPUS else 'NOT MET'}.")
    if args.mixed and engine.llm:
        batches = [mixed[i : i + BATCH_SIZE] for i in range(0, len(mixed), BATCH_SIZE)]
        work = [lambda: _ours(engine, mixed, folder), lambda: [_generate(engine, batch, 0) for batch in batches]]
        total = sum(request.decoding.max_tokens for request in mixed)
        ours, in_batches = _in_turns(work, total, 1 if torch.cuda.is_available() else args.repeats)
        print(f"\n{args.mixed} completions of log-normal length (median {args.median:,}, cap {args.cap:,} tokens):\n")
        print(f"| ours, s | in batches of {BATCH_SIZE}, s | ratio | target |\n| ---: | ---: | ---: | --- |")
        ratio, verdict = ours / in_batches, "met" if ours / in_batches >= AGAINST_BATCHES else "NOT MET"
        seconds = f"{total / ours:,.1f} | {total / in_batches:,.1f}"
        print(f"| {seconds} | {ratio:.2f} | {AGAINST_BATCHES}: {verdict} |")
        met &= ratio >= AGAINST_BATCHES
    return met


def _in_turns(work: Sequence[Callable[[], Any]], num_tokens: int, repeats: int) -> list[float]:
    """Tokens a second of each piece of `work`, the median over turns."""
    seconds = [[] for _ in work]
    for _ in range(repeats):
        for each, times in zip(work, seconds, strict=True):
            began = time.perf_counter()
            each()
            times.append(time.perf_counter() - began)
    return [num_tokens / statistics.median(times) for times in seconds]


def _ours(engine: backend.VLLMEngine, requests: Sequence[Request], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as samples:
        drawn = sampling.sample(engine, requests, Path(samples))
    _check(drawn.num_tokens, requests)


def _generate(engine: backend.VLLMEngine, requests: Sequence[Request], logprobs: int | None) -> None:
    params = [backend._sampling_params(request) for request in requests]
    for each in params:
        each.logprobs, each.flat_logprobs, each.detokenize = logprobs, False, True  # as a user of LLM.generate has it
    outputs = engine.llm.generate([backend._prompt(request) for request in requests], params, use_tqdm=False)
    _check([len(output.outputs[0].token_ids) for output in outputs], requests)


def _check(num_tokens: Sequence[int], requests: Sequence[Request]) -> None:
    assert sum(num_tokens) == sum(request.decoding.max_tokens for request in requests), "not the same work"


def _requests(model: str, lengths: Sequence[int]) -> list[Request]:
    problems, tokenizer = world.problems(len(lengths), seed=1), models.load_tokenizer(model)
    return [
        requests_for([problem], [prompts.render(tokenizer, problem.problem)], decoding, 1, 0)[0]
        for problem, decoding in zip(
            problems, [Decoding(temperature=1.0, top_k=20, top_p=0.95, max_tokens=length) for length in lengths]
        )
    ]


def _ignore_eos() -> None:
    """Let every request of this process run to its cap, which no decoding of ours can say."""
    params_of = backend._sampling_params

    def without_end(request: Request) -> Any:
        params = params_of(request)
        params.ignore_eos = True
        return params

    backend._sampling_params = without_end


def _place(args: argparse.Namespace) -> str:
    kind, _, place = args.engine.partition(":")
    if kind != "vllm":
        raise SystemExit(f"--engine {args.engine} is not vllm or vllm:data_parallel_size=N")
    return place


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()

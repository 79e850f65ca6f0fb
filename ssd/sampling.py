"""Completions on disk as they arrive: a folder of Parquet shards and the manifest of what made them.

A killed process loses at most what came after the last flush. The next one on the same folder goes on from there;
with another manifest, or beside a living one, it is refused.
"""

import dataclasses
import gc
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ssd import models, prompts, records
from ssd.decoding import Decoding
from ssd.engines.opening import kind, open_engine
from ssd.engines.request import Engine, Request, requests_for
from ssd.records import Problem, Sample
from ssd.samples import MANIFEST, Drawn, Generated, load_samples, read_manifest, sample_key

FLUSH_SAMPLES = 256
FLUSH_S = 30.0
BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, ends {eta:%H:%M}{postfix}]"


class Sampler:
    """`model` in `engine`, loaded when the first sample is drawn and kept for what is asked for later.

    `expected` are requests that will come: what the engine cannot honour is refused before the first token, and it has
    room for the longest. `closes` is whether the GPU is to be free again after `close`: vLLM then has a process of its
    own, and all that it holds ends with it.
    """

    def __init__(
        self, model: str, engine: str, code_version: str, expected: Sequence[Request] = (), closes: bool = False
    ):
        self.model, self.engine, self.expected = model, engine, list(expected)
        if closes and torch.cuda.is_available():
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        self.tokenizer = models.load_tokenizer(model)
        self.loaded: Engine | None = None
        self.shared = {
            "model": models.digest(model), "prompt": prompts.PROMPT, "thinks": prompts.opens_thinking(self.tokenizer),
            "engine": kind(engine), "code": code_version,
        }  # fmt: skip

    def requests(self, problems: Sequence[Problem], decoding: Decoding, n: int, seed: int) -> list[Request]:
        """`n` requests for each of `problems`."""
        rendered = [prompts.render(self.tokenizer, problem.problem) for problem in problems]
        return requests_for(problems, rendered, decoding, n, seed)

    def generate(
        self, problems: Sequence[Problem], decodings: Mapping[str, Decoding], n: int, seed: int, folder: Path
    ) -> dict[str, Generated]:
        """Draw `n` samples a problem at each of the named decodings into `folder`/NAME.

        What the folders hold already is not drawn again; what they hold of other problems is not returned.
        """
        waiting, asked, drawn = {}, {}, dict.fromkeys(decodings)
        for name, decoding in decodings.items():
            asked[name] = self.requests(problems, decoding, n, seed)
            settings = dataclasses.asdict(decoding) | {"stop": list(decoding.stop)}  # as JSON gives it back
            manifest = self.shared | {"seed": seed, "n": n, "decoding": settings}
            waiting[name] = pending(folder / name, asked[name], manifest)
        if any(waiting.values()):
            every_request = [request for requests in asked.values() for request in requests]
            self.loaded = self.loaded or open_engine(self.engine, self.model, [*every_request, *self.expected])
            for name, requests in waiting.items():
                if requests:
                    num_stored = len(problems) * n - len(requests)
                    description = str(decodings[name])
                    drawn[name] = sample(self.loaded, requests, folder / name, num_stored, description)
        return {name: completed(folder / name, asked[name])._replace(drawn=part) for name, part in drawn.items()}

    def close(self) -> None:
        """Give the accelerator back, for what is opened or launched next."""
        self.loaded = None
        gc.collect()
        torch.cuda.empty_cache()


def generate(
    model: str,
    engine: str,
    problems: Sequence[Problem],
    decodings: Mapping[str, Decoding],
    n: int,
    seed: int,
    folder: Path,
    code_version: str,
    closes: bool = False,
) -> dict[str, Generated]:
    """`Sampler.generate` by a model that is loaded for this call alone; `closes` where another call may follow."""
    sampler = Sampler(model, engine, code_version, closes=closes)
    generated = sampler.generate(problems, decodings, n, seed, folder)
    if closes:
        sampler.close()
    return generated


def completed(folder: Path, requests: Sequence[Request]) -> Generated:
    """What `folder` holds of `requests`, each once; ValueError where one is missing."""
    asked = {sample_key(request) for request in requests}
    generated = load_samples(folder, asked)
    if len(generated.rows) < len(asked):
        raise ValueError(
            f"{folder} holds {len(generated.rows):,} of the {len(asked):,} samples that were asked for: files were "
            "removed while they were drawn; give the same command again, and the rest is drawn"
        )
    return generated


def pending(folder: Path, requests: Sequence[Request], manifest: Mapping) -> list[Request]:
    """Requests that `folder` does not hold yet; begins the folder where there is none.

    Raises
    ------
    ValueError
        If the folder was begun with another manifest; the message names what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if path.exists():
        begun = read_manifest(path)
        differs = sorted(key for key in begun.keys() | manifest.keys() if begun.get(key) != manifest.get(key))
        if differs:
            key = differs[0]
            raise ValueError(
                f"{folder} holds samples made with {key}={begun.get(key)!r}, not {manifest.get(key)!r}; remove the "
                "folder to begin anew, or give the former settings"
            )
    else:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dict(manifest), indent=1, sort_keys=True))
        partial.replace(path)
    done = records.ids(folder)
    return [request for request in requests if sample_key(request) not in done]


def sample(
    engine: Engine, requests: Sequence[Request], folder: Path, num_stored: int = 0, description: str = "sample"
) -> Drawn | None:
    """Complete `requests` into shards of `folder`, each written atomically, beside the `num_stored` it holds.

    What another process has stored since they were found to be missing is not drawn; None where that is all.
    """
    finished_s, num_tokens, total, num_cut_off = [], [], 0, 0
    with records.alone(folder), _Shards(folder) as shards:
        stored_since = records.ids(folder)
        requests = [request for request in requests if sample_key(request) not in stored_since]
        awaited = {sample_key(request) for request in requests}
        bar = tqdm(total=num_stored + len(requests), initial=num_stored, desc=description, mininterval=1)
        bar.bar_format = BAR_FORMAT
        with bar:
            began = time.monotonic()
            for completion in engine.generate(requests):
                if sample_key(completion) not in awaited:
                    raise RuntimeError(f"the engine gave {sample_key(completion)} twice, or without being asked for it")
                awaited.remove(sample_key(completion))
                shards.add(completion)
                finished_s.append(time.monotonic() - began)
                num_tokens.append(len(completion.token_ids))
                total += len(completion.token_ids)
                num_cut_off += completion.finish_reason == "length"
                rate, cut_off = total / max(finished_s[-1], 1e-9), num_cut_off / len(num_tokens)
                bar.set_postfix_str(f"{rate:,.0f} tokens/s, {cut_off:.1%} cut off", refresh=False)
                bar.update()
    return Drawn(finished_s, num_tokens, engine.num_gpus) if finished_s else None


class _Shards:
    """Samples on their way to disk: written when there are FLUSH_SAMPLES, or the first has waited for FLUSH_S."""

    def __init__(self, folder: Path):
        self.folder = folder
        for left in folder.glob(".part-*.partial"):  # by a kill
            left.unlink()
        # Above the highest: where one was removed, their count is the number of one that is there.
        numbers = [path.stem.removeprefix("part-") for path in folder.glob("part-*.parquet")]
        self.number = 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)
        self.waiting: list[Sample] = []
        self.lock = threading.Lock()
        self.timer = threading.Timer(0, self.flush)

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *_) -> None:
        self.flush()

    def add(self, sample: Sample) -> None:
        with self.lock:
            self.waiting.append(sample)
            if len(self.waiting) == 1:  # the next sample may be long in coming
                self.timer = threading.Timer(FLUSH_S, self.flush)
                self.timer.daemon = True
                self.timer.start()
        if len(self.waiting) >= FLUSH_SAMPLES:
            self.flush()

    def flush(self) -> None:
        with self.lock:
            self.timer.cancel()
            if self.waiting:
                records.write(self.folder / f"part-{self.number:06d}.parquet", Sample, self.waiting)
                self.number += 1
                self.waiting = []

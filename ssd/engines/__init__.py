"""One engine method: requests in, samples out as they finish, in any order.

An engine is named `KIND` or `KIND:PLACE`: `vllm`, `vllm:data_parallel_size=2`, `transformers`,
`openai:http://one:8000/v1,http://two:8000/v1`, `ray`, `ray:HOST:PORT`, `replay:FOLDER`. `open_engine` imports one
backend, in its own file, and nothing else of it. An engine that cannot honour a decoding refuses it before the first
token.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from ssd.records import Problem, Sample

TRUNCATE_FIRST = "truncate_first"
MAX_TEMPERATURE = 2.0  # that vLLM takes
ENGINES = ("vllm", "transformers", "openai", "ray", "replay")
LOCAL = ("vllm", "transformers")  # they use the GPU of this machine


@dataclasses.dataclass(frozen=True, slots=True)
class Decoding:
    """How the next token is drawn, in vLLM's words: penalties, temperature, min-p, top-k, top-p, in that order.

    Parameters
    ----------
    temperature : float
        0 is greedy.
    top_k : int
        0 keeps every token.
    top_p : float
        In (0, 1]; 1 keeps every token.
    min_p : float
        In [0, 1]; drops tokens below `min_p` times the most likely one; 0 keeps every token.
    presence_penalty : float
        In [-2, 2]; subtracted from the logit of each token already generated.
    repetition_penalty : float
        Above 0; divides the logit of each token of the prompt or already generated, or multiplies it where negative.
    max_tokens : int
        Cap of the completion, in tokens.
    stop : tuple of str
        The completion ends with the token that completes one of these strings; the tokens and their text keep it.
    temperature_last : bool
        Truncate at temperature 1, then temper what is left. No order of the usual three can express it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    temperature_last: bool = False

    def __post_init__(self):
        def require(holds: bool, name: str, expected: str) -> None:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} is not {expected}")

        for name in ("top_k", "max_tokens"):
            require(type(getattr(self, name)) is int, name, "an integer")
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"):
            require(type(getattr(self, name)) in (int, float), name, "a number")
        require(type(self.temperature_last) is bool, "temperature_last", "true or false")
        require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "a number >= 0 (0 is greedy)")
        require(self.top_k >= 0, "top_k", "an integer >= 0 (0 keeps every token)")
        require(0 < self.top_p <= 1, "top_p", "in (0, 1] (1 keeps every token)")
        require(0 <= self.min_p <= 1, "min_p", "in [0, 1] (0 keeps every token)")
        require(-2 <= self.presence_penalty <= 2, "presence_penalty", "in [-2, 2]")
        require(self.repetition_penalty > 0, "repetition_penalty", "a number above 0 (1 does nothing)")
        require(self.max_tokens >= 1, "max_tokens", "an integer >= 1")
        require(type(self.stop) in (tuple, list) and all(type(s) is str and s for s in self.stop), "stop", "texts")
        object.__setattr__(self, "stop", tuple(self.stop))  # JSON has no tuples

    def __str__(self) -> str:
        """The settings that do something, as one word: `T=1 top_p=0.85`."""
        words = [f"T={self.temperature:g}"]
        words += [f"top_k={self.top_k}"] * (self.top_k > 0) + [f"top_p={self.top_p:g}"] * (self.top_p < 1)
        words += [f"min_p={self.min_p:g}"] * (self.min_p > 0)
        words += [f"presence_penalty={self.presence_penalty:g}"] * (self.presence_penalty != 0)
        words += [f"repetition_penalty={self.repetition_penalty:g}"] * (self.repetition_penalty != 1)
        words += [f"stop={text!r}" for text in self.stop] + ["temperature_last"] * self.temperature_last
        return " ".join(words)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One completion to be made."""

    problem_id: str
    sample_index: int
    prompt_token_ids: Sequence[int]
    decoding: Decoding
    seed: int


class Engine(Protocol):
    """A loaded model that completes requests. `num_gpus` are kept busy by it; NaN where it cannot know."""

    num_gpus: float

    def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Yield one Sample a request, as each finishes. `token_ids` holds the end-of-turn token where it was drawn."""
        ...


def requests_for(
    problems: Iterable[Problem], prompts: Iterable[Sequence[int]], decoding: Decoding, n: int, seed: int
) -> list[Request]:
    """`n` requests a problem, each with a seed of its own that depends on (seed, problem_id, sample_index) alone."""
    if n < 1:
        raise ValueError(f"n={n} is not an integer >= 1; n is the number of samples for each problem")
    return [
        Request(problem.problem_id, index, prompt, decoding, request_seed(seed, problem.problem_id, index))
        for problem, prompt in zip(problems, prompts, strict=True)
        for index in range(n)
    ]


def request_seed(seed: int, problem_id: str, sample_index: int) -> int:
    """Seed of one request, from the run's `seed`; 48 bits."""
    name = f"{seed}/{problem_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:6], "big")


def kind(engine: str) -> str:
    """`engine` without its place: what a sample depends on, wherever it was made."""
    return engine.partition(":")[0]


def open_engine(engine: str, model: str, requests: Sequence[Request]) -> Engine:
    """Load `model` (a folder or hub id) in `engine` (KIND or KIND:PLACE), with room for the longest of `requests`.

    Raises
    ------
    ValueError
        If the engine is unknown or not installed, its place is not there, it has no GPU where it needs one or too old
        a driver, it cannot honour a decoding, or a prompt with its cap is longer than the model's context.
    """
    name, _, place = engine.partition(":")
    if name not in ENGINES:
        raise ValueError(f"engine={name!r} is not one of {', '.join(ENGINES)}")
    if name in LOCAL:
        from ssd import driver  # torch takes seconds to load

        driver.check()
    try:
        match name:
            case "vllm":
                from ssd.engines.vllm import VLLMEngine as backend
            case "transformers":
                from ssd.engines.transformers import TransformersEngine as backend
            case "openai":
                from ssd.engines.openai import OpenAIEngine as backend
            case "ray":
                from ssd.engines.ray import RayEngine as backend
            case "replay":
                from ssd.engines.replay import ReplayEngine as backend
    except ModuleNotFoundError as error:
        extra = "ray" if error.name == "ray" else "gpu"
        raise ValueError(
            f"engine={name!r} needs the package {error.name}, which is not installed; install the {extra} extra "
            f"(pip install '.[{extra}]') or use engine=transformers"
        ) from error
    return backend(model, requests, place)


def in_vllm(decoding: Decoding) -> tuple[dict[str, float], list[float] | None]:
    """What vLLM is asked for, and what its extra argument TRUNCATE_FIRST says; None where it is not needed.

    vLLM truncates after the temperature, which it takes up to 2. The logits processor of engines/vllm.py acts before
    either: it truncates by top_k, top_p and min_p, and divides by what the temperature exceeds 2. A presence penalty is
    subtracted after that, so it is divided too; a repetition penalty multiplies.
    """
    beyond = max(1.0, decoding.temperature / MAX_TEMPERATURE)
    idle = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    truncation = {name: getattr(decoding, name) for name in idle}
    asked = {
        "temperature": decoding.temperature / beyond,
        "presence_penalty": decoding.presence_penalty / beyond,
        "repetition_penalty": decoding.repetition_penalty,
    }
    if decoding.temperature_last:
        return asked | idle, [*truncation.values(), beyond]
    return asked | truncation, [*idle.values(), beyond] if beyond > 1 else None


def truncates_first(requests: Iterable[Request]) -> bool:
    """Whether vLLM needs the logits processor for one of `requests`."""
    return any(in_vllm(decoding)[1] for decoding in {request.decoding for request in requests})


def refuse_late_truncation_first(requests: Iterable[Request], can_truncate_first: bool) -> None:
    """RuntimeError where one of `requests` needs the processor and vLLM, opened without, would say nothing."""
    if truncates_first(requests) and not can_truncate_first:
        raise RuntimeError("opened for requests that do not truncate before the temperature, and now one does")


def refuse_penalty_before_truncation(requests: Iterable[Request], engine: str) -> None:
    """ValueError where a penalty meets `temperature_last`: vLLM applies it after that has truncated."""
    for decoding in {request.decoding for request in requests}:
        for name, idle in (("presence_penalty", 0), ("repetition_penalty", 1)):
            if decoding.temperature_last and getattr(decoding, name) != idle:
                raise ValueError(
                    f"engine={engine} applies {name}={getattr(decoding, name):g} after temperature_last has truncated, "
                    "not before; set one of them only, or use engine=transformers"
                )


def max_model_len(requests: Sequence[Request], context: int) -> int:
    """Longest prompt + cap among `requests`, in tokens; ValueError where it exceeds the model's `context`."""
    longest = max(requests, key=lambda request: len(request.prompt_token_ids) + request.decoding.max_tokens)
    needed = len(longest.prompt_token_ids) + longest.decoding.max_tokens
    if needed > context:
        raise ValueError(
            f"problem {longest.problem_id}: prompt of {len(longest.prompt_token_ids)} tokens + "
            f"max_tokens={longest.decoding.max_tokens} = {needed} exceeds the model's context of {context}; lower "
            "max_tokens or drop the problem"
        )
    return needed

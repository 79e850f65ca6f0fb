"""What an engine is asked for, and what it is: requests in, samples out as they finish, in any order."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from ssd.decoding import Decoding
from ssd.records import Problem, Sample


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

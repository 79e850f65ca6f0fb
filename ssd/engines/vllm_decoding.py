"""A decoding in vLLM's words, for vLLM in process, a server or a cluster; what vLLM cannot honour is refused."""

from collections.abc import Iterable

from ssd.decoding import Decoding
from ssd.engines.request import Request

TRUNCATE_FIRST = "truncate_first"  # vLLM's extra argument that the logits processor reads
MAX_TEMPERATURE = 2.0  # that vLLM takes


def in_vllm(decoding: Decoding) -> tuple[dict[str, float], list[float] | None]:
    """What vLLM is asked for, and what its extra argument TRUNCATE_FIRST says; None where it is not needed.

    vLLM truncates after the temperature, which it takes up to 2. The logits processor of truncate_first.py acts before
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

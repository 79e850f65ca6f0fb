"""How the next token is drawn. What samples were drawn with, what a step's parameters and a preset spell out."""

import dataclasses
import math


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

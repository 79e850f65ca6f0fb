"""The value of an expression at one value of each letter: what it takes to see that two expressions differ."""

import cmath
import functools
import math
import random
import re
from typing import NamedTuple


class Value(NamedTuple):
    value: complex
    largest: float  # of the numbers on the way, infinite where one is too large for a float


@functools.lru_cache(maxsize=2**14)
def value_of(text: str) -> Value | None:
    """Value of an expression of numbers, letters, sums, products, fractions, powers and roots; None for any other."""
    evaluation = _Evaluation(_VALUE_TOKEN.findall(text))
    try:
        value = evaluation.sum()
    except OverflowError:
        return Value(0, math.inf)
    except (ValueError, ZeroDivisionError, RecursionError):
        return None
    return None if evaluation.tokens or value != value else Value(value, evaluation.largest)


_VALUE_TOKEN = re.compile(r"\d+\.?\d*|\.\d+|\\[a-zA-Z]+|[^ ]")
_GREEK = re.compile(r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|varphi|phi|chi|psi|omega)")


class _Evaluation:
    """Recursive descent over tokens, which it uses up; ValueError at what it does not know. i is the imaginary unit."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.largest = tokens[::-1], 0.0

    def sum(self) -> complex:
        total = self.product()
        while self._next() in ("+", "-"):
            total = self._seen(total + self.product() if self.tokens.pop() == "+" else total - self.product())
        return total

    def product(self) -> complex:
        sign = 1
        while self._next() in ("+", "-"):
            sign = -sign if self.tokens.pop() == "-" else sign
        value = sign * self.power()
        while self.tokens and self._next() not in ("+", "-", ")", "]", "}"):
            if self._next() in ("/", "\\div"):
                self.tokens.pop()
                value = self._seen(value / self.power())
            else:
                if self._next() == "\\cdot":
                    self.tokens.pop()
                elif self._next()[0].isdigit():
                    raise ValueError("a number after a factor")
                value = self._seen(value * self.power())
        return value

    def power(self) -> complex:
        base = self.atom()
        if self._next() == "!":
            self.tokens.pop()
            if base.imag or base.real < 0 or base.real % 1:
                raise ValueError("a factorial of no whole number")
            base = complex(math.gamma(base.real + 1))
        if self._next() != "^":
            return self._seen(base)
        self.tokens.pop()
        return self._seen(base ** self.argument())

    def argument(self) -> complex:
        """A group in braces or, as TeX has it, the next single character."""
        if self._next() != "{" and (len(self._next()) > 1 and self._next()[0] != "\\"):
            raise ValueError("several characters without braces")
        return self.atom()

    def atom(self) -> complex:
        token = self.tokens.pop() if self.tokens else ""
        if token[:1].isdigit() or token[:1] == ".":
            if self._next() == "\\frac":
                raise ValueError("perhaps a mixed number")
            return complex(float(token))
        if token in _GROUPS:
            value = self.sum()
            if not self.tokens or self.tokens.pop() != _GROUPS[token]:
                raise ValueError("brackets that do not match")
            return value
        if token == "\\frac":
            return self.argument() / self.argument()
        if token == "\\sqrt":
            root = 2.0
            if self._next() == "[":
                root = self.atom()
            return self.argument() ** (1 / root)
        if token in _FUNCTIONS:
            value = _FUNCTIONS[token](self.atom() if self._next() in _GROUPS else self.power())
            if self.tokens and self._next() not in ("+", "-", ")", "]", "}"):
                raise ValueError("an argument whose end is not said")
            return value
        if token in ("\\pi", "e", "i"):
            return {"\\pi": complex(math.pi), "e": complex(math.e), "i": 1j}[token]
        if _GREEK.fullmatch(token) or (token.isalpha() and token.isascii()):
            if self._next() == "_":
                self.tokens.pop()
                token += "_" + "".join(self._subscript())
            return _at(token)
        raise ValueError(token)

    def _subscript(self) -> list[str]:
        first = self.tokens.pop() if self.tokens else ""
        if first == "{":
            first = self.tokens.pop() if self.tokens else ""
            if not first or not self.tokens or self.tokens.pop() != "}":
                raise ValueError("a long subscript")
        return [first]

    def _next(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def _seen(self, value: complex) -> complex:
        self.largest = max(self.largest, abs(value))
        return value


_GROUPS = {"(": ")", "[": "]", "{": "}"}
_FUNCTIONS = {
    "\\sin": cmath.sin, "\\cos": cmath.cos, "\\tan": cmath.tan, "\\ln": cmath.log, "\\log": cmath.log10,
}  # fmt: skip


@functools.lru_cache(maxsize=256)
def _at(letter: str) -> complex:
    """A value of a letter, the same in every expression."""
    return complex(random.Random(letter).uniform(1.1, 2.9))

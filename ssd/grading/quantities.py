"""Numbers and units as answers write them."""

import re
from fractions import Fraction
from typing import NamedTuple

from ssd.grading.structure import LETTERS, brackets_of, words_of
from ssd.grading.writing import without_spaces


class Quantity(NamedTuple):
    """A value without its unit; `unit` is '' where there is none or one that measures nothing ('apples')."""

    value: str
    unit: str
    percent: bool


# fmt: off
_MEASURES = {name: measure for measure, names in {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "mg": "milligram", "g": "gram",
    "kg": "kilogram", "lb": "pound", "oz": "ounce", "ml": "milliliter", "l": "liter litre", "gal": "gallon",
    "s": "sec second", "min": "minute", "h": "hr hour", "day": "", "week": "", "month": "", "yr": "year",
    "h mi per": "mph", "dollar": "buck usd", "cent": "", "deg": "degree", "rad": "radian", "am": "", "pm": "",
    "square": "sq", "cube": "cubic cu", "per": "",
}.items() for name in (measure, *names.split())}
# fmt: on
_NO_UNIT = re.compile(
    r"\b(?:or|and|to|not|no|if|for|when|than|least|most|more|less|over|under|base|only|except|below|above|mod"
    r"|squared|cubed|factorial|hal(?:f|ves)|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s?)\b"
)
_PRODUCTS = ("am", "pm", "in", "mi")  # glued to a number rather two letters than a unit
_UNIT_IN_TEXT = re.compile(r"\^?\{?\\text\{([^{}]*)(?:\} ?/ ?\\text\{([^{}]*))?\}\}?(?:\^[23])?$")
_UNIT_IN_WORDS = re.compile(r"(?<=[\d)} ])([a-zA-Z]{2,}(?: [a-zA-Z]{2,}){0,3})(?:/([a-zA-Z]+))?(?:\^[23])?$")
_BASE = re.compile(r"(-?\d+)_(?:\{?(-?\d{1,2})\}?|\{?\\text\{ ?([a-z]+) ?\}\}?)")
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_DEGREES = re.compile(r"(?: ?\^\\circ)+ ?(?:([CF])|\\text\{ ?([CF]) ?\})?$")


def quantity_of(text: str) -> Quantity:
    """`text` without the percent signs, degrees, bases and units at its end, which are named beside it."""
    text, units, percent = text.strip(), [], False
    while True:
        value, unit = _without_last_unit(text)
        if value == text:
            return Quantity(text, " ".join(sorted(set(units))), percent)
        percent |= unit == ["%"]
        text, units = value, units + unit * (unit != ["%"])


def _without_last_unit(text: str) -> tuple[str, list[str]]:
    """The text before a percent sign, degree sign, base or unit at its end, and the measures named there."""
    if text.endswith("%"):
        return text.rstrip("% "), ["%"]
    if (match := _DEGREES.search(text)) and not TRIGONOMETRIC.search(text):
        return text[: match.start()].rstrip(), [f"deg{match[1] or match[2] or ''}"]
    if match := _BASE.fullmatch(text):
        return match[1], [f"base {_NUMERALS.index(match[3]) if match[3] in _NUMERALS else match[2]}"]
    match = _UNIT_IN_TEXT.search(text) or _UNIT_IN_WORDS.search(text)
    if not match:
        return text, []
    value, words = text[: match.start()].strip(), " per ".join(filter(None, match.groups())).lower()
    words = words.replace(".", "").replace("/", " per ")
    if "\\text" not in match[0] and not _stands_apart(text, match):
        return text, []
    known = [_measure(word) for word in re.findall(r"[a-z]+", words) if _measure(word)]
    power = [{"2": "square", "3": "cube"}[digit] for digit in re.findall(r"\^\{?([23])", match[0])]
    is_numeric = re.search(r"\d|\\pi", value) and not LETTERS.search(re.sub(r"\\[a-zA-Z]+", "", value))
    if _NO_UNIT.search(words) or not value or not (is_numeric or (known and "\\text" in match[0])):
        return text, []
    return value, known + power


def _stands_apart(text: str, words: re.Match) -> bool:
    """Whether letters after a value are words, and not a product: 12 ways and 5cm, but 2xy, 2 ab."""
    word = words[1].split(" ")[0]
    is_glued = text[words.start() - 1] != " "
    if len(word) > (3 if is_glued else 2):
        return True
    return bool(_measure(word.lower())) and not (is_glued and word in _PRODUCTS)


def _measure(word: str) -> str:
    return _MEASURES.get(word) or _MEASURES.get(word.removesuffix("s"), "")


class Number(NamedTuple):
    """A rational number; not exact where it is written as a decimal, which may be rounded."""

    value: Fraction
    is_exact: bool


_NUMERALS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_SPACED_GROUPS = re.compile(r"([+-]?\d{1,3})((?: \d{3})+)(\.\d+)?")
_DIGITS = r"\d+\.?\d*|\.\d+"
_DECIMAL = re.compile(rf"({_DIGITS})(?:(?:\\cdot|x)10\^(?:\{{([+-]?\d{{1,3}})\}}|(\d))|[eE]([+-]?\d{{1,3}}))?")
_POWER_OF_TEN = re.compile(r"10\^(?:\{([+-]?\d{1,3})\}|(\d))")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d+)\}")
_FRACTION = re.compile(rf"\\frac\{{(-?)({_DIGITS})\}}\{{({_DIGITS})\}}|()({_DIGITS})/({_DIGITS})")
_MIXED = re.compile(r"(\d+) ?\\frac\{(\d+)\}\{(\d+)\}|(\d+) (\d+)/(\d+)")


def number_of(text: str) -> Number | None:
    """The number that `text` is, in any writing of docs/grading.md; None for any other expression."""
    text = without_spaces(text)
    while (brackets := brackets_of(text))[0] == "(" and brackets[2] == ")":
        text = brackets[1]
    if match := _SPACED_GROUPS.fullmatch(text):
        text = text.replace(" ", "")
    sign, text = (-1 if text[:1] == "-" else 1), text[1:] if text[:1] in ("+", "-") else text
    if match := _DECIMAL.fullmatch(text):
        exponent = match[2] or match[3] or match[4]
        value = Fraction(match[1]) * Fraction(10) ** int(exponent or 0)
        return Number(sign * value, match[1].isdigit())
    if match := _POWER_OF_TEN.fullmatch(text):
        return Number(sign * Fraction(10) ** int(match[1] or match[2]), True)
    if match := _FRACTION.fullmatch(text):
        minus, top, bottom = match.group(1, 2, 3) if match[2] else match.group(4, 5, 6)
        if not Fraction(bottom):
            return None
        value = Fraction(top) / Fraction(bottom)
        return Number(-sign * value if minus else sign * value, top.isdigit() and bottom.isdigit())
    if match := _MIXED.fullmatch(text):
        whole, top, bottom = map(int, match.group(1, 2, 3) if match[1] else match.group(4, 5, 6))
        return Number(sign * (whole + Fraction(top, bottom)), True) if bottom else None
    if match := _REPEATING.fullmatch(text):
        whole, fixed, repeated = match.groups()
        tail = Fraction(int(repeated), 10 ** len(repeated) - 1)
        return Number(sign * (int(whole + fixed or 0) + tail) / 10 ** len(fixed), True)
    word = words_of(text)
    return Number(Fraction(_NUMERALS.index(word)), True) if word in _NUMERALS else None


def equal_numbers(one: Number, other: Number, tolerance: float) -> bool:
    """Whether two numbers are the same, or no further apart than `tolerance`.

    A decimal is the same to 1e-6, and to 4 digits where both are small.
    """
    difference = abs(one.value - other.value)
    if difference <= Fraction(str(tolerance)):
        return True
    if one.is_exact and other.is_exact:
        return False
    return difference <= Fraction(1, 10**6) and difference * 10**4 <= max(abs(one.value), abs(other.value))

r"""When two answers are the same: the policies.

Nothing here evaluates an answer. What no string, number or structure decides goes to `same_expression`, which the
caller gives: in a worker process it is math-verify. docs/grading.md states each policy with its reason. Every pattern
takes time linear in the text.
"""

import collections
import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from ssd.values import value_of
from ssd.writing import all_boxes, clean, last_box, one_writing, without_spaces

SameExpression = Callable[[str, str], bool]


class _How(NamedTuple):
    same_expression: SameExpression
    tolerance: float


def equal(gold: str, answer: str, same_expression: SameExpression, tolerance: float = 0.0) -> bool:
    r"""Whether `answer` is the same answer as `gold`, by the policies of docs/grading.md.

    Parameters
    ----------
    same_expression : callable
        Decides two expressions (LaTeX) that strings, numbers and structure leave open. What it raises goes through.
    tolerance : float
        Largest difference between a number of the gold and the answer's, where the problem allows one.

    >>> equal("(3/4, 10\\%)", "( \\frac{3}{4}, 0.1 )", lambda gold, answer: False)
    True
    """
    gold, answer = all_boxes(gold) or gold, last_box(answer) or answer
    gold, cleaned = clean(_labelled(gold)), clean(answer)
    if not gold or not cleaned:
        return False
    how = _How(same_expression, tolerance)
    if _equal(gold, cleaned, how):
        return True
    if not is_sentence(answer):
        return False
    return _equal(gold, clean(_labelled(answer)), how) or same_expression(gold, one_writing(answer))


def _labelled(text: str) -> str:
    """What the last 'answer is' of `text` is followed by: the formula there, or the line; `text` without such words."""
    label = _LABEL.search(text, max(text.lower().rfind("answer"), 0))
    return (label[1] or label[2]) if label else text


def expressions(gold: str) -> list[str]:
    r"""The expressions in a gold that `equal` would give to `same_expression`; none where numbers and words decide.

    >>> expressions(r"(3, \frac{1}{2})"), expressions(r"x = 2\sqrt{3} \text{ cm}")
    ([], ['2\\sqrt{3}'])
    """
    return _expressions(clean(_labelled(all_boxes(gold) or gold)))


def _expressions(text: str) -> list[str]:
    text = _SET_OF_ALL.sub(r"\1", _without_braces(text))
    if parts := _parts(text):
        return [expression for element in parts.elements for expression in _expressions(element)]
    for simpler in (_named(text)[1], _as_interval(text)[1] or text, _quantity(text).value):
        if simpler != text:
            return _expressions(simpler)
    return [] if _number(text) or _words(text) else [text]


def nesting(text: str) -> int:
    """Largest number of brackets open at once."""
    depth = deepest = 0
    for bracket in re.findall(r"[(\[{)\]}]", text):
        depth += 1 if bracket in "([{" else -1
        deepest = max(deepest, depth)
    return deepest


def is_sentence(text: str) -> bool:
    r"""Whether words outside of `\text` surround the answer, so that it must first be found in them."""
    if _LABEL.search(text):
        return True
    text = _TEXT.sub("", text)
    if not re.search(r"\d|\$|\\", text):
        return False
    return bool(_THREE_WORDS.search(text)) or ("\n" in text.strip() and bool(_WORD.search(text)))


_TEXT = re.compile(r"\\(?:text[a-z]*|math[a-z]+|mbox)\s?\{[^{}]*\}")
_WORD = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{3,}")
_THREE_WORDS = re.compile(r"(?<![\\a-zA-Z{'])[a-zA-Z][a-zA-Z']+(?: [a-zA-Z][a-zA-Z']+){2}")
_LABEL = re.compile(r"(?:(?i:answer)(?: ?is)?[ :=}]+|#### )(?:\$([^$]+)\$|(.*))")


def _equal(gold: str, answer: str, how: _How) -> bool:
    if without_spaces(gold) == without_spaces(answer):
        return True
    if "\\text" in gold + answer and without_spaces(_plain(gold)) == without_spaces(_plain(answer)):
        return True
    gold, answer = (_NAMED.get(_words(text), text) for text in (_without_braces(gold), _without_braces(answer)))
    gold, answer = _SET_OF_ALL.sub(r"\1", gold), _SET_OF_ALL.sub(r"\1", answer)
    letter = _LETTER.fullmatch(_plain(gold))
    if letter and (choice := _CHOICE.match(_plain(answer))):
        return letter[1].upper() == (choice[1] or choice[2]).upper()
    answer = _CHOICE_BEFORE_VALUE.sub("", answer)
    gold_parts, answer_parts = _parts(gold), _parts(answer)
    if not gold_parts or not answer_parts or len(gold_parts.elements) != len(answer_parts.elements):
        gold, gold_parts = _read_as_one(gold, gold_parts)
        answer, answer_parts = _read_as_one(answer, answer_parts)
    if gold_parts and answer_parts:
        return _equal_parts(gold_parts, answer_parts, how)
    (gold_name, gold_value), (answer_name, answer_value) = _named(gold), _named(answer)
    if gold_name and answer_name:
        if without_spaces(gold_name) == without_spaces(answer_name):
            return _equal(gold_value, answer_value, how)
        return how.same_expression(gold, answer)
    if gold_name and not _RELATION.search(answer):
        return _equal(gold_value, answer, how)
    if answer_name and not _RELATION.search(gold):
        return _equal(gold, answer_value, how)
    if bool(_EQUATION.search(gold)) != bool(_EQUATION.search(answer)):
        return False
    if (gold_matrix := _matrix(gold)) and (answer_matrix := _matrix(answer)):
        return _equal_matrices(gold_matrix, answer_matrix, how)
    (gold_variable, gold_interval), (answer_variable, answer_interval) = _as_interval(gold), _as_interval(answer)
    if (gold_interval or answer_interval) and (gold_variable or answer_variable) == (answer_variable or gold_variable):
        return _equal(gold_interval or gold, answer_interval or answer, how)
    return _equal_values(gold, answer, how)


_SET_OF_ALL = re.compile(r"^\\\{ ?[a-zA-Z](?: ?\\in ?\\mathbb\{R\})? ?(?:[|:]|\\mid(?![a-zA-Z])) ?([^{}]*)\\\}$")
# A choice is a letter alone, in brackets, or before its text: (B), B., \text{(B) } 12.
_LETTER = re.compile(r"\(?([A-Ja-j])\)?[.:]?")
_CHOICE = re.compile(r"\(([A-Ja-j])\)|([A-Ja-j])(?:[).:]|$)")
_CHOICE_BEFORE_VALUE = re.compile(r"^(?:\([A-J]\)|\\text\{ ?\([A-J]\) ?\}) ?(?=[\d\\$-])")


def _plain(text: str) -> str:
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", text).rstrip(".,; ").lstrip()


def _equal_values(gold: str, answer: str, how: _How) -> bool:
    one, other = _quantity(gold), _quantity(answer)
    units = one.unit or "%" * one.percent, other.unit or "%" * other.percent
    if all(units) and units[0] != units[1]:
        return False
    if one.percent != other.percent:
        hundredth = [rf"\frac{{{side.value}}}{{100}}" if side.percent else side.value for side in (one, other)]
        return any(_equal(*pair, how) for pair in ((one.value, other.value), hundredth))
    if (one.value, other.value) != (gold, answer):
        return _equal(one.value, other.value, how)
    numbers = _number(gold), _number(answer)
    if all(numbers):
        return _equal_numbers(*numbers, how.tolerance)
    if all(re.fullmatch("[A-Z]{2,}", text) for text in (gold, answer)):
        return False  # points, or letters in a row: LQSX
    words = _words(gold), _words(answer)
    if all(words) and words[0] == words[1]:
        return True
    if any(words) and (any(numbers) or "\\text" in gold + answer or " " in (words[0] or words[1])):
        return False
    return (how.tolerance > 0 or not _differ(gold, answer)) and how.same_expression(gold, answer)


class _Parts(NamedTuple):
    """A list, tuple, interval or set: brackets ('' for a bare list) and elements."""

    opening: str
    closing: str
    elements: list[str]


def _equal_parts(gold: _Parts, answer: _Parts, how: _How) -> bool:
    if len(set(gold.elements)) == len(gold.elements) and not {gold.opening, answer.opening} & {"(", "["}:
        answer = answer._replace(elements=_once(answer.elements))
    if len(gold.elements) != len(answer.elements):
        return False
    if gold.opening and answer.opening and gold[:2] != answer[:2]:
        return False
    if {gold.opening, answer.opening} & {"(", "["}:
        return all(_equal(*pair, how) for pair in zip(gold.elements, answer.elements, strict=True))
    left = collections.Counter(map(without_spaces, gold.elements))
    rest = collections.Counter(map(without_spaces, answer.elements))
    left, rest = list((left - rest).elements()), list((rest - left).elements())
    for element in left:
        found = next((i for i, other in enumerate(rest) if _equal(element, other, how)), None)
        if found is None:
            return False
        rest.pop(found)
    return True


def _once(elements: list[str]) -> list[str]:
    """Each element once, as it is first written."""
    return list({without_spaces(element): element for element in reversed(elements)}.values())[::-1]


_MATRIX = re.compile(
    r"[(\[]? ?\\begin\{(?:[pb]?matrix|array)\} ?(?:\{[clr|]*\} ?)?((?:(?!\\begin|\\end).)*)"
    r"\\end\{(?:[pb]?matrix|array)\} ?[)\]]?"
)


def _matrix(text: str) -> list[list[str]]:
    """Rows of a matrix in any brackets but those of a determinant; none where `text` is no matrix."""
    match = _MATRIX.fullmatch(text.strip())
    rows = [row for row in match[1].split("\\\\") if row.strip()] if match else []
    return [[entry.strip() for entry in row.split("&")] for row in rows]


def _equal_matrices(gold: list[list[str]], answer: list[list[str]], how: _How) -> bool:
    if list(map(len, gold)) != list(map(len, answer)):
        return False
    return all(_equal(*pair, how) for rows in zip(gold, answer, strict=True) for pair in zip(*rows, strict=True))


_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])|.", re.DOTALL)
_OPENING = ("(", "[", "{", "\\{", "\\begin", "\\langle")
_CLOSING = (")", "]", "}", "\\}", "\\end", "\\rangle")


def _split(text: str, separators: Sequence[str]) -> list[str]:
    """`text` cut at the separators that stand outside of all brackets; no empty pieces."""
    pieces, depth, start = [], 0, 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _OPENING:
            depth += 1
        elif token in _CLOSING:
            depth -= 1
        elif depth == 0 and token in separators:
            pieces.append(text[start : match.start()])
            start = match.end()
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces if piece.strip()]


def _parts(text: str) -> _Parts | None:
    r"""Elements of a list, tuple, interval or set; None for a single expression. `\pm` makes two elements of one."""
    opening, inner, closing = _brackets(text)
    elements = _elements(inner)
    if opening == "(" and closing == ")" and len(elements) == 1:
        return _parts(inner)
    if opening in ("(", "["):
        if len(elements) < 2:
            return None
        return _Parts("", "", _signs(text)) if len(_signs(text)) > 1 else _Parts(opening, closing, elements)
    elements = _by_repeated_name([signed for element in elements for signed in _signs(element)])
    return _Parts(opening, closing, elements) if opening or len(elements) > 1 else None


def _brackets(text: str) -> tuple[str, str, str]:
    """Opening bracket, inside and closing bracket, '' for the braces of TeX and unless one pair encloses all."""
    depth, opening = 0, ""
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _OPENING:
            opening, depth = opening or token, depth + 1
        elif token in _CLOSING:
            depth -= 1
        if depth == 0:
            if not opening or match.end() < len(text) or opening == "\\begin":
                return "", text, ""
            inner = text[len(opening) : match.start()].strip()
            return ("", inner, "") if opening == "{" else (opening, inner, token)
    return "", text, ""


def _without_braces(text: str) -> str:
    return _brackets(text)[1] if text[:1] == "{" and not _brackets(text)[0] else text


def _elements(text: str) -> list[str]:
    groups = _split(text, (";",))
    return groups if len(groups) > 1 else _split(text, (",", "and", "or"))


def _signs(text: str) -> list[str]:
    r"""`a \pm b` as `a + b` and `a - b`; with several signs it stays as it is, since their pairing is not said."""
    if text.count("\\pm") != 1 or "\\mp" in text:
        return [text]
    before, after = text.split("\\pm")
    return [f"{before}{sign}{after}" for sign in "+-"]


def _by_repeated_name(elements: list[str]) -> list[str]:
    """`p=5, q=2, p=7, q=3` as the two solutions `p=5, q=2` and `p=7, q=3`."""
    names = [_named(element)[0] for element in elements]
    if not names or not all(names) or names[0] not in names[1:]:
        return elements
    size = names.index(names[0], 1)
    if size == 1 or names != names[:size] * (len(names) // size):
        return elements
    return [", ".join(elements[i : i + size]) for i in range(0, len(elements), size)]


_RELATION = re.compile(r"[=<>]|\\(?:leq|geq|neq|in|notin|equiv|approx|sim|subset|mid)(?![a-zA-Z])")
_EQUATION = re.compile(r"(?<![<>:])=")
_LETTERS = re.compile(r"[a-zA-Z]")


def _named(text: str) -> tuple[str, str]:
    r"""('x', '5') for `x = 5`, `x = 2 + 3 = 5` and `x \in 5`; ('', text) where nothing is named.

    A name holds no sum, number or relation: x, f(2), S_{10}, |AB|, \frac{NO}{BO}, (p, q, r). A sum of numbers before
    its value (2 + 3 = 5) counts as one, and an approximation after the exact value does not count.
    """
    if not _RELATION.search(text):
        return "", text
    sides = _split(text, ("=", "\\in", "\\approx"))
    if len(sides) < 2 or any(re.search(r"[<>]|\\[lgn]eq", side) for side in sides):
        return "", text
    exact = _split(_split(text, ("\\approx",))[0], ("=", "\\in"))
    value = exact[-1] if len(exact) > 1 or not _is_name(exact[0]) else sides[-1]
    is_sum = not _LETTERS.search(re.sub(r"\\[a-zA-Z]+", "", sides[0] + value))
    return (sides[0], value) if _is_name(sides[0]) or is_sum else ("", text)


_INEQUALITY = re.compile(r" ?([<>]|\\[lg]eq(?![a-zA-Z])) ?")
_VARIABLE = re.compile(r"[a-zA-Z]|\\[a-zA-Z]+")


def _as_interval(text: str) -> tuple[str, str]:
    r"""('x', '[2, 3)') for `2 \leq x < 3`, `(-\infty, 5]` for `x \leq 5`; ('', '') for no inequality in one letter."""
    sides = _INEQUALITY.split(text.strip())  # at odd places the signs
    if len(sides) == 3 and _VARIABLE.fullmatch(sides[0]):
        sides = [r"-\infty" if sides[1] in ("<", r"\leq") else r"\infty", sides[1], *sides]
        sides[1] = "<" if sides[1] in ("<", r"\leq") else ">"
    elif len(sides) == 3 and _VARIABLE.fullmatch(sides[2]):
        sides += ["<", r"\infty"] if sides[1] in ("<", r"\leq") else [">", r"-\infty"]
    if len(sides) != 5 or not _VARIABLE.fullmatch(sides[2]):
        return "", ""
    if sides[1] in (">", r"\geq"):
        sides = [{">": "<", r"\geq": r"\leq"}.get(side, side) for side in reversed(sides)]
    low, first, variable, second, high = sides
    if {first, second} - {"<", r"\leq"}:
        return "", ""
    return variable, f"{'[' if first != '<' else '('}{low}, {high}{']' if second != '<' else ')'}"


def _read_as_one(text: str, parts: _Parts | None) -> tuple[str, _Parts | None]:
    """A list beside a single value, where it can be read as one: 3,14 as 3.14, `x < 1 or x > 3` as a union."""
    if parts and re.fullmatch(r"[+-]?\d+,\d+", text):
        return text.replace(",", "."), None
    if parts and parts.opening == "\\{" and len(parts.elements) == 1:
        return parts.elements[0], _parts(parts.elements[0])
    if parts and not parts.opening:
        intervals = [_as_interval(element)[1] for element in parts.elements]
        return (r" \cup ".join(intervals), None) if all(intervals) else (text, parts)
    return text, parts


def _is_name(text: str) -> bool:
    text = re.sub(r"_(?:\{[^{}]*\}|\w)|\^(?:\{-1\}|\*)|(?<=[a-zA-Z}])\([^()]*\)", "", text)
    return bool(_LETTERS.search(text)) and not re.search(r"[\d+*/^-]|\\(?:cdot|sqrt|pm)", text)


class _Quantity(NamedTuple):
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
_NO_UNIT = re.compile(r"\b(?:or|and|to|not|no|if|for|when|than|least|most|more|less|over|under|base|only|except)\b")
_UNIT_IN_TEXT = re.compile(r"\^?\{?\\text\{([^{}]*)(?:\} ?/ ?\\text\{([^{}]*))?\}\}?(?:\^[23])?$")
_UNIT_IN_WORDS = re.compile(r"(?<=[\d)} ])([a-zA-Z]{2,}(?: [a-zA-Z]{2,}){0,3})(?:/([a-zA-Z]+))?(?:\^[23])?$")
_BASE = re.compile(r"(-?\d+)_(?:\{?(-?\d{1,2})\}?|\{?\\text\{ ?([a-z]+) ?\}\}?)")
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_DEGREES = re.compile(r" ?\^\\circ ?(?:([CF])|\\text\{ ?([CF]) ?\})?$")


def _quantity(text: str) -> _Quantity:
    text, units, percent = text.strip(), [], False
    while True:
        value, unit = _without_last_unit(text)
        if value == text:
            return _Quantity(text, " ".join(sorted(set(units))), percent)
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
    known = [_measure(word) for word in re.findall(r"[a-z]+", words) if _measure(word)]
    power = [{"2": "square", "3": "cube"}[digit] for digit in re.findall(r"\^\{?([23])", match[0])]
    is_numeric = re.search(r"\d|\\pi", value) and not _LETTERS.search(re.sub(r"\\[a-zA-Z]+", "", value))
    if _NO_UNIT.search(words) or not value or not (is_numeric or (known and "\\text" in match[0])):
        return text, []
    return value, known + power


def _measure(word: str) -> str:
    return _MEASURES.get(word) or _MEASURES.get(word.removesuffix("s"), "")


class _Number(NamedTuple):
    """A rational number; not exact where it is written as a decimal, which may be rounded."""

    value: Fraction
    is_exact: bool


_SPACED_GROUPS = re.compile(r"([+-]?\d{1,3})((?: \d{3})+)(\.\d+)?")
_DIGITS = r"\d+\.?\d*|\.\d+"
_DECIMAL = re.compile(rf"({_DIGITS})(?:(?:\\cdot|x)10\^(?:\{{([+-]?\d{{1,3}})\}}|(\d))|[eE]([+-]?\d{{1,3}}))?")
_POWER_OF_TEN = re.compile(r"10\^(?:\{([+-]?\d{1,3})\}|(\d))")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d+)\}")
_FRACTION = re.compile(rf"\\frac\{{(-?)({_DIGITS})\}}\{{({_DIGITS})\}}|()({_DIGITS})/({_DIGITS})")
_MIXED = re.compile(r"(\d+) ?\\frac\{(\d+)\}\{(\d+)\}|(\d+) (\d+)/(\d+)")


def _number(text: str) -> _Number | None:
    text = without_spaces(text)
    while (brackets := _brackets(text))[0] == "(" and brackets[2] == ")":
        text = brackets[1]
    if match := _SPACED_GROUPS.fullmatch(text):
        text = text.replace(" ", "")
    sign, text = (-1 if text[:1] == "-" else 1), text[1:] if text[:1] in ("+", "-") else text
    if match := _DECIMAL.fullmatch(text):
        exponent = match[2] or match[3] or match[4]
        value = Fraction(match[1]) * Fraction(10) ** int(exponent or 0)
        return _Number(sign * value, match[1].isdigit())
    if match := _POWER_OF_TEN.fullmatch(text):
        return _Number(sign * Fraction(10) ** int(match[1] or match[2]), True)
    if match := _FRACTION.fullmatch(text):
        minus, top, bottom = match.group(1, 2, 3) if match[2] else match.group(4, 5, 6)
        if not Fraction(bottom):
            return None
        value = Fraction(top) / Fraction(bottom)
        return _Number(-sign * value if minus else sign * value, top.isdigit() and bottom.isdigit())
    if match := _MIXED.fullmatch(text):
        whole, top, bottom = map(int, match.group(1, 2, 3) if match[1] else match.group(4, 5, 6))
        return _Number(sign * (whole + Fraction(top, bottom)), True) if bottom else None
    if match := _REPEATING.fullmatch(text):
        whole, fixed, repeated = match.groups()
        tail = Fraction(int(repeated), 10 ** len(repeated) - 1)
        return _Number(sign * (int(whole + fixed or 0) + tail) / 10 ** len(fixed), True)
    word = _words(text)
    return _Number(Fraction(_NUMERALS.index(word)), True) if word in _NUMERALS else None


def _equal_numbers(one: _Number, other: _Number, tolerance: float) -> bool:
    if abs(one.value - other.value) <= Fraction(str(tolerance)):
        return True
    if one.is_exact and other.is_exact:
        return one.value == other.value
    return close(one.value, other.value)


def close(one: Fraction | float, other: Fraction | float) -> bool:
    """Whether two numbers of which one is a decimal are equal: to 1e-6, and to 4 digits where both are small."""
    difference = abs(one - other)
    return difference <= 1e-6 and difference <= 1e-4 * max(abs(one), abs(other))


def _differ(gold: str, answer: str) -> bool:
    """Whether two expressions have values so far apart, at one value of each letter, that algebra need not be asked.

    Only ever says that they differ: equal values at one point are no proof of equal expressions.
    """
    one, other = value_of(gold), value_of(answer)
    if one is None or other is None:
        beside = answer if other is None else gold
        return (one is None) != (other is None) and (
            "\\begin" in beside or "\\cup" in beside or _parts(beside) is not None
        )
    if math.isinf(one.largest) or math.isinf(other.largest):
        return math.isfinite(one.largest) != math.isfinite(other.largest)
    difference, size = abs(one.value - other.value), max(abs(one.value), abs(other.value))
    if difference <= 1e-9 * max(one.largest, other.largest):
        return False
    return difference > 2e-6 or difference > 2e-4 * size


_NAMED = {
    **dict.fromkeys(("all real numbers", "all reals", "real numbers"), r"\mathbb{R}"),
    **dict.fromkeys(("no solution", "no solutions", "empty set", "the empty set"), r"\emptyset"),
    "infinity": r"\infty",
}
_NUMERALS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def _words(text: str) -> str:
    """The words of an answer that is nothing but words, in lower case; '' for any other."""
    text = _plain(text).lower()
    return " ".join(re.findall("[a-z]+", text)) if re.fullmatch(r"[a-z][a-z ,.()-]*", text) else ""

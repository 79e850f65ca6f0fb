r"""What an answer is made of: lists, tuples, sets, matrices, names, intervals, words.

Nothing is evaluated, and every pattern takes time linear in the text.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple


class Parts(NamedTuple):
    """A list, tuple, interval or set: brackets ('' for a bare list) and elements."""

    opening: str
    closing: str
    elements: list[str]


_MATRIX = re.compile(
    r"[(\[]? ?\\begin\{(?:[pb]?matrix|array)\} ?(?:\{[clr|]*\} ?)?((?:(?!\\begin|\\end).)*)"
    r"\\end\{(?:[pb]?matrix|array)\} ?[)\]]?"
)


def matrix_of(text: str) -> list[list[str]]:
    """Rows of a matrix in any brackets but those of a determinant; none where `text` is no matrix."""
    match = _MATRIX.fullmatch(text.strip())
    rows = [row for row in match[1].split("\\\\") if row.strip()] if match else []
    return [[entry.strip() for entry in row.split("&")] for row in rows]


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


def parts_of(text: str) -> Parts | None:
    r"""Elements of a list, tuple, interval or set; None for a single expression. `\pm` makes two elements of one."""
    opening, inner, closing = brackets_of(text)
    elements = _elements(inner)
    if opening == "(" and closing == ")" and len(elements) == 1:
        return parts_of(inner)
    if opening in ("(", "["):
        if len(elements) < 2:
            return None
        return Parts("", "", _signs(text)) if len(_signs(text)) > 1 else Parts(opening, closing, elements)
    elements = _by_repeated_name([signed for element in elements for signed in _signs(element)])
    return Parts(opening, closing, elements) if opening or len(elements) > 1 else None


def brackets_of(text: str) -> tuple[str, str, str]:
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


def without_braces(text: str) -> str:
    """`text` without the braces of TeX where one pair encloses all of it."""
    return brackets_of(text)[1] if text[:1] == "{" and not brackets_of(text)[0] else text


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
    names = [named(element)[0] for element in elements]
    if not names or not all(names) or names[0] not in names[1:]:
        return elements
    size = names.index(names[0], 1)
    if size == 1 or names != names[:size] * (len(names) // size):
        return elements
    return [", ".join(elements[i : i + size]) for i in range(0, len(elements), size)]


RELATION = re.compile(r"[=<>]|\\(?:leq|geq|neq|in|notin|equiv|approx|sim|subset|mid)(?![a-zA-Z])")
EQUATION = re.compile(r"(?<![<>:])=")
LETTERS = re.compile(r"[a-zA-Z]")


def named(text: str) -> tuple[str, str]:
    r"""('x', '5') for `x = 5`, `x = 2 + 3 = 5` and `x \in 5`; ('', text) where nothing is named.

    A name holds no sum, number or relation: x, f(2), S_{10}, |AB|, \frac{NO}{BO}, (p, q, r). A sum of numbers before
    its value (2 + 3 = 5) counts as one, and an approximation after the exact value does not count.
    """
    if not RELATION.search(text) or any(RELATION.search(element) for element in _elements(text)[1:]):
        return "", text  # x = 3 or x = 7 names no single value
    sides = _split(text, ("=", "\\in", "\\approx"))
    if len(sides) < 2 or any(re.search(r"[<>]|\\[lgn]eq", side) for side in sides):
        return "", text
    exact = _split(_split(text, ("\\approx",))[0], ("=", "\\in")) or sides
    value = exact[-1] if len(exact) > 1 or not _is_name(exact[0]) else sides[-1]
    is_sum = not LETTERS.search(re.sub(r"\\[a-zA-Z]+", "", sides[0] + value))
    return (sides[0], value) if _is_name(sides[0]) or is_sum else ("", text)


_INEQUALITY = re.compile(r" ?([<>]|\\[lg]eq(?![a-zA-Z])) ?")
_VARIABLE = re.compile(r"[a-zA-Z]|\\[a-zA-Z]+")


def as_interval(text: str) -> tuple[str, str]:
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


def read_as_one(text: str, parts: Parts | None) -> tuple[str, Parts | None]:
    """A list beside a single value, where it can be read as one: `x < 1 or x > 3` as a union, `\\{5\\}` as 5."""
    if parts and parts.opening == "\\{" and len(parts.elements) == 1:
        return parts.elements[0], parts_of(parts.elements[0])
    if parts and not parts.opening:
        intervals = [as_interval(element)[1] for element in parts.elements]
        return (r" \cup ".join(intervals), None) if all(intervals) else (text, parts)
    return text, parts


def _is_name(text: str) -> bool:
    text = re.sub(r"_(?:\{[^{}]*\}|\w)|\^(?:\{-1\}|\*)|(?<=[a-zA-Z}])\([^()]*\)", "", text)
    return bool(LETTERS.search(text)) and not re.search(r"[\d+*/^-]|\\(?:cdot|sqrt|pm)", text)


def words_of(text: str) -> str:
    """The words of an answer that is nothing but words, in lower case; '' for any other."""
    text = plain(text).lower()
    is_words = re.fullmatch(r"[a-z][a-z ,.()-]*", text) and re.search("[a-z]{2}", text)  # p - q is none
    return " ".join(re.findall("[a-z]+", text)) if is_words else ""


def plain(text: str) -> str:
    r"""`text` without `\text` around words, and without the marks that end a sentence."""
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", text).rstrip(".,; ").lstrip()

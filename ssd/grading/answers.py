r"""When two answers are the same: the policies.

Nothing here evaluates an answer. What no string, number or structure decides goes to `same_expression`, which the
caller gives: in a worker process it is math-verify. docs/grading.md states each policy with its reason. Every pattern
takes time linear in the text.
"""

import collections
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from ssd.grading.quantities import equal_numbers, number_of, quantity_of
from ssd.grading.structure import (
    EQUATION,
    RELATION,
    Parts,
    as_interval,
    matrix_of,
    named,
    parts_of,
    plain,
    read_as_one,
    without_braces,
    words_of,
)
from ssd.grading.values import value_of
from ssd.grading.writing import all_boxes, clean, last_box, one_writing, without_spaces

SameExpression = Callable[[str, str, float], bool]


class _How(NamedTuple):
    """What two answers are compared by, all the way down."""

    same_expression: SameExpression
    tolerance: float


def equal(gold: str, answer: str, same_expression: SameExpression, tolerance: float = 0.0, notation: str = "") -> bool:
    r"""Whether `answer` is the same answer as `gold`, by the policies of docs/grading.md.

    Parameters
    ----------
    same_expression : callable
        Decides two expressions (LaTeX) that strings, numbers and structure leave open, given the tolerance for their
        values. What it raises goes through.
    tolerance : float
        Largest difference between a number of the gold and the answer's, where the problem allows one. Times, ratios
        and numbers in a base other than ten are compared without.
    notation : str
        One of ssd.records.NOTATIONS. 'interval' refuses an inequality beside a gold without one; 'any letters' also
        compares with the answer's variables, in the order in which they first stand, renamed to the gold's.

    >>> equal("(3/4, 10\\%)", "( \\frac{3}{4}, 0.1 )", lambda gold, answer, tolerance: False)
    True
    """
    gold, answer = all_boxes(gold) or gold, last_box(answer) or answer
    how = _How(same_expression, 0.0 if _WITHOUT_TOLERANCE.search(gold) else tolerance)
    gold, cleaned = clean(_labelled(gold)), clean(answer)
    if not gold or not cleaned:
        return False
    if notation == "interval" and _UNEQUAL.search(cleaned) and not _UNEQUAL.search(gold):
        return False

    def is_same(text: str) -> bool:
        return _equal(gold, text, how) or (notation == "any letters" and _equal(*_as_named(gold, text), how))

    if is_same(cleaned):
        return True
    if (
        not _CONDITION.search(gold)
        and (condition := _CONDITION.search(cleaned))
        and is_same(cleaned[: condition.start()])
    ):
        return True
    if not is_sentence(answer):
        return False
    return is_same(clean(_labelled(answer))) or same_expression(gold, one_writing(answer), how.tolerance)


def _as_named(gold: str, answer: str) -> tuple[str, str]:
    """Both, the variables of `answer` in the order in which they first stand named as those of `gold`.

    A name that only one of them gives its value is left out. An answer with the same variables or another number of
    them, or beside a word, a number in a base or a lone letter, where letters are no variables, stays as it is.
    """
    (gold_name, gold_value), (answer_name, answer_value) = named(gold), named(answer)
    if bool(gold_name) != bool(answer_name):
        gold, answer = gold_value, answer_value
    ours, theirs = (dict.fromkeys(m[1] for m in _VARIABLE.finditer(text) if m[1]) for text in (gold, answer))
    is_text = _WORD.search(words_of(gold)) or _WITHOUT_TOLERANCE.search(gold) or len(plain(gold).strip("()")) == 1
    is_renamed = len(ours) == len(theirs) and ours.keys() != theirs.keys() and not is_text
    new = dict(zip(theirs, ours)) if is_renamed else {}
    return gold, _VARIABLE.sub(lambda match: f" {new[match[1]]} " if match[1] in new else match[0], answer)


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
    text = _SET_OF_ALL.sub(r"\1", without_braces(text))
    if parts := parts_of(text):
        return [expression for element in parts.elements for expression in _expressions(element)]
    for simpler in (named(text)[1], as_interval(text)[1] or text, quantity_of(text).value):
        if simpler != text:
            return _expressions(simpler)
    return [] if number_of(text) or words_of(text) else [text]


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


_WITHOUT_TOLERANCE = re.compile(r"\d *(?::|_)")
_TEXT = re.compile(r"\\(?:text[a-z]*|math[a-z]+|mbox)\s?\{[^{}]*\}")
# Behind an answer: for all x, where k is an integer, k in Z.
_CONDITION = re.compile(
    r",? ?(?:\\text\{ ?,? ?)?(?<![a-zA-Z])(?:for (?:all|any|every|each|some)|where)(?![a-zA-Z])"
    r"|,? ?[a-zA-Z] ?\\in ?\\mathbb\{[A-Z]\}$"
)
_UNEQUAL = re.compile(r"[<>]|\\[lgn]eq(?![a-zA-Z])")
# Letters but e and i, and Greek ones but pi; none of a command, a word in \text, a number set or a degree's scale.
_VARIABLE = re.compile(
    r"\\(?:text|math[a-z]+|begin|end) ?(?:\{[^{}]*\}|[a-zA-Z])|\\circ ?[CF]|([a-df-hj-zA-Z]|\\(?:(?:var)?(?:"
    r"alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega)"
    r"|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega)(?![a-zA-Z]))|\\[a-zA-Z]+"
)
_WORD = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{3,}")
_THREE_WORDS = re.compile(r"(?<![\\a-zA-Z{'])[a-zA-Z][a-zA-Z']+(?: [a-zA-Z][a-zA-Z']+){2}")
_LABEL = re.compile(r"(?:(?i:answer)(?: ?is)?[ :=}]+|#### )(?:\$([^$]+)\$|(.*))")


def _equal(gold: str, answer: str, how: _How) -> bool:
    if without_spaces(gold) == without_spaces(answer):
        return True
    if "\\text" in gold + answer and without_spaces(plain(gold)) == without_spaces(plain(answer)):
        return True
    gold, answer = (_NAMED.get(words_of(text), text) for text in (without_braces(gold), without_braces(answer)))
    gold, answer = _SET_OF_ALL.sub(r"\1", gold), _SET_OF_ALL.sub(r"\1", answer)
    letter = _LETTER.fullmatch(plain(gold))
    if letter and (choice := _CHOICE.match(plain(answer))):
        return letter[1].upper() == (choice[1] or choice[2]).upper()
    answer = _CHOICE_BEFORE_VALUE.sub("", answer)
    gold_parts, answer_parts = parts_of(gold), parts_of(answer)
    if not gold_parts and _DECIMAL_COMMA.fullmatch(answer):
        answer, answer_parts = answer.replace(",", "."), None
    if not answer_parts and _SURE_DECIMAL_COMMA.fullmatch(gold):
        gold, gold_parts = gold.replace(",", "."), None
    if not gold_parts or not answer_parts or len(gold_parts.elements) != len(answer_parts.elements):
        gold, gold_parts = read_as_one(gold, gold_parts)
        answer, answer_parts = read_as_one(answer, answer_parts)
    is_list = answer_parts is not None and not answer_parts.opening and len(answer_parts.elements) > 1
    if is_list and not gold_parts and all(_equal(gold, element, how) for element in answer_parts.elements):
        return True  # 3/4 or 0.75
    if gold_parts and answer_parts:
        return _equal_parts(gold_parts, answer_parts, how)
    (gold_name, gold_value), (answer_name, answer_value) = named(gold), named(answer)
    if gold_name and answer_name:
        if without_spaces(gold_name).lower() == without_spaces(answer_name).lower():
            return _equal(gold_value, answer_value, how)
        return how.same_expression(gold, answer, how.tolerance)
    if gold_name and not RELATION.search(answer):
        return _equal(gold_value, answer, how)
    if answer_name and not RELATION.search(gold):
        return _equal(gold, answer_value, how)
    if bool(EQUATION.search(gold)) != bool(EQUATION.search(answer)):
        return False
    if (gold_matrix := matrix_of(gold)) and (answer_matrix := matrix_of(answer)):
        return _equal_matrices(gold_matrix, answer_matrix, how)
    (gold_variable, gold_interval), (answer_variable, answer_interval) = as_interval(gold), as_interval(answer)
    if (gold_interval or answer_interval) and (gold_variable or answer_variable) == (answer_variable or gold_variable):
        return _equal(gold_interval or gold, answer_interval or answer, how)
    return _equal_values(gold, answer, how)


_SET_OF_ALL = re.compile(
    r"^\\\{ ?[a-zA-Z](?: ?\\in ?\\mathbb\{R\})? ?(?:[|:]|\\mid(?![a-zA-Z])) ?((?:[^{}\\]|\\(?![{}])|\{[^{}]*\})*)\\\}$"
)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_SURE_DECIMAL_COMMA = re.compile(r"[+-]?0,\d{2,}")  # 1,2 may be a list
# A choice is a letter alone, in brackets, or before its text: (B), B., \text{(B) } 12.
_LETTER = re.compile(r"\(?([A-Ja-j])\)?[.:]?")
_CHOICE = re.compile(r"\(([A-Ja-j])\)|([A-Ja-j])(?:[).:]|$)")
_CHOICE_BEFORE_VALUE = re.compile(r"^(?:\([A-J]\)|\\text\{ ?\([A-J]\) ?\}) ?(?=[\d\\$-])")


def _equal_values(gold: str, answer: str, how: _How) -> bool:
    one, other = quantity_of(gold), quantity_of(answer)
    units = one.unit or "%" * one.percent, other.unit or "%" * other.percent
    if all(units) and units[0] != units[1]:
        return False
    if one.percent != other.percent:
        hundredth = [rf"\frac{{{side.value}}}{{100}}" if side.percent else side.value for side in (one, other)]
        how_of_hundredth = how._replace(tolerance=how.tolerance / (100 if one.percent else 1))
        return _equal(one.value, other.value, how) or _equal(*hundredth, how_of_hundredth)
    if (one.value, other.value) != (gold, answer):
        return _equal(one.value, other.value, how)
    numbers = number_of(gold), number_of(answer)
    if all(numbers):
        return equal_numbers(*numbers, how.tolerance)
    if all(re.fullmatch("[A-Z]{2,}", text) for text in (gold, answer)):
        return False  # points, or letters in a row: LQSX
    words = words_of(gold), words_of(answer)
    if all(words) and words[0] == words[1]:
        return True
    if any(words) and (any(numbers) or "\\text" in gold + answer or " " in (words[0] or words[1])):
        return False
    return (how.tolerance > 0 or not _differ(gold, answer)) and how.same_expression(gold, answer, how.tolerance)


def _equal_parts(gold: Parts, answer: Parts, how: _How) -> bool:
    is_ordered = bool({gold.opening, answer.opening} & {"(", "["})
    if len(set(gold.elements)) == len(gold.elements) != len(answer.elements) and not is_ordered:
        answer = answer._replace(elements=_once(answer.elements))
    if len(gold.elements) != len(answer.elements):
        return False
    if gold.opening and answer.opening and gold[:2] != answer[:2]:
        return False
    if is_ordered:
        return all(_equal(*pair, how) for pair in zip(gold.elements, answer.elements, strict=True))
    left = collections.Counter(map(without_spaces, gold.elements))
    rest = collections.Counter(map(without_spaces, answer.elements))
    if not how.tolerance:
        left, rest = left - rest, rest - left
    return _can_be_paired(list(left.elements()), list(rest.elements()), how)


def _can_be_paired(golds: list[str], answers: list[str], how: _How) -> bool:
    """Whether each gold can have an equal answer for itself: a matching, found by augmenting paths (Kuhn 1955)."""
    gold_of: dict[int, int] = {}

    def place(gold: int, tried: set[int]) -> bool:
        for answer in range(len(answers)):
            if answer not in tried and _equal(golds[gold], answers[answer], how):
                tried.add(answer)
                if answer not in gold_of or place(gold_of[answer], tried):
                    gold_of[answer] = gold
                    return True
        return False

    return all(place(gold, set()) for gold in range(len(golds)))


def _once(elements: list[str]) -> list[str]:
    """Each element once, as it is first written."""
    return list({without_spaces(element): element for element in reversed(elements)}.values())[::-1]


def _equal_matrices(gold: list[list[str]], answer: list[list[str]], how: _How) -> bool:
    if list(map(len, gold)) != list(map(len, answer)):
        return False
    return all(_equal(*pair, how) for rows in zip(gold, answer, strict=True) for pair in zip(*rows, strict=True))


def _differ(gold: str, answer: str) -> bool:
    """Whether two expressions have values so far apart, at one value of each letter, that algebra need not be asked.

    Only ever says that they differ: equal values at one point are no proof of equal expressions.
    """
    one, other = value_of(gold), value_of(answer)
    if one is None or other is None:
        beside = answer if other is None else gold
        return (one is None) != (other is None) and (
            "\\begin" in beside or "\\cup" in beside or parts_of(beside) is not None
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

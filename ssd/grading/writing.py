r"""The boxes of a text, and one writing for each answer.

Nothing is evaluated, and every pattern takes time linear in the text.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

_BOX = re.compile(r"\\(?:boxed|fbox)\s*[^\s{}$\\]|\\?(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BETWEEN_ADJACENT = re.compile(
    r"(?:[\s,;$]|\\[()\[\]]|\\q?quad(?![a-zA-Z])|\\text\s*\{\s*(?:and|or)\s*\}|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]))*"
)


MAX_NAME = 16  # characters of a name and its `=` before a box
_NAME = re.compile(r"(?<![a-zA-Z\\])((?:\\[a-z]+|[a-zA-Z]{1,2})(?:_\{?\w{1,2}\}?|\(\w\))?)\s*=\s*$")


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` with balanced braces, or None.

    Boxes with nothing but commas, 'and', 'or', space or math delimiters between them are one answer of several parts,
    joined by ', ', also where a name stands before each; a box that is only repeated counts once. Boxes with anything
    else between them are not joined.

    >>> last_box(r"so \boxed{114}? wait, \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    >>> last_box(r"$x = \boxed{3}$ and $y = \boxed{4}$")
    'x = 3, y = 4'
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    group = [boxes.pop()]
    while boxes and _are_adjacent(text, boxes[-1], group[-1]):
        group.append(boxes.pop())
    named = [_with_name(text, box) for box in reversed(group)]
    are_named = all("=" in box.content for box in named) and len({box.content for box in named}) > 1
    return _joined(named if are_named else reversed(group))


def _are_adjacent(text: str, box: "_Box", later: "_Box") -> bool:
    name = _NAME.search(text, max(box.end, later.start - MAX_NAME), later.start)
    if not name:
        return _BETWEEN_ADJACENT.fullmatch(text, box.end, later.start) is not None
    between = text[box.end : name.start()]
    return _BETWEEN_ADJACENT.fullmatch(between) is not None and re.search(r"[,;a]|or", between) is not None


def _with_name(text: str, box: "_Box") -> "_Box":
    name = None if "=" in box.content else _NAME.search(text, max(0, box.start - MAX_NAME), box.start)
    return box._replace(content=f"{name[1]} = {box.content}") if name else box


def all_boxes(text: str) -> str:
    """Contents of all boxes of `text`, joined as `last_box` does; '' where there is none."""
    return _joined(_boxes(text))


class _Box(NamedTuple):
    start: int
    end: int
    content: str


def _boxes(text: str) -> list[_Box]:
    """Every box with balanced braces that is in no other box."""
    if "boxed" not in text and "fbox" not in text:
        return []
    boxes, closing = [], _closing_braces(text)
    for match in _BOX.finditer(text):
        if boxes and match.start() < boxes[-1].end:
            continue
        if not match[0].endswith("{"):
            boxes.append(_Box(match.start(), match.end(), match[0][-1]))
        elif end := closing.get(match.end() - 1):
            boxes.append(_Box(match.start(), end, text[match.end() : end - 1].strip()))
    return boxes


def _joined(boxes: Iterable[_Box]) -> str:
    return ", ".join(dict.fromkeys(box.content for box in boxes))


def _closing_braces(text: str) -> dict[int, int]:
    r"""Index after the brace that closes each opening one, in one pass; `\{` and `\}` do not count."""
    opened, closing = [], {}
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.end()
    return closing


def normalise(answer: str) -> str:
    r"""Form in which equal strings are equal answers: `clean` without spaces, and without `x =` before the value.

    >>> normalise(r"$ \dfrac12 $."), normalise(r"x = \frac{1}{2}"), normalise("1,000")
    ('\\frac{1}{2}', '\\frac{1}{2}', '1000')
    """
    return re.sub(r"^[a-zA-Z]=(?!=)", "", without_spaces(clean(answer)))


_THIN_GROUPS = re.compile(r"(?<=\d)(?:\{,\}|,?\\!|\\,)\s*(?=\d{3}(?!\d))")  # 10{,}000, 10,\!000, 10\,000
_SPACING = re.compile(r"(?:(?<!\\)\\[()\[\]]|\\?\$|\\q?quad(?![a-zA-Z])|(?<!\\)\\[,;:! ]|~|\s)+")
# Applied in order, each in linear time.
_REPLACEMENTS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|[bB]ig{1,2}[lrm]?)(?![a-zA-Z])\.?|\\displaystyle(?![a-zA-Z])", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac ?(\d|(?<= )[a-z]) ?(?=[\w{])", r"\\frac{\1}"),
        (r"\\frac ?(\{[^{}]*\}) ?(\w)", r"\\frac\1{\2}"),
        (r"\\sqrt\s?(\d)", r"\\sqrt{\1}"),
        (r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|mathnormal)\s?\{([^{}]*)\}", r"\1"),
        (r"\\(?:mathrm|text(?:rm|bf|it|sf|normal|up)?|mbox|hbox|operatorname)\s?\{", r"\\text{"),
        (r"\\text\{ ?(and|or|[eid])? ?\}", r" \1 "),
        (r"(?<!\\)\{ ?([,:;=<>]) ?\}", r"\1"),
        (r"\\[lc]dots(?![a-zA-Z])", r"\\dots"),
        (r"^\*\*|\*\*$", ""),
        (r"\*\*", "^"),
        (r"\{([^{}]*)\\choose(?![a-zA-Z]) ?([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\{([^{}]*)\\over(?![a-zA-Z]) ?([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"(?<![\\a-zA-Z])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|ln|log|infty)(?![a-zA-Z])", r"\\\1 "),
        (r"(?<=[\d}]) ?(?:\\text\{ ?)?thousand(?![a-zA-Z])( ?\})?", r"\\cdot 10^3 "),
        (r"(?<=[\d}]) ?(?:\\text\{ ?)?million(?![a-zA-Z])( ?\})?", r"\\cdot 10^6 "),
        (r"(?<=[\d}]) ?(?:\\text\{ ?)?billion(?![a-zA-Z])( ?\})?", r"\\cdot 10^9 "),
        (r"(?<=[\d}]) ?(?:\\text\{ ?)?trillion(?![a-zA-Z])( ?\})?", r"\\cdot 10^{12} "),
        (r"(?<=[\d}]) ?(?:\\text\{ ?)?hundred(?![a-zA-Z])( ?\})?", r"\\cdot 10^2 "),
        (r"\\mathbb ?([A-Z])(?![a-zA-Z])", r"\\mathbb{\1}"),
        (r"\\(?:times|ast)(?![a-zA-Z])|\*", r"\\cdot "),
        (r"\\leq?(?:slant|q)?(?![a-zA-Z])|<=", r"\\leq "),
        (r"\\geq?(?:slant|q)?(?![a-zA-Z])|>=", r"\\geq "),
        (r"\\neq?(?![a-zA-Z])|!=", r"\\neq "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\[lr]?vert(?![a-zA-Z])", "|"),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
        (r"\\(?:infin|infinity)(?![a-zA-Z])", r"\\infty"),
        (r"\+ ?\\infty", r"\\infty"),
        (r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])", r"^\\circ "),
        (r"\\?%|(?<![a-zA-Z])(?:per ?cent|percentage|pct)(?![a-zA-Z])", "%"),
        (r"\\text\{ ?% ?\}", "%"),
        (r"([_^]) ?\{ ?([a-df-zA-Z\d]) ?\}", r"\1\2"),  # the parser reads e^{e} but not e^e
        (r"\^ ?e(?![a-zA-Z])", r"^{e}"),
    )
]
_BRACKET = re.compile(r"[(\[]|\\\{|^\{")
_GROUPED = re.compile(r"(?<![\d,.])([1-9]\d{0,2}(?:,\d{3})+)(?!\d|,\S)")
_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑﹣－", "-"),
        **dict.fromkeys("⋅·∙×✕", r"\cdot "),
        **{"÷": "/", "∕": "/", "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "±": r"\pm "},
        **{
            "≤": r"\leq ",
            "≦": r"\leq ",
            "≥": r"\geq ",
            "≧": r"\geq ",
            "≠": r"\neq ",
            "∪": r"\cup ",
            "∩": r"\cap ",
            "∈": r"\in ",
            "∅": r"\emptyset ",
        },
        **{"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "…": r"\dots "},
    }
)
_ROOT = re.compile(r"√ ?(?:\(([^()]*)\)|(\d+))")
_CONTROLS = dict.fromkeys([*range(9), *range(14, 32), 127])
_SCRIPTS = {
    "^": ("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n"),
    "_": ("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n"),
}


@functools.lru_cache(maxsize=2**14)
def clean(answer: str) -> str:
    r"""LaTeX of `answer` with one writing for each symbol; no delimiters, sizing, currency or grouping.

    >>> clean("$\\left( \\tfrac12,\\ −1\\,234 \\right)$."), clean("x² ≤ ½")
    ('( \\frac{1}{2}, -1234 )', 'x^2 \\leq \\frac{1}{2}')
    """
    answer = one_writing(_SPACING.sub(" ", _THIN_GROUPS.sub("", _ascii(answer))))
    answer = answer.lstrip("= ").rstrip(".,; \\")
    if ", " in answer or not _BRACKET.search(answer):  # and (1,234) is a pair
        answer = _GROUPED.sub(lambda match: match[1].replace(",", ""), answer)
    return answer


def one_writing(text: str) -> str:
    if "\\\\" in text and "\\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z])", r"\\", text)  # an escape too many; in a matrix it ends a row
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return re.sub(r" +", " ", text)


def _ascii(text: str) -> str:
    if text.isascii():
        return text.translate(_CONTROLS)
    for command, (scripts, plain) in _SCRIPTS.items():
        to_plain = str.maketrans(scripts, plain)
        text = re.sub(f"[{scripts}]+", lambda m, c=command, t=to_plain: f"{c}{{{m[0].translate(t)}}}", text)
    text = _ROOT.sub(r"\\sqrt{\1\2}", text)
    return "".join(map(_ascii_of, text.translate(_SYMBOLS)))


def _ascii_of(character: str) -> str:
    if character.isascii():
        return character
    kind = unicodedata.category(character)
    if kind in ("Cc", "Cf"):
        return ""  # marks of direction and joining, which are not seen
    if kind == "Sc":
        return ""
    if kind == "Zs":
        return r"\,"
    if kind == "Nd":
        return str(unicodedata.digit(character))
    plain = unicodedata.normalize("NFKC", character)
    top, slash, bottom = plain.partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}" if slash else plain


def without_spaces(text: str) -> str:
    return re.sub(r"(?<!\d) | (?!\d)", "", text)  # 1 2 is not 12

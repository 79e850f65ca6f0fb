"""The answer in a text: the last box, and the form in which two answers are compared as strings."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{|[^\s{}$\\])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BETWEEN_ADJACENT = re.compile(r"[\s,;$]*(?:\\(?:quad|qquad|text\{\s*(?:and|or)\s*\})|and|or)?[\s,;$]*")


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` with balanced braces, or None.

    Boxes with nothing but a comma, 'and' or math delimiters between them are one answer of several parts, joined by
    ', '. Boxes with words between them are not.

    >>> last_box(r"so \boxed{114}? wait, \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    >>> last_box(r"$\boxed{3}$ and $\boxed{4}$")
    '3, 4'
    """
    boxes, closing = [], _closing_braces(text)
    for match in _BOX.finditer(text):
        if boxes and match.start() < boxes[-1][1]:
            continue  # a box inside a box
        end = closing.get(match.end() - 1) if match[1] == "{" else match.end()
        if end is not None:
            content = text[match.end() : end - 1] if match[1] == "{" else match[1]
            boxes.append((match.start(), end, content.strip()))
    if not boxes:
        return None
    group = [boxes.pop()]
    while boxes and _BETWEEN_ADJACENT.fullmatch(text[boxes[-1][1] : group[0][0]]):
        group.insert(0, boxes.pop())
    return ", ".join(content for _, _, content in group)


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
    r"""Form in which equal strings are equal answers: no math delimiters, spacing or sizing commands, `x =` or dots.

    >>> normalise(r"$ \dfrac12 $."), normalise(r"x = \frac{1}{2}"), normalise("1,000")
    ('\\frac{1}{2}', '\\frac{1}{2}', '1000')
    """
    answer = answer.strip().rstrip(".").strip()
    answer = re.sub(r"^(?:\$\$?|\\\[|\\\()|(?:\$\$?|\\\]|\\\))$", "", answer)
    answer = re.sub(r"\\(?:left|right|displaystyle|[,;:! ])(?![a-zA-Z])", "", answer)
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer)
    answer = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"^[a-zA-Z]\s*=(?!=)", "", answer.strip())
    answer = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer)  # 1 2 is not 12
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", answer):  # and (1,234) is a pair
        answer = answer.replace(",", "")
    return answer

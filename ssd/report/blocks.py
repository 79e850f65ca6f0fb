"""A page as sections of blocks, written as one HTML page or as Markdown.

Neither lets the text of a model or of a problem set be anything but text.
"""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from matplotlib.figure import Figure

from ssd.markdown import escaped, visible

DPI = 130  # sharp enough for a phone
NARROW_INCHES = 5.2  # width of a figure that is read on a phone, too


class Text(NamedTuple):
    """A paragraph; `loud` where it is the one to read."""

    text: str
    loud: bool = False
    kind = "text"


class Bullets(NamedTuple):
    lines: Sequence[str]
    kind = "bullets"


class Link(NamedTuple):
    """A run, at its path in the MLflow UI."""

    text: str
    href: str


class Table(NamedTuple):
    header: Sequence[str]
    rows: Sequence[Sequence[str | Link]]
    kind = "table"


class Picture(NamedTuple):
    """A PNG; `name` is its file among the artifacts, `alt` says what is seen, with the numbers."""

    name: str
    png: bytes
    alt: str
    kind = "picture"

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()

    @property
    def is_wide(self) -> bool:
        """Whether its letters are too small on a phone, so that it has to be scrolled; by the width in the header."""
        return int.from_bytes(self.png[16:20]) > 1.2 * DPI * NARROW_INCHES


class Verbatim(NamedTuple):
    """Text of a model or a problem, or a command, shown letter by letter under `caption`."""

    caption: str
    text: str
    kind = "verbatim"


Block = Text | Bullets | Table | Picture | Verbatim


class Section(NamedTuple):
    title: str
    blocks: Sequence[Block]


def html(title: str, parts: Sequence[Section]) -> str:
    """One page that needs nothing else: style and figures inline, no script, no request."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["visible"] = visible
    template = environment.from_string(Path(__file__).with_name("page.html").read_text())
    return template.render(title=title, sections=parts)


def markdown(title: str, parts: Sequence[Section], level: int = 2) -> str:
    """The same blocks as Markdown; a figure is the artifact figures/NAME.png beside it."""
    lines = [f"# {escaped(title)}"] if title else []
    for part in parts:
        if part.title:
            lines.append(f"{'#' * level} {escaped(part.title)}")
        for block in part.blocks:
            lines.append(_as_markdown(block))
    return "\n\n".join(lines) + "\n"


def cut(text: str, max_chars: int, rest: str) -> str:
    """`text`, or its first paragraphs and where the rest is, within `max_chars`."""
    if len(text) <= max_chars:
        return text
    note = f"\n\nThe rest is in {rest}."
    return text[: text.rindex("\n\n", 0, max_chars - len(note))] + note


def _as_markdown(block: Block) -> str:
    match block:
        case Text(text, loud):
            return f"**{escaped(text)}**" if loud else escaped(text)
        case Bullets(lines):
            return "\n".join(f"- {escaped(line)}" for line in lines)
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *([_cell(cell) for cell in row] for row in rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Picture(name, _, alt):
            return f"![{escaped(alt)}](figures/{name}.png)"
        case Verbatim(caption, text):
            text = visible(text)
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{escaped(caption)}\n\n{fence}\n{text}\n{fence}"


def _cell(cell: str | Link) -> str:
    return f"[{escaped(cell.text)}]({cell.href})" if isinstance(cell, Link) else escaped(cell)


def png(figure: Figure) -> bytes:
    """`figure` as a PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, dpi=DPI)
    return stream.getvalue()

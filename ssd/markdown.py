"""Text of models, problems, files and users in Markdown: it stays text, whatever it looks like."""

import re
import unicodedata

KEPT = {"\n", "\t"}  # control characters that a text may have
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # categories that are not seen or move what is seen
# What Markdown would take for more than text; a lone bracket or an underscore within a word it does not.
MARKDOWN = re.compile(r"([\\`*|~$]|(?<!\w)_|_(?!\w)|<(?=[a-zA-Z/!?])|&(?=[#\w])|(?<=\])[(\[]|^[\[#>]|^[+-](?=\s))")


def escaped(text: object) -> str:
    """`text` on one line, each character that Markdown or HTML would take for more than text escaped.

    >>> print(escaped("<b>|[a](javascript:b)"))
    \\<b>\\|[a]\\(javascript:b)
    """
    return MARKDOWN.sub(r"\\\1", visible(str(text)).replace("\n", " "))


def visible(text: str) -> str:
    """`text` with each character that is not seen, or that moves what is seen, written as its code point.

    >>> visible("a\\u202eb\\x1b[0m")
    'a⟨U+202E⟩b⟨U+001B⟩[0m'
    """
    return "".join(
        f"⟨U+{ord(char):04X}⟩" if char not in KEPT and unicodedata.category(char) in UNSEEN else char for char in text
    )

"""A problem as what two writings of it have in common: words and numbers, and its answer as a key.

Texts are taken apart thousands at once, as arrays of bytes, and words are compared by hashes of 52 bits: among a
million distinct words the chance that any two share one is 1 in 10,000.
"""

import functools
import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from ssd.grading.writing import normalise
from ssd.records import Problem

Result = TypeVar("Result")
CHUNK_ROWS, WORD_BITS = 1 << 12, 52  # a row's place in its chunk and a word's hash are sorted as one 64-bit number
CHUNK_CHARS = 1 << 20
MAX_THREADS = 4  # half of the work is the interpreter's

_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL | re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,|\{,\}|\\!|,\\!)\s?(?=[0-9]{3}(?![0-9]))")
_LETTER = r"[^\W\d_]"
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_WORD = re.compile(rf"{_LETTER}+|{_NUMBER.pattern}")
_BARE_ANSWER = re.compile(r"[0-9a-z+*/^()-]+")
_UNIT_OF_ANSWER = re.compile(r"\^\{?\\circ\}?|\\?%|\$")
_SHORT_FRACTION, _FRACTION = re.compile(r"\\frac(\w)(\w)"), re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}")
_ASSIGNED_TO = re.compile(r"^[a-z](\([a-z]\))?=")
_BRACE_OR_BACKSLASH = re.compile(r"[{}\\]")
_ZEROS_BEHIND, _ZEROS_BEFORE = re.compile(r"(\.\d*?)0+(?!\d)"), re.compile(r"(?<![\d.])0+(?=\d)")
_WORD_OR_SIGN = re.compile(rf"{_WORD.pattern}|[^\s.,:;?]")
_SIGN_BEYOND_ASCII = re.compile(rf"[^\x00-\x7f](?<!{_LETTER})")
_FONTS = [
    "text", "textbf", "textit", "textrm", "mathrm", "mathbf", "mathit", "mbox", "operatorname", "boxed", "fbox",
    "rm", "bf", "it", "emph",
]  # fmt: skip
_SPACING = ["left", "right", "displaystyle", "textstyle", "quad", "qquad"]
_FONT = re.compile(rf"\\(?:{'|'.join(_FONTS)})(?!{_LETTER})")
_LAYOUT = re.compile(rf"\\(?:{'|'.join(_SPACING)})(?!{_LETTER})|\\[,;:! \[\]()]|[${{}}~]")
# Not 'one', which is as often a pronoun.
_NUMERALS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_SYNONYMS = {word: f" {number} " for number, word in enumerate(_NUMERALS, start=2)} | {"dfrac": "frac", "tfrac": "frac"}
_SYNONYM = re.compile(rf"(?<!{_LETTER})(?:{'|'.join(_SYNONYMS)})(?!{_LETTER})")


def normalise_text(text: str) -> str:
    """`text` in lower case without drawings, fonts, layout and thousands separators, its small numerals as digits.

    The words of a text are the runs of letters and the numbers in this; `_tokens` finds the same, faster.
    """
    text = _THOUSANDS.sub("", _DRAWING.sub(" ", unicodedata.normalize("NFKC", text).lower()))
    text = _LAYOUT.sub(" ", _FONT.sub(" ", text))
    return " ".join(_SYNONYM.sub(lambda match: _SYNONYMS[match[0]], text).split())


@functools.lru_cache(maxsize=2**17)
def answer_key(answer: str) -> str:
    r"""What several writings of one answer have in common, without regard to case, fonts, braces and units of angle.

    A comparison of strings: 0.5 and 1/2 have different keys, but two different answers hardly ever share one.

    >>> answer_key(r"$x = \dfrac{1}{2}.$") == answer_key(r"\mathbf{\frac12}") == answer_key("1/2")
    True
    """
    key = answer if answer.isascii() else unicodedata.normalize("NFKC", answer)
    key = key.lower()
    if not _BARE_ANSWER.fullmatch(key):  # most answers are, and the rest of this takes ten times as long
        key = _THOUSANDS.sub("", normalise(_FONT.sub("", key)))
        key = _ASSIGNED_TO.sub("", _SHORT_FRACTION.sub(r"\1/\2", _UNIT_OF_ANSWER.sub("", key)))
        key = _BRACE_OR_BACKSLASH.sub("", _FRACTION.sub(r"\1/\2", key))
        key = _ZEROS_BEHIND.sub(r"\1", key)
    return _ZEROS_BEFORE.sub("", key).rstrip(".") if "0" in key or "." in key else key


_ALL_BUT_1_TO_9 = bytes(sorted({*range(256)} - {*b"123456789\n"}))


def digits_of(answers: Sequence[str]) -> list[bytes]:
    """The digits 1 to 9 of each answer, in order: answers with the same key have the same ones."""
    lines = unicodedata.normalize("NFKC", "\n".join(answer.replace("\n", " ") for answer in answers))
    return lines.encode("ascii", "ignore").translate(None, _ALL_BUT_1_TO_9).split(b"\n")


@functools.lru_cache(maxsize=2**12)
def signs_of(text: str) -> tuple[str, ...]:
    return tuple(_WORD_OR_SIGN.findall(normalise_text(text)))


class Features(NamedTuple):
    """What is compared of some problems: hashes of the distinct words, row after row, and of what pairs may share."""

    words: np.ndarray
    num_words: np.ndarray
    answers: np.ndarray
    numbers: np.ndarray
    words_and_numbers: np.ndarray
    answers_and_numbers: np.ndarray

    def take(self, rows: np.ndarray) -> "Features":
        wanted = np.zeros(len(self.num_words), bool)
        wanted[rows] = True
        return Features(self.words[np.repeat(wanted, self.num_words)], *(each[rows] for each in self[1:]))

    def agree(self, i: int, j: int, other: "Features") -> tuple[bool, bool]:
        """Whether the answers, and whether the numbers, of problem i here and j there are the same."""
        return bool(self.answers[i] == other.answers[j]), bool(self.numbers[i] == other.numbers[j])


def features_of(problems: Sequence[Problem]) -> Features:
    return Features(*map(np.concatenate, zip(*by_chunk(features_of_chunk, problems, "words"))))


def by_chunk(work: Callable[[Sequence[Problem]], Result], problems: Sequence[Problem], title: str) -> Iterator[Result]:
    """`work` of each chunk of `problems`, in order, done in threads: numpy frees the interpreter while it computes."""
    ends, num_chars = [0], 0
    for i, problem in enumerate(problems):
        num_chars += len(problem.problem)
        if i == len(problems) - 1 or i + 1 - ends[-1] == CHUNK_ROWS or num_chars > CHUNK_CHARS:
            ends.append(i + 1)
            num_chars = 0
    chunks = [problems[start:stop] for start, stop in itertools.pairwise(ends)]
    bar = tqdm(total=len(problems), desc=title, unit="row", unit_scale=True, disable=len(problems) < 50_000)
    with bar, ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        for chunk, result in zip(chunks, threads.map(work, chunks)):
            yield result
            bar.update(len(chunk))


def features_of_chunk(problems: Sequence[Problem], digits: Collection[bytes] | None = None) -> Features:
    """Features of one chunk. An answer whose digits are not among `digits` gets no key: it need only differ."""
    texts = _ready([problem.problem for problem in problems])
    keys = [problem.answer for problem in problems]
    for i in [i for i, found in enumerate(digits_of(keys)) if digits is None or found in digits]:
        keys[i] = answer_key(keys[i])
    answers = np.fromiter(map(hash, keys), np.int64, len(keys)).view(np.uint64)
    tokens, is_number, row = _tokens(texts)
    numbers = _sums(mixed(tokens[is_number] + _ODD), row[is_number], len(texts))
    # Of 64 bits the row takes the upper 12, so that one sort puts the distinct words of each row side by side.
    words = np.sort(row << _WORD_BITS | tokens >> np.uint64(64 - WORD_BITS))
    words = words[np.diff(words, prepend=~_ZERO) != 0]
    row, words = (words >> _WORD_BITS).astype(np.intp), words & _WORD_MASK
    num_words = np.bincount(row, minlength=len(texts))
    alone = np.flatnonzero(num_words == 0)  # two texts without any word are alike: both have the word 0
    words, num_words = np.insert(words, np.searchsorted(row, alone), _ZERO), np.maximum(num_words, 1)
    row = np.repeat(np.arange(len(texts)), num_words)
    words_and_numbers = mixed(numbers) + _sums(mixed(words), row, len(texts))
    return Features(words, num_words, answers, numbers, words_and_numbers, mixed(numbers) ^ answers)


def _ready(texts: list[str]) -> list[str]:
    """`texts` rid of the rarities that `_tokens` does not know; most texts have none."""
    texts = [
        text if text.isascii() else _SIGN_BEYOND_ASCII.sub(" ", unicodedata.normalize("NFKC", text).lower())
        for text in texts
    ]
    texts = [_DRAWING.sub(" ", text) if "[" in text and "[asy]" in text.lower() else text for text in texts]
    for i in _perhaps_thousands(texts):
        texts[i] = _THOUSANDS.sub("", texts[i])
    return texts


def _perhaps_thousands(texts: Sequence[str]) -> list[int]:
    """Which texts may match _THOUSANDS: three digits stand within three bytes of a comma or exclamation mark."""
    raw, start = _joined(texts)
    raw = np.frombuffer(raw, np.uint8)
    digit = (raw >= ord("0")) & (raw <= ord("9"))
    mark = np.flatnonzero((raw[:-5] == ord(",")) | (raw[:-5] == ord("!")))
    is_near = np.logical_or.reduce([digit[mark + k] & digit[mark + k + 1] & digit[mark + k + 2] for k in (1, 2, 3)])
    return np.unique(np.searchsorted(start, mark[is_near], "right") - 1).tolist()


def _joined(texts: Sequence[str]) -> tuple[bytes, np.ndarray]:
    """All texts as one, line after line between two line ends and eight bytes beyond, and the place of each in it."""
    raw = b"".join([b"\n", "\n".join(texts).encode(), b"\n", bytes(8)])
    num_bytes = np.fromiter(map(len, texts), np.int64, len(texts))
    for i in [i for i, text in enumerate(texts) if not text.isascii()]:
        num_bytes[i] = len(texts[i].encode())
    return raw, np.cumsum(num_bytes + 1) - num_bytes


_LOWER = bytes(range(256)).lower()
_LETTERS, _DIGITS, _DOT = 1, 2, 3
_KIND = bytes(
    _LETTERS if 97 <= byte <= 122 or byte >= 128 else _DIGITS if 48 <= byte <= 57 else _DOT if byte == 46 else 0
    for byte in range(256)
)
_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
_ZERO, _ODD = np.uint64(0), np.uint64(0x9E3779B97F4A7C15)
_WORD_BITS, _WORD_MASK = np.uint64(WORD_BITS), np.uint64((1 << WORD_BITS) - 1)


def _tokens(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words and numbers of all texts in order: 64-bit hash of each, whether it is a number, and its text's place."""
    raw, first = _joined(texts)
    raw, start, length, is_number = _split(raw)
    tokens = _hashes(raw, start, length)
    ends = np.append(np.searchsorted(start, first), len(start))
    row = np.repeat(np.arange(len(texts), dtype=np.uint64), np.diff(ends))
    synonym = np.flatnonzero(np.isin(tokens, _SYNONYM_HASHES))
    place = np.searchsorted(_SYNONYM_HASHES, tokens[synonym])
    tokens[synonym], is_number[synonym] = _MEANT_HASHES[place], _MEANT_NUMBER[place]
    command = np.flatnonzero(np.frombuffer(raw, np.uint8)[start - 1] == ord("\\"))
    command = command[np.isin(tokens[command], _COMMAND_HASHES)]
    return np.delete(tokens, command), np.delete(is_number, command), np.delete(row, command)


def _split(raw: bytes) -> tuple[bytes, np.ndarray, np.ndarray, np.ndarray]:
    """`raw` in lower case, and of each word or number in it the start, the length and whether it is a number."""
    raw = raw.translate(_LOWER)
    kind = np.frombuffer(bytearray(raw.translate(_KIND)), np.uint8)
    dots = np.flatnonzero(kind == _DOT)
    kind[dots] = np.where((kind[dots - 1] == _DIGITS) & (kind[dots + 1] == _DIGITS), _DIGITS, 0)
    changes = np.flatnonzero(kind[1:] != kind[:-1]) + 1
    begins = np.flatnonzero(kind[changes])
    start = changes[begins]
    return raw, start, changes[begins + 1] - start, kind[start] == _DIGITS


def _hashes(raw: bytes, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """64-bit hash of each `raw[start : start + length]`, eight bytes at a time; without collision up to eight."""
    eight_bytes = np.ndarray((len(raw) - 7,), "<u8", raw, strides=(1,))
    hashes = mixed(eight_bytes[start] & _FIRST_BYTES[np.minimum(length, 8)])
    done, longer = 8, np.flatnonzero(length > 8)
    while len(longer):
        more = eight_bytes[start[longer] + done] & _FIRST_BYTES[np.minimum(length[longer] - done, 8)]
        hashes[longer] = mixed(hashes[longer] + more + _ODD)
        done += 8
        longer = longer[length[longer] > done]
    return hashes


def mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of 64 bits (Steele, Lea and Flood 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def _hashes_of(words: Iterable[str]) -> np.ndarray:
    return np.concatenate([_hashes(*_split(_joined([word])[0])[:3]) for word in words])


_COMMAND_HASHES = _hashes_of([*_FONTS, *_SPACING])
_BY_HASH = sorted(zip(_hashes_of(_SYNONYMS), _hashes_of(_SYNONYMS.values()), _SYNONYMS.values()))
_SYNONYM_HASHES, _MEANT_HASHES = (np.array([row[k] for row in _BY_HASH], np.uint64) for k in (0, 1))
_MEANT_NUMBER = np.array([meant.strip().isdigit() for _, _, meant in _BY_HASH])


def _sums(values: np.ndarray, row: np.ndarray, num_rows: int) -> np.ndarray:
    """Sum of the values of each row, modulo 2^64: a hash of a multiset, whatever its order."""
    sums = np.concatenate([[_ZERO], np.cumsum(values, dtype=np.uint64)])
    ends = np.searchsorted(row, np.arange(num_rows + 1))
    return np.diff(sums[ends])

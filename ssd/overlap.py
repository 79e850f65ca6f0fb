"""Which problems of two sets, or of one, are the same problem: one scoring, two operating points.

A pair is scored by the Jaccard similarity of its sets of words and numbers, J(A, B) = |A & B| / |A | B|. How much is
enough depends on what else agrees: the two answers, and the two multisets of numbers. Where neither does, no score is
enough: such pairs are mostly one template with other numbers. So every pair that can matter shares a key, its answer
or its numbers, and a join on those two keys finds it: the search is exact. Only where one key is shared by more pairs
than can be compared does MinHash propose, and J decides there as well.
"""

import functools
import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from ssd.answers import normalise
from ssd.records import Problem

NEVER = float("inf")
MAX_BLOCK_PAIRS = 100_000_000
DENSE_PAIRS = 2_000_000  # compared at once: 16 MB an array

_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_FONT = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|operatorname|f?boxed|rm|bf|it|emph)(?![a-z])")
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|textstyle|q?quad)(?![a-z])|\\[,;:! \[\]()]|[${}~]")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\!|,\\!)\s?(?=\d{3}(?!\d))")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_WORD = re.compile(rf"[^\W\d_]+|{_NUMBER.pattern}")
_WORD_OR_SIGN = re.compile(rf"{_WORD.pattern}|[^\s.,:;?]")
# Not 'one', which is as often a pronoun.
_NUMERALS = {
    word: str(number)
    for number, word in enumerate(
        ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"], start=2
    )
}
_NUMERAL = re.compile(rf"(?<![a-z\\])(?:{'|'.join(_NUMERALS)})(?![a-z])")


class OperatingPoint(NamedTuple):
    """The least Jaccard similarity of two duplicates that share their answers and numbers, or only one of them."""

    answers_and_numbers: float
    answers: float
    numbers: float


# Train against evaluation: a miss costs validity, a false alarm one row of many.
RECALL_FIRST = OperatingPoint(answers_and_numbers=0.23, answers=0.36, numbers=0.5)
# Within a set: a false alarm costs a good problem, and near misses with the same numbers are common.
PRECISION_FIRST = OperatingPoint(answers_and_numbers=0.5, answers=0.8, numbers=NEVER)


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two problems that may be the same; `removed` says whether `left` is taken out because of `right`."""

    left_id: str
    right_id: str
    left_problem: str
    right_problem: str
    left_answer: str
    right_answer: str
    score: float
    rule: str
    answers_agree: bool
    removed: bool


def overlaps(
    left: Sequence[Problem], right: Sequence[Problem], point: OperatingPoint = RECALL_FIRST, *, suspected: float = 1.0
) -> list[Overlap]:
    """Pairs of `left` x `right` that are the same problem, in the order of `left`, then of `right`.

    Parameters
    ----------
    left, right : sequence of Problem
        `left` is what may lose rows.
    point : OperatingPoint
        How similar is similar enough.
    suspected : float
        Below 1, pairs that reach only this share of their threshold are listed too, with `removed` False.
    """
    return _compare(left, right, point, suspected, within=False)


def duplicates(problems: Sequence[Problem], point: OperatingPoint = PRECISION_FIRST) -> list[Overlap]:
    """Pairs within one sequence that are the same problem; `left` is the later of the two."""
    return _compare(problems, problems, point, suspected=1.0, within=True)


def clusters(problems: Sequence[Problem], found: Sequence[Overlap] | None = None) -> list[int]:
    """Cluster of each problem: two problems share a number where a chain of duplicates connects them.

    `found` are the pairs that connect; by default `duplicates(problems)`.
    """
    position = {problem.problem_id: i for i, problem in enumerate(problems)}
    found = duplicates(problems) if found is None else found
    ends = np.array([(position[pair.left_id], position[pair.right_id]) for pair in found], dtype=int).reshape(-1, 2)
    graph = sparse.coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(problems), len(problems)))
    return csgraph.connected_components(graph, directed=False)[1].tolist()


def normalise_text(text: str) -> str:
    """`text` in lower case without drawings, fonts, layout and thousands separators, its small numerals as digits."""
    text = _FONT.sub(" ", _DRAWING.sub(" ", unicodedata.normalize("NFKC", text).lower()))
    text = _LAYOUT.sub(" ", _THOUSANDS.sub("", re.sub(r"\\[dt]frac", r"\\frac", text)))
    return " ".join(_NUMERAL.sub(lambda match: _NUMERALS[match[0]], text).split())


@functools.lru_cache(maxsize=2**17)
def answer_key(answer: str) -> str:
    r"""What several writings of one answer have in common, without regard to case, fonts, braces and units of angle.

    A comparison of strings: 0.5 and 1/2 have different keys, but two different answers hardly ever share one.

    >>> answer_key(r"$x = \dfrac{1}{2}.$") == answer_key(r"\mathbf{\frac12}") == answer_key("1/2")
    True
    """
    key = normalise(_FONT.sub("", unicodedata.normalize("NFKC", answer).lower()))
    key = re.sub(r"\^\{?\\circ\}?|\\?%|\$", "", _THOUSANDS.sub("", key))
    key = re.sub(r"^[a-z](\([a-z]\))?=", "", re.sub(r"\\frac(\w)(\w)", r"\1/\2", key))
    key = re.sub(r"[{}\\]", "", re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", key))
    return re.sub(r"(?<![\d.])0+(?=\d)", "", re.sub(r"(\.\d*?)0+(?!\d)", r"\1", key)).rstrip(".")


class _Side(NamedTuple):
    """Features of one set: its words as a 0/1 matrix, and what its problems are joined by, hashed to integers."""

    words: sparse.csr_matrix
    num_words: np.ndarray
    text: np.ndarray
    numbers: np.ndarray
    answer: np.ndarray


def _compare(
    left: Sequence[Problem], right: Sequence[Problem], point: OperatingPoint, suspected: float, *, within: bool
) -> list[Overlap]:
    vocabulary: dict[str, int] = {}
    right_side = _side(right, vocabulary)
    left_side = right_side if within else _side(left, vocabulary)
    for side in (left_side, right_side):
        side.words.resize(len(side.text), max(1, len(vocabulary)))
    least = {
        "answer": suspected * min(point.answers_and_numbers, point.answers),
        "numbers": suspected * point.numbers,
        "text": 0.0,
    }
    scores: dict[tuple[int, int], float] = {}
    for key, at_least in least.items():
        for rows, columns in _blocks(getattr(left_side, key), getattr(right_side, key)) if at_least <= 1 else ():
            if within and len(rows) == 1:
                continue
            for i, j, score in _similar(left_side, right_side, rows, columns, at_least):
                scores.update(zip(zip(i.tolist(), j.tolist()), score.tolist()))
    found = []
    for (i, j), score in sorted(scores.items()):
        same_text, same_numbers, same_answer = (
            bool(getattr(left_side, key)[i] == getattr(right_side, key)[j]) for key in ("text", "numbers", "answer")
        )
        rule, threshold = _rule(point, same_text, same_numbers, same_answer)
        if score >= suspected * threshold and (not within or i > j):
            a, b = left[i], right[j]
            found.append(
                Overlap(
                    a.problem_id, b.problem_id, a.problem, b.problem, a.answer, b.answer,
                    score, rule, same_answer, score >= threshold,
                )
            )  # fmt: skip
    return found


def _rule(point: OperatingPoint, same_text: bool, same_numbers: bool, same_answer: bool) -> tuple[str, float]:
    if same_text:
        return "same text", 0.0
    if same_answer:
        return ("answers and numbers", point.answers_and_numbers) if same_numbers else ("answers", point.answers)
    return ("numbers", point.numbers) if same_numbers else ("neither", NEVER)


def _side(problems: Sequence[Problem], vocabulary: dict[str, int]) -> _Side:
    """Features of `problems`; words new to `vocabulary` are added to it."""
    columns, ends, keys = array("i"), [0], []
    for problem in problems:
        text = normalise_text(problem.problem)
        columns.extend([vocabulary.setdefault(word, len(vocabulary)) for word in dict.fromkeys(_WORD.findall(text))])
        ends.append(len(columns))
        parts = tuple(_WORD_OR_SIGN.findall(text)), tuple(sorted(_NUMBER.findall(text))), answer_key(problem.answer)
        keys.append([hash(part) for part in parts])
    ones, shape = np.ones(len(columns), np.float32), (len(problems), max(1, len(vocabulary)))
    words = sparse.csr_matrix((ones, np.asarray(columns, np.int32), np.array(ends)), shape=shape)
    return _Side(words, np.diff(ends), *np.array(keys, dtype=np.int64).reshape(-1, 3).T)


def _blocks(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions in `left` and in `right` of each value that both hold."""
    left_order, right_order = np.argsort(left, kind="stable"), np.argsort(right, kind="stable")
    shared = np.intersect1d(left, right)
    left_ends = np.searchsorted(left[left_order], shared), np.searchsorted(left[left_order], shared, "right")
    right_ends = np.searchsorted(right[right_order], shared), np.searchsorted(right[right_order], shared, "right")
    for start, stop, right_start, right_stop in zip(*left_ends, *right_ends):
        yield left_order[start:stop], right_order[right_start:right_stop]


def _similar(
    left: _Side, right: _Side, rows: np.ndarray, columns: np.ndarray, at_least: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of `rows` x `columns` with J >= `at_least`: positions on the left, on the right, and J."""
    if len(rows) * len(columns) > MAX_BLOCK_PAIRS:
        i, j = _proposed(left, right, rows, columns, at_least)
        num_shared = np.asarray(left.words[i].multiply(right.words[j]).sum(axis=1)).ravel()
        score = _jaccard(num_shared, left.num_words[i], right.num_words[j])
        yield tuple(each[score >= at_least] for each in (i, j, score))
        return
    transposed = right.words[columns].T.tocsr()
    step = max(1, DENSE_PAIRS // len(columns))
    for part in (rows[start : start + step] for start in range(0, len(rows), step)):
        num_shared = (left.words[part] @ transposed).toarray()
        score = _jaccard(num_shared, left.num_words[part, None], right.num_words[columns])
        i, j = np.nonzero(score >= at_least)
        yield part[i], columns[j], score[i, j]


def _jaccard(num_shared: np.ndarray, num_left: np.ndarray, num_right: np.ndarray) -> np.ndarray:
    """J from the sizes; two texts without any word are alike."""
    num_either = num_left + num_right - num_shared.astype(np.float64)
    return np.where(num_either == 0, 1.0, num_shared / np.maximum(num_either, 1))


def _proposed(
    left: _Side, right: _Side, rows: np.ndarray, columns: np.ndarray, at_least: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that MinHash holds for similar. It misses pairs near its threshold, so it is asked for more than needed."""
    from datasketch import MinHash, MinHashLSH

    def sketches(side: _Side, positions: np.ndarray) -> list[MinHash]:
        words = side.words
        return MinHash.bulk([words.indices[words.indptr[k] : words.indptr[k + 1]].reshape(-1, 1) for k in positions])

    lsh = MinHashLSH(threshold=max(0.1, 0.8 * at_least))
    for position, sketch in zip(columns.tolist(), sketches(right, columns)):
        lsh.insert(position, sketch)
    pairs = [(i, j) for i, sketch in zip(rows.tolist(), sketches(left, rows)) for j in sorted(lsh.query(sketch))]
    return tuple(np.array(pairs, dtype=int).reshape(-1, 2).T)

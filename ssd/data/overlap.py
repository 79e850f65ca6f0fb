"""Which problems of two sets, or of one, are the same problem: one scoring, two operating points.

A pair is scored by the Jaccard similarity of its sets of words and numbers, J(A, B) = |A & B| / |A | B|. How much is
enough depends on what else agrees: the two answers, and the two multisets of numbers. Where neither does, no score is
enough: such pairs are mostly one template with other numbers. So every pair that can matter shares a key, its answer
or its numbers, and a join on those keys finds it: the search is exact.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from ssd.data.words import Features, by_chunk, digits_of, features_of, features_of_chunk, mixed, signs_of
from ssd.records import Problem

NEVER = float("inf")
PAIRS_AT_ONCE = 1 << 18


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
        `left` is what may lose rows. It is read in chunks of a few thousand: time is linear in its rows.
    point : OperatingPoint
        How similar is similar enough.
    suspected : float
        Below 1, pairs that reach only this share of their threshold are listed too, with `removed` False.
    """
    if not left or not right:
        return []
    there = features_of(right)
    joins = [(_Index(there, key), least) for key, least in _joins(point, suspected)]
    digits = {*digits_of([problem.answer for problem in right])}

    def compare(chunk: Sequence[Problem]) -> list[Overlap]:
        here, scores = features_of_chunk(chunk, digits), {}
        for index, least in joins:
            for i, j, num_shared in index.pairs(here):
                scores |= _near(i, j, _jaccard(num_shared, here.num_words[i], there.num_words[j]), least)
        judged = (
            _judged(chunk[i], right[j], scores[i, j], here.agree(i, j, there), point, suspected)
            for i, j in sorted(scores)
        )
        return [pair for pair in judged if pair]

    return [pair for pairs in by_chunk(compare, left, "overlap") for pair in pairs]


def duplicates(problems: Sequence[Problem], point: OperatingPoint = PRECISION_FIRST) -> list[Overlap]:
    """Pairs within one sequence that are the same problem; `left` is the later of the two.

    Two sets of words with J(A, B) >= t have one in common among the |A| - ceil(t |A|) + 1 rarest of A and as many of B
    (Chaudhuri et al. 2006, prefix filter). Only pairs that do are counted, so that common words cost nothing, and only
    those compared that have enough in common there: one of the two has all its other words to offer, and no more.
    """
    if not problems:
        return []
    features = features_of(problems)
    words, num_words = _by_rarity(features), features.num_words
    scores: dict[tuple[int, int], float] = {}
    for key, least in _joins(point, 1.0):
        num_rare = num_words - np.ceil(least * num_words - 1e-9).astype(int) + 1
        last_rare = words.indices[words.indptr[:-1] + num_rare - 1]
        rare = _rare_terms(words, num_rare, getattr(features, key))
        for i, j, num_shared in _products(rare, rare.T.tocsr()):
            later = i > j
            i, j, num_shared = i[later], j[later], num_shared[later]
            first = np.where(last_rare[i] <= last_rare[j], i, j)  # its rare words are in the other's, or in none of it
            most = num_shared + num_words[first] - num_rare[first]
            near = (
                _jaccard(np.minimum(most, np.minimum(num_words[i], num_words[j])), num_words[i], num_words[j]) >= least
            )
            i, j = i[near], j[near]
            num_shared = np.asarray(words[i].multiply(words[j]).sum(axis=1)).ravel()
            scores |= _near(i, j, _jaccard(num_shared, num_words[i], num_words[j]), least)
    judged = (
        _judged(problems[i], problems[j], scores[i, j], features.agree(i, j, features), point, 1.0)
        for i, j in sorted(scores)
    )
    return [pair for pair in judged if pair]


def clusters(problems: Sequence[Problem], found: Sequence[Overlap] | None = None) -> list[int]:
    """Cluster of each problem: two problems share a number where a chain of duplicates connects them.

    `found` are the pairs that connect; by default `duplicates(problems)`.
    """
    position = {problem.problem_id: i for i, problem in enumerate(problems)}
    found = duplicates(problems) if found is None else found
    ends = np.array([(position[pair.left_id], position[pair.right_id]) for pair in found], dtype=int).reshape(-1, 2)
    graph = sparse.coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(problems), len(problems)))
    return csgraph.connected_components(graph, directed=False)[1].tolist()


def _joins(point: OperatingPoint, suspected: float) -> list[tuple[str, float]]:
    """What pairs may share, as fields of Features, and the least score that then matters."""
    return [
        *((key, suspected * least) for key, least in point._asdict().items() if suspected * least <= 1),
        ("words_and_numbers", 1.0),
    ]


def _judged(
    left: Problem, right: Problem, score: float, agree: tuple[bool, bool], point: OperatingPoint, suspected: float
) -> Overlap | None:
    """The pair as an Overlap, None where its score is below what its rule asks for."""
    same_answer, same_numbers = agree
    if same_numbers and score == 1 and signs_of(left.problem) == signs_of(right.problem):
        rule, least = "same text", 0.0
    elif same_answer:
        rule = "answers and numbers" if same_numbers else "answers"
        least = point.answers_and_numbers if same_numbers else point.answers
    else:
        rule, least = "numbers", point.numbers if same_numbers else NEVER
    if score < suspected * least:
        return None
    return Overlap(
        left.problem_id, right.problem_id, left.problem, right.problem, left.answer, right.answer,
        score, rule, same_answer, score >= least,
    )  # fmt: skip


class _Index:
    """A word together with the key of its problem is a term: the terms of a set, and the problems that hold each."""

    def __init__(self, features: Features, key: str):
        self.key, self.keys = key, np.unique(getattr(features, key))
        self.terms, term = np.unique(_terms(features, key), return_inverse=True)
        row = np.repeat(np.arange(len(features.num_words)), features.num_words)
        shape = (len(self.terms), len(features.num_words))
        self.problems = sparse.csr_matrix((np.ones(len(row), np.float32), (term, row)), shape)

    def pairs(self, features: Features) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Pairs that share the key and a word: place of the one in `features`, of the other, number of shared words."""
        rows = np.flatnonzero(np.isin(getattr(features, self.key), self.keys))
        features = features.take(rows)
        terms = _terms(features, self.key)
        place = np.minimum(np.searchsorted(self.terms, terms), len(self.terms) - 1)
        known = self.terms[place] == terms
        ends = np.append(0, np.cumsum(known))[np.append(0, np.cumsum(features.num_words))]
        words = sparse.csr_matrix((np.ones(ends[-1], np.float32), place[known], ends), (len(rows), len(self.terms)))
        for i, j, num_shared in _products(words, self.problems):
            yield rows[i], j, num_shared


def _terms(features: Features, key: str) -> np.ndarray:
    return mixed(np.repeat(getattr(features, key), features.num_words) + features.words)


def _by_rarity(features: Features) -> sparse.csr_matrix:
    """The problems by their words, as a 0/1 matrix in which the words of a row run from the rarest to the commonest."""
    _, word, frequency = np.unique(features.words, return_inverse=True, return_counts=True)
    rank = np.empty(len(frequency), np.int64)
    rank[np.argsort(frequency, kind="stable")] = np.arange(len(frequency))
    row = np.repeat(np.arange(len(features.num_words)), features.num_words)
    sorted_words = np.sort(row * len(rank) + rank[word]) - row * len(rank)
    ends = np.concatenate([[0], np.cumsum(features.num_words)])
    shape = (len(features.num_words), len(rank))
    return sparse.csr_matrix((np.ones(len(row), np.float32), sorted_words, ends), shape)


def _rare_terms(words: sparse.csr_matrix, num_rare: np.ndarray, key: np.ndarray) -> sparse.csr_matrix:
    """The problems by their rarest words, each together with the problem's key; terms of one problem are left out."""
    num_words = np.diff(words.indptr)
    row = np.repeat(np.arange(len(num_words)), num_words)
    rare = np.flatnonzero(np.arange(len(row)) - np.repeat(words.indptr[:-1], num_words) < num_rare[row])
    terms = mixed(key[row[rare]] + words.indices[rare].astype(np.uint64))
    _, column, frequency = np.unique(terms, return_inverse=True, return_counts=True)
    shared = frequency[column] > 1
    row, column = row[rare][shared], column[shared]
    return sparse.csr_matrix((np.ones(len(row), np.float32), (row, column)), (len(num_words), len(frequency)))


def _products(left: sparse.csr_matrix, right: sparse.csr_matrix) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The entries of `left @ right` that are not 0, as row, column and value, some rows of `left` at a time."""
    num_products = np.concatenate([[0], np.cumsum(left @ np.diff(right.indptr).astype(np.float64))])
    start = 0
    while start < left.shape[0]:
        stop = max(start + 1, int(np.searchsorted(num_products, num_products[start] + PAIRS_AT_ONCE, "right")) - 1)
        if num_products[stop] > num_products[start]:
            product = (left[start:stop] @ right).tocoo()
            yield product.row.astype(np.intp) + start, product.col.astype(np.intp), product.data
        start = stop


def _jaccard(num_shared: np.ndarray, num_left: np.ndarray, num_right: np.ndarray) -> np.ndarray:
    return num_shared / (num_left + num_right - num_shared.astype(np.float64))


def _near(i: np.ndarray, j: np.ndarray, score: np.ndarray, least: float) -> dict[tuple[int, int], float]:
    """Score of each pair that reaches `least`."""
    near = score >= least
    return dict(zip(zip(i[near].tolist(), j[near].tolist()), score[near].tolist()))

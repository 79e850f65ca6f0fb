"""Samples that were drawn: the manifest of what made them, and their rows, which stay on disk and are read in parts."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ssd import records
from ssd.decoding import Decoding
from ssd.records import Sample

MANIFEST = "manifest.json"


class Drawn(NamedTuple):
    """What one process drew: when each of its samples ended, in seconds since it began, and of how many tokens."""

    finished_s: list[float]
    num_tokens: list[int]
    num_gpus: float

    @property
    def tokens_per_second(self) -> float:
        return sum(self.num_tokens) / self.finished_s[-1]

    @property
    def gpu_hours(self) -> float:
        """NaN where the engine does not know how many GPUs it kept busy."""
        return self.num_gpus * self.finished_s[-1] / 3600

    @property
    def tail_share(self) -> float:
        """Share of the time in which a tenth of the samples or less was left, and a GPU may have had too few."""
        return 1 - self.finished_s[math.ceil(0.9 * len(self.finished_s)) - 1] / self.finished_s[-1]


class Samples:
    """Samples in the Parquet files of a folder, all or only those of the given keys.

    A name that ends in S is an array with a value for each sample, in order of problem id and sample index. `problem_S`
    numbers `problem_ids`; `closes_S` is whether the text ends its thinking. Texts and tokens are read again for each
    pass over them, in the order of the files, so that memory does not grow with them.

    Raises
    ------
    ValueError
        If a file is not what `records.read` takes, or a sample stands twice; the message names it.
    """

    def __init__(self, folder: Path, only: Collection[tuple[str, int]] | None = None):
        self.folder, self.files = folder, sorted(folder.glob("*.parquet"))  # those alone, where others are drawn since
        brief = pa.concat_tables(
            [
                _brief(records.SCHEMAS[Sample].empty_table()),
                *(_brief(part) for file in self.files for part in records.parts(file, Sample)),
            ]
        )
        encoded = pc.dictionary_encode(brief["problem_id"].combine_chunks())
        names = encoded.dictionary.to_pylist()
        self.problem_ids = sorted(names)
        number_of = {name: number for number, name in enumerate(self.problem_ids)}
        problem_R = np.array([number_of[name] for name in names], dtype=np.int64)[encoded.indices.to_numpy()]
        index_R = brief["sample_index"].to_numpy()
        rows_S = np.lexsort((index_R, problem_R))
        if only is not None:
            keys = zip((self.problem_ids[p] for p in problem_R[rows_S].tolist()), index_R[rows_S].tolist())
            rows_S = rows_S[np.fromiter((key in only for key in keys), bool, len(rows_S))]
        self.place_R = np.full(len(brief), -1)  # of each row of the files among the samples
        self.place_R[rows_S] = np.arange(len(rows_S))
        self.problem_S, self.index_S = problem_R[rows_S], index_R[rows_S]
        columns = ("num_tokens", "is_cut_off", "closes")
        self.num_tokens_S, self.is_cut_off_S, self.closes_S = (brief[name].to_numpy()[rows_S] for name in columns)
        self._refuse_twice()

    def _refuse_twice(self) -> None:
        same = (np.diff(self.problem_S) == 0) & (np.diff(self.index_S) == 0)
        if same.any():
            keys = Counter((self.problem_S[s], self.index_S[s]) for s in np.flatnonzero(same))
            (problem, index), count = keys.most_common(1)[0]
            raise ValueError(
                f"{self.folder}: {self.problem_ids[problem]} {index} stands {count + 1} times; each row must stand once"
            )

    def __len__(self) -> int:
        return len(self.problem_S)

    def __iter__(self) -> Iterator[Sample]:
        """The samples in the order of the files."""
        for table in self.tables():
            yield from (Sample(**row) for row in table.to_pylist())

    def ids(self) -> Iterator[tuple[str, int]]:
        """Problem id and sample index of each sample, in order."""
        return zip((self.problem_ids[p] for p in self.problem_S.tolist()), self.index_S.tolist())

    def tables(self) -> Iterator[pa.Table]:
        """All columns, some samples at a time, in the order of the files."""
        return (table for _, table in self._parts())

    def in_order(self, change: Callable[[pa.Table], Sequence[Any]]) -> list[Any]:
        """What `change` makes of each row of a table of some samples, in order of the samples."""
        changed_S = [None] * len(self)
        for place_R, table in self._parts():
            for place, value in zip(place_R.tolist(), change(table), strict=True):
                changed_S[place] = value
        return changed_S

    def digest(self) -> str:
        """SHA-256 of the SHA-256 of each sample, in order, so that the order of the files makes no difference."""
        content = hashlib.sha256(str(records.SCHEMAS[Sample].names).encode())
        for of_sample in self.in_order(_digests):
            content.update(of_sample)
        return content.hexdigest()[:32]

    def _parts(self) -> Iterator[tuple[NDArray, pa.Table]]:
        """Some rows at a time with their places among the samples, without those that are none of them."""
        start = 0
        for file in self.files:
            for table in records.parts(file, Sample):
                place_R = self.place_R[start : start + len(table)]
                start += len(table)
                if (place_R < 0).any():
                    table, place_R = table.filter(pa.array(place_R >= 0)), place_R[place_R >= 0]
                yield place_R, table


class Generated(NamedTuple):
    """Samples and the manifest of what made them.

    `manifest` holds `model` (digest), `prompt`, `thinks` (the prompt opens the thinking, so that an answer counts only
    after it), `engine` (its kind), `seed`, `n`, `decoding` and `code`. `drawn` is this process's own part, None where
    it drew nothing.
    """

    rows: Samples
    manifest: dict
    drawn: Drawn | None = None

    @property
    def samples(self) -> list[Sample]:
        """All of them in memory, for where they are few."""
        return sorted(self.rows, key=sample_key)

    @property
    def decoding(self) -> Decoding:
        return Decoding(**self.manifest["decoding"])


def load_samples(folder: Path, only: Collection[tuple[str, int]] | None = None) -> Generated:
    """What an earlier run has drawn into `folder`, or of that the samples of the given keys alone."""
    file = folder / MANIFEST
    if not file.exists():
        raise ValueError(f"{folder} has no {MANIFEST}; give the samples/ of a run of sample, baseline or evaluate")
    manifest = read_manifest(file)
    try:
        missing = {"model", "prompt", "thinks", "engine", "seed", "n"} - manifest.keys()
        if missing:
            raise ValueError(f"it does not say {min(missing)}")
        Decoding(**manifest.get("decoding", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not what a run wrote ({error}); copy the folder again") from error
    return Generated(Samples(folder, only), manifest)


def read_manifest(file: Path) -> dict:
    """Content of the manifest `file`; ValueError where it is no JSON object."""
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} holds no JSON object ({error}); copy the folder again, or remove it to draw its samples anew"
        ) from error


def stored(folder: Path) -> list[Sample]:
    """Samples in `folder`, in order of problem id and sample index, so that equal content is equal order."""
    return sorted(Samples(folder), key=sample_key)


def sample_key(row: Sample) -> tuple[str, int]:
    """Problem id and sample index, of a sample or of the request that it answers."""
    return row.problem_id, row.sample_index


def _brief(table: pa.Table) -> pa.Table:
    """What is short of each sample."""
    return pa.table(
        {
            "problem_id": table["problem_id"],
            "sample_index": table["sample_index"],
            "num_tokens": pc.list_value_length(table["token_ids"]),
            "is_cut_off": pc.equal(table["finish_reason"], "length"),
            "closes": pc.match_substring(table["text"], "</think>"),
        }
    )


def _digests(table: pa.Table) -> list[bytes]:
    """SHA-256 of the values of each row and their lengths. JSON would take ten times as long."""
    columns = [_as_bytes(column.combine_chunks()).to_pylist() for column in table.columns]
    return [hashlib.sha256(repr([*map(len, row)]).encode() + b"".join(row)).digest() for row in zip(*columns)]


def _as_bytes(column: pa.Array) -> pa.Array:
    """Each value as its bytes in memory."""
    if pa.types.is_string(column.type):
        return column.cast(pa.binary())
    if not pa.types.is_list(column.type):
        return column.view(pa.binary(column.type.byte_width))
    values, width = column.values, column.type.value_type.byte_width
    offsets = (column.offsets.to_numpy() + values.offset) * width
    return pa.Array.from_buffers(pa.binary(), len(column), [None, pa.py_buffer(offsets), values.buffers()[1]])

"""What travels between steps: Problem, Sample and Grade, with their Parquet schemas.

Every table that one step writes and another reads is a Parquet file of one of these three rows. `read` and `write`
are the only way in and out: a file that lacks a column is refused by name, and a file is either whole or absent. A
column that has a default may be missing, and is where all its values are that: so what was never set changes no file.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, get_args

import pyarrow as pa
import pyarrow.parquet as pq

FinishReason = Literal["stop", "length"]
Outcome = Literal["right", "wrong", "no_answer", "cut_off", "timed_out"]
Notation = Literal["", "interval", "any letters"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
NOTATIONS: tuple[Notation, ...] = get_args(Notation)
# All that these columns may hold.
WORDS = {"finish_reason": get_args(FinishReason), "outcome": OUTCOMES, "notation": NOTATIONS}
ROWS_AT_ONCE = 1000  # of a file that is read in parts
BUFFER_BYTES = 1 << 20  # of a column, where a file is read in parts: else a whole row group is in memory
ROW_GROUP_BYTES = 1 << 26  # of a table that is written in parts


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One problem with one checkable answer.

    `level` is the source's own difficulty label, '' where it has none, `tolerance` how far its numbers may be off, and
    `notation` what its answer may look like: '' for whatever means the same, 'interval' for no inequality in place of
    an interval, 'any letters' for other letters than the answer's, too.
    """

    problem_id: str
    source: str
    problem: str
    answer: str
    level: str
    tolerance: float = 0.0
    notation: Notation = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One completion of one problem, as generated: the token ids are the record, `text` is their decoding.

    `cumulative_logprob` is that of the tokens under the untouched model, NaN where the engine was not asked for it.
    """

    problem_id: str
    sample_index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    cumulative_logprob: float


@dataclasses.dataclass(frozen=True, slots=True)
class Grade:
    """What became of one sample. `answer` is the extracted answer, '' where there is none."""

    problem_id: str
    sample_index: int
    outcome: Outcome
    answer: str


Record = TypeVar("Record", Problem, Sample, Grade)

SCHEMAS: dict[type, pa.Schema] = {
    Problem: pa.schema(
        [
            *((name, pa.string()) for name in ("problem_id", "source", "problem", "answer", "level")),
            ("tolerance", pa.float64()),
            ("notation", pa.string()),
        ]
    ),
    Sample: pa.schema(
        [
            ("problem_id", pa.string()),
            ("sample_index", pa.int32()),
            ("prompt_token_ids", pa.list_(pa.int32())),
            ("token_ids", pa.list_(pa.int32())),
            ("text", pa.string()),
            ("finish_reason", pa.string()),
            ("cumulative_logprob", pa.float64()),
        ]
    ),
    Grade: pa.schema(
        [
            ("problem_id", pa.string()),
            ("sample_index", pa.int32()),
            ("outcome", pa.string()),
            ("answer", pa.string()),
        ]
    ),
}


def difficulty(level: str) -> float:
    """The first number in a level, -1 where it has none."""
    number = re.search(r"\d+(\.\d+)?", level)
    return float(number[0]) if number else -1.0


def jsonable(content: Any) -> Any:
    """`content` as JSON values: named tuples and dataclasses become objects, what is not finite becomes null."""
    if dataclasses.is_dataclass(content):
        content = dataclasses.asdict(content)
    if hasattr(content, "_asdict"):
        content = content._asdict()
    if isinstance(content, Mapping):
        return {str(key): jsonable(value) for key, value in content.items()}
    if isinstance(content, list | tuple | set | frozenset):
        return [jsonable(value) for value in content]
    if hasattr(content, "item"):
        content = content.item()
    return None if isinstance(content, float) and not math.isfinite(content) else content


def table(kind: type[Record], records: Iterable[Record]) -> pa.Table:
    """Arrow table of `records` in the schema of `kind`, without a column that holds nothing but its default."""
    schema, rows = SCHEMAS[kind], list(records)
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    for name, default in _defaults(kind).items():
        if all(value == default for value in columns[name]):
            del columns[name]
            schema = schema.remove(schema.get_field_index(name))
    return pa.table(columns, schema=schema)


def write(path: str | os.PathLike, kind: type[Record], records: Iterable[Record]) -> None:
    """Write `records` to the Parquet file `path` in one atomic step."""
    write_table(path, table(kind, records))


def write_table(path: str | os.PathLike, rows: pa.Table | Iterable[pa.Table]) -> None:
    """Write any Arrow table, or one in parts, to the Parquet file `path` in one atomic step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    groups = _groups([rows] if isinstance(rows, pa.Table) else rows)
    first = next(groups)
    with pq.ParquetWriter(partial, first.schema, write_page_checksum=True) as writer:
        for group in itertools.chain([first], groups):
            writer.write_table(group)
    os.replace(partial, path)


def _groups(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """`parts` put together until they fill a row group."""
    waiting, num_bytes = [], 0
    for part in parts:
        waiting.append(part)
        num_bytes += part.nbytes
        if num_bytes >= ROW_GROUP_BYTES:
            yield pa.concat_tables(waiting)
            waiting, num_bytes = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def read(path: str | os.PathLike, kind: type[Record]) -> list[Record]:
    """Rows of the Parquet file `path`, or of every `*.parquet` in the folder `path`, in the order of file names.

    Raises
    ------
    ValueError
        If there is no such file or no row, a column without a default is missing, a value is null or none of WORDS, or
        a row stands twice; the message names it.
    """
    path = Path(path)
    files: Sequence[Path] = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise ValueError(f"{path}: no Parquet file there; give the file or folder that an earlier step wrote")
    rows = [kind(**row) for file in files for row in _checked(_table_of(file), file, kind).to_pylist()]
    if not rows:
        raise ValueError(f"{path}: no rows; the step that wrote it had nothing to write")
    twice, count = Counter((row.problem_id, getattr(row, "sample_index", "")) for row in rows).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{path}: {' '.join(map(str, twice)).strip()} stands {count} times; each row must stand once")
    return rows


def parts(path: Path, kind: type[Record]) -> Iterator[pa.Table]:
    """The rows of the Parquet file `path`, some at a time; ValueError as `read` has it, but for a row twice."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, buffer_size=BUFFER_BYTES) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield _checked(pa.Table.from_batches([batch]), path, kind)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def ids(folder: Path) -> set[tuple[str, int]]:
    """Problem id and sample index of every row in the files of `folder`; none where it has no file.

    Raises
    ------
    ValueError
        If a file is not readable, or a row stands twice; the message names it.
    """
    found: set[tuple[str, int]] = set()
    for file in sorted(folder.glob("*.parquet")):
        rows = _table_of(file, ["problem_id", "sample_index"])
        keys = list(zip(rows["problem_id"].to_pylist(), rows["sample_index"].to_pylist()))
        if twice := found.intersection(keys):
            problem_id, index = min(twice)
            raise ValueError(f"{file}: {problem_id} {index} stands in another file of its folder, too; remove one")
        found.update(keys)
    return found


@contextlib.contextmanager
def alone(path: Path, shared: bool = False, waits: bool = False) -> Iterator[None]:
    """Hold `path` for this process, or `shared` with others that do; ValueError where another one holds it.

    With `waits`, wait for that one. A killed process holds nothing; the last to hold it leaves no file.
    """
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with open(lock, "w") as stream:
            try:
                fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if waits else fcntl.LOCK_NB))
            except BlockingIOError:
                raise ValueError(f"another process is at work in {path}; wait for it or end it") from None
            if not _is_at(stream, lock):
                continue  # who held it has removed it meanwhile
            try:
                yield
            finally:
                with contextlib.suppress(BlockingIOError):  # others share it
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_at(stream, lock):
                        lock.unlink()
            return


def _is_at(stream: IO, path: Path) -> bool:
    """Whether the open file is the one at `path`."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    return False


def _defaults(kind: type[Record]) -> dict[str, object]:
    return {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}


def _table_of(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(
        f"{path}: not a readable Parquet file ({reason}); remove it and give the command that wrote it again"
    )


def _checked(found: pa.Table, path: Path, kind: type[Record]) -> pa.Table:
    """Rows of the file `path` in the schema of `kind`."""
    schema = SCHEMAS[kind]
    for name in _defaults(kind).keys() - set(found.column_names):
        found = found.append_column(name, pa.nulls(len(found)))
    missing = [name for name in schema.names if name not in found.column_names]
    if missing:
        raise ValueError(
            f"{path}: column {', '.join(missing)} is missing (found {', '.join(found.column_names)}); "
            f"this step needs {', '.join(schema.names)}"
        )
    try:
        found = found.select(schema.names).cast(schema)
    # Both are the user's file: Invalid is a value ("x" as a number), NotImplemented a whole type (lists as text).
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{path}: a column has the wrong type ({error}); expected {schema}") from error
    for name, default in _defaults(kind).items():
        found = found.set_column(schema.get_field_index(name), schema.field(name), found[name].fill_null(default))
    for name in schema.names:
        if found[name].null_count:
            raise ValueError(f"{path}: column {name} has {found[name].null_count} null values; remove those rows")
        foreign = set(found[name].unique().to_pylist()) - set(WORDS[name]) if name in WORDS else ()
        if foreign:
            raise ValueError(
                f"{path}: column {name} holds {min(foreign)!r}; it may hold {', '.join(filter(None, WORDS[name]))}"
            )
    if kind is Problem:
        wrong = [value for value in found["tolerance"].unique().to_pylist() if not 0 <= value < math.inf]
        if wrong:
            raise ValueError(f"{path}: column tolerance holds {wrong[0]:g}; it may hold finite numbers from 0")
    return found

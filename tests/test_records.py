"""Tables between steps: whole or absent, and refused by name where a column is not what it should be."""

import dataclasses
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssd import records
from ssd.records import Grade, Problem, Sample

PROBLEM = Problem("a", "made", "What is 1+1?", "2", "1")
BARE = {"problem_id": ["a"], "source": ["made"], "problem": ["What is 1+1?"], "answer": ["2"], "level": ["1"]}
SAMPLE = Sample("a", 0, [5, 6], [7, 8], "2", "stop", -0.5)


@pytest.mark.parametrize("row", [PROBLEM, SAMPLE, Grade("a", 0, "right", "2")], ids=lambda row: type(row).__name__)
def test_what_is_written_is_read_back(tmp_path, row):
    rows = [row, dataclasses.replace(row, problem_id="b")]
    records.write(tmp_path / "rows.parquet", type(row), rows)
    assert records.read(tmp_path / "rows.parquet", type(row)) == rows


def test_a_tolerance_or_notation_that_no_problem_has_is_no_column_and_changes_no_digest(tmp_path):
    assert records.table(Problem, [PROBLEM]).to_pydict() == BARE
    rows = [PROBLEM, dataclasses.replace(PROBLEM, problem_id="b", tolerance=0.1, notation="interval")]
    records.write(tmp_path / "rows.parquet", Problem, rows)
    assert records.read(tmp_path / "rows.parquet", Problem) == rows
    pq.write_table(pa.table(BARE | {"tolerance": [None], "notation": [None]}), tmp_path / "null.parquet")
    assert records.read(tmp_path / "null.parquet", Problem) == [PROBLEM]


def test_a_row_that_stands_twice_and_a_table_without_rows_are_refused(tmp_path):
    records.write(tmp_path / "twice.parquet", Problem, [PROBLEM, PROBLEM])
    with pytest.raises(ValueError, match=r"twice\.parquet: a stands 2 times"):
        records.read(tmp_path / "twice.parquet", Problem)
    records.write(tmp_path / "empty.parquet", Problem, [])
    with pytest.raises(ValueError, match=r"empty\.parquet: no rows"):
        records.read(tmp_path / "empty.parquet", Problem)


def test_a_folder_is_read_in_the_order_of_its_files(tmp_path):
    for name, index in (("b", 1), ("a", 0)):
        records.write(tmp_path / f"{name}.parquet", Grade, [Grade("p", index, "wrong", "")])
    assert [row.sample_index for row in records.read(tmp_path, Grade)] == [0, 1]


def test_an_unfinished_file_is_not_taken_for_a_table(tmp_path):
    (tmp_path / ".rows.parquet.partial").write_bytes(b"PAR1 half")
    with pytest.raises(ValueError, match="no Parquet file"):
        records.read(tmp_path, Problem)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer": None}, "column answer is missing"),
        ({"answer": [None]}, "answer has 1 null"),
        *(({"tolerance": [t]}, f"tolerance holds {t:g}") for t in (math.nan, math.inf, -1.0)),
        ({"notation": ["roman"]}, "notation holds 'roman'; it may hold interval, any letters"),
    ],
    ids=["a missing column", "a null", "no number", "infinity", "less than nothing", "no notation"],
)
def test_a_bad_table_is_refused_with_the_column_and_the_file(tmp_path, columns, message):
    columns = {name: column for name, column in (BARE | columns).items() if column}
    pq.write_table(pa.table(columns), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=rf"bad\.parquet: .*{message}"):
        records.read(tmp_path / "bad.parquet", Problem)


def test_a_word_that_is_no_outcome_is_refused_and_not_counted_as_wrong(tmp_path):
    rows = {"problem_id": ["a", "b"], "sample_index": [0, 0], "outcome": ["right", "correct"], "answer": ["1", "1"]}
    pq.write_table(pa.table(rows), tmp_path / "grades.parquet")
    with pytest.raises(ValueError, match="column outcome holds 'correct'; it may hold right, wrong, no_answer"):
        records.read(tmp_path / "grades.parquet", Grade)


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "bad.parquet").write_text("hello")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        records.read(tmp_path / "bad.parquet", Problem)

"""Samples on disk in any order of files: what is asked of them comes in order, each once, and so does their digest."""

import dataclasses
import math
import random

import pyarrow.parquet as pq
import pytest

from ssd import records
from ssd.records import Sample
from ssd.samples import Samples

TEXTS = ["", 'a "b" \\ c\n\td\r', "\x0b \x1f\x7f", "é 漢 😀", "so </think> \\boxed{4}"]


@pytest.fixture
def drawn(tmp_path) -> list[Sample]:
    """In order; written in another order, in files of seven."""
    rng = random.Random(0)
    rows = [
        Sample(f"p{p:02}", s, [1], [rng.randrange(9)] * (s + p), rng.choice(TEXTS), rng.choice(("stop", "length")), 0.5)
        for p in range(20) for s in range(5)
    ]  # fmt: skip
    shuffled = rng.sample(rows, len(rows))
    for start in range(0, len(rows), 7):
        records.write(tmp_path / f"part-{start:06d}.parquet", Sample, shuffled[start : start + 7])
    return rows


def texts(samples: Samples) -> list[str]:
    return samples.in_order(lambda table: table["text"].to_pylist())


@pytest.mark.parametrize("rows_at_once", [1000, 3])
def test_files_in_any_order_are_read_in_order(drawn, tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr(records, "ROWS_AT_ONCE", rows_at_once)
    samples = Samples(tmp_path)
    assert list(samples.ids()) == [(row.problem_id, row.sample_index) for row in drawn]
    assert texts(samples) == [row.text for row in drawn]
    assert samples.num_tokens_S.tolist() == [len(row.token_ids) for row in drawn]
    assert samples.is_cut_off_S.tolist() == [row.finish_reason == "length" for row in drawn]
    assert samples.closes_S.tolist() == ["</think>" in row.text for row in drawn]
    assert sorted(samples, key=lambda row: (row.problem_id, row.sample_index)) == drawn
    some = Samples(tmp_path, only={("p11", 0), ("p03", 1), ("p99", 0)})
    assert list(some.ids()) == [("p03", 1), ("p11", 0)]
    assert texts(some) == [row.text for row in drawn if (row.problem_id, row.sample_index) in set(some.ids())]


def test_a_sample_that_stands_twice_is_named(drawn, tmp_path):
    records.write(tmp_path / "part-1.parquet", Sample, [drawn[8]])
    with pytest.raises(ValueError, match="p01 3 stands 2 times"):
        Samples(tmp_path)


@pytest.mark.parametrize("row_group_bytes", [1, 1 << 26])
def test_samples_are_written_in_parts_and_in_few_row_groups(drawn, tmp_path, monkeypatch, row_group_bytes):
    monkeypatch.setattr(records, "ROW_GROUP_BYTES", row_group_bytes)
    copy = tmp_path / "copy" / "samples.parquet"
    records.write_table(copy, Samples(tmp_path).tables())
    assert pq.ParquetFile(copy).num_row_groups == (15 if row_group_bytes == 1 else 1)
    assert texts(Samples(copy.parent)) == [row.text for row in drawn]


def test_the_digest_of_samples_is_that_of_their_content_in_any_order(drawn, tmp_path):
    records.write(tmp_path / "one" / "samples.parquet", Sample, drawn)
    records.write(tmp_path / "less" / "samples.parquet", Sample, drawn[1:])
    digest = Samples(tmp_path).digest()
    assert Samples(tmp_path / "one").digest() == digest
    assert Samples(tmp_path / "less").digest() != digest


@pytest.mark.parametrize(
    "change",
    [{"text": "x"}, {"token_ids": [1, 2]}, {"prompt_token_ids": []}, {"finish_reason": "length"}, {"sample_index": 1},
     {"cumulative_logprob": math.nan}, {"problem_id": "q"}, {"prompt_token_ids": [5, 6], "token_ids": [7]}],
)  # fmt: skip
def test_every_value_of_a_sample_is_in_its_digest(tmp_path, change):
    rows = [Sample("p", 0, [5], [6, 7], "text", "stop", 0.5), Sample("z", 0, [5], [6], "", "stop", 0.0)]
    digests = set()
    for name, changes in (("a", {}), ("b", change)):
        first = dataclasses.replace(rows[0], **changes)
        records.write(tmp_path / name / "samples.parquet", Sample, [first, rows[1]])
        digests.add(Samples(tmp_path / name).digest())
    assert len(digests) == 2

"""The grid's two questions, on grids whose answers are known."""

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import scale
from ssd import records
from ssd.report.text import points


def grid(rate, num_problems: int = 400, n: int = 2, top_p: tuple[float, ...] = (1.0,)) -> dict:
    """correct_PS by cell, where the chance of a right answer is rate(T_train, top_p, T_eval)."""
    rng = np.random.default_rng(0)
    cells = [(t, p, e) for t in (0.7, 1.0, 1.5) for p in top_p for e in scale.T_EVAL]
    return {cell: (rng.random((num_problems, n)) < rate(*cell)).astype(float) for cell in cells}


def test_the_ridge_is_found_where_it_is():
    correct = grid(lambda t_train, top_p, t_eval: 0.6 - 0.2 * (t_train * t_eval - 1.2) ** 2)
    r2, peak, low, high = scale.ridge(correct, correct)
    assert r2 > 0.9 and low < 1.2 < high and peak == pytest.approx(1.2, abs=0.1)
    by_t_eval_alone = grid(lambda t_train, top_p, t_eval: 0.6 - 0.2 * (t_eval - 1.2) ** 2 + 0.2 * (t_train == 1.0))
    assert scale.ridge(by_t_eval_alone, by_t_eval_alone)[0] < 0.5


def test_the_ceiling_of_equal_cells_is_not_their_luckiest():
    correct = grid(lambda *cell: 0.5, num_problems=200)
    luckiest = max(correct_PS.mean() for correct_PS in correct.values())
    assert luckiest > 0.54
    assert scale.ceiling(correct, correct).mean() == pytest.approx(0.5, abs=0.04)


def test_a_grid_is_described_from_its_file(tmp_path):
    correct = grid(lambda t_train, top_p, t_eval: 0.3 + 0.2 * (top_p < 1), top_p=(1.0, 0.85))
    correct |= {(np.nan, np.nan, t): np.zeros((400, 2)) for t in scale.T_EVAL}
    rows = [
        {"t_train": t, "top_p": p, "t_eval": e, "problem_id": f"{i:03}", "num_right": int(right), "n": 2}
        for (t, p, e), correct_PS in correct.items()
        for i, right in enumerate(correct_PS.sum(1))
    ]
    records.write_table(tmp_path / "grid.parquet", pa.Table.from_pylist(rows))
    said = scale.describe(tmp_path / "grid.parquet").splitlines()
    expected = scale.compare.paired(
        scale.ceiling(correct, [c for c in correct if c[1] == 0.85]),
        scale.ceiling(correct, [c for c in correct if c[1] == 1]),
    )
    (row,) = [line for line in said if line.startswith("| top-p 0.85 |") and "%" in line]
    assert points(expected) in row and 0.1 < expected.ci_low < 0.2 < expected.ci_high
    assert (tmp_path / "grid.png").stat().st_size > 10_000

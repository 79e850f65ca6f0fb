"""What grades say, by problem and sample; grades that do not make a table are refused."""

import pytest

from ssd.grades import correct_matrix
from ssd.records import Grade


def test_correct_is_a_table_of_problems_by_samples():
    rows = [
        Grade("b", 1, "right", ""),
        Grade("a", 0, "wrong", ""),
        Grade("b", 0, "timed_out", ""),
        Grade("a", 1, "right", ""),
    ]
    ids, correct_PS = correct_matrix(rows)
    assert ids == ["a", "b"]
    assert correct_PS.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Grade("a", 0, "right", ""), Grade("a", 0, "wrong", "")], "graded twice"),
        ([Grade("a", 0, "right", ""), Grade("b", 0, "wrong", ""), Grade("b", 1, "wrong", "")], r"\[1, 2\] samples"),
        ([Grade("a", 0, "right", ""), Grade("a", 2, "wrong", "")], r"problem a has the samples \[0, 2\]"),
    ],
)
def test_unequal_or_doubled_samples_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        correct_matrix(rows)

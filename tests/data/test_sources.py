"""Reading sources: what is kept, what is dropped and counted, and which errors say what to do."""

import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssd.data.sources import SOURCES, load

REAL = Path(os.environ.get("SSD_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data") / "hub"

ROWS = {  # one row of each source that must be kept, and the (answer, level, source) it must give
    "hendrycks_math": (
        {"problem": "Halve 1.", "level": "Level 5", "solution": r"It is $\boxed{\frac{1}{2}}$."},
        (r"\frac{1}{2}", "Level 5", "hendrycks_math"),
    ),
    "numinamath-cot": (
        {"source": "amc_aime", "problem": "Add 1 and 2.", "solution": r"Not \boxed{4} but \boxed{3}."},
        ("3", "", "numinamath-cot/amc_aime"),
    ),
    "hendrycks_math-train": (
        {"problem": "Add 1 and 2.", "level": "Level 4", "solution": r"So \boxed{3}."},
        ("3", "Level 4", "hendrycks_math-train"),
    ),
    "hendrycks_math-test": (
        {"problem": "Add 1 and 2.", "level": "Level 4", "solution": r"So \boxed{3}."},
        ("3", "Level 4", "hendrycks_math-test"),
    ),
    "beyond-aime": ({"problem": "Add 1 and 2.", "answer": 3}, ("3", "", "beyond-aime")),
    "omni-math-2": (
        {"problem": "Add 1 and 2.", "answer": "$3$", "difficulty": 8.0, "tags": []},
        ("3", "8.0", "omni-math-2"),
    ),
    "olympiadbench": (
        {"question": "Add 1 and 2.", "final_answer": ["3"], "is_multiple_answer": False, "error": None},
        ("3", "", "olympiadbench"),
    ),
    "aimo-validation-aime": ({"problem": "Add 1 and 2.", "answer": "3"}, ("3", "", "aimo-validation-aime")),
    "aime_1983_2023": (
        {"Question": "Add 1 and 2.", "Answer": "003", "Problem Number": 15},
        ("003", "15", "aime_1983_2023"),
    ),
    "math-500": ({"problem": "Add 1 and 2.", "answer": "3", "level": 2}, ("3", "2", "math-500")),
    "gsm8k": ({"question": "Sum?", "answer": "1+1000=1001\n#### 1,001"}, ("1001", "", "gsm8k")),
    "aime_2025": ({"problem_idx": 1, "problem": "Add 1 and 2.", "answer": 3}, ("3", "", "aime_2025")),
    "aime_2026": ({"problem_idx": 1, "problem": "Add 1 and 2.", "answer": "3"}, ("3", "", "aime_2026")),
    "hmmt_feb_2025": ({"problem_idx": 1, "problem": "Add 1 and 2.", "answer": "$3$"}, ("3", "", "hmmt_feb_2025")),
}


def mirror(root: Path, name: str, rows: list, stem: str = "") -> str:
    path = root / f"{stem or SOURCES[name].mirror[-1]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(root)


def reason(tmp_path: Path, name: str, **changes) -> str:
    """The one reason for which the source's row is dropped after `changes`, beside the good row."""
    good = ROWS[name][0]
    loaded = load(name, mirror(tmp_path, name, [good, {**good, **changes}]))
    assert loaded.raw_rows == 2 == len(loaded.problems) + len(loaded.dropped)
    return next(iter(loaded.reasons))


def test_every_source_has_a_row_here():
    assert set(ROWS) == set(SOURCES)


@pytest.mark.parametrize("name", ROWS)
def test_a_good_row_of_each_source_becomes_a_problem(tmp_path, name):
    row, expected = ROWS[name]
    loaded = load(name, mirror(tmp_path, name, [row]))
    [problem] = loaded.problems
    assert (problem.answer, problem.level, problem.source) == expected
    assert problem.problem == row.get("problem", row.get("question", row.get("Question")))
    assert loaded.uri.startswith(str(tmp_path)) and not loaded.dropped


def test_a_problem_keeps_the_tolerance_that_its_source_gives_it(tmp_path):
    row = ROWS["olympiadbench"][0]
    rows = [row | {"question": "How long, about?", "error": "1e-1"}, row]
    loaded = load("olympiadbench", mirror(tmp_path, "olympiadbench", rows))
    assert [problem.tolerance for problem in loaded.problems] == [0.1, 0.0]


def test_a_set_of_ones_own_says_what_an_answer_may_look_like(tmp_path):
    rows = [{"problem": "Solve x > 2.", "answer": "(2, oo)", "notation": each} for each in ("interval", None, "")]
    rows = [row | {"problem": f"{row['problem']} {index}"} for index, row in enumerate(rows)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load(str(tmp_path / "mine.jsonl"))
    assert [problem.notation for problem in loaded.problems] == ["interval", "", ""]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("beyond-aime", {"problem": None}, "no problem statement"),
        ("beyond-aime", {"problem": "  "}, "no problem statement"),
        ("beyond-aime", {"problem": 7}, "no problem statement"),
        ("beyond-aime", {"problem": "Two", "answer": None}, "no answer"),
        ("beyond-aime", {"problem": "Two", "answer": float("nan")}, "no answer"),
        ("beyond-aime", {"problem": "Two", "answer": {"value": 3}}, "no answer"),
        ("beyond-aime", {"problem": "Two", "answer": " $ $ "}, "no answer"),
        ("beyond-aime", {"problem": "x" * 1_000_000}, "statement over 100 kB"),
        ("beyond-aime", {"problem": "Add  1\nand 2.", "answer": 4}, "duplicate id"),
        ("beyond-aime", {"problem": "Solve x^2=1.", "answer": "1, -1"}, "several answers"),
        ("beyond-aime", {"problem": "Solve x^2=1.", "answer": r"1 \text{ or } -1"}, "several answers"),
        ("beyond-aime", {"problem": "Prove that 1+1=2."}, "proof"),
        ("beyond-aime", {"problem": "Find x in the figure below."}, "figure missing"),
        ("beyond-aime", {"problem": "求 x"}, "not English"),
        (
            "beyond-aime",
            {"problem": r"Halve 1. (Answer: $\frac{1}{2}$.)", "answer": r"\frac{1}{2}"},
            "answer in the statement",
        ),
        ("beyond-aime", {"problem": r"Add 2 and 2. \boxed{ 4 }", "answer": "4"}, "answer in the statement"),
        ("beyond-aime", {"problem": "Two", "answer": True}, "no answer"),
        ("beyond-aime", {"problem": "Two", "answer": ["1"]}, "several answers"),
        ("beyond-aime", {"problem": ["Two"]}, "no problem statement"),
        ("hendrycks_math", {"level": None}, "level below 4 or unknown"),
        ("hendrycks_math", {"problem": "Two", "solution": ["3"]}, "no answer"),
        ("olympiadbench", {"question": "Two", "final_answer": None}, "no answer"),
        ("olympiadbench", {"question": "Two", "final_answer": []}, "no answer"),
        ("omni-math-2", {"problem": "Two", "answer": {}}, "no answer"),
        ("hendrycks_math", {"level": "Level 3"}, "level below 4 or unknown"),
        ("hendrycks_math", {"level": "Level ?"}, "level below 4 or unknown"),
        ("hendrycks_math", {"problem": "Two", "solution": None}, "no answer"),
        ("hendrycks_math", {"problem": "Two", "solution": r"$\boxed{}$"}, "no answer"),
        ("hendrycks_math", {"problem": "Two", "solution": r"at $\boxed{1}$ and $\boxed{2}$"}, "several answers"),
        ("numinamath-cot", {"problem": "Which?\nA: 1\nB: 2\nC: 3", "solution": r"\boxed{2}"}, "multiple choice"),
        ("numinamath-cot", {"problem": "Which one?", "solution": r"\boxed{\text{(B)}}"}, "multiple choice"),
        ("numinamath-cot", {"problem": "Two", "solution": "no box"}, "no answer"),
        ("omni-math-2", {"problem": "Two", "tags": ["image"]}, "tagged as not clean"),
        ("olympiadbench", {"question": "Two", "final_answer": ["1", "2"]}, "several answers"),
        ("olympiadbench", {"question": "Two", "is_multiple_answer": True}, "several answers"),
        ("olympiadbench", {"question": "Two", "error": "1e-1,1e-2"}, "tolerance is no number from 0"),
        ("beyond-aime", {"problem": "Two", "tolerance": 10**400}, "tolerance is no number from 0"),
        ("beyond-aime", {"problem": "Two", "tolerance": True}, "tolerance is no number from 0"),
        ("beyond-aime", {"problem": "Two", "notation": "roman"}, "notation is none of interval, any letters"),
        ("beyond-aime", {"problem": "Two", "notation": ["interval"]}, "notation is none of interval, any letters"),
        ("olympiadbench", {"question": "Two", "error": "-1"}, "tolerance is no number from 0"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_under_its_reason(tmp_path, name, changes, expected):
    assert reason(tmp_path, name, **changes) == expected


@pytest.mark.parametrize(
    "problem",
    [
        "The figure [asy]draw((0,0)--(1,1));[/asy] is shown below. Find x.",
        "A triangle has vertices A, B and C. Find its area.",
        "Show that 2 is even and find its half.",
        "Let f(A) = 1, f(B) = 2 and f(C) = 3. Find f(A).",
        "The answer is 12 times the area; find the area. Write Answer: and then the number.",
    ],
)
@pytest.mark.parametrize("answer", ["(1, 2)", "12,345", r"\left[0, 1\right)", r"\{1, 2\}", r"11,\! 111,\! 100"])
def test_one_tuple_or_interval_or_large_number_is_one_answer(tmp_path, problem, answer):
    [kept] = load("beyond-aime", mirror(tmp_path, "beyond-aime", [{"problem": problem, "answer": answer}])).problems
    assert kept.answer == answer


def test_an_id_depends_on_source_and_statement_alone(tmp_path):
    rows = [{"problem": "A b", "answer": 1}, {"problem": "C d", "answer": 2}]
    one = load("beyond-aime", mirror(tmp_path / "one", "beyond-aime", rows)).problems
    two = load("beyond-aime", mirror(tmp_path / "two", "beyond-aime", rows[::-1])).problems
    assert sorted(p.problem_id for p in one) == sorted(p.problem_id for p in two)


def test_a_line_separator_inside_a_statement_does_not_end_the_row(tmp_path):
    row = {"problem": "Add\u2028one and\x85two.", "answer": 3}
    assert load("beyond-aime", mirror(tmp_path, "beyond-aime", [row])).problems[0].problem == row["problem"]


def test_a_line_that_is_no_json_object_and_broken_unicode_are_counted(tmp_path):
    """Wherever they stand, and behind the mark that some editors put before a text."""
    path = tmp_path / "own.jsonl"
    bad = [b'{"problem": ', b"[1]", b"", b'{"problem": "\\ud800", "answer": 1}', b"[" * 100_000, b"9" * 5_000]
    path.write_bytes(b"\n".join([b"\xef\xbb\xbf[]", *bad, json.dumps(ROWS["beyond-aime"][0]).encode()]))
    loaded = load(str(path))
    assert loaded.reasons == {"not a JSON object": 5, "not valid Unicode": 1} and loaded.raw_rows == 7


def test_parquet_and_jsonl_give_the_same_problems(tmp_path):
    rows = [ROWS["olympiadbench"][0], {**ROWS["olympiadbench"][0], "question": "Another", "error": "0.1"}]
    lines = load("olympiadbench", mirror(tmp_path / "jsonl", "olympiadbench", rows))
    path = tmp_path / "parquet/olympiadbench/OE_TO_maths_en_COMP.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    table = load("olympiadbench", str(tmp_path / "parquet"))
    assert (table.problems, table.dropped) == (lines.problems, lines.dropped)


def test_a_mirror_prefers_the_composite_and_says_so(tmp_path):
    row = ROWS["numinamath-cot"][0]
    mirror(tmp_path, "numinamath-cot", [row, row])
    root = mirror(tmp_path, "numinamath-cot", [row], "numinamath-cot_composite/train")
    assert load("numinamath-cot", root).uri.endswith("numinamath-cot_composite/train.jsonl")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("gsm9k", lambda root: root, "'gsm9k' is not known; choose from hendrycks_math"),
        ("beyond-aime", lambda root: root / "nowhere", "nowhere' is not a directory"),
        ("beyond-aime", lambda root: root, r"has no beyond-aime/test.jsonl"),
        ("gsm8k", lambda root: mirror(root, "gsm8k", [{"question": "x", "gold": 1}]), "column answer is missing"),
        ("beyond-aime", lambda root: mirror(root, "beyond-aime", []), "no rows"),
    ],
)
def test_a_source_that_cannot_be_read_is_an_error_that_names_it(tmp_path, name, make, message):
    with pytest.raises(ValueError, match=message):
        load(name, str(make(tmp_path)))


def test_invalid_utf8_is_an_error_that_names_the_line(tmp_path):
    root = mirror(tmp_path, "beyond-aime", [ROWS["beyond-aime"][0]])
    with open(tmp_path / "beyond-aime/test.jsonl", "ab") as file:
        file.write(b'{"problem": "caf\xe9", "answer": 1}\n')
    with pytest.raises(ValueError, match="test.jsonl, line 2: not valid UTF-8"):
        load("beyond-aime", root)


def test_a_hub_that_cannot_be_reached_is_an_error_that_names_the_mirror(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HuggingFaceH4/MATH-500: cannot be loaded from the hub.*source_root=DIR"):
        load("math-500")


@pytest.fixture
def hub(monkeypatch) -> list:
    """A hub that has one row of each set and commit 'c0ffee' on every branch; what it was asked for."""
    datasets, huggingface_hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    asked, row_of = [], {source.hub_id: ROWS[source.name][0] for source in SOURCES.values()}

    def load_dataset(hub_id, config, **how):
        asked.append((hub_id, config, how))
        return iter([row_of[hub_id]]) if how["streaming"] else [row_of[hub_id]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "dataset_info",
        lambda self, hub_id, revision: SimpleNamespace(sha=f"c0ffee of {revision}"),
    )
    return asked


def test_the_hub_is_asked_for_each_config_and_the_pinned_revision(hub):
    loaded = load("hendrycks_math")
    source = SOURCES["hendrycks_math"]
    assert [(hub_id, config) for hub_id, config, _ in hub] == [(source.hub_id, config) for config in source.configs]
    assert len(hub) == 7
    assert all(how == {"split": "train", "revision": source.revision, "streaming": False} for *_, how in hub)
    assert loaded.uri == f"hf://datasets/{source.hub_id}@{source.revision}" and len(source.revision) == 40
    assert (loaded.raw_rows, loaded.reasons) == (7, {"duplicate id": 6})


def test_a_branch_is_resolved_to_its_commit_which_is_loaded_and_recorded(hub):
    assert SOURCES["beyond-aime"].revision == "main"
    assert load("beyond-aime").uri == "hf://datasets/ByteDance-Seed/BeyondAIME@c0ffee of main"
    assert hub[0][2]["revision"] == "c0ffee of main"


def test_a_large_set_is_streamed(hub):
    assert load("numinamath-cot").raw_rows == 1 and hub[0][2]["streaming"]


def test_a_hub_that_breaks_off_is_an_error_that_names_the_mirror(monkeypatch, hub):
    def broken(*_, **__):
        yield ROWS["numinamath-cot"][0]
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr("datasets.load_dataset", broken)
    with pytest.raises(ValueError, match=r"AI-MO/NuminaMath-CoT: cannot be loaded from the hub \(reset by peer\)"):
        load("numinamath-cot")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_of_ones_own_is_a_source(tmp_path, suffix):
    rows = [{"problem": "Add 1 and 2.", "answer": 3, "level": "hard"}, {"problem": "Two", "answer": None, "level": ""}]
    path = tmp_path / f"hmmt{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    loaded = load(str(path))
    [problem] = loaded.problems
    assert (problem.source, problem.answer, problem.level) == ("hmmt", "3", "hard")
    assert (loaded.reasons, loaded.uri) == ({"no answer": 1}, str(path))
    with pytest.raises(ValueError, match="nowhere.jsonl: no such file"):
        load(str(tmp_path / "nowhere.jsonl"))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no problem sets at {REAL}; set SSD_TEST_DATA")
def test_the_real_sets_have_their_published_sizes():
    mirrored = [
        name for name, source in SOURCES.items() if any((REAL / f"{stem}.jsonl").exists() for stem in source.mirror)
    ]
    loaded = {name: load(name, str(REAL)) for name in mirrored}
    raw = {name: each.raw_rows for name, each in loaded.items()}
    assert raw == {
        "hendrycks_math": 7500, "hendrycks_math-train": 7500, "hendrycks_math-test": 5000, "numinamath-cot": 1289,
        "beyond-aime": 100, "omni-math-2": 2821, "olympiadbench": 675,
        "aimo-validation-aime": 90, "aime_1983_2023": 975, "math-500": 500, "gsm8k": 1319,
    }  # fmt: skip
    assert raw["hendrycks_math"] - loaded["hendrycks_math"].reasons["level below 4 or unknown"] == 3994
    for name, each in loaded.items():
        assert each.raw_rows == len(each.problems) + len(each.dropped)
        assert len({problem.problem_id for problem in each.problems}) == len(each.problems)
        if name != "numinamath-cot":  # its rows often have no answer
            assert len(each.problems) >= 0.85 * (each.raw_rows - each.reasons["level below 4 or unknown"])
    assert Counter(p.level for p in loaded["hendrycks_math"].problems).keys() == {"Level 4", "Level 5"}
    assert {p.level for p in loaded["hendrycks_math-test"].problems} == {f"Level {n}" for n in range(1, 6)}

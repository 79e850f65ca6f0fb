"""The step that builds the problem sets, on small mirrors: what it writes, that it can be trusted, what it refuses."""

import json
import random
from collections import Counter
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZES = {"train_size": 40, "val_size": 60, "quick_size": 20}
SOURCES = {"train_sources": "hendrycks_math,numinamath-cot", "val_sources": "beyond-aime,omni-math-2"}


def statements(n: int, seed: int) -> list[str]:
    """Statements that share no word."""
    rng = random.Random(seed)
    return [" ".join("".join(rng.choices(LETTERS, k=9)) for _ in range(8)) + "?" for _ in range(n)]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    """Four sets: MATH of levels 3 to 5, NuminaMath with repeats of evaluation problems and rows that cannot be used."""
    root = tmp_path_factory.mktemp("mirror")
    omni = [
        {"problem": text, "answer": str(100 + i), "difficulty": float(i % 4)}
        for i, text in enumerate(statements(70, 1))
    ]
    beyond = [{"problem": text, "answer": 200 + i} for i, text in enumerate(statements(10, 2))]
    math = [
        {"problem": text, "level": f"Level {3 + i % 3}", "solution": f"So $\\boxed{{{i}}}$."}
        for i, text in enumerate(statements(60, 3))
    ]
    numina = [
        {"source": ("olympiads", "cn_k12")[i % 2], "problem": text, "solution": f"$\\boxed{{{i}}}$"}
        for i, text in enumerate(statements(30, 4))
    ]
    numina += [{**numina[0], "problem": row["problem"].upper(), "solution": "None."} for row in omni[:2]]
    numina += [
        {"source": "aops_forum", "problem": row["problem"].upper(), "solution": f"\\boxed{{{row['answer']}}}"}
        for row in [*omni[:7], *beyond]
    ]
    sets = {"omni-math/test": omni, "beyond-aime/test": beyond, "hendrycks_math/train": math}
    for stem, rows in (sets | {"numinamath-cot/train": numina}).items():
        (root / stem).parent.mkdir()
        (root / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def refused(run_step, capsys, **parameters) -> str:
    """The error line of a step that must fail."""
    with pytest.raises(SystemExit):
        run_step("prepare", **SOURCES | SIZES | parameters)
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))


def artifact(run, name: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/{name}"))


@pytest.fixture(scope="module")
def run(run_step, store, mirror):
    return run_step("prepare", source_root=mirror, **SOURCES | SIZES)


def test_every_row_of_every_source_is_accounted_for(run):
    counts = json.loads(artifact(run, "sources.json").read_text())
    assert {name: row["rows"] for name, row in counts.items()} == {
        "hendrycks_math": 60, "numinamath-cot": 49, "beyond-aime": 10, "omni-math-2": 70,
    }  # fmt: skip
    for row in counts.values():
        assert sum(n for fate, n in row.items() if fate != "rows") == row["rows"]
    assert counts["numinamath-cot"]["repeats"] == 17 and counts["numinamath-cot"]["no answer"] == 2
    assert counts["hendrycks_math"]["level below 4 or unknown"] == 20
    dropped = [row for row in pq.read_table(artifact(run, "removals.parquet")).to_pylist() if row["right_id"] is None]
    assert Counter(row["rule"] for row in dropped) == {"no answer": 2, "level below 4 or unknown": 20}
    assert [row["left_problem"] for row in dropped if row["rule"] == "no answer"] == [
        text.upper() for text in statements(70, 1)[:2]
    ]
    assert (counts["beyond-aime"]["val"], counts["omni-math-2"]["val"], counts["omni-math-2"]["not drawn"]) == (
        10,
        50,
        20,
    )


def test_nothing_of_the_evaluation_is_in_train_and_each_removal_has_a_row_with_both_problems(run):
    train, val, quick = (
        pq.read_table(artifact(run, f"{name}.parquet")).to_pylist() for name in ("train", "val", "quick")
    )
    assert (len(train), len(val), len(quick)) == (40, 60, 20)
    assert {row["problem_id"] for row in quick} < {row["problem_id"] for row in val}
    assert Counter(row["source"].split("/")[0] for row in quick) == {"omni-math-2": 17, "beyond-aime": 3}
    assert not {row["problem"].lower() for row in train} & {row["problem"].lower() for row in val}
    removals = [row for row in pq.read_table(artifact(run, "removals.parquet")).to_pylist() if row["right_id"]]
    assert len(removals) == 17 and all(row["removed"] and row["rule"] == "same text" for row in removals)
    assert all(row["left_problem"].lower() == row["right_problem"] and row["answers_agree"] for row in removals)


def test_datasets_can_be_loaded_by_the_datasets_library_and_are_logged_with_content_digests(run):
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(artifact(run, "val.parquet")), split="train")
    assert rows.column_names == ["problem_id", "source", "problem", "answer", "level"] and len(rows) == 60
    inputs = {(each.tags[0].value, each.dataset.name): each.dataset for each in run.inputs.dataset_inputs}
    assert {context for context, _ in inputs} == {"source", "train", "val", "quick"}
    assert {name for context, name in inputs if context == "source"} == set(",".join(SOURCES.values()).split(","))
    assert all(len(dataset.digest) >= 8 for dataset in inputs.values())


def test_two_runs_write_the_same_bytes_and_digests(run_step, store, mirror, run):
    # Within an experiment a finished run is not done again.
    mlflow.create_experiment("again", artifact_location=str(store / "again"))
    mlflow.set_experiment("again")
    again = run_step("prepare", source_root=mirror, **SOURCES | SIZES)
    mlflow.set_experiment("tests")
    assert again.info.run_id != run.info.run_id
    for name in ("train.parquet", "val.parquet", "quick.parquet", "removals.parquet", "sources.json", "data_card.md"):
        assert artifact(again, name).read_bytes() == artifact(run, name).read_bytes()
    digests = [sorted(each.dataset.digest for each in each_run.inputs.dataset_inputs) for each_run in (run, again)]
    assert digests[0] == digests[1]


def test_the_page_states_power_and_warns_where_a_set_is_too_small(run):
    page = run.data.tags["mlflow.note.content"]
    # By hand: (1.9600 + 0.8416) sqrt((2 x 0.23 x 0.85 x 0.3 + 2 x 0.23 x 0.15) / 60) = 0.1561; at rho 0: 0.2453.
    assert "| val | 60 | 15.6 | 24.5 |" in page and "5 points need 585 problems paired, 1,445 an arm unpaired" in page
    assert "**Warning:** quick (20 problems) cannot detect 5 points: paired, it detects 27.0" in page
    assert "data_card.md" in page and "train has" not in page
    card = artifact(run, "data_card.md").read_text()
    assert "| omni-math-2 | martheballon/Omni-MATH-2 | Apache-2.0 |" in card and "| beyond-aime |" in card
    for figure in ("sources", "difficulty"):
        assert artifact(run, f"figures/{figure}.png").stat().st_size > 10_000


def test_too_few_problems_for_train_are_a_warning_and_a_set_of_ones_own_can_be_final(run_step, store, mirror, tmp_path):
    own = tmp_path / "mine.jsonl"
    omni = (mirror / "omni-math/test.jsonl").read_text().split("\n")[:3]
    own.write_text("\n".join([*omni, json.dumps({"problem": statements(1, 9)[0], "answer": 5})]) + "\n")
    given = SOURCES | SIZES | {"final_sources": own, "train_size": 500, "val_size": 50}
    run = run_step("prepare", source_root=mirror, **given)
    assert "**Warning:** train has 70 problems, not 500" in run.data.tags["mlflow.note.content"]
    final, val = (pq.read_table(artifact(run, f"{name}.parquet")).to_pylist() for name in ("final", "val"))
    assert {row["source"] for row in final} == {"mine"} and len(final) == 4
    assert not {row["problem"] for row in final} & {row["problem"] for row in val}
    assert f"| {own} | a file of one's own | not stated |" in artifact(run, "data_card.md").read_text()


def test_what_cannot_be_built_is_refused_with_the_numbers(run_step, capsys, mirror, tmp_path):
    error = refused(run_step, capsys, source_root=mirror, val_size=500)
    assert "val_size=500 is more than the 80 problems left (beyond-aime 10, omni-math-2 70)" in error
    error = refused(run_step, capsys, source_root=mirror, quick_size=61)
    assert "quick_size=61 is more than the 60 problems of val" in error

    error = refused(run_step, capsys, source_root=mirror, train_sources="a/set.jsonl,b/set.jsonl")
    assert "2 sources are called set" in error

    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text('{"problem": "Prove that 1 = 1.", "answer": "1"}\n{"problem": null, "answer": 2}\n')
    error = refused(run_step, capsys, source_root=mirror, train_sources=nothing)
    assert f"source {nothing} " in error and "no usable problem left: {'proof': 1, 'no problem statement': 1}" in error

    error = refused(run_step, capsys, source_root=mirror, train_sources="omni-math-2")
    assert "train_sources=omni-math-2: every problem repeats one of the evaluation" in error

"""Text of data, files and users is text in the descriptions of runs, which a browser shows."""

import dataclasses
import json
import re

import mlflow
import pytest

from ssd import records
from ssd.lab import world
from ssd.records import Problem

pytestmark = pytest.mark.usefixtures("store")
HOSTILE = "<script>alert(1)</script>|[a](javascript:alert(1))`<img src=http://127.0.0.1:9/x onerror=alert(1)>"
ACTIVE = re.compile(r"(?<!\\)<[a-z/!]|\](?<!\\)\(javascript")


def description(run: mlflow.entities.Run) -> str:
    return run.data.tags["mlflow.note.content"]


def is_inert(text: str) -> bool:
    return "\\<script>" in text and not ACTIVE.search(text)


def test_source_level_and_file_name_are_text_where_an_evaluation_is_described(run_step, lab_model, tmp_path):
    problems = [
        dataclasses.replace(problem, source=f"{HOSTILE}{number % 2}", level=f"{HOSTILE}{number % 2}")
        for number, problem in enumerate(world.problems(8, 0))
    ]
    file = tmp_path / "<script>.parquet"
    records.write(file, Problem, problems)
    run = run_step("evaluate", model=lab_model, problems=file, engine="transformers", max_tokens=8, n=1, arm="base")
    assert description(run).count("\\<script>") == 5 and is_inert(description(run))


def test_file_names_are_text_where_problem_sets_are_described(run_step, tmp_path):
    files = [tmp_path / f"<script>[a]`<img src=x onerror=alert(1)> {name}.jsonl" for name in ("train", "val")]
    for first, file in zip((3, 43), files):
        rows = [{"problem": f"How many legs have {n} spiders and {n * n} ants?", "answer": str(8 * n + 6 * n * n)}
                for n in range(first, first + 40)]  # fmt: skip
        file.write_text("\n".join(map(json.dumps, rows)))
    sizes = {"train_size": 10, "val_size": 10, "quick_size": 5}
    run = run_step("prepare", train_sources=files[0], val_sources=files[1], final_sources="none", **sizes)
    assert is_inert(description(run))
    card = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/data_card.md")
    assert "\\<script>" in card and not re.search(r"(?<!\\)<(script|img)", card)


def test_what_a_user_gave_is_text_where_a_run_says_why_it_failed(run_step):
    with pytest.raises(SystemExit):
        run_step("compare", arms=HOSTILE)
    (run,) = mlflow.search_runs(filter_string="tags.step = 'compare'", output_format="list")
    assert description(run).startswith("**Failed:** ") and is_inert(description(run))

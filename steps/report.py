"""Write the one page that a person reads: what was asked, what was found and how sure, and what would change it.

Reads:  verdict (latest: compare/verdict.json), the comparison beside it, and the runs that these were made from.
Writes: report.html (one page that needs nothing else), report.md (the same), their figures.
Run:    mlflow run . -e report
"""

from collections.abc import Sequence
from pathlib import Path

import mlflow

from ssd import records, tracking
from ssd.records import OUTCOMES, Grade, Problem
from ssd.report import blocks, page
from ssd.samples import Samples
from ssd.stats.estimate import Estimate
from ssd.verdict import decision
from ssd.verdict.comparison import Comparison, read_files
from ssd.verdict.evidence import Checkpoint, Shown, StepRun

BESIDE = ("baseline", "power", "search", "evaluate")  # what led to the choices, though no input of the comparison
TITLE = "Does self-distillation make the model better?"


def report(step: tracking.Step) -> None:
    uri = step.args.verdict
    verdict, comparison = read_files(
        step.path("verdict"), tracking.local_path(f"{uri.rpartition('/')[0]}/comparison.json")
    )
    runs = tracking.lineage(uri)
    compared, prepared = runs[0], next((run for run in runs if run.step == "prepare"), None)
    base_model = tracking.run_of(uri).data.tags["ssd.base_model"]
    runs += _beside(base_model, runs)
    power = next((run for run in runs if run.step == "power"), None)
    power_png = power and _found(power, "figures/power.png")
    parts = page.sections(
        page.Evidence(
            verdict,
            comparison,
            base_model,
            sorted(runs, key=lambda run: run.started_ms),
            commands=_commands(uri, compared),
            power=power and tracking.read_json(f"runs:/{power.run_id}/power.json"),
            power_png=power_png.read_bytes() if power_png else b"",
            overlap=prepared and tracking.overlap(prepared),
            checkpoints=_checkpoints(runs),
            samples=_samples(comparison),
            registration=_registration(uri),
        )
    )
    mlflow.log_text(blocks.html(TITLE, parts), "report.html")
    mlflow.log_text(blocks.markdown(TITLE, parts), "report.md")
    for block in (block for part in parts for block in part.blocks if isinstance(block, blocks.Picture)):
        (step.work / f"{block.name}.png").write_bytes(block.png)
        mlflow.log_artifact(str(step.work / f"{block.name}.png"), "figures")
    run = mlflow.active_run().info
    link = f"#/experiments/{run.experiment_id}/runs/{run.run_id}/artifacts/report.html"
    said = f"The whole page: [report.html]({link}), to be downloaded and opened anywhere."
    head = [part for part in parts if part.title.startswith(("The verdict", "What would change", "Runs"))]
    step.describe(
        f"report · {verdict.promotion}",
        blocks.cut(f"{said}\n\n{blocks.markdown('', head, level=4)}", page.MAX_RUN_DESCRIPTION, "report.md"),
        verdict=verdict.promotion,
    )


def _beside(base_model: str, runs: Sequence[StepRun]) -> list[StepRun]:
    """Runs that the choices rest on, by the same base model: the newest search of each arm, baseline and power."""
    known = {run.run_id for run in runs}
    newest: dict[tuple[str, str], StepRun] = {}
    for entry_point in BESIDE:
        for run in tracking.finished_runs(entry_point):
            is_choice = entry_point != "evaluate" or run.data.params["decodings"] != "none"
            if is_choice and run.data.tags.get("ssd.base_model") == base_model:
                made = tracking.step_run(run)
                newest.setdefault((made.step, made.arm), made)
    return [run for run in newest.values() if run.run_id not in known]


def _found(run: StepRun, artifact: str) -> Path | None:
    try:
        return Path(tracking.local_path(f"runs:/{run.run_id}/{artifact}"))
    except ValueError:
        return None


def _commands(verdict: str, compared: StepRun) -> list[str]:
    commit = compared.commit.split(" ")[0]
    main = tracking.parent(verdict)
    if main and main.data.tags.get("step") == "main":
        entry_point, params = "", main.data.params
        environment = main.data.tags.get("mlflow.project.env", "local")
    else:
        entry_point, params, environment = "-e compare ", compared.params, "local"
    given = " ".join(f"-P {name}={value}" for name, value in params.items() if not name.startswith("input."))
    return [
        f"git checkout {commit}",
        f"mlflow run . {entry_point}--env-manager {environment} {given}",
        f"mlflow run . -e report --env-manager {environment} -P verdict={verdict}",
    ]


def _checkpoints(runs: Sequence[StepRun]) -> list[Checkpoint]:
    """Checkpoints of the trainings in the lineage, where they were evaluated."""
    trained = [run.run_id for run in runs if run.step == "train"]
    found = []
    for run in tracking.finished_runs("evaluate", with_tag="ssd.checkpoints_of"):
        if run.data.tags["ssd.checkpoints_of"] in trained:
            measured = tracking.read_json(f"runs:/{run.info.run_id}/by_step.json")
            for number, estimate in measured["estimates"].items():
                of_step = decision.from_json(Estimate, estimate)
                arm, split = run.data.tags["arm"], run.data.tags["split"]
                found.append(Checkpoint(arm, split, measured["decoding"], int(number), of_step))
    return found


def _samples(comparison: Comparison) -> list[Shown]:
    """The first sample of each outcome, of the trained model where it is among the arms."""
    arm = next((arm for arm in ("ssd-same-decoding", "ssd") if arm in comparison.arms), [*comparison.arms][-1])
    run = tracking.run_of(f"runs:/{comparison.arms[arm].run_id}")
    uri = f"runs:/{run.info.run_id}"
    grades = records.read(tracking.local_path(f"{uri}/grades.parquet"), Grade)
    first = {}
    for grade in sorted(grades, key=lambda row: (row.problem_id, row.sample_index)):
        first.setdefault(grade.outcome, grade)
    shown_keys = {(grade.problem_id, grade.sample_index) for grade in first.values()}
    stored = Samples(Path(tracking.local_path(f"{uri}/samples")), shown_keys)
    samples = {(row.problem_id, row.sample_index): row for row in stored}
    problems_uri = run.data.params.get("input.problems", run.data.params["problems"])
    problems = {row.problem_id: row for row in records.read(tracking.local_path(problems_uri), Problem)}
    shown = []
    for grade in (first[outcome] for outcome in OUTCOMES if outcome in first):
        problem, sample = problems[grade.problem_id], samples[grade.problem_id, grade.sample_index]
        shown.append(
            Shown(arm, grade.outcome, problem.problem_id, problem.problem, problem.answer, grade.answer, sample.text)
        )
    return shown


def _registration(verdict: str) -> str:
    """What the newest registration by this verdict did."""
    for run in tracking.finished_runs("register"):
        if tracking.step_run(run).params["verdict"] == verdict:
            found = tracking.read_json(f"runs:/{run.info.run_id}/registration.json")
            if "version" in found:
                return f"In the registry: version {found['version']} of {found['name']}, as {found['alias']}."
            return "No version was registered."
    return ""


if __name__ == "__main__":
    tracking.execute("report", report, verdict="compare/verdict.json")

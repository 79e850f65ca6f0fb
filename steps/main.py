"""The whole experiment, in the order in which a person would do it; what is already done is not done again.

Reads:  a preset (presets/NAME.yaml): values over MLproject's defaults, by entry point and, as `sample control`, by arm;
        model and source_root, where given, over the preset's.
Writes: a nested run for each step; the verdict and the minutes that each step took.
Run:    mlflow run .
"""

import json
from pathlib import Path

import mlflow

from ssd import evaluation, parameters, tracking
from ssd.markdown import escaped

PRESET = "preset"  # a value that says: the preset's
FAMILIES = ("temperature", "min-p", "temperature-last")


def main(step: tracking.Step) -> None:
    preset, seed = step.args.preset, step.args.seed
    if parameters.preset_values(preset, "prepare")["final_sources"] == "none":
        raise ValueError(
            f"preset {preset} names no final set, and the verdict is read on nothing else: copy "
            f"presets/{preset}.yaml, name the set there (prepare: {{final_sources: ...}}), and run -P preset=FILE.yaml"
        )
    # A preset may leave out the control or the search; the verdict then says which claims were not measured.
    control, search = (parameters.load_preset(preset).get(section) for section in parameters.VARIANTS)
    if search:
        families = parameters.load_decodings(search["decodings"], max_tokens=1).keys()
        if not set(FAMILIES) <= families:
            raise ValueError(
                f"{search['decodings']} has the families {', '.join(families)}; needs {', '.join(FAMILIES)}"
            )
    recommended = parameters.preset_values(preset, "baseline")
    base = recommended["model"] if step.args.model == PRESET else step.args.model
    recommended = {name: recommended[name] for name in evaluation.DECODING if name in recommended}
    sources = {} if step.args.source_root == PRESET else {"source_root": step.args.source_root}
    if base == "lab":
        base = f"runs:/{step.launch('lab', seed=seed)}/model"
    prepared = step.launch("prepare", seed=seed, **sources)
    train, val, quick, final = (f"runs:/{prepared}/{name}.parquet" for name in ("train", "val", "quick", "final"))

    measured = step.launch("baseline", model=base, problems=val, seed=seed)
    num_final = int(mlflow.get_run(prepared).data.metrics["num_final"])
    power = step.launch("power", grades=f"runs:/{measured}/grades.parquet", num_problems=num_final)

    fitted, trained = {}, {}
    for arm, decoding in {"ssd": {}, "control": control}.items():
        if decoding is None:
            continue
        sampled = step.launch("sample", arm=arm, model=base, problems=train, seed=seed, **decoding)
        fitted[arm] = step.launch("train", model=base, samples=f"runs:/{sampled}/samples", seed=seed)
        trained[arm] = f"runs:/{fitted[arm]}/model"

    def measure(arm: str, model: str, decoding: dict) -> str:
        run_id = step.launch("evaluate", arm=arm, model=model, problems=final, seed=seed + 2, **decoding)
        return f"{arm}=runs:/{run_id}"

    by_step = {"arm": "ssd-by-step", "model": f"runs:/{fitted['ssd']}", "problems": quick, "seed": seed + 1}
    step.launch("evaluate", **by_step, **recommended)
    arms = [measure("base", base, recommended), measure("ssd-same-decoding", trained["ssd"], recommended)]
    if search:
        search = search | {"problems": quick, "seed": seed + 1}
        best = _best(step.launch("evaluate", arm="base-search", model=base, **search))
        arms += [measure(f"base-tuned-{family}", base, best[family]) for family in FAMILIES]
        best = _best(step.launch("evaluate", arm="ssd-search", model=trained["ssd"], **search))
        arms.append(measure("ssd", trained["ssd"], best["temperature"]))
    if control:
        arms.append(measure("control", trained["control"], recommended))
    compared = step.launch("compare", arms=",".join(arms), chosen_on=quick)
    registered = step.launch("register", verdict=f"runs:/{compared}/verdict.json")
    reported = step.launch("report", verdict=f"runs:/{compared}/verdict.json")
    summary = "\n\n".join(mlflow.get_run(run).data.tags["mlflow.note.content"] for run in (power, compared, registered))
    step.describe(f"main · {preset}, seed {seed}", f"{summary}\n\n{_minutes(step.launched)}")
    print(
        "Every run, figure and table: mlflow ui"
        f"{'' if mlflow.get_tracking_uri().startswith('sqlite') else ' (on your tracking server)'}"
        f", then open experiment {mlflow.active_run().info.experiment_id}, run {reported} (report): report.html "
        "among its artifacts says what was found.",
        flush=True,
    )


def _minutes(run_ids: list[str]) -> str:
    """How long each launched run took, as a table in Markdown."""
    began, total = mlflow.get_run(mlflow.active_run().info.run_id).info.start_time, 0.0
    lines = ["| step | minutes |", "| --- | ---: |"]
    for run in map(mlflow.get_run, run_ids):
        if run.info.start_time < began:
            lines.append(f"| {escaped(run.info.run_name)} | reused |")
            continue
        minutes = (run.info.end_time - run.info.start_time) / 60_000
        total += minutes
        lines.append(f"| {escaped(run.info.run_name)} | {minutes:.1f} |")
    return "\n".join([*lines, f"| together | {total:.1f} |"])


def _best(run_id: str) -> dict[str, dict]:
    """Best decoding of each family that the evaluate run `run_id` found."""
    found = json.loads(Path(tracking.local_path(f"runs:/{run_id}/decodings.json")).read_text())["best"]
    names = parameters.defaults("evaluate")
    return {
        family: {name: int(value) if name == "temperature_last" else value
                 for name, value in row["decoding"].items() if name in names}
        for family, row in found.items()
    }  # fmt: skip


if __name__ == "__main__":
    tracking.execute("main", main)

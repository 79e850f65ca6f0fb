"""What training changed and where: locks, forks and the end of thinking, on stored texts that every model reads alike.

Reads:  model (latest: train/model), base, control (a model trained on untruncated samples; latest or none), samples
        (runs:/ID/samples, several by commas; latest: baseline/samples), grades (Parquet files in the same order;
        latest: those beside the samples, where there are any; or none). temperature, top_k and top_p are those of the
        samples that the model was trained on.
Writes: diagnosis.json, diagnosis.md, changes.parquet, positions.parquet (at most 200,000 of them), figures, the
        verdict on the mechanism.
Run:    mlflow run . -e diagnose -P control=latest
"""

import dataclasses
import itertools
import json
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa

from ssd import evaluation, records, tracking
from ssd.decoding import Decoding
from ssd.diagnosis import mechanism
from ssd.markdown import escaped
from ssd.records import Grade
from ssd.report import figures
from ssd.samples import load_samples

MAX_STORED_POSITIONS = 200_000
UNTRUNCATED = Decoding()


def diagnose(step: tracking.Step) -> None:
    from ssd import driver, models  # torch takes seconds to load
    from ssd.diagnosis import changes, measure
    from ssd.lab import world

    args = step.args
    driver.check()
    truncation, rules = evaluation.decoding(args), measure.Rules()
    folders = {name: str(step.path(name)) for name in ("base", "model", "control") if getattr(args, name) != "none"}
    for folder in folders.values():
        models.load_tokenizer(folder)  # its errors come before the weights are loaded
    carriers = _carriers(args.samples, args.grades)
    texts = [measure.Text(*row) for rows, _ in carriers for row in rows]
    texts = measure.choose(texts, args.num_texts, args.seed)
    measured = measure.measure(folders, texts, truncation, rules, args.seed)

    tokenizer, base = models.load_tokenizer(folders["base"]), models.digest(folders["base"])
    from_base = {id(row[0]) for rows, manifest in carriers if _is_plain(manifest, base) for row in rows}
    drawn_T = np.array([id(text.sample) in from_base for text in texts])
    truth_N = None
    if any(set(world.fragments(each)) <= tokenizer.get_vocab().keys() for each in world.WORLDS.values()):
        kinds = [world.kinds(tokenizer.convert_ids_to_tokens(text.sample.token_ids)) for text in texts]
        truth_N = np.array(list(itertools.chain.from_iterable(kinds)))
    found = changes.summary(measured, drawn_T, truth_N)
    found |= {
        "truncation": str(truncation),
        "rules": dataclasses.asdict(rules),
        "carriers": changes.carriers(measured),
    }
    curves = changes.mean_curves(measured)
    step.log_json("diagnosis.json", found | {"curves": curves})
    mlflow.log_text(mechanism.page(found), "diagnosis.md")
    step.log_table("changes.parquet", pa.Table.from_pylist([_flat(row) for row in found["changes"]]))
    order = np.random.default_rng(args.seed).permutation(found["num_positions"])
    kept_M = np.sort(order[:MAX_STORED_POSITIONS])
    columns = changes.positions(measured, kept_M) | ({} if truth_N is None else {"truth": truth_N[kept_M]})
    step.log_table("positions.parquet", pa.table(columns))
    mlflow.log_figure(figures.curves(curves, measure.EVAL_TEMPERATURES), "figures/curves.png")
    mlflow.log_figure(figures.changes(found["changes"]), "figures/changes.png")
    mlflow.log_metrics({"num_texts": found["num_texts"], "num_positions": found["num_positions"]})
    for row in found["changes"]:
        if row["group"] in measure.CLASSES and row["quantity"] in ("kept_mass", "entropy", "tail_mass"):
            name = f"{row['group']}_{row['quantity']}_{row['model']}_minus_{row['against']}"
            value = row["estimate"]
            if np.isfinite(value.se):
                bounds = {f"{name}_ci_low": value.ci_low, f"{name}_ci_high": value.ci_high}
                mlflow.log_metrics({name: value.value} | bounds)
    step.describe(
        f"diagnose · {tracking.tag_of(args.model, 'arm', 'model')} · {found['num_texts']:,} texts",
        mechanism.verdict(found) + "\n\nTables: diagnosis.md." + _warning(args.model, truncation),
    )


def _flat(row: dict) -> dict:
    """A change as one row: the mean before, and the change, each with its interval."""
    before = {f"before_{name}": value for name, value in row["before"]._asdict().items()}
    flat = row | before | row["estimate"]._asdict()
    return {name: value for name, value in flat.items() if name not in ("before", "estimate")}


def _carriers(samples: str, grades: str) -> list[tuple[list[tuple], dict]]:
    """(sample, arm, outcome) of every sample of each run, and the run's manifest."""
    uris = samples.split(",")
    files = {"latest": [_beside(uri) for uri in uris], "none": ["none"] * len(uris)}.get(grades, grades.split(","))
    if len(files) != len(uris):
        raise ValueError(
            f"grades={grades} names {len(files)} files for {len(uris)} of samples; name one for each, or none"
        )
    found = []
    for uri, file in zip(uris, files):
        generated = load_samples(Path(tracking.local_path(uri)))
        rows = [] if file == "none" else records.read(tracking.local_path(file), Grade)
        outcome_of = {(row.problem_id, row.sample_index): row.outcome for row in rows}
        arm, own = tracking.tag_of(uri, "arm", uri), generated.samples
        missing = [row for row in own if rows and (row.problem_id, row.sample_index) not in outcome_of]
        if missing:
            raise ValueError(
                f"{file} grades other samples than {uri} (no {missing[0].problem_id}); name them in one order"
            )
        found.append(
            ([(row, arm, outcome_of.get((row.problem_id, row.sample_index), "")) for row in own], generated.manifest)
        )
    return found


def _beside(uri: str) -> str:
    """The grades of the run that drew these samples; none where it graded nothing."""
    graded = tracking.tag_of(uri, "step", "") in ("baseline", "evaluate")
    return uri.replace("/samples", "/grades.parquet") if graded else "none"


def _warning(model: str, truncation: Decoding) -> str:
    """A word where the model was trained on samples that were decoded otherwise than is said here."""
    params = tracking.run_of(model).data.params if model.startswith("runs:/") else {}
    samples = params.get("input.samples", params.get("samples", ""))
    if not samples.startswith("runs:/"):
        return ""
    manifest = json.loads(Path(tracking.local_path(f"{samples}/manifest.json")).read_text())
    trained_on = str(Decoding(**manifest["decoding"]))
    if trained_on == str(truncation):
        return ""
    return f"\n\n**Warning:** the model was trained on samples at {escaped(trained_on)}, not at {escaped(truncation)}."


def _is_plain(manifest: dict, base: str) -> bool:
    """Whether the base itself drew these samples, at temperature 1 without truncation."""
    decoding = Decoding(**manifest["decoding"] | {"max_tokens": UNTRUNCATED.max_tokens})
    return manifest["model"] == base and decoding == UNTRUNCATED


if __name__ == "__main__":
    tracking.execute(
        "diagnose", diagnose, model="train/model", base="lab/model", control="train/model", samples="baseline/samples"
    )

"""Register the trained model with its evidence, or record why not.

Reads:  verdict (latest: compare/verdict.json) and the comparison beside it.
Writes: a version of the registered model with its card: alias `champion` where the verdict says so and it beats the
        present champion on the same problems, `candidate` otherwise; or a refusal with its reason: registration.json.
Run:    mlflow run . -e register
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import mlflow
import numpy as np
from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion

from ssd import records, tracking
from ssd.grades import correct_matrix
from ssd.markdown import escaped
from ssd.records import Grade
from ssd.report import blocks, page
from ssd.report.text import percent, points
from ssd.stats import compare as comparing
from ssd.verdict.comparison import Comparison, read_files
from ssd.verdict.decision import PLAN
from ssd.verdict.evidence import StepRun

TRAINED = ("ssd", "ssd-same-decoding")  # arms of the checkpoint, the one whose decoding is recommended first
ALIASES = ("champion", "candidate")


def register(step: tracking.Step) -> None:
    uri, name = step.args.verdict, step.args.name
    beside = tracking.local_path(f"{uri.rpartition('/')[0]}/comparison.json")
    verdict, comparison = read_files(step.path("verdict"), beside)
    arm = next((arm for arm in TRAINED if arm in comparison.arms), None)
    known = mlflow.MlflowClient().search_registered_models(f"name = '{name}'")
    # A version is a number in a local store, and a text from a server.
    aliases = {alias: str(version) for alias, version in known[0].aliases.items()} if known else {}
    version = _registered(name, comparison.arms[arm].model) if known and arm else None
    reasons = list(verdict.reasons)
    outcome = {"promotion": verdict.promotion, "verdict": uri, "name": name}
    if verdict.promotion == "refused":
        withdrawn = _withdraw(name, version, aliases, ALIASES)
        reasons += [f"Version {version.version} is {alias} no longer." for alias in withdrawn]
        if version:
            mlflow.MlflowClient().set_model_version_tag(name, version.version, "verdict", "refused")
        step.log_json("registration.json", outcome | {"reasons": reasons})
        step.describe("register · refused", f"No version was registered.\n\n{_bullets(reasons)}", verdict="refused")
        return
    measured = comparison.arms[arm]
    compared = tracking.run_of(uri)
    runs = [tracking.step_run(compared), *tracking.lineage(f"runs:/{measured.run_id}")]
    base_model = compared.data.tags["ssd.base_model"]
    prepared = next((run for run in runs if run.step == "prepare"), None)
    content = page.Evidence(verdict, comparison, base_model, runs, overlap=prepared and tracking.overlap(prepared))
    version = _stored(
        name, measured.model, version, page.card(content, name, arm), _tags(verdict.promotion, comparison, arm, runs)
    )
    alias, because = _alias(name, aliases, version, verdict.promotion, comparison, arm)
    withdrawn = _withdraw(name, version, aliases, [other for other in ALIASES if other != alias])
    mlflow.MlflowClient().set_registered_model_alias(name, alias, version.version)
    reasons = [because, *(f"It is {other} no longer." for other in withdrawn), *reasons]
    step.log_json(
        "registration.json",
        outcome
        | {"alias": alias, "version": str(version.version), "model": measured.model, "evaluate": measured.run_id}
        | {"reasons": reasons},
    )
    step.describe(
        f"register · {name} v{version.version} as {alias}",
        f"[{name} version {version.version}](#/models/{name}/versions/{version.version}), `models:/{name}@{alias}`, is "
        f"{escaped(measured.model)}, to be decoded at {escaped(measured.decoding)}.\n\n{_bullets(reasons)}",
        verdict=verdict.promotion,
    )


def _registered(name: str, model: str) -> ModelVersion | None:
    """The version that holds the weights of `model`.

    A version without a digest, as an attempt leaves that was killed before it could tag it, is known by its weights.
    """
    from ssd import models  # torch and transformers take seconds to load

    local = tracking.local_path(model)
    digest = models.digest(local)
    versions = mlflow.MlflowClient().search_model_versions(f"name = '{name}'")
    for version in versions:
        if version.tags.get("digest") == digest:
            return version
    for version in versions:
        if "digest" not in version.tags:
            stored = Path(tracking.local_path(f"models:/{name}/{version.version}"), "model")
            if models.same_weights(local, str(stored)):
                return version
    return None


def _stored(name: str, model: str, version: ModelVersion | None, card: str, tags: dict[str, str]) -> ModelVersion:
    """The version of `model`, made where there is none, with its present card and tags.

    The tags come with the version in one call, and a logged model that a killed attempt left is taken up.
    """
    from ssd import models

    client, local = mlflow.MlflowClient(), tracking.local_path(model)
    tags = {"digest": models.digest(local)} | tags
    if version is None:
        query = f"tags.`ssd.digest` = '{tags['digest']}'"
        left = mlflow.search_logged_models([mlflow.active_run().info.experiment_id], query, output_format="list")
        model_id = next((each.model_id for each in left if each.status == LoggedModelStatus.READY), None)
        if model_id is None:
            model_id = mlflow.transformers.log_model(
                {"model": models.load_weights(local, "auto"), "tokenizer": models.load_tokenizer(local)},
                name="model",
                task="text-generation",
                pip_requirements=["transformers", "torch"],
                tags={"ssd.digest": tags["digest"]},
            ).model_id
        _add_files(model_id, local, card)
        version = mlflow.register_model(f"models:/{model_id}", name, tags=tags)
    else:
        _add_files(version.source.removeprefix("models:/"), local, card)
        for key, value in tags.items():
            client.set_model_version_tag(name, version.version, key, value)
    client.update_registered_model(name, "\n".join(f"- {page.MEANING[alias]}" for alias in ALIASES))
    first = card.index("**")  # a list of versions shows how the description begins: with the verdict
    client.update_model_version(
        name,
        version.version,
        blocks.cut(card[first:], page.MAX_VERSION_DESCRIPTION, "README.md of the version's folder"),
    )
    return version


def _add_files(model_id: str, model: str, card: str) -> None:
    """Put the card at the root, and the tokenizer beside the weights, where vLLM looks for it."""
    from ssd import models

    client = mlflow.MlflowClient()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "README.md").write_text(card)
        models.save_tokenizer(model, Path(folder) / "model")
        client.log_model_artifacts(model_id, folder)


def _tags(promotion: str, comparison: Comparison, arm: str, runs: Sequence[StepRun]) -> dict[str, str]:
    """The evidence: the run of each step, the digest of each data set, what was measured."""
    datasets = {f"dataset.{name.replace(' ', '.')}": digest for run in runs for name, digest in run.datasets.items()}
    return {
        "source": comparison.arms[arm].model,
        "arm": arm,
        "decoding": comparison.arms[arm].decoding,
        "pass_at_1": percent(comparison.pass_at_1[arm]),
        "verdict": promotion,
        **{f"run.{run.step}": run.run_id for run in runs},
        **datasets,
    }


def _alias(
    name: str, aliases: dict[str, str], version: ModelVersion, promotion: str, comparison: Comparison, arm: str
) -> tuple[str, str]:
    """The alias that `version` gets, and why: a champion gives way only to one that is better on the same problems."""
    if promotion != "champion":
        return promotion, f"The verdict is {promotion}."
    present = aliases.get("champion")
    if present is None:
        return "champion", "The verdict is champion, and there was none before."
    if present == str(version.version):
        return "champion", "It is the champion already."
    champion = mlflow.MlflowClient().get_model_version(name, present)
    told = f"The verdict is champion, and version {present} holds that place"
    as_arm = {(each.model, each.decoding): each.run_id for each in comparison.arms.values()}
    key = (champion.tags.get("source"), champion.tags.get("decoding"))
    other = as_arm.get(key, champion.tags.get("run.evaluate"))
    if other is None:
        return "candidate", f"{told} without saying by which evaluation, so the two cannot be compared."
    try:
        conditions = json.loads(tracking.run_of(f"runs:/{other}").data.tags["ssd.conditions"])
        comparing.check_comparable(comparison.conditions, conditions)
    except ValueError as error:
        return "candidate", f"{told}; the two cannot be paired: {error}."
    difference = comparing.paired(_correct(comparison.arms[arm].run_id), _correct(other))
    better = difference.ci_low > 0 and difference.p_value < PLAN.alpha
    told += f"; paired on the same {difference.n:,} problems, this one is {points(difference)} points against it"
    return ("champion", f"{told}: better.") if better else ("candidate", f"{told}: not shown to be better.")


def _correct(run_id: str) -> np.ndarray:
    return correct_matrix(records.read(tracking.local_path(f"runs:/{run_id}/grades.parquet"), Grade))[1]


def _withdraw(name: str, version: ModelVersion | None, aliases: dict[str, str], of: Sequence[str]) -> list[str]:
    """Take those aliases of `of` from `version` that it holds; what a later verdict does not bear out is not said."""
    withdrawn = [alias for alias in of if version is not None and aliases.get(alias) == str(version.version)]
    for alias in withdrawn:
        mlflow.MlflowClient().delete_registered_model_alias(name, alias)
    return withdrawn


def _bullets(reasons: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(reason)}" for reason in reasons)


if __name__ == "__main__":
    tracking.execute("register", register, verdict="compare/verdict.json")

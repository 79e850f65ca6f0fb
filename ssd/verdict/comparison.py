"""The arms side by side, as a record.

`compare_arms` makes a Comparison of graded arms; `comparison_of` reads it back from comparison.json.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ssd.stats import compare as comparing
from ssd.stats import estimate
from ssd.stats.compare import Difference
from ssd.stats.estimate import Estimate
from ssd.stats.power import Cost
from ssd.verdict.decision import PLAN, Plan, Verdict, from_json, verdict_of


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """An arm as an evaluate run measured it.

    `health` holds the rates and `tokens_per_sample`, `token_percentiles` the tokens a sample by `p10`, `p50`, ...;
    `spent` is what drawing its samples took, NaN where the engine could not know.
    """

    run_id: str
    model: str
    decoding: str
    health: dict[str, Estimate]
    token_percentiles: dict[str, float]
    spent: Cost


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """The arms on the same problems: pass@1, and paired differences to the base, also by source and by level.

    `p_outside_plan` has the p-values, Holm-adjusted among themselves, of the arms whose difference to the base is no
    claim of the plan. `conditions` is what all arms share, `chosen_on` the set that choices were made on.
    """

    arms: dict[str, Arm]
    pass_at_1: dict[str, Estimate]
    against_base: dict[str, Difference]
    p_outside_plan: dict[str, float]
    by_source: dict[str, dict[str, Difference]]
    by_level: dict[str, dict[str, Difference]]
    conditions: dict[str, Any]
    chosen_on: str


def compare_arms(
    arms: Mapping[str, Arm],
    correct: Mapping[str, NDArray],
    sources_P: Sequence[str],
    levels_P: Sequence[str],
    conditions: Mapping[str, Any],
    chosen_on: str,
    plan: Plan = PLAN,
) -> Comparison:
    """Compare every arm with "base"; `correct` holds correct_PS by arm, row i the same problem in all of them."""
    base_PS = correct["base"]
    others = {arm: correct_PS for arm, correct_PS in correct.items() if arm != "base"}
    against_base = {arm: comparing.paired(correct_PS, base_PS) for arm, correct_PS in others.items()}
    planned = {claim.arm for claim in plan.claims if claim.against == "base"}
    outside = [arm for arm in others if arm not in planned]
    adjusted = comparing.holm([against_base[arm].p_value for arm in outside]).tolist()
    by_source, by_level = (
        {arm: comparing.by_group(correct_PS, base_PS, groups_P) for arm, correct_PS in others.items()}
        for groups_P in (sources_P, levels_P)
    )
    return Comparison(
        dict(arms),
        {arm: estimate.mean(correct_PS) for arm, correct_PS in correct.items()},
        against_base,
        dict(zip(outside, adjusted)),
        by_source,
        by_level,
        dict(conditions),
        chosen_on,
    )


def read_files(verdict_json: str | os.PathLike, comparison_json: str | os.PathLike) -> tuple[Verdict, Comparison]:
    """The two files of a compare run; ValueError where the first holds no verdict or the second no comparison."""
    try:
        verdict = verdict_of(json.loads(Path(verdict_json).read_text()))
    except ValueError as error:  # of UTF-8 and JSON, too
        raise ValueError(f"verdict={verdict_json} holds no verdict; give verdict.json of a compare run") from error
    return verdict, comparison_of(json.loads(Path(comparison_json).read_text()))


def arm_of(content: Mapping[str, Any]) -> Arm:
    """The Arm that was written as the JSON object `content`."""
    health = {rate: from_json(Estimate, row) for rate, row in content["health"].items()}
    return Arm(**content | {"health": health, "spent": from_json(Cost, content["spent"])})


def comparison_of(content: Mapping[str, Any]) -> Comparison:
    """The Comparison that comparison.json holds; ValueError where it holds none."""
    try:
        arms = {name: arm_of(arm) for name, arm in content["arms"].items()}
        groups = {
            field: {
                arm: {group: from_json(Difference, row) for group, row in of.items()}
                for arm, of in content[field].items()
            }
            for field in ("by_source", "by_level")
        }
        return Comparison(
            arms,
            {arm: from_json(Estimate, row) for arm, row in content["pass_at_1"].items()},
            {arm: from_json(Difference, row) for arm, row in content["against_base"].items()},
            content["p_outside_plan"],
            conditions=content["conditions"],
            chosen_on=content["chosen_on"],
            **groups,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"comparison.json is not of this version ({error!r}); run -e compare again") from error

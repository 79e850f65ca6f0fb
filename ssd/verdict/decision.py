"""The analysis plan as data, and the verdict as a pure function of it: differences of arms in, Verdict out.

`docs/plan.md` says the same in prose; a test holds the two equal. A change of the plan is a new date, before the set
that the verdict is read from has been evaluated.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from ssd.stats import compare, power
from ssd.stats.compare import Difference
from ssd.stats.estimate import normal_quantile

Role = Literal["method", "decoding", "check"]
Word = Literal["better", "worse", "equivalent", "inconclusive"]
Promotion = Literal["champion", "candidate", "refused"]
Row = TypeVar("Row")


CHECK: dict[Word, str] = {
    "better": "The check failed, training as such helps",
    "worse": "The check failed, training as such hurts",
    "inconclusive": "The check did not fail, but an effect of training as such is not ruled out",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """That `arm` is better than `against`. Roles: is it the method, is it more than decoding, is the instrument sound.

    The claims of the first two roles are one family for Holm's adjustment; a check is read without it, since there
    a missed difference is the error to fear.
    """

    name: str
    role: Role
    arm: str
    against: str


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What was fixed before the final set was evaluated. `margin_points` bounds what counts as no difference."""

    date: str
    metric: str
    alpha: float
    power: float
    margin_points: float
    # Sets that choices are made on; the one nests in the other, so that a choice on either is a choice on both.
    selection_sets: tuple[str, ...]
    claims: tuple[Claim, ...]


PLAN = Plan(
    date="2026-11-21",
    metric="pass@1",
    alpha=0.05,
    power=0.80,
    margin_points=2.0,
    selection_sets=("val", "quick"),
    claims=(
        Claim("method", "method", "ssd-same-decoding", "base"),
        Claim("more-than-training", "method", "ssd-same-decoding", "control"),
        Claim("more-than-temperature", "decoding", "ssd", "base-tuned-temperature"),
        Claim("more-than-min-p", "decoding", "ssd", "base-tuned-min-p"),
        Claim("more-than-temperature-last", "decoding", "ssd", "base-tuned-temperature-last"),
        Claim("control", "check", "control", "base"),
    ),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """What the data say of one claim. `n_to_decide` problems would settle it; None where it is settled."""

    claim: Claim
    difference: Difference
    p_adjusted: float
    word: Word
    n_to_decide: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of the trained model, why, and every finding behind it.

    `absent` claims lacked an arm. `reading` counts the comparisons that have read this set, this one among them.
    """

    promotion: Promotion
    reasons: tuple[str, ...]
    findings: tuple[Finding, ...]
    absent: tuple[Claim, ...]
    evaluated_on: str
    plan: Plan
    reading: int = 1


def decide(
    differences: Mapping[tuple[str, str], Difference],
    *,
    chosen_on: Mapping[str, str],
    evaluated_on: str,
    num_earlier_reads: int = 0,
    plan: Plan = PLAN,
) -> Verdict:
    """Apply the plan to the differences that were measured.

    Parameters
    ----------
    differences
        `compare.paired` of pass@1, by (arm, against) as in `plan.claims`, all on the same problems and with intervals
        of confidence 1 - alpha. A pair whose arms were not run is left out.
    chosen_on
        The set (name or digest) that "decoding" and "checkpoint" were chosen on.
    evaluated_on
        The set, named in the same way, that `differences` come from.
    num_earlier_reads
        Comparisons with other arms that have read that set before. They change no finding, and the verdict says so.

    Returns
    -------
    Verdict
        "champion" where ssd is better than base, and than the control if that beat base, at the same decoding, and
        better than every tuned base that was run, at least one; "candidate" where the first holds without the second;
        "refused" otherwise.

    Raises
    ------
    ValueError
        If a choice was made on the evaluated set, a pair is not in the plan, or the differences disagree in n.
    """
    _check_selection(chosen_on, evaluated_on, plan)
    _check_differences(differences, plan)
    present = [claim for claim in plan.claims if (claim.arm, claim.against) in differences]
    family = [claim for claim in present if claim.role != "check"]
    adjusted = dict(zip(family, compare.holm([differences[c.arm, c.against].p_value for c in family]).tolist()))
    findings = {
        claim.name: _find(claim, differences[claim.arm, claim.against], adjusted.get(claim), len(family), plan)
        for claim in present
    }
    promotion, reasons = _promote(findings, plan)
    absent = tuple(claim for claim in plan.claims if claim.name not in findings)
    reasons += [f"Not measured: {claim.arm} against {claim.against} ({claim.name})." for claim in absent]
    reading = num_earlier_reads + 1
    if num_earlier_reads:
        reasons.append(
            f"Reading {reading} of this set: {num_earlier_reads} other "
            f"comparison{'s have' if num_earlier_reads > 1 else ' has'} read it before, so it was not read once, as "
            "the plan asks, and no p-value here allows for that."
        )
    return Verdict(promotion, tuple(reasons), tuple(findings.values()), absent, evaluated_on, plan, reading)


def _check_selection(chosen_on: Mapping[str, str], evaluated_on: str, plan: Plan) -> None:
    for choice in ("decoding", "checkpoint"):
        if not chosen_on.get(choice):
            raise ValueError(f"chosen_on does not say which set the {choice} was chosen on; give its name or digest")
    if not evaluated_on:
        raise ValueError("evaluated_on is empty; give the name or digest of the evaluated set")
    for choice, chosen in chosen_on.items():
        if chosen == evaluated_on or {chosen, evaluated_on} <= set(plan.selection_sets):
            raise ValueError(
                f"the {choice} was chosen on {chosen!r}, which shares problems with the evaluated set "
                f"{evaluated_on!r}; evaluate on a set that no choice has seen"
            )


def _check_differences(differences: Mapping[tuple[str, str], Difference], plan: Plan) -> None:
    planned = {(claim.arm, claim.against) for claim in plan.claims}
    for pair, difference in differences.items():
        if pair not in planned:
            raise ValueError(f"{pair} is not a claim of the plan of {plan.date}; its pairs are {sorted(planned)}")
        if difference.test == "score" or abs(difference.value) > 1:
            raise ValueError(f"the difference of {pair} is not one of compare.paired, as a proportion: {difference}")
    sizes = {pair: difference.n for pair, difference in differences.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the differences come from different numbers of problems ({sizes}); evaluate all arms alike")


def _find(claim: Claim, difference: Difference, p_adjusted: float | None, family_size: int, plan: Plan) -> Finding:
    if p_adjusted is None:
        p_adjusted, family_size = difference.p_value, 1
    word = _word(difference, p_adjusted, plan)
    n_to_decide = _n_to_decide(difference, family_size, plan) if word == "inconclusive" else None
    return Finding(claim, difference, p_adjusted, word, n_to_decide)


def _word(difference: Difference, p_adjusted: float, plan: Plan) -> Word:
    # Test and interval must agree, so that no finding is called better beside an interval that reaches 0.
    if p_adjusted < plan.alpha and difference.ci_low > 0:
        return "better"
    if p_adjusted < plan.alpha and difference.ci_high < 0:
        return "worse"
    if compare.equivalent(difference, plan.margin_points / 100):
        return "equivalent"
    return "inconclusive"


def _n_to_decide(difference: Difference, family_size: int, plan: Plan) -> int | None:
    """Problems at which the observed difference, were it the true one, would be called different or equivalent.

    The spread is read from the interval, not from the standard error, which is 0 where no problem differed.
    """
    half = (difference.ci_high - difference.ci_low) / 2
    if math.isnan(half):
        return None
    variance = difference.n * (half / normal_quantile(1 - plan.alpha)) ** 2
    value, margin, sizes = abs(difference.value), plan.margin_points / 100, []
    if value > 0:  # Holm's hardest step is alpha over the size of the family
        hardest = plan.alpha / family_size
        sizes.append(power.sample_size_paired(variance, 0.0, 0.0, value, alpha=hardest, power=plan.power))
    if value < margin:
        sizes.append(power.sample_size_equivalent(variance, value, margin, plan.alpha, plan.power))
    return max(min(sizes), difference.n + 1)


def _promote(findings: Mapping[str, Finding], plan: Plan) -> tuple[Promotion, list[str]]:
    reasons = []
    control, beyond = findings.get("control"), findings.get("more-than-training")
    if control is None:
        reasons.append("Without a control arm a gain over base cannot be told from the effect of training as such.")
    else:
        within = compare.equivalent(control.difference, plan.margin_points / 100)
        moved = "The check passed, training as such moves the model by less than the margin"
        reasons.append(f"{moved if within else CHECK[control.word]}: {_sentence(control)}")

    method = findings.get("method")
    if method is None:
        return "refused", ["The method was not compared with base at the same decoding.", *reasons]
    reasons.insert(0, _sentence(method))
    if method.word != "better":
        return "refused", reasons
    if control is not None and control.word == "better":
        if beyond is None or beyond.word != "better":
            seen = _sentence(beyond) if beyond else "ssd-same-decoding was not compared with control."
            return "refused", [*reasons, f"The gain is not shown to exceed that of training as such: {seen}"]
        reasons.append(f"The gain exceeds that of training as such: {_sentence(beyond)}")

    tuned = [finding for finding in findings.values() if finding.claim.role == "decoding"]
    reasons += [_sentence(finding) for finding in tuned]
    unbeaten = [finding.claim.against for finding in tuned if finding.word != "better"]
    if not tuned:
        return "candidate", [*reasons, "No tuned base was run, so a better decoding may do as well without training."]
    if unbeaten:
        return "candidate", [*reasons, f"Not shown to be better than {', '.join(unbeaten)}, which costs no training."]
    return "champion", reasons


def _sentence(finding: Finding) -> str:
    sentence = (
        f"{finding.claim.arm} against {finding.claim.against}: {finding.word}, {_points(finding.difference)}, "
        f"n = {finding.difference.n}, p = {finding.p_adjusted:.2g}"
    )
    if finding.claim.role != "check":
        sentence += " after Holm"
    return sentence + (f"; about {finding.n_to_decide} problems would decide." if finding.n_to_decide else ".")


def _points(difference: Difference) -> str:
    value, low, high = (f"{100 * x:+.1f}" for x in (difference.value, difference.ci_low, difference.ci_high))
    return f"{value} points [{low}, {high}]"


def what_would_change(verdict: Verdict) -> tuple[str, ...]:
    """What would lead the plan to another promotion, from what was found and what was not measured."""
    findings = {finding.claim.name: finding for finding in verdict.findings}
    method, control = findings.get("method"), findings.get("control")
    tuned = [finding for finding in verdict.findings if finding.claim.role == "decoding"]
    changes = []
    if method is None:
        changes.append("The method itself was not compared with base at the same decoding: run that arm.")
    elif method.word != "better":
        changes.append(f"To be a candidate, {_gap(method)}.")
    elif verdict.promotion == "refused":
        changes.append("To be a candidate, the gain would have to be larger than that of the control, by its own test.")
    if verdict.promotion == "candidate":
        changes += [f"To be champion, {_gap(finding)}." for finding in tuned if finding.word != "better"]
        if not tuned:
            changes.append("To be champion, ssd would have to beat at least one tuned base; none was run.")
    if verdict.promotion == "champion":
        nearest = min(tuned, key=lambda finding: finding.difference.ci_low)
        changes.append(
            f"An untrained model decoded better than any that was tried. The nearest is {nearest.claim.against}: "
            f"{_points(nearest.difference)}."
        )
    if verdict.promotion != "refused" and control is None:
        changes.append("A control arm that gains as much: then training as such would explain the gain.")
    changes += [
        f"The claim that {claim.arm} is better than {claim.against}, which was not measured."
        for claim in verdict.absent
        if claim.role == "decoding"
    ]
    changes.append(
        "Another seed of the training: one checkpoint stands here for the method, and no interval holds the luck of "
        "its samples and batches."
    )
    return tuple(changes)


def _gap(finding: Finding) -> str:
    claim = finding.claim
    gap = f"{claim.arm} would have to beat {claim.against}, and the difference is {_points(finding.difference)}"
    if finding.n_to_decide:
        return f"{gap}: inconclusive; about {finding.n_to_decide:,} problems would decide, were it the true one"
    return f"{gap}: {finding.word}; more problems would not turn it, another training or decoding might"


def verdict_of(content: Mapping[str, Any]) -> Verdict:
    """The Verdict that verdict.json holds; ValueError where it holds none."""
    try:
        claims = {row["name"]: Claim(**row) for row in content["plan"]["claims"]}
        plan = content["plan"] | {
            "claims": tuple(claims.values()),
            "selection_sets": tuple(content["plan"]["selection_sets"]),
        }
        findings = tuple(
            Finding(**row | {"claim": Claim(**row["claim"]), "difference": from_json(Difference, row["difference"])})
            for row in content["findings"]
        )
        absent = tuple(Claim(**row) for row in content["absent"])
        given = {"reasons": tuple(content["reasons"]), "findings": findings, "absent": absent, "plan": Plan(**plan)}
        return Verdict(**content | given)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no verdict of docs/plan.md ({error!r})") from error


def from_json(kind: type[Row], content: Mapping[str, Any]) -> Row:
    """`content` as the named tuple `kind`; null becomes NaN."""
    return kind(**{name: math.nan if value is None else value for name, value in content.items()})

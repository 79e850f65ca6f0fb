"""The verdict follows the plan, for every pattern of findings a person may meet."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from ssd import records
from ssd.stats.compare import Difference
from ssd.verdict import decision
from ssd.verdict.decision import PLAN, decide

TUNED = ("base-tuned-temperature", "base-tuned-min-p", "base-tuned-temperature-last")
CHOSEN = {"decoding": "quick", "checkpoint": "val"}


def difference(points, se_points=1.0, n=1000):
    """A difference whose test and interval are those of the normal distribution."""
    value, se = points / 100, se_points / 100
    p_value = float(2 * norm.sf(abs(value) / se))
    return Difference(value, se, value - 1.96 * se, value + 1.96 * se, p_value, n, "sign-flip")


def measured(method=5.0, beyond=5.0, control=0.0, tuned=(5.0, 5.0, 5.0)):
    pairs = {
        ("ssd-same-decoding", "base"): method,
        ("ssd-same-decoding", "control"): beyond,
        ("control", "base"): control,
        **{("ssd", arm): points for arm, points in zip(TUNED, tuned)},
    }
    return {pair: difference(points) for pair, points in pairs.items() if points is not None}


def verdict(**points):
    return decide(measured(**points), chosen_on=CHOSEN, evaluated_on="final")


def words(result):
    return {finding.claim.name: finding.word for finding in result.findings}


def test_better_than_base_and_every_tuned_base_is_champion():
    result = verdict()
    assert result.promotion == "champion"
    assert words(result)["method"] == "better"
    assert "ssd-same-decoding against base: better, +5.0 points [+3.0, +7.0], n = 1000" in result.reasons[0]


@pytest.mark.parametrize("unbeaten", TUNED)
@pytest.mark.parametrize("points", [-5.0, 0.0, 1.0])
def test_one_tuned_base_that_is_not_beaten_makes_a_candidate_and_is_named(unbeaten, points):
    result = verdict(tuned=tuple(points if arm == unbeaten else 5.0 for arm in TUNED))
    assert result.promotion == "candidate"
    assert result.reasons[-1] == f"Not shown to be better than {unbeaten}, which costs no training."
    assert any(f"against {unbeaten}:" in reason and f"{points:+.1f} points" in reason for reason in result.reasons)


@pytest.mark.parametrize("points, word", [(-5.0, "worse"), (0.0, "equivalent"), (1.0, "inconclusive")])
def test_without_the_method_better_than_base_promotion_is_refused(points, word):
    result = verdict(method=points)
    assert result.promotion == "refused"
    assert words(result)["method"] == word


def test_the_ports_own_interval_is_inconclusive_and_says_how_many_problems_would_decide():
    # +1.90 [-0.20, +4.10] on 1,000 problems: SE 1.10, so 2.8016^2 (1.10 / 1.90)^2 1000 problems for that one claim.
    ported = Difference(0.019, 0.011, -0.0026, 0.0406, 0.084, 1000, "sign-flip")
    result = decide({("ssd-same-decoding", "base"): ported}, chosen_on=CHOSEN, evaluated_on="final")
    assert result.promotion == "refused"
    assert result.findings[0].word == "inconclusive"
    assert result.findings[0].n_to_decide == pytest.approx(2.8016**2 * (1.10 / 1.90) ** 2 * 1000, rel=0.01)


def test_a_small_difference_is_decided_by_showing_equivalence_instead():
    result = decide({("control", "base"): difference(0.1, se_points=2)}, chosen_on=CHOSEN, evaluated_on="final")
    se_points = 2 * math.sqrt(1000 / result.findings[0].n_to_decide)
    measured_points = np.random.default_rng(0).normal(0.1, se_points, 100_000)
    within = np.abs(measured_points) + 1.96 * se_points < 2
    assert within.mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    "odd", [Difference(0.05, 0.01, 0.03, 0.07, 1e-6, 2000, "score"), Difference(5, 1, 3, 7, 1e-6, 1000, "sign-flip")]
)
def test_an_unpaired_difference_and_one_in_points_are_refused(odd):
    with pytest.raises(ValueError, match=r"not one of compare\.paired, as a proportion"):
        decide({("ssd-same-decoding", "base"): odd}, chosen_on=CHOSEN, evaluated_on="final")


def test_arms_that_agreed_on_every_problem_still_get_a_finite_n_to_decide():
    agreed = Difference(0.0, 0.0, -0.03, 0.03, 1.0, 100, "mcnemar-exact")
    finding = decide({("control", "base"): agreed}, chosen_on=CHOSEN, evaluated_on="final").findings[0]
    assert finding.word == "inconclusive" and finding.n_to_decide > 100


def test_p_values_are_adjusted_over_the_claims_but_not_for_the_check():
    result = verdict(method=2.3, control=2.3)
    by_name = {finding.claim.name: finding for finding in result.findings}
    raw = difference(2.3).p_value
    assert raw < PLAN.alpha
    # The four other claims have smaller p-values, so Holm multiplies this one, the largest, by 1.
    assert by_name["method"].p_adjusted == pytest.approx(raw)
    assert by_name["control"].p_adjusted == raw
    three_weak = verdict(method=2.3, beyond=2.3, tuned=(2.3, 5.0, 5.0))
    assert {f.claim.name: f.p_adjusted for f in three_weak.findings}["method"] == pytest.approx(3 * raw)
    assert words(three_weak)["method"] == "inconclusive" and three_weak.promotion == "refused"


def test_a_control_within_the_margin_passes_the_check_though_it_differs_from_base():
    within = measured() | {("control", "base"): difference(0.9, se_points=0.3)}
    beyond = measured() | {("control", "base"): difference(1.7, se_points=0.3)}
    passed, failed = (decide(d, chosen_on=CHOSEN, evaluated_on="final") for d in (within, beyond))
    assert any("The check passed" in reason and "better" in reason for reason in passed.reasons)
    assert any("The check failed" in reason for reason in failed.reasons)


def test_a_control_that_beats_base_must_itself_be_beaten():
    assert verdict(control=5.0, beyond=4.0).promotion == "champion"
    refused = verdict(control=5.0, beyond=0.0)
    assert refused.promotion == "refused"
    assert "The gain is not shown to exceed that of training as such" in refused.reasons[-1]
    assert verdict(control=5.0, beyond=None).promotion == "refused"


def test_a_sound_control_does_not_ask_for_a_gain_over_it():
    assert verdict(control=0.0, beyond=1.0).promotion == "champion"


def test_missing_arms_leave_their_claims_out_and_are_said_to_be_missing():
    result = verdict(beyond=None, control=None, tuned=(5.0, None, None))
    assert result.promotion == "champion"
    assert [claim.name for claim in result.absent] == [
        "more-than-training",
        "more-than-min-p",
        "more-than-temperature-last",
        "control",
    ]
    assert "Not measured: control against base (control)." in result.reasons
    assert any("Without a control arm" in reason for reason in result.reasons)


def test_without_any_tuned_base_the_best_promotion_is_candidate():
    result = verdict(tuned=(None, None, None))
    assert result.promotion == "candidate"
    assert any("No tuned base was run" in reason for reason in result.reasons)


def test_without_base_there_is_nothing_to_promote():
    assert verdict(method=None).promotion == "refused"
    assert decide({}, chosen_on=CHOSEN, evaluated_on="final").promotion == "refused"


def test_a_test_without_its_interval_is_not_better():
    odd = Difference(0.02, 0.01, -0.001, 0.041, 0.04, 1000, "sign-flip")
    result = decide({("ssd-same-decoding", "base"): odd}, chosen_on=CHOSEN, evaluated_on="final")
    assert result.findings[0].word == "inconclusive"


@pytest.mark.parametrize(
    "chosen_on, evaluated_on",
    [
        ({"decoding": "final", "checkpoint": "val"}, "final"),
        ({"decoding": "3fa9", "checkpoint": "77c0"}, "77c0"),
        ({"decoding": "quick", "checkpoint": "quick"}, "val"),
        ({"decoding": "val", "checkpoint": "val"}, "quick"),
    ],
)
def test_selection_on_the_evaluated_set_is_refused(chosen_on, evaluated_on):
    with pytest.raises(ValueError, match="which shares problems with the evaluated set"):
        decide(measured(), chosen_on=chosen_on, evaluated_on=evaluated_on)


def test_a_choice_without_its_set_is_refused():
    with pytest.raises(ValueError, match="which set the checkpoint was chosen on"):
        decide(measured(), chosen_on={"decoding": "quick"}, evaluated_on="final")


def test_a_pair_outside_the_plan_is_refused():
    with pytest.raises(ValueError, match="is not a claim of the plan of 2026-11-21"):
        decide({("ssd", "base"): difference(5)}, chosen_on=CHOSEN, evaluated_on="final")


def test_differences_on_other_problems_are_refused():
    mixed = measured() | {("control", "base"): difference(0, n=300)}
    with pytest.raises(ValueError, match="different numbers of problems"):
        decide(mixed, chosen_on=CHOSEN, evaluated_on="final")


def test_the_verdict_survives_json_with_null_for_what_is_undefined():
    alone = Difference(0.0, float("nan"), float("nan"), float("nan"), 1.0, 1, "sign-flip")
    result = decide({("control", "base"): alone}, chosen_on=CHOSEN, evaluated_on="final")
    loaded = json.loads(json.dumps(records.jsonable(result), allow_nan=False))
    assert loaded["findings"][0]["difference"] == {
        "value": 0.0,
        "se": None,
        "ci_low": None,
        "ci_high": None,
        "p_value": 1.0,
        "n": 1,
        "test": "sign-flip",
    }
    assert loaded["findings"][0]["word"] == "inconclusive"
    assert loaded["plan"]["date"] == "2026-11-21" and loaded["promotion"] == "refused"


def test_the_plan_in_prose_and_the_plan_in_code_are_the_same():
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| ([\w-]+) \| ([\w-]+) \| ([\w-]+) \|$", text, re.MULTILINE)[1:]
    assert [row for row in rows if set(row[0]) != {"-"}] == [dataclasses.astuple(claim) for claim in PLAN.claims]
    assert re.search(r"Frozen on (\S+),", text)[1] == PLAN.date
    assert re.search(r"primary metric is (\S+):", text)[1] == PLAN.metric
    assert float(re.search(r"alpha = ([\d.]+\d)", text)[1]) == PLAN.alpha
    assert float(re.search(r"confidence ([\d.]+\d)", text)[1]) == 1 - PLAN.alpha
    assert float(re.search(r"power = ([\d.]+\d)", text)[1]) == PLAN.power
    assert float(re.search(r"margin = ([\d.]+) points", text)[1]) == PLAN.margin_points
    selection = re.search(r"are chosen on `(\w+)` and `(\w+)`", text)
    assert set(selection.groups()) == set(PLAN.selection_sets)


def test_every_promotion_and_word_is_explained_in_the_plan():
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    for word in (*decision.Word.__args__, *decision.Promotion.__args__):
        assert f"**{word}**" in text

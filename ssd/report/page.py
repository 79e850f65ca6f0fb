"""What a person reads: the report as one HTML page and as Markdown, the page of a compare run, the card of a model.

Records and estimates in, sections of blocks or text out.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ssd import records
from ssd.markdown import escaped
from ssd.report import figures
from ssd.report.blocks import Block, Bullets, Link, Picture, Section, Table, Text, Verbatim, cut, markdown, png
from ssd.report.text import p_value, percent, points
from ssd.verdict.comparison import Comparison
from ssd.verdict.decision import Finding, Promotion, Verdict, what_would_change
from ssd.verdict.evidence import Checkpoint, Overlap, Shown, StepRun

MAX_SHOWN_CHARS = 1200  # of a sample, half from its beginning and half from its end
MAX_RUN_DESCRIPTION = 8000  # characters, MLflow's
MAX_VERSION_DESCRIPTION = 5000  # the registry's
QUESTION = (
    "Does a language model get better at competition math by training on its own samples, checking no answer "
    "(simple self-distillation)? Better than it already is at the same decoding, and better than the same model "
    "untrained but well decoded? The measure is pass@1: the share of problems' samples that are right, in percent."
)
MEANING: dict[Promotion, str] = {
    "champion": (
        "“champion” means: better than the untrained model at the same decoding, and better than the untrained model "
        "at every tuned decoding that was run."
    ),
    "candidate": (
        "“candidate” means: training helped at the same decoding, but the untrained model at another decoding is as "
        "good, better or not told apart, or none was run. Changing the decoding costs no training."
    ),
    "refused": (
        "“refused” means: it was not shown that self-distillation makes the model better than it was at the same "
        "decoding, beyond what training as such does."
    ),
}
INTERVALS = (
    "Every interval is for 95% confidence and over problems, for the one checkpoint that was trained: it says how far "
    "other problems like these could move the figure, not how far another seed of the training could."
)
LAB = (
    "The model is the lab's: a small one, trained in this experiment on generated problems with a known effect. What "
    "is found here shows that the instrument works; it is no evidence about any larger model or about real contests."
)
ARMS = {
    "base": "the untrained model at its recommended decoding",
    "base-tuned-temperature": "untrained, the best temperature, top-k and top-p that the search found",
    "base-tuned-min-p": "untrained, the best min-p and penalties that the search found",
    "base-tuned-temperature-last": "untrained, the best truncation before temperature that the search found",
    "ssd": "trained on its own samples, at the best temperature, top-k and top-p found for it",
    "ssd-same-decoding": "the same trained checkpoint, decoded as base",
    "control": "trained alike on samples without truncation, decoded as base: the effect of training as such",
}
OTHER = "an arm outside of the plan, shown and not decided by"
HEALTH = ("think_close_rate", "boxed_answer_rate", "length_stop_rate", "timed_out_rate")


@dataclasses.dataclass(frozen=True, slots=True)
class Evidence:
    """All that the report says; what was not measured is None or empty, and its section is left out.

    `power` is power.json and `power_png` the figure beside it, `runs` the lineage of the verdict, `commands` what gives
    it again, `registration` what became of the checkpoint in the registry.
    """

    verdict: Verdict
    comparison: Comparison
    base_model: str
    runs: Sequence[StepRun]
    commands: Sequence[str] = ()
    power: Mapping[str, Any] | None = None
    power_png: bytes = b""
    overlap: Overlap | None = None
    checkpoints: Sequence[Checkpoint] = ()
    samples: Sequence[Shown] = ()
    registration: str = ""

    @property
    def in_lab(self) -> bool:
        """Whether the model was made by the step `lab`, so that nothing here is about a language model at large."""
        return any(run.step == "lab" for run in self.runs)


def sections(evidence: Evidence) -> list[Section]:
    """The report, in the order in which a person needs it."""
    verdict, comparison = evidence.verdict, evidence.comparison
    found = [
        Section("The question", [Text(QUESTION), Text(_setting(evidence))]),
        Section(
            f"The verdict{' in the lab' * evidence.in_lab}: {verdict.promotion}",
            [
                Text("In the lab: " * evidence.in_lab + sentence(verdict), loud=True),
                Text(MEANING[verdict.promotion]),
                Text(INTERVALS),
                Text(_reading(verdict)),
                *([Text(evidence.registration)] if evidence.registration else []),
                Text("By the plan:"),
                Bullets(verdict.reasons),
            ],
        ),
        Section("What would change it", [Bullets(what_would_change(verdict))]),
        Section("Arms", _arms(comparison)),
        Section("Differences", _differences(evidence)),
        Section("Accuracy against training step", _by_step(evidence.checkpoints)),
        Section("What such a comparison can detect", _power(evidence)),
        Section("Health", [Text(_HEALTH), _health(comparison)]),
        Section("Lengths", _lengths(comparison)),
        Section("Overlap removed", _overlap(evidence.overlap)),
        Section("Cost", _cost(evidence)),
        Section("A few samples", _samples(evidence.samples)),
        Section("Runs", _runs(evidence.runs)),
        Section("To get it again", [Verbatim("In a clone of the repository:", "\n".join(evidence.commands))]),
    ]
    return [section for section in found if section.blocks]


def sentence(verdict: Verdict) -> str:
    """The verdict in one sentence, with its interval."""
    findings = {finding.claim.name: finding for finding in verdict.findings}
    method = findings.get("method")
    if method is None:
        return "Nothing can be said of self-distillation: it was not compared with the base at the same decoding."
    n = f"n = {method.difference.n:,} problems of {verdict.evaluated_on}"
    gain = f"{points(method.difference)} points of pass@1 against the untrained model at the same decoding ({n})"
    tuned = [finding for finding in verdict.findings if finding.claim.role == "decoding"]
    if verdict.promotion == "champion":
        least = min(tuned, key=lambda finding: finding.difference.value)
        return (
            f"Self-distillation made the model better, by {gain}, and better than the untrained model at every tuned "
            f"decoding that was run, by {points(least.difference)} points at the least."
        )
    if verdict.promotion == "candidate":
        unbeaten = [f"{points(f.difference)} against {f.claim.against} ({f.word})" for f in tuned if f.word != "better"]
        said = "but it was not compared with the untrained model at any tuned decoding."
        if unbeaten:
            said = f"but is not shown to beat the untrained model decoded otherwise: {_listed(unbeaten)}."
        return f"Self-distillation made the model better, by {gain}, {said}"
    if method.word == "better":
        return f"The trained model is better, by {gain}, but not shown to gain more than training as such does."
    says = {"worse": "made the model worse", "equivalent": "made no difference that counts"}
    return f"Self-distillation {says.get(method.word, 'is not shown to make the model better')}: {gain}, {method.word}."


def comparison(found: Comparison, verdict: Verdict) -> str:
    """Markdown, the description of a compare run: verdict, arms, claims, health, and differences by group."""
    n = found.pass_at_1["base"].n
    head = (
        f"**{escaped(verdict.promotion)}** · read on {escaped(verdict.evaluated_on)}, {n:,} problems, by the plan of "
        f"{escaped(verdict.plan.date)}"
    )
    parts = [
        Section("", [Text(sentence(verdict)), Text(_reading(verdict)), Bullets(verdict.reasons)]),
        Section("Arms", _arms(found)),
        Section("Claims of the plan", [_claims(verdict.findings)]),
        Section("Health and cost", [_health(found)]),
        Section("Outside of the plan", _outside(found)),
        Section("Minus base by group, unadjusted", _groups(found)),
    ]
    text = head + "\n\n" + markdown("", [part for part in parts if part.blocks], level=4)
    return cut(text, MAX_RUN_DESCRIPTION, "comparison.json and in the report")


def card(evidence: Evidence, name: str, arm: str) -> str:
    """Markdown, the card of the registered model `name`: the checkpoint measured as `arm`, `evidence.runs` its own."""
    found, verdict = evidence.comparison, evidence.verdict
    by_step = {run.step: run for run in evidence.runs}
    train, sample, prepare = (by_step.get(step) for step in ("train", "sample", "prepare"))
    measured = found.arms[arm]
    parts = [
        Section(
            "Verdict",
            [
                Text(f"{verdict.promotion}. {'In the lab: ' * evidence.in_lab}{sentence(verdict)}", loud=True),
                Text(MEANING[verdict.promotion]),
                Text(_reading(verdict)),
            ],
        ),
        Section(
            "Use",
            [
                Text(
                    f"Decode at {measured.decoding}, with the prompt of the experiment and at most "
                    f"{found.conditions['max_tokens']:,} tokens. FOLDER is what mlflow.artifacts.download_artifacts "
                    "gives for the version; weights, config and tokenizer lie in its folder model."
                ),
                Verbatim(
                    "With MLflow, or with vLLM:",
                    f'mlflow.transformers.load_model("models:/{name}/VERSION")\nvllm serve FOLDER/model',
                ),
                Verbatim("The prompt, as the user's message:", _prompt(found)),
            ],
        ),
        Section(
            "Training",
            [
                _params("Trained on the samples below with plain cross-entropy; no answer was looked at.", train),
                _params("Sampled from the untrained model, truncated so that the tail is cut off:", sample),
                Text(f"The untrained model: {evidence.base_model}."),
            ],
        ),
        Section("Data", [_params("Problem sets, distinct from each other:", prepare), *_overlap(evidence.overlap)]),
        Section("Results", [Text(_setting(evidence)), *_arms(found), _claims(verdict.findings), _health(found)]),
        Section(
            "Limits",
            [
                Bullets(
                    [INTERVALS, *what_would_change(verdict), "Measured on competition math alone, with this prompt."]
                )
            ],
        ),
        Section("Runs", _runs(evidence.runs)[1:]),
    ]
    return markdown(f"{name}: a model trained on its own samples", parts)


def _setting(evidence: Evidence) -> str:
    comparison, n = evidence.comparison, evidence.comparison.pass_at_1["base"].n
    model = f"The model is {evidence.base_model}."
    if evidence.in_lab:
        model = LAB
    return (
        f"{model} All arms were decoded and graded by the same code on the same {n:,} "
        f"problems of {evidence.verdict.evaluated_on}, with the engine {comparison.conditions['engine']} and at most "
        f"{comparison.conditions['max_tokens']:,} tokens a sample. Decodings and checkpoints were chosen on "
        f"{comparison.chosen_on}, by the plan of {evidence.verdict.plan.date}."
    )


def _reading(verdict: Verdict) -> str:
    if verdict.reading == 1:
        return f"No other comparison of this experiment had read the set {verdict.evaluated_on} before."
    return (
        f"This was reading {verdict.reading} of the set {verdict.evaluated_on} in this experiment, not the first: "
        f"{verdict.reading - 1} other comparison{'s' * (verdict.reading > 2)} had seen it before, and who looks often "
        "finds something by luck. Only a fresh final set can confirm it."
    )


def _arms(found: Comparison) -> list[Block]:
    rows = []
    for name, arm in found.arms.items():
        difference = points(found.against_base[name]) if name in found.against_base else ""
        rows.append([name, percent(found.pass_at_1[name]), difference, arm.decoding])
    n = found.pass_at_1["base"].n
    header = ["arm", f"pass@1, n = {n:,} [95%]", "minus base, paired, points [95%]", "decoding"]
    return [Table(header, rows), Bullets([f"{arm}: {ARMS.get(arm, OTHER)}." for arm in found.arms])]


def _claims(findings: Sequence[Finding]) -> Table:
    rows = []
    for finding in findings:
        more = f" ({finding.n_to_decide:,} problems would decide)" if finding.n_to_decide else ""
        adjusted = p_value(finding.p_adjusted) + (" (a check, unadjusted)" if finding.claim.role == "check" else "")
        pair = f"{finding.claim.arm} - {finding.claim.against}"
        rows.append([pair, points(finding.difference), adjusted, finding.word + more])
    return Table(["claim of the plan", "paired difference, points [95%]", "Holm's p", "finding"], rows)


def _outside(found: Comparison) -> list[Block]:
    rows = [
        [f"{arm} - base", points(found.against_base[arm]), p_value(p_adjusted)]
        for arm, p_adjusted in found.p_outside_plan.items()
    ]
    if not rows:
        return []
    return [
        Text("To look at, not to decide by: differences that are no claim of the plan, Holm's p among these alone."),
        Table(["outside of the plan", "paired difference, points [95%]", "Holm's p"], rows),
    ]


def _groups(found: Comparison) -> list[Table]:
    """Differences to the base by source and by level, each where there are several."""
    tables = []
    for name, of_arms, order in (("source", found.by_source, str), ("level", found.by_level, records.difficulty)):
        groups = sorted(next(iter(of_arms.values())), key=order)
        if len(groups) > 1:
            rows = []
            for group in groups:
                differences = [of_group[group] for of_group in of_arms.values()]
                rows.append([group or "none", f"{differences[0].n:,}", *map(points, differences)])
            tables.append(Table([name, "problems", *of_arms], rows))
    return tables


def _differences(evidence: Evidence) -> list[Block]:
    found, verdict = evidence.comparison, evidence.verdict
    seen = [
        f"{arm} {percent(estimate)}"
        + (f", {points(found.against_base[arm])} points against base" if arm in found.against_base else "")
        for arm, estimate in found.pass_at_1.items()
    ]
    claims = [f"{f.claim.arm} minus {f.claim.against} {points(f.difference)}, {f.word}" for f in verdict.findings]
    blocks: list[Block] = [
        Picture(
            "arms",
            png(figures.forest(found.pass_at_1, found.against_base)),
            f"Forest plot of pass@1 and its paired difference to base: {'; '.join(seen)}.",
        ),
        Picture(
            "claims",
            png(figures.claims(verdict.findings)),
            f"Forest plot of the plan's claims, in points: {'; '.join(claims)}.",
        ),
        _claims(verdict.findings),
        *_outside(found),
    ]
    if groups := _groups(found):
        note = (
            "Each arm minus base, by group of problems, paired, points [95%], unadjusted: to look at, not to decide by."
        )
        levels = " A level is the source's own label, and does not mean the same in two sources."
        blocks += [Text(note + levels * (len(next(iter(found.by_level.values()))) > 1)), *groups]
    return blocks


def _by_step(checkpoints: Sequence[Checkpoint]) -> list[Block]:
    if not checkpoints:
        return []
    ordered = sorted(checkpoints, key=lambda row: (row.arm, row.split, row.decoding, row.step))
    lines: dict[str, list[Checkpoint]] = {}
    for row in ordered:
        lines.setdefault(f"{row.arm} on {row.split} at {row.decoding}", []).append(row)
    seen = [
        f"{label}: " + ", ".join(f"step {row.step} {percent(row.pass_at_1)}" for row in of)
        for label, of in lines.items()
    ]
    figure = figures.by_step({label: {row.step: row.pass_at_1 for row in of} for label, of in lines.items()})
    rows = [[label, str(row.step), f"{row.pass_at_1.n:,}", percent(row.pass_at_1)] for label, of in lines.items()
            for row in of]  # fmt: skip
    return [
        Text("A checkpoint that is chosen by such a curve is no result on the problems of the curve."),
        Picture("by_step", png(figure), f"pass@1 against training step. {'; '.join(seen)}."),
        Table(["checkpoints", "step", "problems", "pass@1 [95%]"], rows),
    ]


def _power(evidence: Evidence) -> list[Block]:
    if not evidence.power:
        return []
    power, parts = evidence.power, evidence.power["components"]
    rows = [
        [label, f"{parts[name]:.3f} [{parts[name + '_ci_low']:.3f}, {parts[name + '_ci_high']:.3f}]"]
        for name, label in (
            ("total", "variance of a sample"),
            ("between", "between problems"),
            ("within", "within problems"),
        )
    ]
    table = Table([f"variance, {parts['n']:,} problems with {parts['k']} samples", "[95%]"], rows)
    if "detectable_at_n" not in power:
        return [Text("No variance was seen, so nothing can be planned from it."), table]
    share = f"{parts['between_share']:.0%} [{parts['between_share_ci_low']:.0%}, {parts['between_share_ci_high']:.0%}]"
    needed = ", ".join(f"{n:,} with {k} a problem" for k, n in power["needed_paired_by_k"].items())
    said = (
        f"Of the untrained model's variance, {share} is between problems, the rest between samples of one problem. "
        f"Paired, with one sample a problem, {power['n']:,} problems detect a true difference of "
        f"{100 * power['detectable_at_n']:.1f} points with a power of {power['power']:.0%}; "
        f"{100 * power['delta']:g} points need: {needed}. This was planned from the untrained model alone, before any "
        "arm was compared; the intervals above say how sharp the comparison came out."
    )
    alt = (
        f"Detectable difference over the number of problems, and over samples a problem at fixed budgets; "
        f"{100 * power['detectable_at_n']:.1f} points at {power['n']:,} problems with one sample each."
    )
    return [Text(said), table, *([Picture("power", evidence.power_png, alt)] if evidence.power_png else [])]


_HEALTH = (
    "A gain that comes from finishing more often is another gain than one from better answers: these rates would show "
    "it. GPU hours and money are those of drawing the arm's samples, where the engine could know them."
)


def _health(found: Comparison) -> Table:
    rows = []
    for name, arm in found.arms.items():
        tokens = arm.health["tokens_per_sample"]
        rows.append(
            [
                name,
                *(percent(arm.health[rate]) for rate in HEALTH),
                f"{tokens.value:,.1f} [{tokens.ci_low:,.1f}, {tokens.ci_high:,.1f}]",
                _number(arm.spent.tokens, ",.0f"),
                _number(arm.spent.gpu_hours, ",.3g"),
                _number(arm.spent.money, ",.2f"),
            ]
        )
    rates = [f"{rate.removesuffix('_rate').replace('_', ' ')} [95%]" for rate in HEALTH]
    return Table(["arm", *rates, "tokens a sample [95%]", "tokens", "GPU hours", "money"], rows)


def _lengths(found: Comparison) -> list[Block]:
    percentiles = {name: arm.token_percentiles for name, arm in found.arms.items()}
    seen = [f"{name} {', '.join(f'{p} {tokens:,.0f}' for p, tokens in of.items())}" for name, of in percentiles.items()]
    alt = f"Tokens a sample by arm, percentiles: {'; '.join(seen)}."
    rows = [[name, *(f"{tokens:,.0f}" for tokens in of.values())] for name, of in percentiles.items()]
    return [
        Picture("lengths", png(figures.lengths(percentiles)), alt),
        Table(["tokens a sample", *next(iter(percentiles.values()))], rows),
    ]


def _overlap(overlap: Overlap | None) -> list[Block]:
    if overlap is None:
        return []
    sizes = ", ".join(f"{name} {n:,}" for name, n in overlap.num_problems.items())
    said = f"Problems: {sizes}. {overlap.num_removed:,} were taken out because they repeat others."
    if not overlap.num_pairs:
        return [Text(f"{said} No pair of problems was found alike, or none was looked for (the lab's are distinct).")]
    rows = [[rule, f"{n:,}"] for rule, n in overlap.num_pairs.items()]
    return [Text(said), Table(["repeats another problem, by rule", "pairs"], rows)]


def _cost(evidence: Evidence) -> list[Block]:
    rows = []
    for run in evidence.runs:
        tokens = run.metrics.get("num_tokens", run.metrics.get("tokens_per_sample", math.nan) * _num_samples(run))
        rows.append(
            [
                f"{run.step} {run.arm}".strip(),
                _duration(run.hours),
                _number(tokens, ",.0f"),
                _number(run.metrics.get("gpu_hours", math.nan), ",.3g"),
                _number(run.metrics.get("gpu_cost", math.nan), ",.2f"),
            ]
        )
    total = math.fsum(run.hours for run in evidence.runs if not math.isnan(run.hours))
    rows.append(["all of these", _duration(total), "", *(_summed(evidence.runs, m) for m in ("gpu_hours", "gpu_cost"))])
    said = "The runs that the verdict was made from. A dash is what the engine could not know, as on a CPU."
    return [Text(said), Table(["step", "wall time", "tokens", "GPU hours", "money"], rows)]


def _num_samples(run: StepRun) -> float:
    return run.metrics.get("num_samples", math.nan)


def _summed(runs: Sequence[StepRun], metric: str) -> str:
    known = [run.metrics[metric] for run in runs if metric in run.metrics]
    return _number(math.fsum(known) if known else math.nan, ",.3g")


def _samples(samples: Sequence[Shown]) -> list[Block]:
    if not samples:
        return []
    blocks: list[Block] = [
        Text(
            "The first of each outcome in the order of problem ids, not picked. Characters that cannot be seen are "
            "written as ⟨U+…⟩."
        )
    ]
    for row in samples:
        said = f"extracted {row.answer!r}, gold {row.gold!r}" if row.answer else f"no answer, gold {row.gold!r}"
        blocks += [
            Verbatim(f"{row.outcome.replace('_', ' ')}: {row.arm}, problem {row.problem_id}", _shortened(row.problem)),
            Verbatim(f"Its sample ({said}):", _shortened(row.text)),
        ]
    return blocks


def _runs(runs: Sequence[StepRun]) -> list[Block]:
    rows = [
        [f"{run.step} {run.arm}".strip(), Link(run.name, f"#/experiments/{run.experiment_id}/runs/{run.run_id}"),
         run.run_id, run.commit[:12]]
        for run in runs
    ]  # fmt: skip
    said = (
        "A link is a path in the MLflow UI (mlflow ui, or your tracking server): put it behind the server's address. "
        "The description of this report's run has the same links, to click on."
    )
    return [Text(said), Table(["step", "run", "id", "code"], rows)]


def _params(said: str, run: StepRun | None) -> Text:
    if run is None:
        return Text(f"{said} (not known: no such run in the lineage)")
    params = ", ".join(f"{name}={value}" for name, value in run.params.items() if name not in ("preset", "arm"))
    return Text(f"{said} {params}.")


def _prompt(found: Comparison) -> str:
    return str(found.conditions["prompt"]).replace("{{", "{").replace("}}", "}")  # it is a format string


def _shortened(text: str) -> str:
    if len(text) <= MAX_SHOWN_CHARS:
        return text
    half = MAX_SHOWN_CHARS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _number(value: float, spec: str) -> str:
    return "-" if math.isnan(value) else format(value, spec)


def _duration(hours: float) -> str:
    if math.isnan(hours):
        return "-"
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:,.1f} min"

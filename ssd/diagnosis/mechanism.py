"""The mechanism in words: what `changes` found, as sentences and tables in Markdown."""

from collections.abc import Mapping, Sequence

from ssd.markdown import escaped
from ssd.report.text import percent, points
from ssd.stats.estimate import Estimate


def verdict(found: Mapping) -> str:
    """What the mechanism was, of a diagnosis, in sentences."""
    table = {(r["group"], r["quantity"], r["model"], r["against"]): r for r in found["changes"]}
    sentences = "".join(f"\n- {sentence}" for sentence in _sentences(found, table, _trained(found)))
    return (
        f"{found['num_texts']:,} texts of {found['num_problems']:,} problems, {found['num_positions']:,} positions; "
        f"training truncation {escaped(found['truncation'])}. Intervals are 95%, over problems.\n{sentences}"
    )


def page(found: Mapping) -> str:
    """The page of a diagnose run: the mechanism, then the tables that say so."""
    table = {(r["group"], r["quantity"], r["model"], r["against"]): r for r in found["changes"]}
    trained = _trained(found)
    share = {group: count / found["num_positions"] for group, count in found["positions"].items() if count}
    lines = [
        verdict(found),
        "",
        "| positions | share | " + " | ".join(f"{n}: kept mass | top-1 | entropy, 0.01 nats" for n in trained) + " |",
        "| --- | ---: |" + " --- |" * 3 * len(trained),
    ]
    for group, of_all in share.items():
        cells = [
            points(table[group, quantity, name, "base"]["estimate"]) if (group, quantity, name, "base") in table else ""
            for name in trained
            for quantity in ("kept_mass", "top_1", "entropy")
        ]
        lines.append(f"| {group} | {of_all:.1%} | {' | '.join(cells)} |")
    lines += [
        "",
        "Changes against base, in points. A rival has at least {rival_ratio:g} of the mass of the likeliest token in "
        "the base. Certain: no rival, all else below {least_tail:g}. Lock: no rival. Fork: rivals. Diffuse: likeliest "
        "and rivals hold less than {least_head_mass:g}. These four are all positions; strict lock (the same likeliest "
        "token) and swap (another) are chosen by what training did there.".format(**found["rules"]),
        "",
        "What each class adds to the change of the loss, in nats a 1,000 positions:",
        "",
        "| class | " + " | ".join(f"{name}: support | reshaping | alignment" for name in trained) + " |",
        "| --- |" + " --- |" * 3 * len(trained),
    ]
    loss = {(row["class"], row["term"], row["model"], row["against"]): row["estimate"] for row in found["loss"]}
    for group in (name for name in dict.fromkeys(row["class"] for row in found["loss"]) if name in share):
        terms = [(term, name) for name in trained for term in ("support", "reshaping", "alignment")]
        lines.append(
            f"| {group} | {' | '.join(_signed(loss[group, term, name, 'base'], 1000) for term, name in terms)} |"
        )
    if "gains" in found:
        rows = {(r["where"], r["value"], r["model"], r["against"]): r for r in found["gains"]}
        pairs = list(dict.fromkeys(key[2:] for key in rows))
        lines += [
            "",
            "What the base would gain if a model drew, in its place, these positions alone: accuracy in points, ",
        ]
        lines[-1] += "tokens a text (the base's own texts, reweighted; - where too few would count):"
        lines += ["", "| positions | " + " | ".join(f"{model} - {against}" for model, against in pairs) + " | tokens, "]
        lines[-1] += " | ".join(f"{model} - {against}" for model, against in pairs) + " | effective texts |"
        lines += ["| --- |" + " --- |" * 2 * len(pairs) + " ---: |"]
        for where in dict.fromkeys(row["where"] for row in found["gains"]):
            if found["positions"].get(where) == 0:
                continue
            right, tokens = ([rows.get((where, value, *pair)) for pair in pairs] for value in ("accuracy", "tokens"))
            cells = [points(row["estimate"]) if row and row["estimate"] else "-" for row in right]
            cells += [_signed(row["estimate"]) if row["estimate"] else "-" for row in tokens]
            lines.append(f"| {where} | {' | '.join(cells)} | {min(row['effective_texts'] for row in tokens):,.0f} |")
    if "truth" in found:
        counts, scores = found["truth"]["counts"], found["truth"]["scores"]
        classes = list(next(iter(counts.values())))
        lines += ["", "What the positions really are, and how they were classed:", ""]
        lines += [
            f"| truth | {' | '.join(classes)} | precision | recall |",
            "| --- |" + " ---: |" * len(classes) + " --- | --- |",
        ]
        for kind, row in counts.items():
            of = [percent(each) for each in scores[kind].values()] if kind in scores else ["", ""]
            lines.append(f"| {kind} | {' | '.join(f'{row[name]:,}' for name in classes)} | {' | '.join(of)} |")
    lines += ["", "| texts of | texts | tokens a text | outcomes |", "| --- | ---: | --- | --- |"]
    for row in found["carriers"]:
        outcomes = ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(row["outcomes"].items()))
        tokens = row["tokens"]
        shown = f"{tokens.value:,.1f} [{tokens.ci_low:,.1f}, {tokens.ci_high:,.1f}]"
        lines.append(f"| {escaped(row['arm'])} | {row['num_texts']:,} | {shown} | {outcomes} |")
    return "\n".join(lines)


def _trained(found: Mapping) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in found["changes"] if row["against"] == "base"))


def _sentences(found: Mapping, table: Mapping, trained: Sequence[str]) -> list[str]:
    """Sentences: how much is tail compression at locks, what forks keep, shorter thinking, what the control has too."""
    pairs = [(name, "base") for name in trained] + [("model", "control")] * ("control" in trained)

    def said(group: str, quantity: str, factor: float) -> str:
        rows = [(f"{a} - {b}", table[group, quantity, a, b]["estimate"]) for a, b in pairs]
        return "; ".join(f"{pair} {_signed(estimate, factor)}" for pair, estimate in rows)

    def before(group: str, quantity: str) -> Estimate:
        return table[group, quantity, "model", "base"]["before"]

    sentences, known = [], {key[:2] for key in table}
    if ("lock", "kept_mass") in known:
        sentences.append(
            f"**Tail compression at locks:** training keeps {percent(before('lock', 'kept_mass'))} of the base's mass "
            f"there; change in points, {said('lock', 'kept_mass', 100)}."
        )
    if ("fork", "kept_mass") in known:
        sentences.append(
            f"**Forks:** training keeps {percent(before('fork', 'kept_mass'))}; change in points, "
            f"{said('fork', 'kept_mass', 100)}. The likeliest token has {percent(before('fork', 'top_1'))}; change in "
            f"points, {said('fork', 'top_1', 100)}. The entropy is {_nats(before('fork', 'entropy'))} nats; change, "
            f"{said('fork', 'entropy', 1)}."
        )
    loss = {(row["class"], row["term"], row["model"], row["against"]): row["estimate"] for row in found["loss"]}
    parts = {"all": ("all", "loss"), "support compression": ("all", "support"), "of it at locks": ("lock", "support")}
    sentences.append(
        "**Loss** against what training keeps, nats a 1,000 positions: "
        + "; ".join(
            f"{name} - base "
            + ", ".join(f"{part} {_signed(loss[(*key, name, 'base')], 1000)}" for part, key in parts.items())
            for name in trained
        )
        + "."
    )
    for quantity, name in (("end_of_thinking", "Shorter thinking"), ("self_correction", "Self-correction")):
        if ("thinking", quantity) in known:
            what = "an end of the thinking" if quantity == "end_of_thinking" else "a word such as 'Wait'"
            sentences.append(
                f"**{name}:** on the same texts the base gives {what} {percent(before('thinking', quantity))} at each "
                f"token of the thinking; change in points, {said('thinking', quantity, 100)}."
            )
    gains = {(r["where"], r["value"], r["model"], r["against"]): r["estimate"] for r in found.get("gains", ())}
    if ("everywhere", "accuracy", "model", "base") not in gains:
        sentences.append(
            "**Accuracy:** no text is a graded one that this base drew at temperature 1 without truncation, so what "
            "these changes are worth cannot be told."
        )
    shown = ("everywhere", "lock", "fork", "end of thinking")
    for value, what in (("accuracy", "Accuracy, in points"), ("tokens", "Tokens a text")):
        for name in trained if ("everywhere", value, "model", "base") in gains else ():
            of = {part: gains.get((part, value, name, "base")) for part in shown}
            told = ", ".join(
                f"{part} {_signed(each, 100 if value == 'accuracy' else 1)}" for part, each in of.items() if each
            )
            sentences.append(
                f"**{what}**, at temperature 1, where it draws these positions in the base's place: {name} - base "
                f"{told or '(too few texts would count)'}."
            )
    return sentences


def _nats(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.ci_low:.2f}, {estimate.ci_high:.2f}]"


def _signed(estimate: Estimate, factor: float = 1) -> str:
    """`+1.30 [+1.22, +1.38]`, times `factor`."""
    value, low, high = (factor * bound for bound in (estimate.value, estimate.ci_low, estimate.ci_high))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"

"""Numbers as text, with their uncertainty, and tables with their n."""

from collections.abc import Mapping

from ssd.markdown import escaped
from ssd.stats.compare import Difference
from ssd.stats.estimate import Estimate


def percent(estimate: Estimate) -> str:
    """`52.1% [49.0, 55.2]`."""
    return f"{estimate.value:.1%} [{estimate.ci_low * 100:.1f}, {estimate.ci_high * 100:.1f}]"


def points(difference: Difference) -> str:
    """`+7.3 [+5.1, +9.5]`, in percentage points."""
    return f"{difference.value * 100:+.1f} [{difference.ci_low * 100:+.1f}, {difference.ci_high * 100:+.1f}]"


def p_value(value: float) -> str:
    """`< 0.001` or three decimals."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def estimate_tables(rows: Mapping[str, Estimate], groups: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Tables of every estimate of an evaluation, and of pass@1 by group where there are several."""
    lines = ["| estimate | 95% interval |", "| --- | --- |"]
    for name, row in rows.items():
        is_rate = name != "tokens_per_sample"
        shown = percent(row) if is_rate else f"{row.value:,.1f} [{row.ci_low:,.1f}, {row.ci_high:,.1f}]"
        lines.append(f"| {name.replace('_', ' ')} | {shown} |")
    for name, of_group in groups.items():
        if len(of_group) > 1:
            lines += ["", f"| {name.removeprefix('by_')} | problems | pass@1 |", "| --- | ---: | --- |"]
            lines += [f"| {escaped(group or '-')} | {row.n:,} | {percent(row)} |" for group, row in of_group.items()]
    return "\n".join(lines)

"""Numbers, intervals and tables of the evidence as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from benchmarks.transfer.evidence import POINTS, Group
from benchmarks.transfer.stats import Interval


def mean(each: Interval) -> str:
    if math.isnan(each.low):
        return f"{POINTS * each.mean:.1f} (no interval)"
    low, high = max(0.0, each.low), min(1.0, each.high)  # a Dice cannot lie beyond
    return f"{POINTS * each.mean:.1f} ({POINTS * low:.1f} to {POINTS * high:.1f})"


def difference(each: Interval | None) -> str:
    """With the seeds that were won, where there is an interval."""
    if each is None:
        return ""
    won = "" if math.isnan(each.low) else f", {each.won} of {each.seeds}"
    return gain(each) + won


def gain(each: Interval) -> str:
    if math.isnan(each.low):
        return f"{POINTS * each.mean:+.1f} (no interval)"
    low, high = POINTS * each.low, POINTS * each.high
    return f"{POINTS * each.mean:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "\u2212")


def millimetres(hd95: float) -> str:
    return f"{hd95:.1f}" if math.isfinite(hd95) else "half missed"


def number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""


def by_scenario(found: Sequence[Group]) -> dict[str, list[Group]]:
    own: dict[str, list[Group]] = {}
    for group in found:
        own.setdefault(group.scenario, []).append(group)
    return own


def images(links: Sequence[str], what: str) -> Iterator[str]:
    for link in links:
        yield f"![{what}]({link})"
        yield ""


def anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head(*cells: str, numbers: bool = False) -> Iterator[str]:
    """The first two lines of a table."""
    yield row(*cells)
    yield row("---", *["---:" if numbers else "---"] * (len(cells) - 1))

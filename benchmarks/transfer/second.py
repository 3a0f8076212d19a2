"""The page of the evidence: the second round's main table, and the tables behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.transfer import charts, report
from benchmarks.transfer.arms import ARMS, MAP, REFERENCE
from benchmarks.transfer.evidence import POINTS, Group, groups
from benchmarks.transfer.markdown import (
    anchor,
    by_scenario,
    gain,
    head,
    images,
    mean,
    millimetres,
    number,
    row,
)
from benchmarks.transfer.scenario import FOLDER, Scenario, load_scenarios
from benchmarks.transfer.stats import Interval, survivors
from benchmarks.transfer.store import Rows, Store
from riskmap_ext.finetune.base.files import write_text

HERE = Path(__file__).parent
BASELINE = "prior_ce_dice"
# Column of the main table -> (arm, what it is held against).
COMPARED = {
    "class prior": (BASELINE, REFERENCE),
    "class weights": ("prior_class_dice", BASELINE),
    "risk map": (f"prior_{MAP}", BASELINE),
    "source offset": ("offset5_ce_dice", BASELINE),
    "fading offset": ("fade5_ce_dice", BASELINE),
}
# Where the output layer is the source's own there is no prior to start at.
COMPARED_KEPT = {
    "class weights": ("class_dice", REFERENCE),
    "risk map": (MAP, REFERENCE),
    "source offset": ("offset5_ce_dice", REFERENCE),
    "fading offset": ("fade5_ce_dice", REFERENCE),
    "risk CE over CE": ("risk_ce", "ce"),
}
# What is in the map, and what it adds without Dice, as in the paper: where these arms were run.
CONTROLS = {
    "risk CE over CE": ("risk_ce", "ce"),
    "the same from the prior": ("prior_risk_ce", "prior_ce"),
    "risk CE over prior": ("risk_ce", BASELINE),
    "map over its class means": (f"prior_{MAP}", "prior_linear_mean_dice"),
    "class means over prior": ("prior_linear_mean_dice", BASELINE),
    "shifted prediction over prior": ("prior_shift", BASELINE),
}
ISLANDS = ("class weights", "risk map")
# Of fewer subjects an interval says next to nothing: no marks, and no part of the family.
FEWEST_SUBJECTS = 3
FIRST, SECOND = "first_round.md", "second_round.md"


@dataclass(frozen=True)
class Marked:
    """A difference, and whether it holds among all comparisons.

    holds: by the bootstrap, corrected: by the variance corrected for overlapping splits too.
    """

    each: Interval
    holds: bool
    corrected: bool

    @property
    def mark(self) -> str:
        return "" if not self.holds else " ●" if self.corrected else " ○"


# By scenario, length and both arms: of a difference and its reverse there is one.
Marks = Mapping[tuple[str, str, frozenset[str]], Marked]


def _key(group: Group, pair: tuple[str, str]) -> tuple[str, str, frozenset[str]]:
    return group.scenario, group.length, frozenset(pair)


def marks(comparisons: Iterable[tuple[Group, tuple[str, str]]]) -> Marks:
    """Of comparisons, each of two arms of a group; not of runs that are the same."""
    compared = {
        _key(group, pair): each
        for group, pair in comparisons
        if (each := group.against(*pair)) is not None
        and each.low < each.high
        and each.subjects >= FEWEST_SUBJECTS
    }
    holds = survivors([each.p for each in compared.values()])
    corrected = survivors([each.corrected_p for each in compared.values()])
    return {
        key: Marked(each, one, one and two)
        for (key, each), one, two in zip(compared.items(), holds, corrected, strict=True)
    }


def write_pages(out: Path, page: Path, scenarios: Path = FOLDER) -> None:
    """Writes the page, and into the folder of its name the tables of both rounds and pictures."""
    known = load_scenarios(scenarios)
    rows = Store(out).read()
    folder = page.with_suffix("")
    for old in folder.glob("*.png"):
        old.unlink()
    first = {name for name, each in known.items() if each.round == 1}
    report.write_page(rows, folder / FIRST, {name: known[name] for name in sorted(first)})
    second = {name: each for name, each in known.items() if each.round == 2}
    found = groups(rows, second)
    marked = marks((group, pair) for group in found for pair in _pairs(group))
    write_text(folder / SECOND, _text(_tables(found, second, folder, marked)))
    write_text(page, _text(_page(rows, found, second, marked)))


def _pairs(group: Group) -> set[tuple[str, str]]:
    """Every comparison of either page: one family."""
    base = _base(group)
    tables = (COMPARED, CONTROLS) if base == BASELINE else (COMPARED_KEPT,)
    every = {(arm, base) for arm in _arms_of(group) if arm != base}
    return every | {pair for table in tables for pair in table.values()}


def _arms_of(group: Group) -> list[str]:
    """Where the output layer is the source's, those that start at a prior are twins of others."""
    kept = _base(group) == REFERENCE
    return [arm for arm in group.runs if not (kept and arm.startswith("prior_"))]


def _text(lines: Iterator[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"


def _page(
    rows: Rows, found: list[Group], known: Mapping[str, Scenario], marked: Marks
) -> Iterator[str]:
    yield "<!-- Made from the stored rows by `python -m benchmarks.transfer report`. -->"
    yield ""
    yield "# Evidence"
    yield ""
    yield (HERE / "verdict.md").read_text(encoding="utf-8")
    if not found:
        yield "No runs are stored yet: `make bench-transfer` or `make bench-transfer-full`."
        return
    fresh = [group for group in found if _base(group) == BASELINE]
    kept = [group for group in found if _base(group) == REFERENCE]
    controlled = [g for g in fresh if any({*pair} <= g.runs.keys() for pair in CONTROLS.values())]
    yield "## The main table"
    yield ""
    yield from _differences(fresh, known, COMPARED, marked)
    yield "## What is found, and how exactly"
    yield ""
    yield from _what_is_found(fresh, known)
    if controlled:
        yield "## What is in the map"
        yield ""
        yield from _differences(controlled, known, CONTROLS, marked)
    if kept:
        yield "## Where the output layer is the source's"
        yield ""
        yield from _differences(kept, known, COMPARED_KEPT, marked)
    yield "## Without islands"
    yield ""
    yield from _without_islands([*fresh, *kept], known)
    yield (HERE / "how_second.md").read_text(encoding="utf-8")
    final = sum(len(runs.rows) for group in found for runs in group.runs.values())
    tuning = sum(r["kind"] == "tuning" and r["scenario"] in known for r in rows.runs)
    machines = ", ".join(sorted({r["cpu"] for r in rows.runs if r["scenario"] in known}))
    exclude = sum(each.each.low > 0 or each.each.high < 0 for each in marked.values())
    yield (
        f"{len(marked)} comparisons are in the family: {exclude} intervals exclude 0, of which "
        f"{sum(each.holds for each in marked.values())} are marked. "
        f"{final} runs were scored and {tuning} used to choose learning rates, on {machines}."
    )
    there = {(group.scenario, group.length) for group in found}
    missing = [
        f"{name} at {steps} steps"
        for name, each in known.items()
        for length, steps in each.lengths.items()
        if (name, length) not in there
    ]
    if missing:
        yield ""
        yield f"Not run: {', '.join(missing)}."


def _differences(
    found: Sequence[Group],
    known: Mapping[str, Scenario],
    columns: Mapping[str, tuple[str, str]],
    marked: Marks,
) -> Iterator[str]:
    base = next(iter(columns.values()))[1]
    yield from head("data", "steps", ARMS[base].name, *columns)
    for group in found:
        runs = group.runs.get(base)
        yield row(
            _where(group, known),
            str(group.steps),
            "" if runs is None else number(POINTS * runs.mean().mean, ".1f"),
            *(_difference(group, pair, base, marked) for pair in columns.values()),
        )
    yield ""
    for name, pair in columns.items():
        own = [(group, marked.get(_key(group, pair))) for group in found]
        told = [(group.against(*pair), each) for group, each in own if each is not None]
        yield f"* {name}: {_counted(told)}."
    yield ""


def _difference(group: Group, pair: tuple[str, str], base: str, marked: Marks) -> str:
    """With the mean that it is a difference from, where that is not the table's own."""
    each = group.against(*pair)
    if each is None or each.low == each.high:
        return "-"
    found = marked.get(_key(group, pair))
    text = gain(each) + ("" if found is None else found.mark)
    if pair[1] in (base, BASELINE):
        return text
    return f"{number(POINTS * group.runs[pair[1]].mean().mean, '.1f')}: {text}"


def _without_islands(found: Sequence[Group], known: Mapping[str, Scenario]) -> Iterator[str]:
    yield (
        "Dice after removing components smaller than 20 % of a structure's largest, minus that of "
        "the class prior (CE + Dice if the output layer is the source's) after the same removal. "
        "This analysis is post hoc, so it has no marks."
    )
    yield ""
    yield from head("data", "steps", *ISLANDS)
    for group in found:
        columns = COMPARED if _base(group) == BASELINE else COMPARED_KEPT
        cells = [group.column_against(*columns[name], "clean_dice") for name in ISLANDS]
        told = ["-" if each is None else gain(each) for each in cells]
        yield row(_where(group, known), str(group.steps), *told)
    yield ""


def _counted(told: Sequence[tuple[Interval | None, Marked]]) -> str:
    up, down = (
        [mark for each, mark in told if mark.holds and each and sign * each.mean > 0]
        for sign in (1, -1)
    )
    return (
        f"ahead in {len(up)} of {len(told)} ({sum(m.corrected for m in up)} ●), behind in "
        f"{len(down)} ({sum(m.corrected for m in down)} ●)"
    )


def _what_is_found(found: Sequence[Group], known: Mapping[str, Scenario]) -> Iterator[str]:
    """Precision, recall and surfaces of the arms of the main table."""
    yield (
        "Precision / recall, and the median HD95 in mm over the structures that both the arm and "
        "the class prior found; in brackets the prior's HD95 over the same structures."
    )
    yield ""
    arms = list(dict.fromkeys(arm for arm, _ in COMPARED.values()))
    yield from head("data", "steps", *(name for name in COMPARED))
    for group in found:
        cells = [_found(group, arm) if arm in group.runs else "" for arm in arms]
        yield row(_where(group, known), str(group.steps), *cells)
    yield ""


def _found(group: Group, arm: str) -> str:
    runs = group.runs[arm]
    text = f"{runs.share('precision'):.2f} / {runs.share('recall'):.2f}"
    mine, theirs = group.distances(arm, BASELINE)
    text += f", {millimetres(mine)}" + ("" if arm == BASELINE else f" ({millimetres(theirs)})")
    missed = 100 * runs.missed()
    return text + (f", {missed:.0f} % missed" if missed >= 0.5 else "")


def _where(group: Group, known: Mapping[str, Scenario]) -> str:
    return f"[{group.scenario}](evidence/{SECOND}#{anchor(group.scenario)})"


def _tables(
    found: list[Group], known: Mapping[str, Scenario], folder: Path, marked: Marks
) -> Iterator[str]:
    yield "# Second round: all arms"
    yield ""
    yield (
        f"Each arm against {ARMS[BASELINE].name} (against {ARMS[REFERENCE].name} if the output "
        "layer is the source's). ● and ○ as on [the page](../evidence.md). HD95: medians over the "
        "structures that both arms found, in brackets that of the other arm. Without islands: "
        "components smaller than 20 % of the largest are removed. ‡: the rate is the smallest or "
        "largest one tried. ≈: another rate came within a point of it."
    )
    yield ""
    for name, own in by_scenario(found).items():
        yield f"## {name}"
        yield ""
        yield f"{known[name].title}. {known[name].about}"
        yield ""
        for group in own:
            yield from _arms(group, marked)
        picture = charts.differences(own, folder / f"{name}-differences.png", _base(own[0]))
        yield from images([picture.name], name)


def _base(group: Group) -> str:
    """What its arms are held against: the prior, where the output layer is fresh."""
    if BASELINE not in group.runs:
        return REFERENCE
    each = group.against(BASELINE, REFERENCE)
    return REFERENCE if each is not None and each.low == each.high else BASELINE


def _arms(group: Group, marked: Marks) -> Iterator[str]:
    base = _base(group)
    leep, entropy = group.leep()
    told = 1 + leep / entropy if entropy > 0 else math.nan
    yield f"### {group.scenario}, {group.length}: {group.steps} steps"
    yield ""
    yield (
        f"{group.seeds} seeds. LEEP of the source {leep:.3f} nats: it tells {100 * told:.0f} % of "
        f"the label entropy {entropy:.3f}."
    )
    yield ""
    yield from head(
        *("arm", "rate", "mean Dice", f"against {ARMS[base].name}", "precision / recall"),
        *("missed, %", "HD95, mm", "Dice without islands", "HD95 without islands, mm"),
        numbers=True,
    )
    for key in _arms_of(group):
        runs = group.runs[key]
        clean = group.distances(key, base, "clean_hd95")
        mine, theirs = group.distances(key, base)
        yield row(
            f"**{ARMS[key].name}**" if key == base else ARMS[key].name,
            f"{runs.lr:g}{'‡' if runs.at_edge else ''}{' ≈' if runs.near_tie else ''}",
            mean(runs.mean()),
            "" if key == base else _difference(group, (key, base), base, marked),
            f"{runs.share('precision'):.2f} / {runs.share('recall'):.2f}",
            f"{100 * runs.missed():.1f}",
            _pair(mine, theirs, key == base),
            number(POINTS * runs.share("clean_dice"), ".1f"),
            _pair(*clean, key == base),
        )
    yield ""


def _pair(mine: float, theirs: float, alone: bool) -> str:
    return number(mine, ".1f") + ("" if alone else f" ({number(theirs, '.1f')})")

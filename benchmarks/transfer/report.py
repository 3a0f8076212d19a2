"""The tables of the first round, from the stored rows alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.transfer import charts
from benchmarks.transfer.arms import (
    ARMS,
    DEFAULT,
    MAP,
    MEANS,
    PAPER,
    PLACED,
    REFERENCE,
    SETTINGS,
    WEIGHTS,
)
from benchmarks.transfer.evidence import POINTS, Group, groups
from benchmarks.transfer.markdown import (
    anchor,
    by_scenario,
    difference,
    images,
    mean,
    millimetres,
    number,
    row,
)
from benchmarks.transfer.scenario import Scenario
from benchmarks.transfer.stats import Interval
from benchmarks.transfer.store import Row, Rows
from benchmarks.transfer.work import TUNING
from riskmap_ext.finetune.base.files import write_text

HOW = Path(__file__).with_name("how.md")
# What the map and what class weights are held against, in the order of the summary.
_OTHERS = {
    MAP: ("ce", REFERENCE, WEIGHTS, PAPER, "scratch"),
    WEIGHTS: ("ce", REFERENCE, PAPER, "scratch", "scratch_class"),
}


def write_page(rows: Rows, page: Path, known: dict[str, Scenario]) -> None:
    """The page of the rows' scenarios that are known, and its pictures beside it."""
    found = groups(rows, known)
    own = [each for each in rows.runs if each["scenario"] in known]
    pictures = _draw(found, page.parent)
    write_text(page, "\n".join(_page(own, rows.cut, found, known, pictures)).rstrip() + "\n")


def _draw(found: Sequence[Group], folder: Path) -> dict[str, list[str]]:
    """Links to the pictures by scenario; that of all scenarios by the empty name."""
    if not found:
        return {}
    made: dict[str, list[Path | None]] = {"": [charts.overview(found, folder / "overview.png")]}
    for name, own in by_scenario(found).items():
        made[name] = [
            charts.differences(own, folder / f"{name}-differences.png"),
            charts.curves(own, folder / f"{name}-curves.png"),
        ]
    return {name: [path.name for path in paths if path is not None] for name, paths in made.items()}


def _page(
    runs: Sequence[Row],
    cut: int,
    found: list[Group],
    known: dict[str, Scenario],
    pictures: dict[str, list[str]],
) -> Iterator[str]:
    yield "# First round"
    yield ""
    yield (
        "The risk map against plain fine-tuning, class weights and others, all with a fresh output "
        "layer that starts at random. [The page](../evidence.md) has the second round, whose "
        "baseline is fairer and whose statistics allow for many comparisons: here nothing does."
    )
    yield ""
    if not found:
        yield "No runs are stored yet: `make bench-transfer` or `make bench-transfer-full`."
        yield ""
    else:
        yield from _summary(found, known, pictures)
        yield from _surfaces(found)
        yield from _weights(found, known)
        yield from _negative(found)
        yield from _settings(found)
        yield from _location(found)
    yield from _what_was_run(runs, cut, found, known)
    yield from _how(found)
    for name, own in by_scenario(found).items():
        yield from _scenario(name, own, known.get(name), pictures.get(name, []))


def _summary(
    found: list[Group], known: dict[str, Scenario], pictures: dict[str, list[str]]
) -> Iterator[str]:
    yield "## Summary"
    yield ""
    yield (
        f"What {ARMS[MAP].name}, the default scheme, gains over another arm: paired difference "
        "of the mean Dice in points with its 95 % interval, and the seeds it won."
    )
    yield ""
    yield from _gains(found, known, MAP)
    yield from images(pictures.get("", []), "paired differences of all scenarios")


def _weights(found: list[Group], known: dict[str, Scenario]) -> Iterator[str]:
    yield "## Class weights without a map"
    yield ""
    yield (
        f"What {ARMS[WEIGHTS].name} gains over other arms: paired differences of the mean Dice in "
        "points."
    )
    yield ""
    yield from _gains(found, known, WEIGHTS)
    yield from _apart(
        found,
        {"scratch_class": "scratch"},
        "### Without a source",
        "The same from scratch, against CE + Dice from scratch: paired differences of the mean "
        "Dice in points.",
    )


def _surfaces(found: list[Group]) -> Iterator[str]:
    """The map against others by HD95, whose infinite values leave no mean."""
    others = [
        key for key in (REFERENCE, WEIGHTS, PAPER, MEANS) if any(key in g.runs for g in found)
    ]
    yield "## Surface distances"
    yield ""
    yield (
        "Median HD95 in mm over seeds, subjects and classes (a structure that was missed counts as "
        f"infinite), and in how many seeds the median of {ARMS[MAP].name} is the lower one. Told "
        "apart: by a sign test over the seeds with p below 0.05, which 5 seeds cannot reach."
    )
    yield ""
    yield row("scenario", "steps", *(ARMS[key].name for key in (MAP, *others)))
    yield row(*["---"] * (3 + len(others)))
    verdicts = {key: {"lower": 0, "higher": 0, "not told apart": 0} for key in others}
    for group in found:
        if MAP not in group.runs:
            continue
        cells = []
        for key in others:
            signs = group.nearer(MAP, key)
            if signs is None:
                cells.append("")
                continue
            verdicts[key][signs.told] += 1
            cells.append(f"{millimetres(group.hd95[key])}, {signs.lower} of {signs.seeds}")
        name = f"[{group.scenario}](#{anchor(group.scenario)})"
        yield row(name, f"{group.length}, {group.steps}", millimetres(group.hd95[MAP]), *cells)
    yield ""
    for key in others:
        told = ", ".join(f"{word} in {count}" for word, count in verdicts[key].items())
        yield f"* {ARMS[MAP].name} against {ARMS[key].name}, by seeds: {told}."
    yield ""


def _gains(found: list[Group], known: dict[str, Scenario], arm: str) -> Iterator[str]:
    """What an arm gains over others, a row for each group that has one of them."""
    others = [key for key in _OTHERS[arm] if any(group.against(arm, key) for group in found)]
    yield row("scenario", "steps", "seeds", *(f"against {ARMS[key].name}" for key in others))
    yield row(*["---"] * (3 + len(others)))
    for group in found:
        cells = [difference(group.against(arm, key)) for key in others]
        name = f"[{group.scenario}](#{anchor(group.scenario)})"
        if any(cells):
            yield row(name, f"{group.length}, {group.steps}", _seeds(group, known), *cells)
    yield ""
    for key in others:
        yield f"* {_verdict(found, arm, key)}"
    yield ""


def _seeds(group: Group, known: dict[str, Scenario]) -> str:
    asked = known[group.scenario].seeds if group.scenario in known else 0
    few = f" of {asked}: too few to decide" if group.seeds < asked else ""
    return f"{group.seeds}{few}"


def _verdict(found: list[Group], arm: str, other: str) -> str:
    told: dict[str, list[str]] = {"ahead": [], "behind": [], "not told apart": []}
    for group in found:
        difference = group.against(arm, other)
        if difference is not None:
            told[difference.told].append(f"{group.scenario} {group.length}")
    total = sum(map(len, told.values()))
    parts = [
        f"{word} in {len(names)}" + (f" ({', '.join(names)})" if names else "")
        for word, names in told.items()
    ]
    return f"Against {ARMS[other].name}, of {total} comparisons: " + "; ".join(parts) + "."


def _negative(found: list[Group]) -> Iterator[str]:
    yield "## Negative results beside the positive"
    yield ""
    ours = ARMS[MAP].name
    lines = []
    for group in found:
        where = f"{group.scenario}, {group.length}"
        for key in (REFERENCE, WEIGHTS):
            each = group.against(MAP, key)
            if each is not None and each.told != "ahead":
                lines.append(f"{where}: {ours} is {_told(each, key)}.")
        rivals = {
            key: group.against(key, MAP)
            for key in group.runs
            if key not in (MAP, "scratch", *SETTINGS, *PLACED)
        }
        better = [
            f"{ARMS[key].name} ({difference(each)})"
            for key, each in rivals.items()
            if each is not None and each.told == "ahead"
        ]
        if better:
            lines.append(f"{where}: ahead of {ours}: {', '.join(better)}.")
        scratch = group.against(REFERENCE, "scratch")
        if scratch is not None and scratch.told != "ahead":
            lines.append(
                f"{where}: no gain of the source's weights is seen: {ARMS[REFERENCE].name} is "
                f"{_told(scratch, 'scratch')}."
            )
    yield from (f"* {line}" for line in lines or ["None in the rows so far."])
    yield ""


def _settings(found: list[Group]) -> Iterator[str]:
    ours = ARMS[MAP].name
    others = dict.fromkeys((PAPER, "power_dice", *SETTINGS), MAP)
    yield from _apart(
        found,
        {**others, "image_dice": PAPER, "valid_dice": PAPER},
        "## Other settings of the risk map",
        f"What other settings ([what each is](#how)) gain over {ours}, those of the exponential "
        f"scheme over {ARMS[PAPER].name}: paired differences of the mean Dice in points.",
    )


def _location(found: list[Group]) -> Iterator[str]:
    """The arms that differ from another in the place of the weights alone."""
    yield from _apart(
        found,
        {PAPER: MEANS, **dict.fromkeys(PLACED, WEIGHTS)},
        "## Does the location count?",
        "The exponential map against its means within each class; below it, class weights times a "
        "factor whose mean over each class is 1, against class weights alone. What is "
        "gained comes from where within a class the weight lies ([what each factor is](#how)). "
        "Paired differences of the mean Dice in points.",
    )


def _apart(found: list[Group], pairs: Mapping[str, str], title: str, about: str) -> Iterator[str]:
    """A row for each arm, against the other of the pair; a column for each group that has any."""
    shown = [g for g in found if any(g.against(*pair) for pair in pairs.items())]
    if not shown:
        return
    yield from (title, "", about, "")
    yield row("arm", *(f"[{g.scenario}](#{anchor(g.scenario)}), {g.length}" for g in shown))
    yield row(*["---"] * (1 + len(shown)))
    verdicts = {"ahead": 0, "behind": 0, "not told apart": 0}
    for key, other in pairs.items():
        cells = [group.against(key, other) for group in shown]
        for each in cells:
            if each is not None:
                verdicts[each.told] += 1
        if any(cells):
            yield row(ARMS[key].short, *map(difference, cells))
    yield ""
    told = ", ".join(f"{word} in {count}" for word, count in verdicts.items())
    yield f"Of {sum(verdicts.values())} comparisons: {told}."
    yield ""


def _told(each: Interval, other: str) -> str:
    """ "behind CE + Dice (...)" or "not told apart from CE + Dice (...)"."""
    word = "behind" if each.told == "behind" else "not told apart from"
    return f"{word} {ARMS[other].name} ({difference(each)})"


def _what_was_run(
    stored: Sequence[Row], cut: int, found: list[Group], known: dict[str, Scenario]
) -> Iterator[str]:
    yield "## What was run and what not"
    yield ""
    final = sum(len(runs.rows) for group in found for runs in group.runs.values())
    tuning = sum(row["kind"] == TUNING for row in stored)
    machines = sorted({f"{row['cpu']}, {row['device']}" for row in stored})
    versions = sorted(
        {f"riskmap_ext {r['riskmap_ext']}, torch {r['torch']}, MONAI {r['monai']}" for r in stored}
    )
    yield (
        f"{final} runs that are compared and {tuning} for learning rates"
        + (f"; on {'; '.join(machines)}; {'; '.join(versions)}." if stored else ".")
    )
    yield ""
    yield row("scenario", "what", "labelled / tested", "lengths and seeds run", "arms missing")
    yield row(*["---"] * 5)
    by_name = by_scenario(found)
    for name in dict.fromkeys([*by_name, *known]):
        own = by_name.get(name, [])
        title = known[name].title if name in known else ""
        done = ", ".join(f"{g.length} ({g.steps} steps): {g.seeds}" for g in own) or "not run"
        sizes = sorted(
            {
                (r["train_cases"], r["test_cases"])
                for g in own
                for x in g.runs.values()
                for r in x.rows
            }
        )
        cases = ", ".join(f"{train} / {test}" for train, test in sizes)
        yield row(name, title, cases, done, ", ".join(_missing(own)))
    yield ""
    notes = [f"{g.scenario}, {g.length}: {note}" for g in found for note in g.left_out]
    if cut:
        notes.append(f"{cut} lines of runs that were cut")
    if notes:
        yield "Left out:"
        yield ""
        yield from (f"* {note}" for note in notes)
        yield ""


def _missing(own: list[Group]) -> Iterator[str]:
    """Arms without rows; with the length where others of it have some."""
    for key in DEFAULT:
        lengths = [group.length for group in own if key not in group.runs]
        if lengths:
            some = "" if len(lengths) == len(own) else f" ({', '.join(lengths)})"
            yield ARMS[key].name + some


def _how(found: list[Group]) -> Iterator[str]:
    yield HOW.read_text(encoding="utf-8")
    yield row("arm", "what")
    yield row("---", "---")
    for key, arm in ARMS.items():
        if not found or any(key in group.runs for group in found):
            yield row(arm.name, arm.what)
    yield ""


def _scenario(
    name: str, own: list[Group], scenario: Scenario | None, pictures: list[str]
) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    if scenario is not None:
        yield f"{scenario.title}. {scenario.about}"
        yield ""
    for group in own:
        leep, entropy = group.leep()
        yield f"### {name}, {group.length}: {group.steps} steps"
        yield ""
        told = 1 + leep / entropy if entropy > 0 else math.nan
        few = _seeds(group, {name: scenario} if scenario else {})
        yield (
            f"Seeds: {few}. LEEP of the source {leep:.3f} nats, which tells {100 * told:.0f} % of "
            f"the label entropy {entropy:.3f}."
        )
        yield ""
        yield from _table(group)
        yield from _classes(group)
    yield from images(pictures, name)


def _table(group: Group) -> Iterator[str]:
    yield row(
        *("arm", "rate", "mean Dice", f"against {ARMS[REFERENCE].name}"),
        *(f"against {ARMS[WEIGHTS].name}", "HD95, mm", "ms / step"),
    )
    yield row("---", *["---:"] * 6)
    for key, runs in group.runs.items():
        hd95 = group.hd95[key]
        yield row(
            f"**{ARMS[key].name}**" if key == MAP else ARMS[key].name,
            f"{runs.lr:g}{'‡' if runs.at_edge else ''}{' ≈' if runs.near_tie else ''}",
            mean(runs.mean()),
            "" if key == REFERENCE else difference(group.against(key, REFERENCE)),
            "" if key == WEIGHTS else difference(group.against(key, WEIGHTS)),
            millimetres(hd95),
            number(runs.step_ms(), ".1f"),
        )
    yield ""


def _classes(group: Group) -> Iterator[str]:
    table = {key: runs.classes() for key, runs in group.runs.items()}
    names = list(dict.fromkeys(name for own in table.values() for name in own))
    if len(names) < 2:
        return
    yield row("Dice of", *names)
    yield row("---", *["---:"] * len(names))
    for key, own in table.items():
        yield row(ARMS[key].name, *(number(POINTS * own.get(n, math.nan), ".1f") for n in names))
    yield ""

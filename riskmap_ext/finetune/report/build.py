"""The report of a run as a page: what its files say, and what is missing from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape

from riskmap_ext.finetune.base.log import MISSING, number
from riskmap_ext.finetune.metrics.dice import mean_without_nan
from riskmap_ext.finetune.metrics.surfaces import EXTRA, FOUND, MISSED, Score
from riskmap_ext.finetune.pictures.figures import class_colours
from riskmap_ext.finetune.pictures.panels import ERROR_COLOURS, risk_colours
from riskmap_ext.finetune.report import page, svg
from riskmap_ext.finetune.report.cases import TOLERANCE, CaseResults, DrawnCase
from riskmap_ext.finetune.report.leep import leep_section, leep_style
from riskmap_ext.finetune.report.read import RunFiles
from riskmap_ext.finetune.report.settings import settings_section
from riskmap_ext.finetune.report.svg import Line

# Further lists are folded up.
_OPEN_ROWS = 12
# Larger tables and finer lines would make the file large.
_MOST_CELLS = 12000
_MOST_POINTS = 250
_CLASS_LINES = svg.COLOURS


def run_page(run: RunFiles, results: CaseResults) -> str:
    name = run.folder.resolve().name
    parts = [
        f"<h1>{escape(name)}</h1>",
        _what(run),
        _state(run),
        _headline(run),
        page.section("Training", _curves(run)),
        page.section("Classes", _classes(run, results)),
        page.section("Cases", _cases(run, results)),
        page.section("What the source tells (LEEP)", leep_section(run)),
        page.section("Settings", settings_section(run)),
    ]
    return page.page(f"riskmap: {name}", "\n".join(parts), svg.STYLE + leep_style() + _STYLE)


def _what(run: RunFiles) -> str:
    parts = []
    if run.config is not None:
        source = run.config.source
        kind = "Training" if source is None else f"Fine-tuning from {source.checkpoint}"
        if source is not None and run.is_finished and not (run.metrics or run.losses):
            kind = f"Maps of {source.checkpoint}, without any training"
        parts.append(kind)
    if run.starts:
        start = run.starts[0]
        if "loss" in start:
            parts.append(f"loss: {start['loss']}")
        parts.append(f"begun {start.get('begun')}, riskmap_ext {start.get('riskmap_ext')}")
    return f"<p class='note'>{escape('; '.join(parts))}</p>" if parts else ""


def _state(run: RunFiles) -> str:
    if run.is_finished:
        return ""
    steps = f" of {run.steps}" if run.steps else ""
    done = f"{run.steps_done}{steps} steps are recorded here"
    text = f"Unfinished run (stopped, or still at work): {done}."
    if run.can_resume:
        text += " `riskmap finetune --resume` goes on with it from its last validation."
    last = (run.log or [""])[-1].partition(" stopped ")
    if last[1]:
        text += f" It was stopped {last[2].partition(';')[0]}."
    return f"<p class='banner' role='status'><strong>{page.marked(text)}</strong></p>"


def _headline(run: RunFiles) -> str:
    facts = []
    if run.dice:
        facts.append(("mean Dice", number(mean_without_nan(_means(run)))))
        facts.append(("validation cases", str(len(run.dice))))
    elif run.metrics and not math.isnan(run.metrics[-1]["mean_dice"]):
        row = run.metrics[-1]
        facts.append((f"mean Dice at step {row['step']:.0f}", number(row["mean_dice"])))
    if run.leep is not None:
        facts.append(("LEEP, nats", f"{run.leep.score:.3f}"))
    if run.steps_done:
        facts.append(("steps", f"{run.steps_done}"))
    if run.metrics:
        facts.append(("training time", page.duration(run.metrics[-1]["seconds"])))
    cells = "".join(f"<div><b>{escape(v)}</b><span>{escape(n)}</span></div>" for n, v in facts)
    return f"<div class='headline'>{cells}</div>" if cells else ""


def _curves(run: RunFiles) -> str:
    metrics = run.metrics or []
    parts, notes = [], []
    if run.losses:
        steps = [(step, loss) for step, loss, _ in run.losses]
        width = max(1, len(steps) // 50)
        every = round(steps[1][0] - steps[0][0] if len(steps) > 1 else steps[0][0])
        name = "each step" if every == 1 else f"mean of {every} steps"
        if width == 1:
            lines = [Line(name, steps)]
        else:
            smooth = Line(f"mean of {width} of these", _smooth(steps, width))
            lines = [Line(name, steps, "faint"), smooth]
        rates = [(step, lr) for step, _, lr in run.losses]
    else:
        notes.append("There is no losses.csv (older run): the loss is the mean up to a validation.")
        lines = [Line("mean up to a validation", [(r["step"], r["train_loss"]) for r in metrics])]
        rates = [(r["step"], r["lr"]) for r in metrics]
    dice = _dice_lines(metrics)
    title = "Dice of the validation cases"
    parts += [
        svg.chart(lines, title="Training loss", x_label="step", y_label="loss", log=True),
        svg.chart(dice, title=title, x_label="step", y_label="Dice", y_range=(0.0, 1.0)),
        svg.chart(
            [Line("", rates)],
            title="Learning rate",
            x_label="step",
            y_label="learning rate",
            y_range=(0.0, 0.0),
        ),
    ]
    if not run.metrics:
        notes.append("No validation is recorded yet (metrics.csv).")
    else:
        parts.append(_validations(run))
    return f"<div class='charts'>{''.join(parts)}</div>" + "".join(map(page.note, notes))


def _smooth(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """Means of `width` neighbours; at both ends of those that are there."""
    smooth = []
    for place, (step, _) in enumerate(points):
        first = place - width // 2
        values = [y for _, y in points[max(0, first) : first + width]]
        smooth.append((step, sum(values) / len(values)))
    return smooth


def _dice_lines(metrics: Sequence[dict[str, float]]) -> list[Line]:
    """The mean, and each class; of many classes the lowest have names."""
    if not metrics:
        return []

    shown = _thinned(metrics, _MOST_POINTS)

    def line(column: str, name: str, style: str | int) -> Line:
        return Line(name, [(row["step"], row[column]) for row in shown], style)

    columns = [name for name in metrics[-1] if name.startswith("dice_")]
    named = columns
    if len(columns) > _CLASS_LINES:
        last = {c: v for c in columns if not math.isnan(v := metrics[-1][c])}
        named = sorted(last, key=lambda c: last[c])[:_CLASS_LINES]
    others = [c for c in columns if c not in named]
    label = f"{len(others)} other classes (the lowest at the end have names)"
    lines = [line(c, label if c == others[0] else "", "faint") for c in others]
    lines += [line(c, c.removeprefix("dice_"), i) for i, c in enumerate(named, start=1)]
    return [*lines, line("mean_dice", "mean", "ink")] if len(columns) > 1 else lines


def _validations(run: RunFiles) -> str:
    assert run.metrics
    header = [
        name
        for name in run.metrics[0]
        if name == "step" or not all(math.isnan(row[name]) for row in run.metrics)
    ]
    named = {"train_loss": "loss", "mean_dice": "mean Dice", "lr": "learning rate"}
    names = [named.get(name, name.removeprefix("dice_")) for name in header]
    shown = _thinned(run.metrics, max(_OPEN_ROWS, _MOST_CELLS // len(header)))
    rows = [[f"{row['step']:.0f}", *(_plain(row[name]) for name in header[1:])] for row in shown]
    table = page.table(names, rows)
    title = "Validations"
    if len(shown) < len(run.metrics):
        title += f" ({len(shown)} of {len(run.metrics)}; metrics.csv has all)"
    return f"<figure class='chart'><figcaption>{title}</figcaption>{table}</figure>"


def _thinned(rows: Sequence[dict[str, float]], most: int) -> Sequence[dict[str, float]]:
    """At most so many, evenly, with the last one."""
    every = -(-len(rows) // most)
    return rows[(len(rows) - 1) % every :: every]


def _plain(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.4g}"


def _means(run: RunFiles) -> list[float]:
    rows = list((run.dice or {}).values())
    return [mean_without_nan([row[i] for row in rows]) for i in range(len(run.classes))]


def _classes(run: RunFiles, results: CaseResults) -> str:
    if not run.dice:
        if not run.metrics:
            return page.note("No Dice is recorded: there is neither dice.csv nor metrics.csv.")
        row = run.metrics[-1]
        if math.isnan(row["mean_dice"]):
            return page.note("There is no Dice: no validation case has any of the classes.")
        rows = [[name, number(row.get(f"dice_{name}", math.nan))] for name in run.classes]
        rows.append(["mean", number(row["mean_dice"])])
        why = "validation cases, on the grid of the network" if run.can_resume else "no dice.csv"
        return page.table(["class", "mean Dice"], rows, bold=["mean"]) + page.note(
            f"At the validation of step {row['step']:.0f} ({why})."
        )
    scores = results.scores
    header = ["class", "mean Dice", "sd", "lowest", "highest", "cases with it"]
    header += ["missed", "extra", "surface Dice", "HD95, mm"] if scores else ["Dice 0"]
    rows = [_class_row(run, index, scores) for index in range(len(run.classes))]
    means = _means(run)
    rows.append(["mean", number(mean_without_nan(means)), *[""] * (len(header) - 2)])
    text = "Means, standard deviation (sd) and range are over the cases whose label has the class"
    if scores:
        text += (
            f"; a missed one counts as 0. Missed: in the label alone; extra: in the prediction "
            f"alone. Surface Dice: mean, at {TOLERANCE:g} mm. HD95: median over the cases where "
            "it is found."
        )
    else:
        text += ". Dice 0: cases with no overlap at all."
        text += f" No surface Dice and HD95: {results.remark}." if results.remark else ""
    return page.table(header, rows, bold=["mean"]) + _lost(scores) + page.note(text)


def _class_row(run: RunFiles, index: int, scores: Sequence[Score]) -> list[str]:
    assert run.dice
    name = run.classes[index]
    known = [row[index] for row in run.dice.values() if not math.isnan(row[index])]
    spread = statistics.stdev(known) if len(known) > 1 else math.nan
    cells = [mean_without_nan(known), spread, *(f(known, default=math.nan) for f in (min, max))]
    row = [name, *map(number, cells), f"{len(known)} of {len(run.dice)}"]
    if not scores:
        return [*row, str(sum(value == 0 for value in known) or "-")]
    own = [score for score in scores if score.structure == name]
    there = [score.surface_dice for score in own if score.outcome in (FOUND, MISSED)]
    found = [score.hd95 for score in own if score.outcome == FOUND]
    counts = [sum(score.outcome == outcome for score in own) for outcome in (MISSED, EXTRA)]
    return [
        *row,
        *(str(count or "-") for count in counts),
        number(mean_without_nan(there)),
        f"{statistics.median(found):.2f}" if found else MISSING,
    ]


def _lost(scores: Sequence[Score]) -> str:
    """The missed structures by name: the ones that a mean hides."""
    missed = [f"{score.structure} in {score.case}" for score in scores if score.outcome == MISSED]
    if not missed:
        return ""
    shown = ", ".join(missed[:10]) + (f" and {len(missed) - 10} more" if missed[10:] else "")
    return f"<p class='warn'><strong>Missed:</strong> {escape(shown)}</p>"


def _cases(run: RunFiles, results: CaseResults) -> str:
    if not run.dice:
        why = "before the run is done" if not run.is_finished else "without validation cases"
        return page.note(f"There is no dice.csv {why}, so no case is shown.")
    parts = [_drawn_case(case, run) for case in results.drawn]
    if any(case.panels is not None for case in results.drawn):
        parts.append(_keys_of_panels(run, results.drawn))
    means = {name: mean_without_nan(row) for name, row in run.dice.items()}
    names, which = list(means), "each case"
    most = max(_OPEN_ROWS, _MOST_CELLS // (len(run.classes) + 2))
    if len(names) > most:
        lowest = set(sorted(names, key=lambda name: means[name])[:most])
        names = [name for name in names if name in lowest]
        which = f"the {most} cases with the lowest mean of {len(means)} (dice.csv has all)"
    rows = [[name, *map(number, (*run.dice[name], means[name]))] for name in names]
    table = page.table(["case", *run.classes, "mean"], rows)
    parts.append(_folded(f"Dice of {which}", table, len(rows)))
    for title, column in (
        (f"Surface Dice at {TOLERANCE:g} mm", "surface_dice"),
        ("HD95 in mm", "hd95"),
    ):
        if results.scores:
            table = _score_table(run.classes, names, results.scores, column)
            parts.append(_folded(f"{title} of {which}", table, _OPEN_ROWS + 1))
    return "\n".join(parts)


def _score_table(
    classes: Sequence[str], cases: Sequence[str], scores: Sequence[Score], column: str
) -> str:
    """Outcomes other than found as words."""
    by_case = {(score.case, score.structure): score for score in scores}

    def cell(score: Score) -> str:
        value = getattr(score, column)
        return f"{value:.3f}" if score.outcome == FOUND else score.outcome

    rows = [[case, *(cell(by_case[case, name]) for name in classes)] for case in cases]
    return page.table(["case", *classes], rows)


def _folded(title: str, body: str, rows: int) -> str:
    state = " open" if rows <= _OPEN_ROWS else ""
    return f"<details{state}><summary>{escape(title)}</summary>{body}</details>"


def _drawn_case(case: DrawnCase, run: RunFiles) -> str:
    count = len(run.dice or {})
    rank = f"{case.rank} of {count}" if count > 1 else "the one case"
    head = f"<h3>{escape(case.name)} <span>{rank}, mean Dice {number(case.dice)}</span></h3>"
    if case.panels is None:
        return f"{head}{page.note(f'No picture: {case.problem}')}"
    errors = ", ".join(f"{count} {kind}" for kind, count in case.panels.errors.items())
    captions = {"errors": f"errors: {errors}"}
    if case.panels.weights is not None:
        low, high, _ = case.panels.weights
        captions["risk map"] = f"risk map: weights {low:.3g} to {high:.3g}"
    shown = "".join(
        f"<figure>{page.picture(png, f'{name} of {case.name}')}"
        f"<figcaption>{escape(captions.get(name, name))}</figcaption></figure>"
        for name, png in case.panels.pictures.items()
    )
    return f"{head}<div class='panels'>{shown}</div>"


def _keys_of_panels(run: RunFiles, drawn: Sequence[DrawnCase]) -> str:
    """Colours of the classes that are seen, of the errors, and of the weights."""
    present = sorted({i for case in drawn if case.panels for i in case.panels.present})
    colours = class_colours(max(present, default=0) + 1)
    shown = [(run.classes[i - 1], colours[i]) for i in present if i <= len(run.classes)]
    errors = {
        "missed": "missed (label alone)",
        "extra": "extra (prediction alone)",
        "other class": "other class",
    }
    lists = [_chips("Classes:", shown)]
    lists.append(_chips("Errors:", [(errors[k], colour) for k, colour in ERROR_COLOURS.items()]))
    weights = [case.panels.weights for case in drawn if case.panels and case.panels.weights]
    if weights:
        scale = "logarithmic" if any(log for *_, log in weights) else "linear"
        lists.append(
            "<p class='chips'><b>Weights:</b> smallest<i class='scale' style='background-image:"
            f"linear-gradient(to right,{','.join(risk_colours(9))})'></i>largest of the case "
            f"({scale})</p>"
        )
    text = (
        "The slice with most labelled area; numbers of voxels are of this slice. The risk map is "
        "drawn with the label of the case; the network never saw it. The least weight lets the "
        "image through."
    )
    return "".join(lists) + page.note(text)


def _chips(title: str, colours: Sequence[tuple[str, Sequence[float]]]) -> str:
    chips = "".join(
        f"<span><i style='background:rgb({','.join(str(round(255 * c)) for c in rgb)})'></i>"
        f"{escape(name)}</span>"
        for name, rgb in colours
    )
    return f"<p class='chips'><b>{title}</b> {chips}</p>"


_STYLE = """
h3 { font-size: 1rem; margin: 1rem 0 .4rem; overflow-wrap: anywhere; }
h3 span { color: var(--soft); font-weight: 400; }
.banner, .warn { border-left: 4px solid #d55e00; background: var(--paper); padding: .5rem .8rem;
  margin: .6rem 0; max-width: none; overflow-wrap: anywhere; }
.note { overflow-wrap: anywhere; }
.headline { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: .4rem 0; }
.headline div { display: flex; flex-direction: column; }
.headline b { font-size: 1.35rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.headline span { color: var(--soft); font-size: .9rem; }
.charts { display: grid; gap: 1.4rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.charts > * { min-width: 0; }
.charts .scroll { max-height: 20rem; overflow: auto; }
.charts .scroll thead th { position: sticky; top: 0; background: var(--paper); z-index: 1; }
.panels { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.panels figcaption { color: var(--soft); font-size: .85rem; line-height: 1.35; margin-top: .2rem; }
.chips { display: flex; flex-wrap: wrap; align-items: center; gap: .2rem .9rem; margin: .6rem 0 0;
  font-size: .9rem; max-width: none; }
.chips span { display: inline-flex; align-items: center; gap: .35rem; overflow-wrap: anywhere; }
.chips i { width: .9rem; height: .9rem; border: 1px solid var(--soft); border-radius: 3px;
  flex: none; }
.chips .scale { width: 8rem; background-color: #888; }
details { margin-top: .8rem; }
summary { cursor: pointer; font-weight: 600; padding: .2rem 0; }
pre { overflow-x: auto; background: var(--wash); padding: .7rem; border-radius: 6px;
  font-size: .85rem; line-height: 1.45; margin: .4rem 0; }
"""

"""The LEEP section of a run's report: the score, and P(y|z) as a table."""

from __future__ import annotations

from html import escape

import numpy as np

from riskmap_ext.finetune.report import page
from riskmap_ext.finetune.report.read import Leep, RunFiles

# Source classes in the table; further ones, with least of the source's mass, are counted.
_MOST_COLUMNS = 30
# More have their names written upwards.
_UPRIGHT_COLUMNS = 8
_DARK = 0.55


def leep_section(run: RunFiles) -> str:
    leep = run.leep
    if leep is None:
        if run.config is not None and run.config.source is None:
            return page.note("No source model: trained from scratch, so there is nothing to score.")
        return page.note("There is no leep.json: an older run, or one that has not come so far.")
    told = leep.score + leep.label_entropy
    share = told / leep.label_entropy if leep.label_entropy > 0 else 0.0
    low, high = leep.hardness_range
    facts = [
        ("LEEP score", f"{leep.score:.4f} nats a voxel (0 would be perfect)"),
        ("H(Y)", f"{leep.label_entropy:.4f} nats: what the class frequencies leave open"),
        ("told by the source", f"{told:.4f} nats, {share:.1%} of H(Y)"),
        ("hardness", f"{low:.3f} to {high:.3f} nats"),
        ("voxels", f"{leep.voxels:,} of the training cases"),
    ]
    warning = ""
    if leep.tells_nothing:
        text = leep.remark or "this source tells nothing about the target labels"
        warning = f"<p class='warn'><strong>Warning:</strong> {escape(text)}</p>"
    return warning + page.facts(facts) + _table(leep)


def _table(leep: Leep) -> str:
    order = np.argsort(-leep.source_frequencies, kind="stable")[:_MOST_COLUMNS]
    columns = sorted(int(z) for z in order)
    left_out = len(leep.source_classes) - len(columns)
    upright = " class='upright'" if len(columns) > _UPRIGHT_COLUMNS else ""
    head = "".join(
        f"<th scope='col'{upright}><span>{escape(leep.source_classes[z])}</span></th>"
        for z in columns
    )
    rows = []
    for y, name in enumerate(leep.classes):
        cells = "".join(_cell(float(leep.conditional[y, z])) for z in columns)
        frequency = _share(float(leep.class_frequencies[y]))
        rows.append(
            f"<tr><th scope='row'><span>{escape(name)}</span></th>{cells}<td>{frequency}</td></tr>"
        )
    used = "".join(f"<td>{_share(float(leep.source_frequencies[z]))}</td>" for z in columns)
    rows.append(f"<tr class='total'><th scope='row'>of all mass</th>{used}<td></td></tr>")
    text = (
        "P(y|z): a column for each source class z, a row for each target class y; a column adds up "
        "to 1. `of all voxels`: how often the target class occurs. `of all mass`: how much of the "
        "source's probability goes to its class."
    )
    if left_out:
        rest = 1 - float(leep.source_frequencies[columns].sum())
        text += (
            f" The {len(columns)} source classes with most mass are shown; {left_out} with "
            f"{_share(max(rest, 0.0))} of it are left out."
        )
    return (
        "<h3>P(label | source class)</h3>\n<div class='scroll heat' tabindex='0'><table>\n"
        f"<thead><tr><th scope='col'>target class</th>{head}"
        f"<th scope='col'{upright}><span>of all voxels</span></th></tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody>\n</table></div>"
        + page.note(text)
    )


def _cell(value: float) -> str:
    dark = " class='dark'" if value > _DARK else ""
    return f"<td{dark} style='--p:{value:.3f}'>{_probability(value)}</td>"


def _probability(value: float) -> str:
    """Three digits; what would round to 0 is told from nothing."""
    if value == 0:
        return "0"
    return "&lt;0.001" if value < 0.0005 else f"{value:.3f}"


def _share(value: float) -> str:
    if value == 0:
        return "0"
    return "&lt;0.01%" if value < 0.00005 else f"{100 * value:.2f}%"


def leep_style() -> str:
    return """
.heat { max-height: max(34rem, 85vh); overflow: auto; margin-top: .3rem; }
.heat table { width: auto; }
.heat td { min-width: 4rem; }
.heat td[style] { background: rgb(0 114 178 / var(--p)); }
.heat .dark { color: #fff; }
.heat thead th { position: sticky; top: 0; background: var(--paper); z-index: 1; }
.heat tbody th, .heat thead th:first-child { position: sticky; left: 0; background: var(--paper); }
.heat tbody th { z-index: 1; }
.heat tbody th span { max-width: 10rem; }
.heat thead th:first-child { z-index: 2; }
.heat .upright span { writing-mode: vertical-rl; transform: rotate(180deg); width: auto;
  max-height: 11rem; }
"""

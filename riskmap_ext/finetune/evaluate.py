"""Scores segmentation files against reference labels: Dice, HD95, NSD, missed structures."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from riskmap_ext.finetune.base.errors import ConfigError, DataError, Problems
from riskmap_ext.finetune.base.files import check_there, stem
from riskmap_ext.finetune.base.log import Log, number, some
from riskmap_ext.finetune.data.datalist import files_by_name
from riskmap_ext.finetune.data.volumes import read_labels
from riskmap_ext.finetune.metrics.surfaces import ABSENT, EXTRA, FOUND, MISSED, Score, score_masks


def score_files(
    predictions: str | os.PathLike[str],
    references: str | os.PathLike[str],
    *,
    structures: Mapping[str, Sequence[int]] | None = None,
    tolerance: float = 1.0,
    partial: bool = False,
    progress: bool = True,
) -> list[Score]:
    """Scores predictions against the references of the same name.

    Args:
        predictions, references: two files, or two folders; paired by name.
        structures: name -> its label values; regions may overlap. None: every value except 0 that
            occurs in a file of either side.
        tolerance: of the NSD (surface Dice), in mm.
        partial: skip references without a prediction; otherwise they are an error.
        progress: print the table and a progress bar.

    Raises: InputError naming the files: no counterpart, another grid, values not whole numbers.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ConfigError(f"--tolerance: expected a number >= 0 in mm, got {tolerance!r}")
    log = Log(quiet=not progress)
    pairs = _pairs(Path(predictions), Path(references), partial)
    wanted = structures or _values_of(pairs.values())
    scores = []
    with log.counting("Scoring", len(pairs)) as advance:
        for name, paths in pairs.items():
            prediction, reference = read_labels(*paths)
            for structure, values in wanted.items():
                one, other = (np.isin(v.values, list(values)) for v in (prediction, reference))
                scores.append(
                    score_masks(name, structure, one, other, reference.spacing, tolerance)
                )
            advance(name)
    log.table(summary(scores, tolerance))
    for structure in wanted:
        if all(s.outcome == ABSENT for s in scores if s.structure == structure):
            log.warn(f"structure {structure} occurs in no file")
    return scores


def summary(scores: Sequence[Score], tolerance: float) -> Table:
    """One row per structure. Missed structures count as Dice 0; nothing is averaged away."""
    cases = len({score.case for score in scores})
    table = Table(
        title=f"{cases} cases; NSD: surface Dice at {tolerance:g} mm; HD95 in mm",
    )
    for column in ("structure", "in", "missed", "extra"):
        table.add_column(column, justify="left" if column == "structure" else "right", no_wrap=True)
    for column in ("mean\nDice", "lowest\nDice", "mean\nNSD", "median\nHD95"):
        table.add_column(column, justify="right")
    for structure in dict.fromkeys(score.structure for score in scores):
        own = [score for score in scores if score.structure == structure]
        there = [score for score in own if score.outcome in (FOUND, MISSED)]
        found = [score.hd95 for score in own if score.outcome == FOUND]
        dice = [score.dice for score in there]
        counts = [sum(score.outcome == outcome for score in own) for outcome in (MISSED, EXTRA)]
        table.add_row(
            escape(structure),
            f"{len(there)} of {cases}",
            *(str(count) if count else "-" for count in counts),
            number(statistics.fmean(dice) if dice else math.nan),
            number(min(dice, default=math.nan)),
            number(statistics.fmean(s.surface_dice for s in there) if there else math.nan),
            f"{statistics.median(found):.2f}" if found else "-",
        )
    return table


def _pairs(predictions: Path, references: Path, partial: bool) -> dict[str, tuple[Path, Path]]:
    check_there(("--prediction", [predictions]), ("--reference", [references]))
    if predictions.is_dir() != references.is_dir():
        raise ConfigError(
            f"--prediction {predictions} and --reference {references}: expected two files or two "
            "folders"
        )
    if not predictions.is_dir():
        return {stem(predictions): (predictions, references)}
    problems, folders = Problems(), []
    for folder in (predictions, references):
        with problems.collected():
            folders.append(files_by_name(folder))
    problems.tell()
    found, wanted = folders
    if missing := sorted(set(found) - set(wanted)):
        problems.append(f"{references}: no reference for {some(missing)} of {predictions}")
    if (missing := sorted(set(wanted) - set(found))) and not partial:
        problems.append(
            f"{predictions}: no prediction for {some(missing)} of {references}; --partial scores "
            "the others"
        )
    problems.tell()
    return {name: (path, wanted[name]) for name, path in sorted(found.items())}


def _values_of(pairs: Iterable[tuple[Path, Path]]) -> dict[str, list[int]]:
    values: set[int] = set()
    for pair in pairs:
        for volume in read_labels(*pair):
            values |= set(np.unique(volume.values).tolist())
    values.discard(0)
    if not values:
        raise DataError(["--prediction, --reference: every voxel of every file is 0"])
    return {str(value): [value] for value in sorted(values)}

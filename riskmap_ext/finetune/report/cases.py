"""The validation cases of a run, read back from its folder: pictures, and scores of surfaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from riskmap_ext.finetune.base.errors import DataError, InputError
from riskmap_ext.finetune.base.structures import IGNORE_INDEX
from riskmap_ext.finetune.data.prepare import prepare_cases
from riskmap_ext.finetune.data.volumes import read_image_files, read_labels
from riskmap_ext.finetune.metrics.surfaces import Score, score_masks
from riskmap_ext.finetune.pictures.figures import Panels, panels
from riskmap_ext.finetune.pictures.slices import Volumes, volumes_of
from riskmap_ext.finetune.report.read import RunFiles

# Of the NSD (surface Dice), in mm.
TOLERANCE = 1.0
# Up to this many voxels times classes times cases, surfaces are measured: a minute or so.
_MOST_WORK = 1e9


class DrawnCase(NamedTuple):
    """A case with its rank ("best", "median", "worst"); panels is None if problem says why."""

    name: str
    rank: str
    dice: float
    panels: Panels | None
    problem: str | None = None


class CaseResults(NamedTuple):
    """scores: of each case and class; if empty, remark has the reason."""

    drawn: Sequence[DrawnCase] = ()
    scores: Sequence[Score] = ()
    remark: str | None = None


def read_results(run: RunFiles) -> CaseResults:
    """Pictures of the best, median and worst case, and scores; reports what is missing."""
    means = run.case_means
    order = sorted((n for n in means if not math.isnan(means[n])), key=means.__getitem__)
    # Each case has one rank.
    ranks = (
        {order[len(order) // 2]: "median", order[0]: "worst", order[-1]: "best"} if order else {}
    )
    remark, scores, drawn, folds = None, [], [], run.fold_of
    for name in run.dice:
        if remark is not None and name not in ranks:
            continue
        drawing, problem = None, None
        try:
            volumes, structures = _read(run.folds[folds[name]] if folds else run, name)
            if volumes.labels.size * len(run.dice) * len(run.classes) > _MOST_WORK:
                what = f"{len(run.dice)} cases of {len(run.classes)} classes"
                remark = remark or f"{what} would take long; riskmap evaluate measures them"
            for structure, members in structures.items() if remark is None else ():
                both = (*volumes.predictions.values(), volumes.labels)
                one, other = (np.isin(each, members) for each in both)
                scores.append(score_masks(name, structure, one, other, volumes.zooms, TOLERANCE))
            drawing = panels(volumes) if name in ranks else None
        except InputError as error:
            problem = str(error)
            # Means over some of the cases would look like those over all.
            remark = remark or f"Case {name}: {problem}"
        if name in ranks:
            drawn.append(DrawnCase(name, ranks[name], means[name], drawing, problem))
    drawn.sort(key=lambda case: case.rank)
    return CaseResults(drawn, [] if remark else scores, remark)


def _read(run: RunFiles, name: str) -> tuple[Volumes, dict[str, list[int]]]:
    """The case at the file's resolution, and the classes of each structure.

    Raises: InputError naming the file that is missing or does not fit.
    """
    if run.config is None:
        raise DataError(run.config_problem or "config.yaml cannot be used")
    path = run.folder / "predictions" / f"{name}.nii.gz"
    if not path.exists():
        raise DataError(f"{path}: no such file (write.predictions)")
    alone = {"train": [name], "validation": 0, "spacing": None, "crop": "none"}
    data = run.config.data.model_copy(update=alone)
    cases = prepare_cases(run.config.model_copy(update={"data": data}))
    (case,) = cases.train
    prediction = case.grid.from_file(read_labels(path, case.files.label)[0].values)
    # Ignored voxels agree with everything, as in the Dice.
    prediction = np.where(case.label.numpy() == IGNORE_INDEX, 0, prediction)
    risk, path = None, run.folder / "maps" / f"{name}_risk.nii.gz"
    if path.exists():
        values = read_image_files([path], 1).values[0]
        risk = case.grid.from_file(values) if values.shape == case.grid.shape else None
    return volumes_of(case, prediction, risk), cases.structures.scored

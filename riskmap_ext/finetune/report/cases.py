"""The validation cases of a run, read back from its folder: pictures, and scores of surfaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from riskmap_ext.finetune.base.errors import DataError, InputError
from riskmap_ext.finetune.config.schema import IGNORE_INDEX
from riskmap_ext.finetune.data.prepare import Case, prepare_cases
from riskmap_ext.finetune.data.volumes import read_labels
from riskmap_ext.finetune.metrics.surfaces import Score, score_masks
from riskmap_ext.finetune.pictures.figures import Panels, panels
from riskmap_ext.finetune.pictures.slices import Volumes, volumes_of
from riskmap_ext.finetune.report.read import RunFiles

# Of the surface Dice, in mm.
TOLERANCE = 1.0
# Voxels times classes times cases up to which surfaces are measured: a minute or so.
_MOST_WORK = 1e9


class DrawnCase(NamedTuple):
    """A case with its rank ("best", "median", "worst"); panels is None where problem says why."""

    name: str
    rank: str
    dice: float
    panels: Panels | None
    problem: str | None = None


class CaseResults(NamedTuple):
    """scores: of each case and class; empty with the reason in remark."""

    drawn: Sequence[DrawnCase] = ()
    scores: Sequence[Score] = ()
    remark: str | None = None


def read_results(run: RunFiles) -> CaseResults:
    """Pictures of the best, median and worst case, and scores; what cannot be had is told."""
    means = run.case_means
    order = sorted((n for n in means if not math.isnan(means[n])), key=lambda n: means[n])
    # Each case has one rank.
    ranks = (
        {order[len(order) // 2]: "median", order[0]: "worst", order[-1]: "best"} if order else {}
    )
    remark, scores, drawn = _why_no_scores(run), [], []
    for name in run.dice:
        if remark is not None and name not in ranks:
            continue
        drawing, problem = None, None
        try:
            volumes, zooms, own = _read(run, name, measured=remark is None)
            scores += own
            drawing = panels(volumes, zooms) if name in ranks else None
        except InputError as error:
            problem = str(error)
            # Means over some of the cases would look like those over all.
            remark = remark or f"Case {name}: {problem}"
        if name in ranks:
            drawn.append(DrawnCase(name, ranks[name], means[name], drawing, problem))
    drawn.sort(key=lambda case: case.rank)
    return CaseResults(drawn, [] if remark else scores, remark)


def _why_no_scores(run: RunFiles) -> str | None:
    if run.config is None or not run.dice:
        return run.config_problem or "there is no dice.csv"
    paths = [path for name in run.dice if (path := _prediction(run, name)).exists()]
    if not paths:
        return f"there are no predictions in {run.folder / 'predictions'} (write.predictions)"
    try:
        voxels = [math.prod(nib.load(path).shape) for path in paths]  # type: ignore[attr-defined]
    except Exception as error:  # a damaged file can raise nearly anything in its reader
        return f"a prediction cannot be read ({type(error).__name__}: {error})"
    if sum(voxels) * len(run.classes) > _MOST_WORK:
        what = f"{len(run.dice)} cases of {len(run.classes)} classes"
        return f"{what} would take long; `riskmap evaluate` measures them"
    return None


def _prediction(run: RunFiles, name: str) -> Path:
    return run.folder / "predictions" / f"{name}.nii.gz"


def _read(
    run: RunFiles, name: str, *, measured: bool
) -> tuple[Volumes, tuple[float, float, float], list[Score]]:
    """The case as RAS volumes at the file's resolution, and their voxel size.

    Raises: InputError naming the file that is missing or does not fit.
    """
    if run.config is None:
        raise DataError([run.config_problem or "config.yaml cannot be used"])
    path = _prediction(run, name)
    if not path.exists():
        raise DataError([f"{path}: no such file (write.predictions)"])
    alone = {"train": [name], "validation": 0, "spacing": None}
    data = run.config.data.model_copy(update=alone)
    cases = prepare_cases(run.config.model_copy(update={"data": data}))
    (case,) = cases.train
    grid, labels = case.grid, case.full_label.numpy()
    prediction = grid.from_file(read_labels(path, case.files.label)[0].values)
    # Ignored voxels agree with everything, as they do in the Dice.
    prediction = np.where(labels == IGNORE_INDEX, 0, prediction)
    risk = _risk(run.folder / "maps" / f"{name}_risk.nii.gz", case)
    scores = []
    for structure, members in cases.structures.scored.items() if measured else ():
        masks = np.isin(prediction, members), np.isin(labels, members)
        scores.append(score_masks(name, structure, *masks, grid.spacing, TOLERANCE))
    return volumes_of(case, prediction, risk), grid.ras_spacing(), scores


def _risk(path: Path, case: Case) -> np.ndarray | None:
    """None where no map was written, or one of another grid."""
    try:
        values = np.asarray(nib.load(path).dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file can raise nearly anything in its reader
        raise DataError([f"{path}: cannot be read ({type(error).__name__}: {error})"]) from None
    return case.grid.from_file(values) if values.shape == case.grid.shape else None

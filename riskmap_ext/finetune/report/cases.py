"""The validation cases of a run, read back from its folder: pictures, and scores of surfaces."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from riskmap_ext.finetune.base.errors import DataError, InputError
from riskmap_ext.finetune.base.structures import Structures
from riskmap_ext.finetune.config.schema import IGNORE_INDEX, Config
from riskmap_ext.finetune.data.prepare import Case, prepare_cases
from riskmap_ext.finetune.data.volumes import read_labels
from riskmap_ext.finetune.metrics.dice import mean_without_nan
from riskmap_ext.finetune.metrics.surfaces import Score, score_masks
from riskmap_ext.finetune.pictures.figures import Panels, panels
from riskmap_ext.finetune.pictures.slices import Volumes
from riskmap_ext.finetune.report.read import RunFiles

# Of the surface Dice, in mm.
TOLERANCE = 1.0
# Voxels times classes times cases up to which surfaces are measured: a minute or so.
_MOST_WORK = 1e9


@dataclass(frozen=True)
class DrawnCase:
    """A case with its rank ("best", "median", "worst"); panels is None where problem says why."""

    name: str
    rank: str
    dice: float
    panels: Panels | None
    problem: str | None = None


@dataclass
class CaseResults:
    """scores: of each case and class; empty with the reason in remark."""

    drawn: list[DrawnCase] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    remark: str | None = None


def read_results(run: RunFiles) -> CaseResults:
    """Pictures of the best, median and worst case, and scores; what cannot be had is told."""
    results = CaseResults()
    if not run.dice:
        return results
    ranks = _ranks(run.dice)
    results.remark = _why_no_scores(run)
    for name in run.dice:
        measured = results.remark is None
        if not (measured or name in ranks):
            continue
        drawing, problem = None, None
        try:
            row, zooms, scores = _read(run, name, measured)
            results.scores += scores
            drawing = panels(row, zooms) if name in ranks else None
        except InputError as error:
            problem = str(error)
            if measured:
                # Means over some of the cases would look like those over all.
                results.remark, results.scores = f"Case {name}: {problem}", []
        if name in ranks:
            mean = mean_without_nan(run.dice[name])
            results.drawn.append(DrawnCase(name, ranks[name], mean, drawing, problem))
    order = ["best", "median", "worst"]
    results.drawn.sort(key=lambda case: order.index(case.rank))
    return results


def _ranks(dice: dict[str, list[float]]) -> dict[str, str]:
    """Case -> rank; each case once."""
    means = {name: mean_without_nan(row) for name, row in dice.items()}
    order = sorted((n for n in means if not math.isnan(means[n])), key=lambda n: means[n])
    if not order:
        return {}
    ranks = {order[len(order) // 2]: "median", order[0]: "worst", order[-1]: "best"}
    return ranks


def _why_no_scores(run: RunFiles) -> str | None:
    if run.config is None:
        return run.config_problem
    assert run.dice is not None
    paths = [_prediction(run, name) for name in run.dice]
    if not any(path.exists() for path in paths):
        return f"there are no predictions in {run.folder / 'predictions'} (write.predictions)"
    try:
        voxels = [math.prod(nib.load(path).shape) for path in paths if path.exists()]  # type: ignore[attr-defined]
    except Exception as error:  # a damaged file can raise nearly anything in its reader
        return f"a prediction cannot be read ({type(error).__name__}: {error})"
    if sum(voxels) * len(run.classes) > _MOST_WORK:
        return (
            f"{len(paths)} cases of {len(run.classes)} classes would take long; `riskmap evaluate` "
            "measures them"
        )
    return None


def _prediction(run: RunFiles, name: str) -> Path:
    return run.folder / "predictions" / f"{name}.nii.gz"


def _read(
    run: RunFiles, name: str, measured: bool
) -> tuple[Volumes, tuple[float, float, float], list[Score]]:
    """The case as RAS volumes at the file's resolution.

    Raises: InputError naming the file that is missing or does not fit.
    """
    if run.config is None:
        raise DataError([run.config_problem or "config.yaml cannot be used"])
    path = _prediction(run, name)
    if not path.exists():
        raise DataError([f"{path}: no such file (write.predictions)"])
    case, structures = _case(run.config, name)
    grid = case.grid
    prediction = grid.from_file(read_labels(path, case.files.label)[0].values)
    labels = case.full_label.numpy()
    # Ignored voxels agree with everything, as they do in the Dice.
    prediction = np.where(labels == IGNORE_INDEX, 0, prediction)
    risk = _risk(run.folder / "maps" / f"{name}_risk.nii.gz", case)
    scores = []
    if measured:
        spacing = grid.spacing
        for structure, members in structures.scored.items():
            masks = np.isin(prediction, members), np.isin(labels, members)
            scores.append(score_masks(name, structure, *masks, spacing, TOLERANCE))
    row = Volumes(
        name,
        grid.to_ras(case.image[0]),
        grid.to_ras(labels),
        None if risk is None else grid.to_ras(risk),
        {"prediction": grid.to_ras(prediction)},
    )
    return row, grid.ras_spacing(), scores


def _case(config: Config, name: str) -> tuple[Case, Structures]:
    alone = {"train": [name], "validation": 0, "spacing": None}
    data = config.data.model_copy(update=alone)
    cases = prepare_cases(config.model_copy(update={"data": data}))
    return cases.train[0], cases.structures


def _risk(path: Path, case: Case) -> np.ndarray | None:
    """None where no map was written, or one of another grid."""
    try:
        values = np.asarray(nib.load(path).dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file can raise nearly anything in its reader
        raise DataError([f"{path}: cannot be read ({type(error).__name__}: {error})"]) from None
    return case.grid.from_file(values) if values.shape == case.grid.shape else None

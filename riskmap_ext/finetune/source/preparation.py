"""How images were prepared: what a checkpoint says of it, and how a run differs from that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from riskmap_ext.finetune.base.orientation import PREPARED, arranged
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.source.checkpoint import SourceModel

# Of data.normalize; sources of other tools may have been trained with more.
KNOWN_NORMALIZATIONS = ("zscore", "none")
# Keys of data that a checkpoint keeps.
PREPARATION = ("spacing", "normalize", "image_foreground", "slice_axis")
_SUFFERS = "its logits and the maps may suffer"


def preparation(
    config: Config, patch: list[int], image_suffix: list[str] | None = None
) -> dict[str, Any]:
    """As a checkpoint keeps it."""
    told = config.data.model_dump(include=set(PREPARATION))
    return told | {"patch_size": patch, "image_suffix": image_suffix}


def preparation_warnings(
    config: Config, source: SourceModel, spacings: Sequence[Sequence[float]]
) -> list[str]:
    """What the source's file warns of, and where its images were prepared otherwise.

    spacings: voxel sizes of the prepared training cases, in mm.
    """
    warnings = list(source.notes)
    mine, theirs = preparation(config, []), source.preprocessing
    keys = ["normalize", "slice_axis"]
    if mine["normalize"] != "none":
        keys.append("image_foreground")
    differing = [key for key in keys if key in theirs and mine[key] != theirs[key]]
    for key in differing:
        how = f"trained with data.{key}={theirs[key]}"
        if key == "normalize" and theirs[key] not in KNOWN_NORMALIZATIONS:
            how = f"normalized by {theirs[key]}, which data.normalize does not have"
        warnings.append(f"the source was {how}, this run has {mine[key]}; {_SUFFERS}")
    spacing = in_prepared_order(source, theirs.get("spacing"), config)
    if "spacing" in theirs and not _same_spacing(spacing, config, spacings):
        warnings.append(
            f"the source was trained with data.spacing={spacing}, this run has "
            f"{mine['spacing']}; {_SUFFERS}"
        )
    return warnings


def in_prepared_order(source: SourceModel, values: Any, config: Config) -> Any:
    """Sizes of a volume's axes in this run's order; a network without an order takes any."""
    if source.config.orientation is None or values is None or len(values) != 3:
        return values
    theirs = source.preprocessing.get("slice_axis", "axial")
    return arranged(values, PREPARED[theirs], PREPARED[config.data.slice_axis])


def _same_spacing(
    theirs: list[float] | None, config: Config, spacings: Sequence[Sequence[float]]
) -> bool:
    """Up to 1 %. Voxels as they are in the files count where nothing is resampled to."""
    mine = config.data.spacing
    if theirs is None:
        return mine is None
    return all(
        math.isclose(a, b, rel_tol=0.01)
        for each in (spacings if mine is None else [mine])
        for a, b in zip(theirs, each, strict=False)
    )

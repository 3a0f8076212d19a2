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
_SUFFERS = "its logits and the maps may suffer"


def preparation(
    config: Config, patch: list[int], image_suffix: list[str] | None = None
) -> dict[str, Any]:
    """As a checkpoint keeps it."""
    data = config.data
    return {
        "spacing": data.spacing,
        "normalize": data.normalize,
        "image_foreground": data.image_foreground,
        "slice_axis": data.slice_axis,
        "patch_size": patch,
        "image_suffix": image_suffix,
    }


def preparation_warnings(
    config: Config, source: SourceModel, spacings: Sequence[Sequence[float]]
) -> list[str]:
    """What the source's file warns of, and where its images were prepared otherwise.

    spacings: voxel sizes of the prepared training cases, in mm.
    """
    warnings = list(source.notes)
    mine, theirs = preparation(config, []), source.preprocessing
    for key in ("normalize", "image_foreground", "slice_axis"):
        if key not in theirs or mine[key] == theirs[key]:
            continue
        if key == "normalize" and theirs[key] not in KNOWN_NORMALIZATIONS:
            warnings.append(
                f"the source's images were normalized by {theirs[key]}, which data.normalize does "
                f"not have; this run has {mine[key]}; {_SUFFERS}"
            )
        elif key != "image_foreground" or mine["normalize"] != "none":
            warnings.append(
                f"the source was trained with data.{key}={theirs[key]}, this run has {mine[key]}; "
                + _SUFFERS
            )
    spacing = in_prepared_order(source, theirs.get("spacing"), config)
    if "spacing" in theirs and not _same_spacing(spacing, config, spacings):
        warnings.append(
            f"the source was trained with data.spacing={spacing}, this run has "
            f"{mine['spacing']}; {_SUFFERS}"
        )
    if "pixel_size" in theirs and not _same_spacing(theirs["pixel_size"], config, spacings):
        warnings.append(
            f"the source was trained on slices with pixels of {theirs['pixel_size']} mm, this run "
            f"has others (data.spacing={mine['spacing']}); {_SUFFERS}"
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
    return all(_close(theirs, each) for each in (spacings if mine is None else [mine]))


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=0.01) for a, b in zip(one, other, strict=False))

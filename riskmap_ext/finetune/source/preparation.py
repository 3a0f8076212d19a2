"""How images were prepared: what a checkpoint says of it, and a run that prepares its own so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from riskmap_ext.finetune.base.orientation import PREPARED, arranged
from riskmap_ext.finetune.config.schema import Config, DataConfig
from riskmap_ext.finetune.source.checkpoint import SourceModel

# Keys of data that a checkpoint keeps.
PREPARATION = (
    *("spacing", "geometry", "crop", "normalize", "window", "mean_std", "image_foreground"),
    "slice_axis",
)
_SUFFERS = "its logits and the maps may suffer"


def preparation(
    config: Config, patch: list[int], image_suffix: list[str] | None = None
) -> dict[str, Any]:
    """As a checkpoint keeps it."""
    told = config.data.model_dump(include=set(PREPARATION))
    return told | {"patch_size": patch, "image_suffix": image_suffix}


def own_preparation(source: SourceModel) -> tuple[dict[str, Any], list[str]]:
    """What the source's file says, as keys of `data`, and what of it `data` has no word for."""
    known: dict[str, Any] = {}
    unknown = []
    for key in PREPARATION:
        if key not in source.preprocessing:
            continue
        value = source.preprocessing[key]
        try:
            DataConfig.model_validate({"root": ".", key: value})
        except ValidationError:
            unknown.append(f"with {value}")
        else:
            known[key] = value
    return known, unknown


def prepared_as_source(config: Config, source: SourceModel | None) -> Config:
    """The configuration with what `data` leaves out as the images of the source's training had it.

    A list with a value for each channel is left out where the source sees some of the channels.
    """
    if source is None or config.source is None:
        return config
    known, _ = own_preparation(source)
    axis = config.data.slice_axis
    if "slice_axis" not in config.data.model_fields_set:
        axis = known.get("slice_axis", axis)
    taken = {
        key: value
        for key, value in known.items()
        if key not in config.data.model_fields_set
        and not (config.source.channels and _of_channels(value))
    }
    if taken.get("spacing") is not None:
        taken["spacing"] = _in_order(source, taken["spacing"], axis)
    data = DataConfig.model_construct(
        config.data.model_fields_set | taken.keys(), **dict(config.data) | taken
    )
    return config.model_copy(update={"data": data})


def _of_channels(value: Any) -> bool:
    return isinstance(value, list) and isinstance(value[0], (str, list, type(None)))


def preparation_warnings(
    config: Config, source: SourceModel, spacings: Sequence[Sequence[float]]
) -> list[str]:
    """What the source's file warns of, and where its images were prepared otherwise.

    spacings: voxel sizes of the prepared training cases, in mm.
    """
    warnings = list(source.notes)
    mine = preparation(config, [])
    theirs, unknown = own_preparation(source)
    warnings += [
        f"the images of the source's training were prepared {each}, for which data has no word; "
        + _SUFFERS
        for each in unknown
    ]
    passed = {"spacing"} if mine["normalize"] != "none" else {"spacing", "image_foreground"}
    for key, value in theirs.items():
        if key not in passed and mine[key] != value:
            warnings.append(
                f"the source was trained with data.{key}={value}, this run has {mine[key]}; "
                + _SUFFERS
            )
    spacing = in_prepared_order(source, theirs.get("spacing"), config)
    if "spacing" in theirs and not _same_spacing(spacing, config, spacings):
        warnings.append(
            f"the source was trained with data.spacing={spacing}, this run has "
            f"{mine['spacing']}; {_SUFFERS}"
        )
    return warnings


def in_prepared_order(source: SourceModel, values: Any, config: Config) -> Any:
    """Sizes of a volume's axes in this run's order; a network without an order takes any."""
    return _in_order(source, values, config.data.slice_axis)


def _in_order(source: SourceModel, values: Any, slice_axis: str) -> Any:
    if source.config.orientation is None or values is None or len(values) != 3:
        return values
    theirs = source.preprocessing.get("slice_axis", "axial")
    return arranged(values, PREPARED[theirs], PREPARED[slice_axis])


def _same_spacing(
    theirs: list[float | None] | None, config: Config, spacings: Sequence[Sequence[float]]
) -> bool:
    """Up to 1 %. Voxels as they are in the files count where nothing is resampled to."""
    mine = config.data.spacing
    if theirs is None:
        return mine is None
    return all(
        a is None or b is None or math.isclose(a, b, rel_tol=0.01)
        for each in (spacings if mine is None else [mine])
        for a, b in zip(theirs, each, strict=False)
    )

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


def preparation(
    config: Config, patch: list[int], image_suffix: list[str] | None = None
) -> dict[str, Any]:
    """As a checkpoint keeps it."""
    told = config.data.model_dump(include=set(PREPARATION))
    return told | {"patch_size": patch, "image_suffix": image_suffix}


def own_preparation(source: SourceModel) -> tuple[dict[str, Any], list[str]]:
    """What the source's file says, as keys of `data`, and what of it `data` has no word for."""
    told = {key: source.preprocessing[key] for key in PREPARATION if key in source.preprocessing}
    unknown = set()
    try:
        DataConfig.model_validate({"root": ".", **told})
    except ValidationError as error:
        unknown = {each["loc"][0] for each in error.errors()}
    known = {key: value for key, value in told.items() if key not in unknown}
    return known, [f"with {value}" for key, value in told.items() if key in unknown]


def prepared_as_source(config: Config, source: SourceModel | None) -> Config:
    """The configuration with what `data` leaves out as the images of the source's training had it.

    A list with a value for each channel is left out where the source sees some of the channels.
    """
    if source is None or config.source is None:
        return config
    known, _ = own_preparation(source)
    taken = {
        key: value
        for key, value in known.items()
        if key not in config.data.model_fields_set
        and not (config.source.channels and _of_channels(value))
    }
    if "spacing" in taken:
        axis = taken.get("slice_axis", config.data.slice_axis)
        taken["spacing"] = in_prepared_order(source, taken["spacing"], axis)
    return config.model_copy(update={"data": config.data.model_copy(update=taken)})


def _of_channels(value: Any) -> bool:
    return isinstance(value, list) and isinstance(value[0], (str, list, type(None)))


def preparation_warnings(
    config: Config, source: SourceModel, spacings: Sequence[Sequence[float]]
) -> list[str]:
    """What the source's file warns of, and where its images were prepared otherwise.

    spacings: voxel sizes of the prepared training cases, in mm.
    """
    theirs, unknown = own_preparation(source)
    suffers = "its logits and the maps may suffer"
    warnings = [
        f"the images of the source's training were prepared {each}, for which data has no word; "
        + suffers
        for each in unknown
    ]
    for key, value in theirs.items():
        mine = getattr(config.data, key)
        same = value == mine
        if key == "spacing":
            value = in_prepared_order(source, value, config.data.slice_axis)
            same = _same_spacing(value, mine, spacings)
        elif key == "image_foreground":
            # The network has it from the scaling of intensities alone.
            same |= config.data.normalize == "none"
        if not same:
            warnings.append(
                f"the source was trained with data.{key}={value}, this run has {mine}; {suffers}"
            )
    return source.notes + warnings


def in_prepared_order(source: SourceModel, values: Any, slice_axis: str) -> Any:
    """Sizes of a volume's axes in a run's order; a network without an order takes any."""
    if source.config.orientation is None or values is None or len(values) != 3:
        return values
    theirs = source.preprocessing.get("slice_axis", "axial")
    return arranged(values, PREPARED[theirs], PREPARED[slice_axis])


def _same_spacing(
    theirs: list[float | None] | None,
    mine: list[float | None] | None,
    spacings: Sequence[Sequence[float]],
) -> bool:
    """Up to 1 %. Voxels as they are in the files count where nothing is resampled to."""
    if theirs is None:
        return mine is None
    return all(
        a is None or b is None or math.isclose(a, b, rel_tol=0.01)
        for each in (spacings if mine is None else [mine])
        for a, b in zip(theirs, each, strict=False)
    )

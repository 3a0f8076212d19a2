"""A source model: its network, its structures, and the preprocessing of its images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from torch import nn

from riskmap_ext.finetune.base.errors import CheckpointError, ConfigError
from riskmap_ext.finetune.base.orientation import PREPARED, arranged
from riskmap_ext.finetune.base.structures import Structures
from riskmap_ext.finetune.config.load import problems_of
from riskmap_ext.finetune.config.schema import Config, DataConfig, NetworkConfig, SourceConfig

Section = TypeVar("Section", bound=BaseModel)
# Keys of data that a checkpoint stores.
PREPARATION = (
    *("spacing", "geometry", "crop", "normalize", "window", "mean_std", "image_foreground"),
    "slice_axis",
)


@dataclass(kw_only=True)
class SourceModel:
    """The frozen source network, and what its file says about it, whichever tool wrote it.

    told: what the file itself says about its network, for messages. preprocessing: like a run's
    `preparation`, as far as known; may have values that `data` cannot express. notes: warnings for
    the log.
    """

    path: Path
    config: NetworkConfig
    structures: Structures
    channels: list[str]
    preprocessing: dict[str, Any]
    told: str
    notes: list[str] = field(default_factory=list)
    network: nn.Module = field(init=False)
    digest: str = field(init=False)

    @property
    def classes(self) -> list[str]:
        return self.structures.classes


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Says which network an unusable argument belongs to."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}{error}") from None


def checked(model: type[Section], content: Any, path: Path, section: str) -> Section:
    """A pydantic model of a section of a file. Raises: CheckpointError naming file and keys."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        told = (
            f"{'.'.join(filter(None, (section, key)))}: {why}"
            for key, why in problems_of(error, model)
        )
        raise CheckpointError(f"{path}: its {'; '.join(told)}") from None


def given_structures(source: SourceConfig) -> Structures | None:
    """`source.classes`, names or their number, if set."""
    names = source.classes
    if isinstance(names, int):
        names = numbered("class", names)
    return None if names is None else Structures(names)


def numbered(what: str, count: int) -> list[str]:
    return [f"{what} {index}" for index in range(count)]


def stored_orientation(source: SourceConfig, why: str) -> tuple[str, list[str]]:
    """For files that do not say it: `source.orientation`, or RAS and a warning with the reason."""
    if source.orientation is not None:
        return source.orientation, []
    otherwise = "RAS is assumed (source.orientation=LPS, for example, overrides this)"
    return "RAS", [f"{source.checkpoint}: {why}; {otherwise}"]


def preparation(data: DataConfig, patch: list[int], suffix: list[str] | None) -> dict[str, Any]:
    """As a checkpoint stores it. suffix: of the image files, one for each channel."""
    told = data.model_dump(include=set(PREPARATION))
    return told | {"patch_size": patch, "image_suffix": suffix}


def own_preparation(source: SourceModel) -> tuple[dict[str, Any], list[str]]:
    """What the source's file says, as keys of `data`, and what of it `data` cannot express."""
    told = {key: source.preprocessing[key] for key in PREPARATION if key in source.preprocessing}
    unknown = set()
    try:
        DataConfig.model_validate({"root": ".", **told})
    except ValidationError as error:
        unknown = {each["loc"][0] for each in error.errors()}
    known = {key: value for key, value in told.items() if key not in unknown}
    return known, [f"with {value}" for key, value in told.items() if key in unknown]


def prepared_as_source(config: Config, source: SourceModel | None) -> Config:
    """The configuration, with keys that `data` omits set as in the source's training.

    A list with a value for each channel is omitted if the source sees only some of the channels.
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


def preparation_warnings(config: Config, source: SourceModel) -> list[str]:
    """Warnings of the source's file, and about preprocessing that differs from the source's."""
    theirs, unknown = own_preparation(source)
    suffers = "its logits and the maps may suffer"
    warnings = [
        f"the images of the source's training were prepared {each}, which data cannot express; "
        + suffers
        for each in unknown
    ]
    for key, value in theirs.items():
        mine = getattr(config.data, key)
        if key == "spacing":
            value = in_prepared_order(source, value, config.data.slice_axis)
        same = value == mine
        if key == "spacing" and value and mine:
            pairs = zip(value, mine, strict=True)
            same = all(None in pair or math.isclose(*pair, rel_tol=0.01) for pair in pairs)
        elif key == "image_foreground":
            # The network gets it only through the scaling of intensities.
            same |= config.data.normalize == "none"
        if not same:
            warnings.append(
                f"the source was trained with data.{key}={value}, this run has {mine}; {suffers}"
            )
    return source.notes + warnings


def in_prepared_order(source: SourceModel, values: Any, slice_axis: str) -> Any:
    """Sizes of a volume's axes in a run's order; a network without an order fits any."""
    if source.config.orientation is None or not isinstance(values, list) or len(values) != 3:
        return values
    theirs = source.preprocessing.get("slice_axis", "axial")
    return arranged(values, PREPARED[theirs], PREPARED[slice_axis])

"""What a network's outputs mean: exclusive classes, or regions that may overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from riskmap_ext.finetune.base.errors import ConfigError

# Of labels that are ignored everywhere.
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Structures:
    """The classes of the labels, background first, and the regions built from them, if any.

    regions: name -> class indices. region_classes: for each region, the class that its voxels get
    in a segmentation, unless a later region claims them (nnU-Net's regions_class_order).
    """

    classes: list[str]
    regions: dict[str, list[int]] | None = None
    region_classes: list[int] | None = None

    @property
    def num_outputs(self) -> int:
        """Output channels of a network: one for each class (softmax) or region (sigmoid)."""
        return len(self.classes) if self.regions is None else len(self.regions)

    @property
    def outputs(self) -> list[str]:
        return self.classes if self.regions is None else list(self.regions)

    @property
    def scored(self) -> dict[str, list[int]]:
        """The structures that get a Dice: name -> class indices."""
        if self.regions is not None:
            return self.regions
        return {name: [index] for index, name in enumerate(self.classes) if index > 0}

    @property
    def table(self) -> Tensor | None:
        """[R, C] bool, as riskmap_ext.weighted_loss takes it; None for classes."""
        if self.regions is None:
            return None
        table = torch.zeros(len(self.regions), len(self.classes), dtype=torch.bool)
        for row, members in zip(table, self.regions.values(), strict=True):
            row[members] = True
        return table

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=1) if self.regions is None else logits.sigmoid()

    def segmentation(self, values: Tensor, *, threshold: float = 0.0) -> Tensor:
        """Class indices [*S] int16 of logits [K, *S], or of probabilities (threshold 0.5)."""
        if self.region_classes is None:
            return values.argmax(dim=0).to(torch.int16)
        out = torch.zeros(values.shape[1:], dtype=torch.int16, device=values.device)
        for value, label in zip(values, self.region_classes, strict=True):
            out[value > threshold] = label
        return out

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def check_names(names: list[str]) -> list[str]:
    """Class names, unchanged; ValueError for empty and duplicate names."""
    empty = [place for place, name in enumerate(names) if not name.strip()]
    if empty:
        raise ValueError(f"expected a name for each class, got none for class {empty[0]}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"expected distinct names, got {', '.join(twice)} more than once")
    return names


def structures_of(
    classes: Sequence[str],
    regions: Mapping[str, Sequence[int | str]] | None,
    region_classes: Sequence[int | str] | None = None,
    key: str = "data",
) -> Structures:
    """Structures, with names replaced by class indices.

    Without `region_classes`, regions are painted from the largest to the smallest, each with the
    one class that no smaller region has.

    Raises: ConfigError naming the region and what was expected.
    """
    if regions is None:
        if region_classes is not None:
            raise ConfigError(f"{key}.region_classes: expected {key}.regions beside it")
        return Structures(list(classes))
    if not regions:
        raise ConfigError(f"{key}.regions: expected at least one region, got none")
    members = {
        name: sorted({class_index(value, classes, f"{key}.regions.{name}") for value in values})
        for name, values in regions.items()
    }
    for name, values in members.items():
        if not values or 0 in values:
            got = "the background" if 0 in values else "none"
            raise ConfigError(f"{key}.regions.{name}: expected classes beside 0, got {got}")
    if region_classes is not None:
        painted = [class_index(value, classes, f"{key}.region_classes") for value in region_classes]
        if len(painted) != len(members):
            raise ConfigError(
                f"{key}.region_classes: expected a class for each of the {len(members)} regions, "
                f"got {len(painted)}"
            )
        return Structures(list(classes), members, painted)
    order = sorted(members, key=lambda name: -len(members[name]))
    painted = []
    for place, name in enumerate(order):
        smaller = {value for other in order[place + 1 :] for value in members[other]}
        own = [value for value in members[name] if value not in smaller]
        if len(own) != 1:
            left = ", ".join(classes[value] for value in own) or "none"
            raise ConfigError(
                f"{key}.regions.{name}: expected one class that no smaller region has, to write it "
                f"into segmentations, got {left}; set {key}.region_classes to a class for each "
                "region, in their order"
            )
        painted.append(own[0])
    return Structures(list(classes), {name: members[name] for name in order}, painted)


def class_index(value: int | str, classes: Sequence[str], key: str, also: str = "") -> int:
    """The index of a class given by name or index. Raises: ConfigError naming the key."""
    if isinstance(value, str) and value in classes:
        return list(classes).index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(classes):
        return value
    raise ConfigError(
        f"{key}: {value!r} is no class; expected a name or index of {list(classes)}{also}"
    )

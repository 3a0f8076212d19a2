"""Argument checks of the weighted loss, shared by the op, the module and the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from riskmap_ext._arguments import (
    integer,
    near_names,
    number,
    validate_background,
    validate_choice,
    validate_class_weight,
    validate_flag,
    validate_head,
    validate_labels,
    validate_logits,
    validate_mask,
    validate_regions,
    validate_voxel_map,
)
from riskmap_ext._deferred import cast_by_autocast

# In the order of the numbers in the schemas.
NORMALIZATIONS = ("foreground", "batch_foreground", "valid", "batch_valid", "weighted", "none")
CE_VOXELS = ("valid", "foreground")
REDUCTIONS = ("mean", "sum", "none")


class LossTensors(NamedTuple):
    logits: Tensor
    target: Tensor
    risk: Tensor | None
    class_weight: Tensor | None
    foreground: Tensor | None
    regions: Tensor | None
    dice_class_weight: Tensor | None

    @property
    def num_labels(self) -> int:
        return self.logits.size(1) if self.regions is None else self.regions.size(1)

    def options(self, **given: Any) -> LossOptions:
        """Options that are not given have their defaults."""
        return loss_options(
            self.num_labels,
            has_regions=self.regions is not None,
            has_foreground=self.foreground is not None,
            **given,
        )


def loss_tensors(
    logits: Any,
    target: Any,
    risk: Any,
    class_weight: Any,
    foreground: Any,
    regions: Any,
    dice_class_weight: Any,
    class_weight_name: str = "weight",
) -> LossTensors:
    logits = validate_logits("logits", logits)
    return LossTensors(
        logits,
        validate_labels("target", target, logits),
        None if risk is None else validate_voxel_map("risk", risk, logits),
        validate_class_weight(class_weight_name, class_weight, logits),
        None if foreground is None else validate_mask("foreground", foreground, logits),
        validate_regions(regions, logits),
        validate_class_weight("dice_class_weight", dice_class_weight, logits),
    )


class HeadTensors(NamedTuple):
    features: Tensor
    weight: Tensor
    bias: Tensor | None


def head_tensors(features: Any, weight: Any, bias: Any, *, autocast: bool = True) -> HeadTensors:
    """Features [B, F, *S], weight [C, F] and bias [C] in one dtype: that of autocast within it."""
    features = validate_logits("features", features, "F")
    weight, bias = validate_head(weight, bias, features)
    if autocast:
        features, weight, bias = cast_by_autocast(features, weight, bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != features.dtype:
            raise TypeError(
                f"{name}: expected {features.dtype} as features have, got {tensor.dtype}; autocast "
                "casts them all"
            )
    return HeadTensors(features, weight, bias)


def shape_of_logits(head: HeadTensors) -> Tensor:
    """A tensor with the shape of a head's logits but without their memory, for checking others."""
    features, weight, _ = head
    return features.detach()[:, :1].expand(-1, weight.size(0), *features.shape[2:])


class LossOptions(NamedTuple):
    """The options of the losses, with their defaults."""

    ignore_index: int = -100
    background: int | None = 0
    foreground_floor: float = 0.05
    normalization: str | None = None  # once checked, one of NORMALIZATIONS
    ce_voxels: str = "valid"
    reduction: str = "mean"
    label_smoothing: float = 0.0
    ce_weight: float = 1.0
    dice_weight: float = 0.0
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    alpha: float = 0.5
    beta: float = 0.5
    squared_pred: bool = False
    include_background: bool = False
    batch_dice: bool = False
    sync_dice: bool = False
    overwrite_logits: bool = False

    @property
    def of_cross_entropy(self) -> tuple[Any, ...]:
        """As the ops take them, in the order of their schemas."""
        return (
            self.ignore_index,
            self.background,
            self.foreground_floor,
            NORMALIZATIONS.index(self.normalization),
            CE_VOXELS.index(self.ce_voxels),
            REDUCTIONS.index(self.reduction),
            self.label_smoothing,
            self.ce_weight,
        )

    @property
    def of_dice(self) -> tuple[Any, ...]:
        return (
            self.dice_weight,
            self.smooth_nr,
            self.smooth_dr,
            self.alpha,
            self.beta,
            self.squared_pred,
            self.include_background,
            self.batch_dice,
        )

    @property
    def of_gradient(self) -> tuple[Any, ...]:
        """Options that the backward pass takes beside the sums."""
        return (
            self.ignore_index,
            self.background,
            CE_VOXELS.index(self.ce_voxels),
            self.label_smoothing,
            self.squared_pred,
        )


def _share(name: str, value: Any) -> float:
    return number(name, value, 0.0, 1.0)


def _amount(name: str, value: Any) -> float:
    return number(name, value, 0.0)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "ignore_index": lambda name, value: integer(name, value, -(2**63), 2**63 - 1),
    "foreground_floor": _share,
    "ce_voxels": lambda name, value: validate_choice(name, value, CE_VOXELS),
    "reduction": lambda name, value: validate_choice(name, value, REDUCTIONS),
    "label_smoothing": _share,
    **dict.fromkeys(("ce_weight", "dice_weight"), _amount),
    **dict.fromkeys(("smooth_nr", "smooth_dr", "alpha", "beta"), _amount),
    **dict.fromkeys(("squared_pred", "include_background"), validate_flag),
    **dict.fromkeys(("batch_dice", "sync_dice", "overwrite_logits"), validate_flag),
}


def loss_options(
    num_labels: int, *, has_regions: bool, has_foreground: bool, **given: Any
) -> LossOptions:
    for name in given:
        if name not in LossOptions._fields:
            near = near_names(name, LossOptions._fields)
            raise TypeError(f"{name}: expected an option of weighted_loss, got {name!r}{near}")
    checked = {name: _CHECKS[name](name, given[name]) for name in _CHECKS if name in given}
    if "background" in given:
        checked["background"] = validate_background(given["background"], num_labels)
    checked["normalization"] = _normalization(given.get("normalization"), has_foreground)
    options = LossOptions(**checked)
    if options.sync_dice and not options.batch_dice:
        raise ValueError(
            "sync_dice: expected batch_dice=True with it, as only the sums of a batch can be those "
            "of all processes, got batch_dice=False"
        )
    if has_regions and options.normalization == "weighted":
        raise ValueError(
            "normalization: expected another one with regions, as a voxel of overlapping regions "
            "has no class weight of its own, got 'weighted'"
        )
    if options.dice_weight > 0:
        if options.reduction == "none":
            raise ValueError(
                "dice_weight: expected 0 with reduction='none', as Dice has no voxel map, "
                f"got {options.dice_weight}"
            )
        # Counted without listing them: nn passes a huge number of classes to mean "enough".
        without_background = options.background is not None and not options.include_background
        if not has_regions and num_labels - without_background < 1:
            raise ValueError(
                "dice_weight: expected at least one class besides the background, got logits "
                "with 1 class; set include_background=True or background=None"
            )
    return options


def _normalization(value: Any, has_foreground: bool) -> str:
    if value is None:
        return "foreground" if has_foreground else "valid"
    return validate_choice("normalization", value, NORMALIZATIONS)


def dice_classes(
    num_classes: int, background: int | None, include_background: bool
) -> tuple[int, ...]:
    """The classes whose Dice is averaged."""
    skip = None if include_background else background
    return tuple(k for k in range(num_classes) if k != skip)

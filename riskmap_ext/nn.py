"""The loss as a module, and tools for the output layer of a network."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from riskmap_ext._arguments import (
    class_weight_row,
    near_names,
    number_sequence,
    plain_tensor,
    region_table,
)
from riskmap_ext._deferred import DeferredLogits
from riskmap_ext._head import FusedHead, fuse_head, unfuse_head
from riskmap_ext._loss_arguments import LossOptions, loss_options
from riskmap_ext._prior import set_head_prior
from riskmap_ext.ops.linear_weighted_loss import linear_weighted_loss
from riskmap_ext.ops.weighted_loss import weighted_loss

__all__ = [
    "DeferredLogits",
    "FusedHead",
    "RiskWeightedLoss",
    "fuse_head",
    "set_head_prior",
    "unfuse_head",
]

Logits = Tensor | DeferredLogits
Scales = Tensor | Sequence[Tensor]

_ELSEWHERE = {  # what other losses call the options
    "class_weight": "weight",
    "class_weights": "weight",
    "ds_weights": "scale_weights",
    "weight_factors": "scale_weights",
    "ignore_label": "ignore_index",
    "smoothing": "label_smoothing",
    "ce": "ce_weight",
    "lambda_ce": "ce_weight",
    "weight_ce": "ce_weight",
    "dice": "dice_weight",
    "lambda_dice": "dice_weight",
    "weight_dice": "dice_weight",
    "batch": "batch_dice",
    "do_bg": "include_background",
}


class RiskWeightedLoss(torch.nn.Module):
    r""":func:`riskmap_ext.weighted_loss` with its options fixed, and with deep supervision.

    With a list of logits, one per scale of a deeply supervised network (finest first), the
    result is :math:`\sum_i s_i L_i`. Target, risk and foreground are then lists too, or one tensor
    each at the finest scale, which the other scales sample at the nearest voxel.

    Args:
        weight, dice_class_weight: class weights [C], a tensor or a sequence of numbers.
        regions: table [C, L] of overlapping regions, a tensor or nested lists.
        scale_weights: s_i, finite and >= 0, one per scale; None: 1, 1/2, 1/4, ... divided by
            their sum (nnU-Net also sets its coarsest scale to 0). Not used for a single tensor
            of logits.
        options: the other keyword arguments of :func:`riskmap_ext.weighted_loss`, checked here.
            Deep supervision needs a reduction.

    ``weight``, ``dice_class_weight`` and ``regions`` are buffers: they move with the module but are
    not in its state_dict.

    Shapes: input [B, C, \*S] logits or :class:`DeferredLogits`, or a list of them; target, risk and
    foreground [B, \*S] or [B, 1, \*S].
    """

    weight: Tensor | None
    dice_class_weight: Tensor | None
    regions: Tensor | None

    def __init__(
        self,
        weight: Any = None,
        *,
        dice_class_weight: Any = None,
        regions: Any = None,
        scale_weights: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        weight = _weight_buffer("weight", weight)
        dice_class_weight = _weight_buffer("dice_class_weight", dice_class_weight)
        regions = None if regions is None else region_table(regions).clone()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("dice_class_weight", dice_class_weight, persistent=False)
        self.register_buffer("regions", regions, persistent=False)
        self.scale_weights = None if scale_weights is None else _scale_weights(scale_weights)
        unknown = sorted(set(options) - set(LossOptions._fields))
        if unknown:
            known = ("weight", "regions", "scale_weights", *LossOptions._fields)
            raise TypeError(
                f"RiskWeightedLoss: unknown option {unknown[0]!r}{_meant(unknown[0], known)}"
            )
        # The number of labels may not be known yet: check as if there were enough of them.
        labelled = regions if regions is not None else weight
        num_labels = 2**31 if labelled is None else labelled.size(-1)
        loss_options(num_labels, has_regions=regions is not None, has_foreground=False, **options)
        self.options = options

    def forward(
        self,
        input: Logits | Sequence[Logits],  # torch's name for it
        target: Scales,
        risk: Scales | None = None,
        foreground: Scales | None = None,
    ) -> Tensor:
        if isinstance(input, (torch.Tensor, DeferredLogits)):
            return self._one_scale(input, target, risk, foreground)
        if not isinstance(input, (list, tuple)):
            raise TypeError(
                f"input: expected a torch.Tensor or a list of them, got {type(input).__name__}"
            )
        logits = [
            each if isinstance(each, DeferredLogits) else plain_tensor("input", each)
            for each in input
        ]
        scale_weights = self._weights_of(len(logits))
        targets = _for_scales("target", target, logits)
        risks = _for_scales("risk", risk, logits)
        foregrounds = _for_scales("foreground", foreground, logits)
        total: Tensor | None = None
        for scale, *tensors in zip(scale_weights, logits, targets, risks, foregrounds, strict=True):
            if scale == 0:
                continue  # as nnU-Net leaves out its coarsest scale
            loss = scale * self._one_scale(*tensors)
            total = loss if total is None else total + loss
        assert total is not None  # one weight at least is above 0
        return total

    def _one_scale(self, logits: Any, target: Any, risk: Any, foreground: Any) -> Tensor:
        options = {
            "dice_class_weight": self.dice_class_weight,
            "foreground": foreground,
            "regions": self.regions,
            **self.options,
        }
        if isinstance(logits, DeferredLogits):
            features, weight, bias = logits.parts
            return linear_weighted_loss(
                features, weight, bias, target, risk, class_weight=self.weight, **options
            )
        return weighted_loss(logits, target, risk, weight=self.weight, **options)

    def _weights_of(self, scales: int) -> Sequence[float]:
        if scales == 0:
            raise ValueError("input: expected at least one scale, got an empty list")
        if self.options.get("reduction") == "none":
            raise ValueError(
                "reduction: expected 'mean' or 'sum' with a list of logits, got 'none'"
            )
        if self.scale_weights is None:
            halves = [0.5**scale for scale in range(scales)]
            return [each / sum(halves) for each in halves]
        if len(self.scale_weights) != scales:
            raise ValueError(
                f"scale_weights: expected {scales} values, one for each scale of input, "
                f"got {len(self.scale_weights)}"
            )
        return self.scale_weights

    def extra_repr(self) -> str:
        fixed = dict(self.options)
        if self.scale_weights is not None:
            fixed["scale_weights"] = self.scale_weights
        return ", ".join(f"{name}={value!r}" for name, value in fixed.items())


def _meant(name: str, known: Collection[str]) -> str:
    if name in ("target", "risk", "foreground"):
        return "; it goes with the call, loss(input, target, risk, foreground)"
    if name in _ELSEWHERE:
        return f"; did you mean {_ELSEWHERE[name]}?"
    return near_names(name, known) or f"; expected {', '.join(known)}"


def _weight_buffer(name: str, value: Any) -> Tensor | None:
    return None if value is None else class_weight_row(name, value).detach().clone()


def _scale_weights(value: Any) -> tuple[float, ...]:
    weights = number_sequence("scale_weights", value, 0.0)
    if not any(weights):
        raise ValueError(f"scale_weights: expected at least one value above 0, got {value!r}")
    return weights


def _for_scales(
    name: str, value: Scales | None, logits: Sequence[Logits]
) -> Sequence[Tensor] | Sequence[None]:
    """``value`` for each scale; one tensor is sampled at the nearest voxel."""
    if value is None:
        return [None] * len(logits)
    if isinstance(value, (list, tuple)):
        if len(value) != len(logits):
            raise ValueError(
                f"{name}: expected {len(logits)} tensors, one for each scale of input, "
                f"got {len(value)}"
            )
        return value
    tensor = plain_tensor(name, value)
    if tensor.dim() == len(logits[0].shape) and tensor.size(1) == 1:
        tensor = tensor.squeeze(1)
    return [_nearest(name, tensor, each.shape[2:]) for each in logits]


def _nearest(name: str, tensor: Tensor, size: torch.Size) -> Tensor:
    if tensor.dim() != len(size) + 1:
        raise ValueError(
            f"{name}: expected {len(size)} spatial dimensions, got shape {list(tensor.shape)}"
        )
    for dim, extent in enumerate(size, start=1):
        if tensor.size(dim) != extent:
            # The voxel whose centre is nearest: "nearest-exact" of torch's interpolate.
            index = torch.arange(extent, device=tensor.device)
            index = ((2 * index + 1) * tensor.size(dim)) // (2 * extent)
            tensor = tensor.index_select(dim, index)
    return tensor

"""MONAI's ``DiceCELoss`` with a risk map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

import riskmap_ext
from riskmap_ext._arguments import (
    class_weight_row,
    compute_dtype,
    may_look,
    number,
    number_sequence,
    plain_tensor,
    validate_flag,
    validate_logits,
)
from riskmap_ext._deferred import DeferredLogits

_ROUNDING = 1e-3
_INSIDE = [[0, 1]]  # one channel of logits for labels 0 and 1
_BITS = 8  # of the codes for the channels that are 1 at a voxel
_IGNORED_CODE, _NO_CODE = -100, -1


class RiskMapDiceCELoss(_Loss):
    r"""``monai.losses.DiceCELoss`` with a risk map: one fused pass for cross-entropy and Dice.

    .. math:: \lambda_{ce}\, L + \lambda_{dice}\, D

    with L and D of :func:`riskmap_ext.weighted_loss`. The first 15 arguments are DiceCELoss's, in
    its order and with its defaults. Without a risk map the value is DiceCELoss's own, with one
    exception: over several channels with ``sigmoid=True`` the cross-entropy is that of the sigmoids
    (the mean over channels of the binary one), where MONAI uses that of a softmax.

    * ``softmax=True``: mutually exclusive classes. Target: labels [B, 1, \*S] with
      ``to_onehot_y=True``, else one-hot [B, C, \*S].
    * ``sigmoid=True``: one channel and a target [B, 1, \*S] of 0 and 1; or several overlapping
      ones, with a multi-hot target [B, C, \*S] of 0 and 1, or labels [B, 1, \*S] and
      ``regions``, the table [C, L] of the labels in each channel (``to_onehot_y=True``: each label
      is a channel). ``label_smoothing`` has no effect on one channel, as in MONAI.
    * ``weight``, class weights [C], acts as in MONAI. It weights the Dice of each class, whose mean
      is not divided by the weights' sum. It weights the cross-entropy, whose mean is divided by
      that sum for labels, but not for one-hot targets. For one channel it is the weight of the
      voxels inside, in the cross-entropy alone.
    * ``reduction="sum"``: the sum over images, classes and voxels.
    * ``other_act``, and Dice without an activation, raise an error: the Dice of raw inputs is not
      an overlap of probabilities. Without Dice (``lambda_dice=0``) no activation is required.

    Further arguments, by keyword:
        class_weight: class weights [C] of the cross-entropy alone.
        ignore_index: label of voxels to ignore; in a multi-hot target the value of any channel
            there, neither 0 nor 1.
        regions: see above.
        scale_weights: for a list of inputs (deep supervision, finest first), see
            :class:`riskmap_ext.nn.RiskWeightedLoss`.
        normalization: see :func:`riskmap_ext.weighted_loss`. None: the mean that DiceCELoss uses,
            or "foreground" if the call passes the image's own foreground, except with ``weight``
            or ``reduction="sum"``.
        background, foreground_floor, ce_voxels, sync_dice: see :func:`riskmap_ext.weighted_loss`.
        overwrite_logits: see there; not for a multi-hot target of more than 8 channels.

    It has no state: class weights are not in its state_dict. If the number of channels matters
    (several sigmoids, ``reduction="sum"``) and neither ``weight`` nor ``regions`` gives it, the
    first call builds the loss: call it once before ``torch.compile(fullgraph=True)``.

    Shapes: input [B, C, \*S], or a list of them; logits, or for every option the
    :class:`riskmap_ext.nn.DeferredLogits` of a fused head; target as above, or a mapping with the
    key "label" and optionally "risk" and "foreground", as
    :class:`riskmap_ext.integrations.monai.PrepareBatchRiskMap` returns it; risk and foreground
    [B, \*S] or [B, 1, \*S]. Labels within 1e-3 of a whole number, as resampling leaves them, are
    rounded. The result is a scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an unsupported or incompatible argument, by name.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Any] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Any = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        *,
        class_weight: Any = None,
        ignore_index: int = -100,
        regions: Any = None,
        scale_weights: Sequence[float] | None = None,
        normalization: str | None = None,
        background: int | None = 0,
        foreground_floor: float = 0.05,
        ce_voxels: str = "valid",
        sync_dice: bool = False,
        overwrite_logits: bool = False,
    ) -> None:
        super().__init__()
        flags = {
            "include_background": include_background,
            "to_onehot_y": to_onehot_y,
            "sigmoid": sigmoid,
            "softmax": softmax,
            "squared_pred": squared_pred,
            "jaccard": jaccard,
            "batch": batch,
            "sync_dice": sync_dice,
            "overwrite_logits": overwrite_logits,
        }
        for name, value in flags.items():
            validate_flag(name, value)
        lambda_dice = number("lambda_dice", lambda_dice, 0.0)
        lambda_ce = number("lambda_ce", lambda_ce, 0.0)
        if sync_dice and not batch:
            raise ValueError("sync_dice: expected batch=True with it, got batch=False")
        if other_act is not None:
            raise ValueError(f"other_act: expected None, the only value supported, got {other_act}")
        if (sigmoid and softmax) or (lambda_dice != 0 and not (sigmoid or softmax)):
            raise ValueError(
                "softmax, sigmoid: expected one of them to be True (the Dice of raw inputs is not "
                f"supported), got softmax={softmax!r}, sigmoid={sigmoid!r}"
            )
        if regions is not None and not sigmoid:
            raise ValueError(f"regions: expected sigmoid=True with it, got sigmoid={sigmoid!r}")
        reduction = getattr(reduction, "value", reduction)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
        if weight is not None and class_weight is not None:
            raise ValueError(
                "weight, class_weight: expected one of them (weight is for Dice and cross-entropy, "
                "class_weight for the cross-entropy alone), got both"
            )
        self.include_background, self.to_onehot_y = include_background, to_onehot_y
        self.sigmoid, self.softmax = sigmoid, softmax
        self.reduction = reduction
        self.of_both = _as_list("weight", weight)
        self.of_cross_entropy = _as_list("class_weight", class_weight)
        self.regions = regions
        self.label_smoothing = label_smoothing
        self.normalization = normalization
        self.options: dict[str, Any] = {
            "scale_weights": scale_weights,
            "ignore_index": ignore_index,
            "background": background,
            "foreground_floor": foreground_floor,
            "ce_voxels": ce_voxels,
            "reduction": reduction,
            "ce_weight": lambda_ce,
            "dice_weight": lambda_dice,
            "smooth_nr": smooth_nr,
            "smooth_dr": smooth_dr,
            "alpha": 1.0 if jaccard else 0.5,
            "beta": 1.0 if jaccard else 0.5,
            "squared_pred": squared_pred,
            "batch_dice": batch,
            "sync_dice": sync_dice,
            "overwrite_logits": overwrite_logits,
        }
        self.losses = nn.ModuleDict()  # by number of channels, if it matters
        # Built now if the number is known: for torch.compile, and to raise errors here.
        given = (self.of_both or self.of_cross_entropy, regions, [0] if sigmoid else [0, 0])
        self._loss(len(next(each for each in given if each is not None)))

    def forward(
        self,
        input: Tensor | DeferredLogits | Sequence[Tensor | DeferredLogits],
        target: Tensor | Sequence[Tensor] | Mapping[str, Any],
        risk: Tensor | Sequence[Tensor] | None = None,
        foreground: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        if isinstance(target, Mapping):
            if "label" not in target:
                raise ValueError(f"target: expected the key 'label', got {sorted(target)}")
            risk = target.get("risk") if risk is None else risk
            foreground = target.get("foreground") if foreground is None else foreground
            target = target["label"]
        if isinstance(input, (list, tuple)) and not input:
            raise ValueError("input: expected at least one scale, got an empty list")
        first: Any = input[0] if isinstance(input, (list, tuple)) else input
        finest = first if isinstance(first, DeferredLogits) else validate_logits("input", first)
        channels = finest.shape[1]
        if channels == 1 and self.softmax:
            raise ValueError(
                "input: expected several channels with softmax=True, got one; sigmoid=True is for "
                "one channel"
            )
        for name, weights in (("weight", self.of_both), ("class_weight", self.of_cross_entropy)):
            if weights is not None and len(weights) != channels:
                raise ValueError(
                    f"{name}: expected [{channels}], one value per channel of input "
                    f"{list(finest.shape)}, got [{len(weights)}]"
                )
        target = _for_each(target, self._target, channels)
        if foreground is not None:
            foreground = _for_each(foreground, _mask)
        if self._is_sigmoid(channels) and channels == 1 and self.of_both is not None:
            risk = _heavier_inside(target, risk, self.of_both[0], compute_dtype(finest.dtype))
        loss = self._loss(channels)
        if {each.device for each in loss.buffers()} - {finest.device}:
            loss.to(finest.device)
        return loss(input, target, risk, foreground)

    def _is_sigmoid(self, channels: int) -> bool:
        return self.sigmoid or (channels == 1 and not self.softmax)

    def _is_multi_hot(self, channels: int) -> bool:
        return (
            self._is_sigmoid(channels)
            and channels > 1
            and self.regions is None
            and not self.to_onehot_y
        )

    def _loss(self, channels: int) -> nn.Module:
        any_number = not self._is_sigmoid(channels) and self.reduction == "mean"
        key = "classes" if any_number else str(channels)
        if key not in self.losses:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"RiskMapDiceCELoss: its loss for {channels} channels is not built yet and "
                    "cannot be built within torch.compile; call it once before with such an input"
                )
            self.losses[key] = self._built(channels)
        return self.losses[key]

    def _built(self, channels: int) -> nn.Module:
        """The loss for this number of channels of logits."""
        options = {**self.options, "label_smoothing": self.label_smoothing}
        weight = self.of_cross_entropy
        normalization = "none" if self.reduction == "sum" else None
        counted = channels - (channels > 1 and not self.include_background)
        if self._is_sigmoid(channels):
            dice_weights = self._dice_weights_of_sigmoids(channels)
            if channels == 1:
                options["label_smoothing"] = 0.0
                options["regions"] = _INSIDE if self.regions is None else self.regions
            else:
                weight = self.of_both or weight
                options["regions"] = self.regions
                if self.regions is None and self.to_onehot_y:
                    options["regions"] = torch.eye(channels, dtype=torch.bool)
            if self.reduction == "sum":
                options["ce_weight"] *= channels
        else:
            dice_weights = self.of_both if counted > 1 else None
            weight = self.of_both or weight
            options["include_background"] = self.include_background
            # As in torch: divided by the weights of the labels, but not of one-hot targets.
            if self.of_both is not None and self.to_onehot_y and self.reduction == "mean":
                normalization = "weighted"
        if self.reduction == "sum":
            options["dice_weight"] *= counted
        options["normalization"] = self.normalization or normalization
        if self._is_multi_hot(channels):
            return _MultiHotLoss(channels, weight, dice_weights, options)
        return riskmap_ext.nn.RiskWeightedLoss(weight, dice_class_weight=dice_weights, **options)

    def _dice_weights_of_sigmoids(self, channels: int) -> list[float] | None:
        """Without the background, MONAI's mean is over the channels after the first; if only one
        is left, it has no weight."""
        if channels == 1 or self.include_background:
            return None if channels == 1 else self.of_both
        rest = self.of_both if self.of_both and channels > 2 else [1.0] * channels
        return [0.0, *(each * channels / (channels - 1) for each in rest[1:])]

    def _target(self, target: Any, channels: int) -> Tensor:
        """Labels [B, 1, *S], converted from a one-hot target; a multi-hot one is returned as is."""
        target = plain_tensor("target", target)
        sigmoid = self._is_sigmoid(channels)
        labelled = self.to_onehot_y or self.regions is not None or (sigmoid and channels == 1)
        expected = 1 if labelled else channels
        if target.dim() < 3 or target.size(1) != expected:
            kind = "multi-hot" if sigmoid else "one-hot"
            form = "labels [B, 1, *S]" if labelled else f"{kind} [B, {channels}, *S]"
            hint = "" if labelled else "; to_onehot_y=True takes labels [B, 1, *S]"
            raise ValueError(f"target: expected {form}, got shape {list(target.shape)}{hint}")
        if labelled:
            return rounded(target)
        return target if sigmoid else _labels_of_one_hot(target, self.options["ignore_index"])


class _MultiHotLoss(nn.Module):
    """Overlapping channels with a target [B, C, *S] of 0 and 1.

    The kernels take one label per voxel and a table of the labels in each channel. A label is the
    code of the channels that are 1 at a voxel. If there are too many channels for one code, groups
    of them have codes with one more bit, set if any channel at all is 1, so that label 0 is the
    background of all groups; the losses of the groups are averaged.
    """

    def __init__(
        self,
        channels: int,
        weight: list[float] | None,
        dice_weights: list[float] | None,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.channels = channels
        self.ignore_index = options["ignore_index"]
        if self.ignore_index in (0, 1):
            raise ValueError(
                "ignore_index: expected neither 0 nor 1 with a multi-hot target, "
                f"got {self.ignore_index}"
            )
        self.apart = channels > _BITS
        if self.apart and options["overwrite_logits"]:
            raise ValueError(
                f"overwrite_logits: expected False with a multi-hot target of {channels} channels, "
                f"whose logits are taken in parts beyond {_BITS}, got True"
            )
        size = _BITS - 1 if self.apart else channels
        starts = range(0, channels, size)
        self.slices = [slice(start, min(start + size, channels)) for start in starts]
        of_codes = {
            "ignore_index": _IGNORED_CODE,
            "background": None if options["background"] is None else 0,
        }
        groups = []
        for mine in self.slices:
            table = _table(mine.stop - mine.start, self.apart)
            group = riskmap_ext.nn.RiskWeightedLoss(
                None if weight is None else weight[mine],
                dice_class_weight=None if dice_weights is None else dice_weights[mine],
                **{**options, **of_codes, "regions": table},
            )
            groups.append(group)
        self.groups = nn.ModuleList(groups)

    def forward(self, input: Any, target: Any, risk: Any, foreground: Any) -> Tensor:
        codes = _for_each(target, self._codes)
        total: Tensor | None = None
        for index, (mine, group) in enumerate(zip(self.slices, self.groups, strict=True)):
            logits = _for_each(input, _channels, mine)
            part = group(logits, _for_each(codes, _item, index), risk, foreground)
            part = part * ((mine.stop - mine.start) / self.channels)
            total = part if total is None else total + part
        assert total is not None  # there is a channel
        return total

    def _codes(self, target: Tensor) -> Tensor:
        """[groups, B, *S]: sum of 2^c over the channels that are 1 at a voxel, and one more bit if
        any channel of all groups is."""
        groups = [list(range(mine.start, mine.stop)) for mine in self.slices]
        factors = [[2**bit for bit in range(len(each))] for each in groups]
        ignored = _ignored(target, self.ignore_index)
        codes, ones, others = _sums_of_ones(target, factors, torch.int16)
        if self.apart:
            anything = ones.ne(0)
            for each, mine in zip(codes, groups, strict=True):
                each.add_(anything, alpha=2 ** len(mine))
        wrong = others if ignored is None else others & ~ignored
        _require_hard(target, wrong, "multi-hot (0 or 1 in each channel)")
        codes.masked_fill_(wrong, _NO_CODE)
        return codes if ignored is None else codes.masked_fill_(ignored, _IGNORED_CODE)


def _table(channels: int, apart: bool) -> list[list[int]]:
    return [[code >> bit & 1 for code in range(2 ** (channels + apart))] for bit in range(channels)]


def _ignored(target: Tensor, ignore_index: int) -> Tensor | None:
    """Voxels with the ignored label in any channel; None if the dtype has no such value."""
    if not target.is_floating_point():
        if target.dtype == torch.bool:
            return None
        limits = torch.iinfo(target.dtype)
        if not limits.min <= ignore_index <= limits.max:
            return None
    return target.eq(ignore_index).any(dim=1)


def _labels_of_one_hot(target: Tensor, ignore_index: int) -> Tensor:
    channels = target.size(1)
    labels, ones, others = _sums_of_ones(target, [list(range(channels))], torch.int32)
    wrong = others | ones.ne(1)
    _require_hard(target, wrong, "one-hot (a single 1 among the classes of each voxel)")
    none = channels if ignore_index != channels else channels + 1
    return labels[0].masked_fill_(wrong, none).unsqueeze(1)


def _sums_of_ones(
    target: Tensor, factors: list[list[int]], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """For each group, the sum of the factors of the channels that are 1, [groups, B, *S]. Over all
    channels: how many are 1, and whether one is neither 0 nor 1."""
    # Comparing with exactly 0 and 1 is cheaper. On the CPU, values near them, from resampling, are
    # handled only if there are any; on a device always, since looking would have to wait for it.
    exact = not target.is_floating_point() or may_look(target)
    found = _read(target, factors, dtype, exact)
    if exact and target.is_floating_point() and bool(found[2].any()):
        found = _read(target, factors, dtype, exact=False)
    return found


def _read(
    target: Tensor, factors: list[list[int]], dtype: torch.dtype, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.zeros_like(target[:, 0], dtype=dtype)
    sums = count.new_zeros((len(factors), *count.shape))
    others = torch.zeros_like(count, dtype=torch.bool)
    places = [(group, factor) for group, row in enumerate(factors) for factor in row]
    for (group, factor), channel in zip(places, target.unbind(1), strict=True):
        if target.dtype == torch.bool:
            one, other = channel, None
        elif exact:
            one = channel.eq(1)
            other = channel.ne(0).logical_xor_(one)
        else:
            one = (channel - 1).abs() <= _ROUNDING
            other = ~(one | (channel.abs() <= _ROUNDING))
        sums[group].add_(one, alpha=factor)
        count.add_(one)
        if other is not None:
            others |= other
    return sums, count, others


def _require_hard(target: Tensor, wrong: Tensor, form: str) -> None:
    """Raises on the CPU. On a device the error would have to wait; the loss turns an invalid label
    into NaN."""
    if may_look(target) and bool(wrong.any()):
        raise ValueError(
            f"target: expected {form}, got other values at {int(wrong.sum())} voxels; soft labels "
            "are not supported"
        )


def _heavier_inside(target: Any, risk: Any, weight: float, dtype: torch.dtype) -> Any:
    """The risk times MONAI's weight of the voxels inside; labels but 0 and 1 stay invalid."""
    if isinstance(target, list):
        risks = [None] * len(target) if risk is None else risk
        if not isinstance(risks, (list, tuple)) or len(risks) != len(target):
            raise ValueError(
                f"risk: expected a list of {len(target)} maps, one for each target, with weight"
            )
        return [_heavier_inside(*each, weight, dtype) for each in zip(target, risks, strict=True)]
    factor = torch.ones_like(target, dtype=dtype).masked_fill_(target.eq(1), weight)
    if risk is None:
        return factor
    risk = plain_tensor("risk", risk)
    return risk * (factor if risk.dim() == target.dim() else factor.squeeze(1))


def _for_each(value: Any, function: Callable[..., Any], *options: Any) -> Any:
    """Applies ``function`` to a tensor, or to each in a list of them (deep supervision)."""
    if isinstance(value, (list, tuple)):
        return [function(each, *options) for each in value]
    return function(value, *options)


def _channels(value: Tensor | DeferredLogits, mine: slice) -> Tensor | DeferredLogits:
    return value.channels(mine) if isinstance(value, DeferredLogits) else value[:, mine]


def _item(values: Tensor, index: int) -> Tensor:
    return values[index]


def _as_list(name: str, value: Any) -> list[float] | None:
    """Class weights [C] as numbers, so that they are not state."""
    if value is None:
        return None
    return list(number_sequence(name, class_weight_row(name, value).tolist(), 0.0))


def rounded(label: Tensor) -> Tensor:
    """Resampling, even nearest, leaves labels such as 1e-15; other values are not changed."""
    if not label.is_floating_point():
        return label
    whole = label.round()
    return torch.where((label - whole).abs() <= _ROUNDING, whole, label)


def _mask(foreground: Any) -> Tensor:
    mask = plain_tensor("foreground", foreground)
    return mask.ne(0) if mask.is_floating_point() else mask

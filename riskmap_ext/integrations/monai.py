"""MONAI: ``DiceCELoss`` with a risk map, and a transform that makes the map of a case.

Needs MONAI, and ignite for the engines (extra ``monai``). docs/howto/monai.md has an example.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

try:
    from monai.engines.utils import PrepareBatch, default_prepare_batch
    from monai.transforms import MapTransform
    from monai.utils import convert_to_dst_type
except ImportError as error:
    raise ImportError(
        "riskmap_ext.integrations.monai needs MONAI >= 1.5 (the extra monai): "
        "pip install monai pytorch-ignite"
    ) from error

import riskmap_ext
from riskmap_ext._arguments import near_names, plain_tensor, risk_options, validate_flag
from riskmap_ext._files import digest, read_torch, write_torch
from riskmap_ext.integrations._cases import file_of, image_and_label, read_cases, two_keys
from riskmap_ext.integrations._source import FrozenSource, Inferer, Source, as_plain

__all__ = ["PrepareBatchRiskMap", "RiskMapDiceCELoss", "RiskMapd", "transfer_statistics"]

_SMOOTH = 1e-5  # the kernels' own, and MONAI's default
_ROUNDING = 1e-3
_FOREGROUND = [[0, 1]]  # one channel of logits for labels 0 and 1

Range = str | tuple[float, float]


class RiskMapDiceCELoss(_Loss):
    r"""``monai.losses.DiceCELoss`` with a risk map: one fused pass for cross-entropy and Dice.

    .. math:: \lambda_{ce}\, L + \lambda_{dice}\, D

    with L and D of :func:`riskmap_ext.weighted_loss`. The first 15 arguments are DiceCELoss's, in
    its order and with its defaults. Without a risk map the value is DiceCELoss's own.

    * ``softmax=True``: classes that exclude each other. Target: labels [B, 1, \*S] with
      ``to_onehot_y=True``, else one-hot [B, C, \*S].
    * ``sigmoid=True``: one channel of logits and a target [B, 1, \*S] of 0 and 1; or several
      overlapping regions with ``regions``, the table [C, L] of the labels in each, and a target of
      labels [B, 1, \*S] (MONAI's own loss has no binary cross-entropy for several channels).
      ``label_smoothing`` is refused: MONAI does not smooth binary cross-entropy.
    * ``reduction``: "mean" alone. ``smooth_nr``, ``smooth_dr``: 1e-5 alone. ``other_act``,
      ``squared_pred``, ``jaccard`` and ``weight`` (which MONAI applies to Dice as well) are
      refused.

    Further arguments, by keyword:
        class_weight: class weights [C] of the cross-entropy.
        ignore_index: label of voxels that count nowhere.
        regions: see above.
        scale_weights: for a list of inputs (deep supervision, finest first), see
            :class:`riskmap_ext.nn.RiskWeightedLoss`.
        normalization: see :func:`riskmap_ext.weighted_loss`. "valid", MONAI's mean over voxels,
            leaves cross-entropy and Dice on the scale they have there. "foreground" raises the
            cross-entropy up to 20-fold in images with little foreground, unless the image's own
            foreground is given.
        background, foreground_floor, ce_voxels: see :func:`riskmap_ext.weighted_loss`.

    It holds no state: the class weights stay out of its state_dict.

    Shapes: input [B, C, \*S], or a list of them; target as above, or a mapping with the keys
    "label", and "risk" and "foreground" where there are any, as :class:`PrepareBatchRiskMap` makes
    it; risk and foreground [B, \*S] or [B, 1, \*S]. Labels that resampling has left within 1e-3 of
    a whole number are rounded. The result is a scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument that is not supported or does not fit, by name.
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
        smooth_nr: float = _SMOOTH,
        smooth_dr: float = _SMOOTH,
        batch: bool = False,
        weight: Tensor | None = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        *,
        class_weight: Any = None,
        ignore_index: int = -100,
        regions: Any = None,
        scale_weights: Sequence[float] | None = None,
        normalization: str = "valid",
        background: int | None = 0,
        foreground_floor: float = 0.05,
        ce_voxels: str = "valid",
    ) -> None:
        super().__init__()
        _only("other_act", other_act, None)
        _only("squared_pred", squared_pred, False)
        _only("jaccard", jaccard, False)
        _only("reduction", getattr(reduction, "value", reduction), "mean")
        _only("smooth_nr", smooth_nr, _SMOOTH)
        _only("smooth_dr", smooth_dr, _SMOOTH)
        if weight is not None:
            raise ValueError(
                "weight: expected None (MONAI weights the Dice of each class with it too), got "
                "class weights; class_weight= weights the cross-entropy alone"
            )
        if bool(sigmoid) == bool(softmax):
            raise ValueError(
                "softmax, sigmoid: expected one of them to be True, got "
                f"softmax={softmax!r}, sigmoid={sigmoid!r}"
            )
        if regions is not None and softmax:
            raise ValueError("regions: expected sigmoid=True with it, got softmax=True")
        if sigmoid:
            _only("label_smoothing", label_smoothing, 0.0)
        self.to_onehot_y = bool(to_onehot_y)
        self.one_channel = bool(sigmoid) and regions is None
        self.loss = riskmap_ext.nn.RiskWeightedLoss(
            class_weight,
            regions=_FOREGROUND if self.one_channel else regions,
            scale_weights=scale_weights,
            ignore_index=ignore_index,
            background=background,
            foreground_floor=foreground_floor,
            normalization=normalization,
            ce_voxels=ce_voxels,
            label_smoothing=label_smoothing,
            ce_weight=lambda_ce,
            dice_weight=lambda_dice,
            include_background=bool(include_background),
            batch_dice=bool(batch),
        )

    def forward(
        self,
        input: Tensor | Sequence[Tensor],
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
        finest = input[0] if isinstance(input, (list, tuple)) and input else input
        channels = plain_tensor("input", finest).size(1)
        if self.one_channel and channels != 1:
            raise ValueError(
                f"input: expected one channel with sigmoid=True, got {channels}; regions= says "
                "which labels make up each of several overlapping regions"
            )
        if isinstance(target, (list, tuple)):
            target = [self._labels(each, channels) for each in target]
        else:
            target = self._labels(target, channels)
        if isinstance(foreground, (list, tuple)):
            foreground = [_mask(each) for each in foreground]
        elif foreground is not None:
            foreground = _mask(foreground)
        return self.loss(input, target, risk, foreground)

    def _labels(self, target: Any, channels: int) -> Tensor:
        """Labels [B, 1, *S]; a one-hot target is turned into them."""
        target = plain_tensor("target", target)
        one_hot = not self.to_onehot_y and self.loss.regions is None
        expected = channels if one_hot else 1
        if target.dim() < 3 or target.size(1) != expected:
            form = f"one-hot [B, {channels}, *S]" if one_hot else "labels [B, 1, *S]"
            hint = "; to_onehot_y=True takes labels [B, 1, *S]" if one_hot else ""
            raise ValueError(f"target: expected {form}, got shape {list(target.shape)}{hint}")
        if not one_hot:
            return _rounded(target)
        if target.dtype == torch.bool:
            target = target.to(torch.uint8)
        labels = target.argmax(dim=1, keepdim=True)
        hot = target.gather(1, labels).eq(1) & target.ne(0).sum(dim=1, keepdim=True).eq(1)
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            if not bool(hot.all()):
                raise ValueError(
                    "target: expected one-hot (a single 1 among the classes of each voxel), got "
                    f"other values at {int((~hot).sum())} voxels; soft labels are not supported"
                )
            return labels
        # Elsewhere a voxel that is not one-hot gets a label that the loss turns into NaN: an error
        # would have to wait for the device.
        return labels.masked_fill_(~hot, channels)


def _rounded(label: Tensor) -> Tensor:
    """Resampling, nearest too, leaves labels such as 1e-15; what is no label stays what it is."""
    if not label.is_floating_point():
        return label
    whole = label.round()
    return torch.where((label - whole).abs() <= _ROUNDING, whole, label)


def _mask(foreground: Any) -> Tensor:
    mask = plain_tensor("foreground", foreground)
    return mask.ne(0) if mask.is_floating_point() else mask


def _only(name: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise ValueError(f"{name}: expected {expected!r}, the only value supported, got {value!r}")


class PrepareBatchRiskMap(PrepareBatch):
    """``prepare_batch`` for MONAI's SupervisedTrainer: the target is {"label": ..., "risk": ...}.

    The trainer hands its loss two arguments, so the map travels within the second;
    :class:`RiskMapDiceCELoss` takes it apart. Metrics of the training set find the label in
    ``output["label"]["label"]``. A batch without ``risk_key`` has no map: its weights are 1.
    """

    def __init__(self, risk_key: str = "risk", foreground_key: str | None = None) -> None:
        self.keys = {"risk": risk_key}
        if foreground_key is not None:
            self.keys["foreground"] = foreground_key

    def __call__(
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> Any:
        image, label = default_prepare_batch(batchdata, device, non_blocking, **kwargs)
        target = {"label": label}
        for name, key in self.keys.items():
            if key in batchdata:
                target[name] = batchdata[key].to(device=device, non_blocking=non_blocking, **kwargs)
        return image, target


class RiskMapd(MapTransform):
    """Dictionary transform that adds the transfer risk map of a case, or loads it from a cache.

    It belongs after the transforms that are the same in every epoch (loading, orientation, spacing,
    intensities) and before the random ones: those then carry the map along with image and label
    (``keys=["image", "label", "risk"]``; interpolate the map like the label, ``mode="nearest"``, or
    linearly). CacheDataset and PersistentDataset keep it as they keep the rest.

    Args:
        keys: the keys of image [channels, *S] and label [1, *S], in this order.
        source: the frozen source model, image [1, channels, *S] to logits [1, Z, *S]; a Module is
            put into eval mode. Where it gives a list (deep supervision), the first counts.
        statistics: :class:`riskmap_ext.TransferStatistics` of the training set after both passes,
            see :func:`transfer_statistics`.
        risk_key: key of the map, [1, *S] float32, with the meta data of the label.
        inferer: as of ``monai.inferers`` (SlidingWindowInferer for volumes that do not fit); None:
            the source is called on the whole volume.
        range: "dataset" (the hardness range of ``statistics``), "image", or (lo, hi) in nats. The
            scheme "power" needs none: statistics of the first pass will do.
        device: where the source runs; None: where its first parameter lies, or the CPU for a
            function.
        cache_dir: folder of maps that were made before, by the content of image, label, statistics
            and options, and the source's weights and architecture; a damaged entry is made again.
            None: no cache.
        source_key: names source and inferer in the cache. Needed where one of them is a function:
            its content is not known. Change it when they change.
        options: further options of :func:`riskmap_ext.risk_map` (scheme, base, alpha, scale,
            background).
    """

    def __init__(
        self,
        keys: Iterable[Hashable] = ("image", "label"),
        *,
        source: Source,
        statistics: riskmap_ext.TransferStatistics,
        risk_key: str = "risk",
        inferer: Inferer | None = None,
        range: Range = "dataset",
        device: str | torch.device | None = None,
        cache_dir: str | Path | None = None,
        source_key: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(two_keys(keys))
        if not isinstance(statistics, riskmap_ext.TransferStatistics):
            raise TypeError(
                f"statistics: expected TransferStatistics, got {type(statistics).__name__}"
            )
        if isinstance(range, str) and range not in ("dataset", "image"):
            raise ValueError(f"range: expected 'dataset', 'image' or (lo, hi), got {range!r}")
        self.source = FrozenSource(source, inferer, device, statistics.regions)
        self.risk_key = risk_key
        self.conditional = statistics.conditional.cpu()
        wanted: Any
        if range == "dataset":
            wanted = None if options.get("scheme") == "power" else statistics.hardness_range
        else:
            wanted = None if range == "image" else range
        self.options = _checked({**options, "range": wanted}, statistics.num_classes)
        self.options |= {"ignore_index": statistics.ignore_index, "regions": statistics.regions}
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.source_key = source_key
        if self.cache_dir is not None and source_key is None and not self.source.is_known:
            raise ValueError(
                "source_key: expected a name for the cache, since source or inferer is a function, "
                "whose content is not known; got None"
            )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        image, label = image_and_label(case, self.keys)
        shape = tuple(label.shape)
        if len(shape) != len(image.shape) or shape[0] != 1:
            raise ValueError(
                f"{self.keys[1]}: expected labels [1, *S] beside an image of shape "
                f"{list(image.shape)}, got shape {list(shape)}"
            )
        path = self._path(image, label)
        risk = None if path is None else read_torch(path)
        if not isinstance(risk, Tensor) or tuple(risk.shape) != shape:
            risk = self._risk(image, label)
            if path is not None:
                write_torch(path, risk)
        case[self.risk_key] = convert_to_dst_type(risk, label, dtype=torch.float32)[0]
        return case

    def _risk(self, image: Any, label: Any) -> Tensor:
        logits = self.source(image)
        target = as_plain(label).to(logits.device)[None]
        conditional = self.conditional.to(logits.device)
        return riskmap_ext.risk_map(logits, _rounded(target), conditional, **self.options).cpu()

    def _path(self, image: Any, label: Any) -> Path | None:
        if self.cache_dir is None:
            return None
        options = {**self.options, "regions": None, "version": riskmap_ext.__version__}
        parts = [options, self.conditional, as_plain(image), as_plain(label)]
        if self.options["regions"] is not None:
            parts.append(self.options["regions"])
        source = self.source.digest() if self.source_key is None else self.source_key
        return self.cache_dir / f"risk-{digest(source, *parts)[:32]}.pt"


def _checked(options: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """Options of risk_map; what is wrong with them is told before any case."""
    defaults = {
        name: value
        for name, value in (riskmap_ext.risk_map.__kwdefaults__ or {}).items()
        if name not in ("ignore_index", "regions")
    }
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        hint = near_names(unknown[0], defaults) or f"; expected one of {', '.join(defaults)}"
        raise TypeError(f"RiskMapd: unknown option {unknown[0]!r}{hint}")
    risk_options(**{**defaults, **options}, num_classes=num_classes)
    return options


def transfer_statistics(
    data: Iterable[Mapping[Hashable, Any]],
    source: Source,
    num_classes: int,
    *,
    keys: Iterable[Hashable] = ("image", "label"),
    inferer: Inferer | None = None,
    device: str | torch.device | None = None,
    ignore_index: int = -100,
    regions: Tensor | None = None,
    progress: bool = False,
) -> riskmap_ext.TransferStatistics:
    """LEEP statistics of a source model over a data set of dictionaries, in two passes.

    Args:
        data: a data set (not a loader) of cases with image [channels, *S] and label [1, *S],
            through the transforms that are the same in every epoch; read twice.
        source, keys, inferer, device: as for :class:`RiskMapd`.
        num_classes: number of target classes C.
        ignore_index: label of voxels that count nowhere.
        regions: table [R, Z] for a source of overlapping regions; [[0, 1]] for one sigmoid channel.
        progress: whether to tell on stderr how far each pass is: a bar on a terminal where tqdm is
            installed, else a line for each tenth of it.

    Raises:
        TypeError: a loader, or cases that are no dictionaries of arrays.
        ValueError: no cases, a key that a case lacks, labels or logits that do not do (the case is
            named by index and file), no labelled voxels, or another data set in the second pass (a
            generator that is used up, random transforms).

    Warns where the source tells nothing about the labels.
    """
    keys = two_keys(keys)
    progress = validate_flag("progress", progress)
    run = FrozenSource(source, inferer, device, regions)
    statistics = riskmap_ext.TransferStatistics(
        num_classes, ignore_index=ignore_index, regions=regions
    )
    counts: list[int] = []
    for step in (statistics.update, statistics.update_range):
        title, count = f"LEEP statistics, pass {len(counts) + 1} of 2", 0
        for case in read_cases(data, title, progress):
            image, label = image_and_label(case, keys, f"case {count}")
            logits = run(image)
            try:
                step(logits, _rounded(as_plain(label).to(logits.device)[None]))
            except (TypeError, ValueError) as error:
                where = f"case {count}{file_of(label, image)}"
                raise type(error)(f"data: {where}: {error}") from error
            count += 1
        counts.append(count)
        if counts[0] == 0:
            raise ValueError("data: expected cases, got none")
        if statistics.num_voxels == 0:
            raise ValueError("data: expected labelled voxels, got none that is not ignored")
    if counts[0] != counts[1]:
        raise ValueError(
            f"data: gave {counts[0]} cases in the first pass and {counts[1]} in the second; "
            "expected a data set that can be read twice, not a generator"
        )
    try:
        _ = statistics.score  # warns where it tells nothing
    except RuntimeError:
        raise ValueError(
            "data: gave other labels in the second pass than in the first; expected transforms "
            "that are the same every time, no random ones"
        ) from None
    return statistics

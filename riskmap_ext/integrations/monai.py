"""MONAI: ``DiceCELoss`` with a risk map, and a transform that makes the map of a case.

Needs MONAI (``pip install "riskmap-ext[monai]"``). docs/howto/monai.md has a complete example.
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
        "riskmap_ext.integrations.monai needs MONAI >= 1.5 with ignite: "
        'pip install "riskmap-ext[monai]"'
    ) from error

import riskmap_ext
from riskmap_ext._arguments import plain_tensor
from riskmap_ext._files import digest, read_torch, write_torch

__all__ = ["PrepareBatchRiskMap", "RiskMapDiceCELoss", "RiskMapd", "transfer_statistics"]

_SMOOTH = 1e-5  # the kernels' own, and MONAI's default
_FOREGROUND = [[0, 1]]  # one channel of logits for labels 0 and 1

Inferer = Callable[..., Any]
Source = Callable[[Tensor], Any]
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
    * ``reduction``: "mean" alone. ``smooth_nr``, ``smooth_dr``: 1e-5 alone. ``other_act``,
      ``squared_pred``, ``jaccard`` and ``weight`` (which MONAI applies to Dice as well) are
      refused.

    Further arguments, by keyword:
        class_weight: class weights [C] of the cross-entropy.
        ignore_index: label of voxels that count nowhere.
        regions: see above.
        scale_weights: for a list of inputs (deep supervision, finest first), see
            :class:`riskmap_ext.nn.RiskWeightedLoss`.
        normalization: see :func:`riskmap_ext.weighted_loss`. None: "foreground" with a risk map,
            "valid" without, which is MONAI's mean.
        background, foreground_floor, region: see :func:`riskmap_ext.weighted_loss`.

    Shapes: input [B, C, \*S], or a list of them; target as above, or a mapping with the keys
    "label", and "risk" and "foreground" where there are any, as :class:`PrepareBatchRiskMap` makes
    it; risk and foreground [B, \*S] or [B, 1, \*S]. The result is a float32 scalar.

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
        normalization: str | None = None,
        background: int | None = 0,
        foreground_floor: float = 0.05,
        region: str = "valid",
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
        self.to_onehot_y = bool(to_onehot_y)
        self.one_channel = bool(sigmoid) and regions is None
        table = _FOREGROUND if self.one_channel else regions

        def loss(default: str) -> riskmap_ext.nn.RiskWeightedLoss:
            return riskmap_ext.nn.RiskWeightedLoss(
                class_weight,
                regions=table,
                scale_weights=scale_weights,
                ignore_index=ignore_index,
                background=background,
                foreground_floor=foreground_floor,
                normalization=default if normalization is None else normalization,
                region=region,
                label_smoothing=label_smoothing,
                ce_weight=lambda_ce,
                dice_weight=lambda_dice,
                include_background=bool(include_background),
                batch_dice=bool(batch),
            )

        self.plain, self.weighted = loss("valid"), loss("foreground")

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
        loss = self.plain if risk is None else self.weighted
        return loss(input, target, risk, foreground)

    def _labels(self, target: Any, channels: int) -> Tensor:
        """Labels [B, 1, *S]; a one-hot target is turned into them."""
        target = plain_tensor("target", target)
        one_hot = not self.to_onehot_y and self.plain.regions is None
        expected = channels if one_hot else 1
        if target.dim() < 3 or target.size(1) != expected:
            form = f"one-hot [B, {channels}, *S]" if one_hot else "labels [B, 1, *S]"
            hint = "; to_onehot_y=True takes labels [B, 1, *S]" if one_hot else ""
            raise ValueError(f"target: expected {form}, got shape {list(target.shape)}{hint}")
        if not one_hot:
            return target
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


def _only(name: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise ValueError(f"{name}: expected {expected!r}, the only value supported, got {value!r}")


class PrepareBatchRiskMap(PrepareBatch):
    """``prepare_batch`` for MONAI's SupervisedTrainer: the target is {"label": ..., "risk": ...}.

    The trainer hands its loss two arguments, so the map travels within the second;
    :class:`RiskMapDiceCELoss` takes it apart. Metrics of the training set find the label in
    ``output["label"]["label"]``. A batch without ``risk_key`` has no map: the loss is then plain.
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
        range: "dataset" (the hardness range of ``statistics``), "image", or (lo, hi) in nats.
        device: where the source runs; None: where its first parameter lies.
        cache_dir: folder of maps that were made before, by the content of image, label, source,
            statistics and options; a damaged entry is made again. None: no cache.
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
        **options: Any,
    ) -> None:
        keys = tuple(keys)
        super().__init__(keys)
        if len(keys) != 2:
            raise ValueError(f"keys: expected those of image and label, got {keys!r}")
        if not isinstance(statistics, riskmap_ext.TransferStatistics):
            raise TypeError(
                f"statistics: expected TransferStatistics, got {type(statistics).__name__}"
            )
        if isinstance(range, str) and range not in ("dataset", "image"):
            raise ValueError(f"range: expected 'dataset', 'image' or (lo, hi), got {range!r}")
        self.source = _Source(source, inferer, device)
        self.risk_key = risk_key
        self.conditional = statistics.conditional.cpu()
        self.options = {
            "range": {"dataset": statistics.hardness_range, "image": None}.get(range, range)
            if isinstance(range, str)
            else range,
            "ignore_index": statistics.ignore_index,
            "regions": statistics.regions,
            **options,
        }
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._settings: str | None = None

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        image, label = (case[key] for key in self.keys)
        path = self._path(image, label)
        risk = None if path is None else read_torch(path)
        if not isinstance(risk, Tensor) or risk.shape != label.shape:
            risk = self._risk(image, label)
            if path is not None:
                write_torch(path, risk)
        case[self.risk_key] = convert_to_dst_type(risk, label, dtype=torch.float32)[0]
        return case

    def _risk(self, image: Any, label: Any) -> Tensor:
        logits = self.source(image)
        target = torch.as_tensor(label).to(logits.device)[None]
        conditional = self.conditional.to(logits.device)
        return riskmap_ext.risk_map(logits, target, conditional, **self.options).cpu()

    def _path(self, image: Any, label: Any) -> Path | None:
        if self.cache_dir is None:
            return None
        if self._settings is None:
            options = {**self.options, "regions": None, "version": riskmap_ext.__version__}
            parts = [options, self.conditional, *self.source.identity()]
            if self.options["regions"] is not None:
                parts.append(self.options["regions"])
            self._settings = digest(*parts)
        content = (
            plain_tensor(name, torch.as_tensor(value))
            for name, value in (("image", image), ("label", label))
        )
        return self.cache_dir / f"risk-{digest(self._settings, *content)[:32]}.pt"


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
) -> riskmap_ext.TransferStatistics:
    """LEEP statistics of a source model over a data set of dictionaries, in two passes.

    Args:
        data: a data set (not a loader) of cases with image [channels, *S] and label [1, *S],
            through the transforms that are the same in every epoch; iterated over twice.
        source, keys, inferer, device: as for :class:`RiskMapd`.
        num_classes: number of target classes C.
        ignore_index: label of voxels that count nowhere.
        regions: table [R, Z] for a source of overlapping regions.
    """
    image_key, label_key = keys
    run = _Source(source, inferer, device)
    statistics = riskmap_ext.TransferStatistics(
        num_classes, ignore_index=ignore_index, regions=regions
    )
    for step in (statistics.update, statistics.update_range):
        for case in data:
            logits = run(case[image_key])
            step(logits, torch.as_tensor(case[label_key]).to(logits.device)[None])
    return statistics


class _Source:
    """A source model as it is called on one image: without gradients, in eval mode."""

    def __init__(
        self, source: Source, inferer: Inferer | None, device: str | torch.device | None
    ) -> None:
        if not callable(source):
            raise TypeError(f"source: expected a Module or a function, got {type(source).__name__}")
        if isinstance(source, torch.nn.Module):
            source.eval()
            if device is None:
                device = next((each.device for each in source.parameters()), None)
        self.source, self.inferer = source, inferer
        self.device = torch.device("cpu" if device is None else device)

    def __call__(self, image: Any) -> Tensor:
        inputs = torch.as_tensor(image)[None].to(self.device)
        with torch.no_grad():
            if self.inferer is None:
                logits = self.source(inputs)
            else:
                logits = self.inferer(inputs=inputs, network=self.source)
        return logits[0] if isinstance(logits, (list, tuple)) else logits

    def identity(self) -> list[Any]:
        """What a map depends on besides image, label and statistics."""
        parts: list[Any] = [_described(self.inferer)]
        if isinstance(self.source, torch.nn.Module):
            state = self.source.state_dict()
            return [*parts, *(part for key in sorted(state) for part in (key, state[key]))]
        return [*parts, _described(self.source)]


def _described(value: Any) -> str:
    """Type and plain settings of an object; no address, which differs from run to run."""
    settings = {
        name: setting
        for name, setting in sorted(getattr(value, "__dict__", {}).items())
        if isinstance(setting, (bool, int, float, str, tuple, list, type(None)))
    }
    return f"{getattr(value, '__qualname__', type(value).__qualname__)} {settings}"

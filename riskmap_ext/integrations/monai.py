"""MONAI: ``DiceCELoss`` with a risk map, and a transform that computes the map of a case.

Needs MONAI, and ignite for the engines (extra ``monai``). docs/howto/monai.md has an example.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from riskmap_ext._arguments import near_names, risk_options, validate_flag
from riskmap_ext._files import digest, read_torch, write_torch
from riskmap_ext.integrations._cases import file_of, image_and_label, read_cases, two_keys
from riskmap_ext.integrations._monai_loss import RiskMapDiceCELoss, rounded
from riskmap_ext.integrations._source import FrozenSource, Inferer, Source, as_plain

__all__ = ["PrepareBatchRiskMap", "RiskMapDiceCELoss", "RiskMapd", "transfer_statistics"]

Range = str | tuple[float, float]


class _Target(dict[str, Any]):
    """Label and map for the loss; a wrapping loss that reads it gets a descriptive error."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{name}: the target is a dictionary of label and risk map, which only "
            "RiskMapDiceCELoss reads; it takes a list of inputs (deep supervision) directly, "
            "without MONAI's DeepSupervisionLoss around it"
        )


class PrepareBatchRiskMap(PrepareBatch):
    """``prepare_batch`` for MONAI's SupervisedTrainer: the target is {"label": ..., "risk": ...}.

    The trainer passes its loss two arguments, so the map is part of the second;
    :class:`RiskMapDiceCELoss` unpacks it. Metrics on the training set find the label in
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
        target = _Target(label=label)
        for name, key in self.keys.items():
            if key in batchdata:
                target[name] = batchdata[key].to(device=device, non_blocking=non_blocking, **kwargs)
        return image, target


class RiskMapd(MapTransform):
    """Dictionary transform that adds the transfer risk map of a case, or loads it from a cache.

    Put it after the deterministic transforms (loading, orientation, spacing, intensities) and
    before the random ones, which then transform the map with image and label
    (``keys=["image", "label", "risk"]``; interpolate the map like the label, ``mode="nearest"``, or
    linearly). CacheDataset and PersistentDataset cache it like the rest.

    Args:
        keys: the keys of image [channels, *S] and label [1, *S], in this order.
        source: the frozen source model, image [1, channels, *S] to logits [1, Z, *S]; a Module is
            put into eval mode. If it returns a list (deep supervision), the first is used. With
            many classes, ``riskmap_ext.nn.fuse_head(source, "always")`` saves the logits' memory,
            but not with an inferer, which sums windows.
        statistics: :class:`riskmap_ext.TransferStatistics` of the training set after both passes,
            see :func:`transfer_statistics`.
        risk_key: key of the map, [1, *S] float32, with the meta data of the label.
        inferer: as in ``monai.inferers`` (SlidingWindowInferer for volumes that do not fit); None:
            the source is called on the whole volume.
        range: "dataset" (the hardness range of ``statistics``), "image", or (lo, hi) in nats. The
            scheme "power" needs none: statistics of the first pass suffice.
        device: where the source runs; None: the device of its first parameter, or the CPU for a
            function.
        cache_dir: folder of cached maps, keyed by the content of image, label, statistics
            and options, and the source's weights and architecture; a damaged entry is recomputed.
            None: no cache.
        source_key: names source and inferer in the cache. Required if one of them is a function,
            whose content is not known. Change it when they change.
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

    def __call__(self, data: Mapping[Any, Any]) -> dict[Hashable, Any]:
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
        return riskmap_ext.risk_map(logits, rounded(target), conditional, **self.options).cpu()

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
    """Options of risk_map; errors in them are raised before any case."""
    defaults = {
        name: value
        for name, value in (riskmap_ext.risk_map.__kwdefaults__ or {}).items()
        if name not in ("ignore_index", "regions")
    }
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        hint = near_names(unknown[0], defaults) or f"; expected one of {', '.join(defaults)}"
        raise TypeError(f"RiskMapd: unknown option {unknown[0]!r}{hint}")
    options = {**defaults, **options}
    risk_options(**options, num_classes=num_classes)
    return options


def transfer_statistics(
    data: Iterable[Mapping[Any, Any]],
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
            after the deterministic transforms; read twice.
        source, keys, inferer, device: as for :class:`RiskMapd`.
        num_classes: number of target classes C.
        ignore_index: label of voxels to ignore.
        regions: table [R, Z] for a source of overlapping regions; [[0, 1]] for one sigmoid channel.
        progress: whether to show the progress of each pass on stderr: a bar on a terminal if tqdm
            is installed, else a line for each tenth of it.

    Raises:
        TypeError: a loader, or cases that are not dictionaries of arrays.
        ValueError: no cases, a key that a case lacks, invalid labels or logits (the case is
            named by index and file), no labelled voxels, or different data in the second pass (an
            exhausted generator, random transforms).

    Warns if the source tells nothing about the labels.
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
                step(logits, rounded(as_plain(label).to(logits.device)[None]))
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
        _ = statistics.score  # warns if the source tells nothing
    except RuntimeError:
        raise ValueError(
            "data: gave other labels in the second pass than in the first; expected deterministic "
            "transforms, no random ones"
        ) from None
    return statistics

"""nnU-Net v2: trainers whose loss is weighted by the transfer risk map of the pretrained model, by
class weights, or by voxel weights of your own.

::

    export nnUNet_extTrainer="$(python -m riskmap_ext.integrations.nnunet)"
    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerRiskMap -pretrained_weights checkpoint.pth
    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerClassWeights

Needs nnU-Net (``pip install nnunetv2``). docs/howto/nnunet.md has all steps.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
except ImportError as error:
    raise ImportError(
        "riskmap_ext.integrations.nnunet needs nnU-Net >= 2.8: pip install nnunetv2"
    ) from error

import riskmap_ext
from riskmap_ext._arguments import class_weights
from riskmap_ext._files import digest, read_torch, write_torch
from riskmap_ext._head import WORTH_FUSING
from riskmap_ext.integrations._nnunet_source import SourceNetwork, region_table, tile
from riskmap_ext.nn import RiskWeightedLoss, fuse_head
from riskmap_ext.statistics import sqrt_inverse_frequency

__all__ = [
    "SourceNetwork",
    "nnUNetTrainerClassWeights",
    "nnUNetTrainerRiskMap",
    "nnUNetTrainerVoxelWeights",
    "trainer_folder",
]

SOURCE = "RISKMAP_SOURCE"  # environment: the checkpoint, if -pretrained_weights is not given
_STATISTICS = "riskmap_statistics.pt"
_IGNORED = -100


def trainer_folder() -> str:
    """The folder that ``nnUNet_extTrainer`` must name for training and for prediction."""
    return str(Path(__file__).parent / "nnunet_trainers")


class nnUNetTrainerVoxelWeights(nnUNetTrainer):
    """nnU-Net's trainer with a weighted cross-entropy + Dice instead of its loss.

    A subclass defines the weights: :meth:`voxel_weights`. Without weights, or with ones, the loss
    is nnU-Net's own plus 1 (nnU-Net uses -Dice for 1 - Dice), on any number of GPUs: ``batch_dice``
    covers the batches of all processes, the scales of deep supervision have nnU-Net's
    weights, regions and the ignore label are those of the data set. The loss of the validation
    steps stays nnU-Net's own.

    Settings are attributes, to be changed in a subclass:
        loss_options: of :func:`riskmap_ext.weighted_loss`. ``normalization="batch_valid"`` keeps
            cross-entropy and Dice on the scale they have in nnU-Net's own loss.
        fused_head: whether the loss computes the network's last 1x1 convolutions, so that no
            logits are kept in training (:func:`riskmap_ext.nn.fuse_head`). "auto": from 16 classes
            or regions on, if the network has such heads; True: ValueError if it has none.
            Validation, checkpoints and prediction are those of the network without it.
    """

    loss_options: ClassVar[dict[str, Any]] = {"dice_weight": 1.0, "normalization": "batch_valid"}
    fused_head: ClassVar[bool | str] = "auto"

    def initialize(self) -> None:
        super().initialize()
        wanted = self.fused_head
        if wanted not in (True, False, "auto"):
            raise ValueError(f"fused_head: expected True, False or 'auto', got {wanted!r}")
        enough = self.label_manager.num_segmentation_heads >= WORTH_FUSING
        if wanted is False or (wanted == "auto" and not enough):
            return
        patch = self.configuration_manager.patch_size
        image = torch.zeros(2, self.num_input_channels, *patch, device="meta")
        try:
            # Not yet traced, and with the parameters that the optimizer and DDP hold.
            heads = fuse_head(_bare(self.network), example_input=image)
        except ValueError as error:
            if wanted is True:
                raise ValueError(
                    f"fused_head: expected a network with a 1x1 head: {error}"
                ) from None
            self.print_to_log_file(f"the head is not fused with the loss: {error}")
            return
        self.print_to_log_file(f"fused with the loss: {', '.join(heads)}")

    def voxel_weights(self, data: Tensor, target: Tensor) -> Tensor | None:
        """Weights for a training batch [B, channels, *S] and its labels [B, 1, *S], both augmented.

        Returns weights [B, *S] or [B, 1, *S], finite and >= 0; None: 1.
        """
        return None

    def _build_loss(self) -> _SwitchedLoss:
        plain = super()._build_loss()
        regions, ignored = region_table(self.label_manager), self.label_manager.ignore_label
        options = {
            "ignore_index": _IGNORED if ignored is None else ignored,
            "batch_dice": self.configuration_manager.batch_dice,
            **self.loss_options,
        }
        options.setdefault("sync_dice", options["batch_dice"])
        if regions is not None and ignored is not None:
            # nnU-Net then sums the regions' cross-entropies; otherwise it takes their mean.
            options["ce_weight"] = len(regions) * options.get("ce_weight", 1.0)
        scales = getattr(plain, "weight_factors", None)
        weighted = RiskWeightedLoss(regions=regions, scale_weights=scales, **options)
        return _SwitchedLoss(plain, weighted.to(self.device))

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> Any:
        """nnU-Net's own, but targets stay labels: the loss converts them to regions."""
        kwargs["regions"] = None
        return nnUNetTrainer.get_training_transforms(*args, **kwargs)

    def train_step(self, batch: dict) -> dict:
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"]
        finest = target[0] if isinstance(target, (list, tuple)) else target
        weights = self.voxel_weights(data, finest.to(self.device, non_blocking=True))
        with self.loss.weighted_by(weights):
            return super().train_step({**batch, "data": data})

    def _once(self, name: str, of: Sequence[Any], make: Callable[[Any], dict]) -> dict:
        """The result of `make` on the training cases, cached in the output folder.

        of: what it depends on besides the cases. make: gets this process's share of them, and sums
        the results of all processes.
        """
        keys, _ = self.do_split()
        made_of = digest(*of, self.configuration_name, self._data_digest(keys))
        path = Path(self.output_folder) / name
        stored = read_torch(path)
        if stored and stored["made_of"] == made_of:
            return stored
        mine = keys[self.local_rank :: dist.get_world_size()] if self.is_ddp else keys
        content = {
            "made_of": made_of,
            **make(self.dataset_class(self.preprocessed_dataset_folder, mine)),
        }
        if self.local_rank == 0:
            write_torch(path, content)
        return content

    def _data_digest(self, keys: Sequence[str]) -> str:
        """Digest of the preprocessed files' sizes and times, and of plans and labels."""
        folder, wanted = Path(self.preprocessed_dataset_folder), set(keys)
        files = [
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(folder.iterdir())
            if path.name.split(".")[0].removesuffix("_seg") in wanted
        ]
        return digest(files, self.plans_manager.plans, self.dataset_json)


class nnUNetTrainerClassWeights(nnUNetTrainerVoxelWeights):
    """nnU-Net's trainer with class weights in its cross-entropy; needs no source model.

    The weights are sqrt(1/f) with mean 1 over the training voxels, and 0 for a class without
    voxels. f is counted once, in the preprocessed training cases of the fold without ignored
    voxels, and stored in ``riskmap_class_weights.pt`` in the output folder, where ``--c`` finds it.
    The cross-entropy is divided by the number of valid voxels, not by the sum of their weights. The
    Dice is not weighted.

    Settings are attributes, to be changed in a subclass:
        class_weights: your own numbers, finite and >= 0: one per class, background first; for a
            data set of regions one per region, as in its dataset.json. Regions overlap, so their
            shares do not add up to 1: sqrt(1/f) is not defined for them.
        loss_options: see :class:`nnUNetTrainerVoxelWeights`.
    """

    class_weights: ClassVar[Sequence[float] | None] = None

    def _build_loss(self) -> _SwitchedLoss:
        loss = super()._build_loss()
        labels, given = self.label_manager, self.class_weights
        if given is None:
            if labels.has_regions:
                raise ValueError(
                    f"class_weights: expected {labels.num_segmentation_heads} numbers, one per "
                    "region, got None; regions overlap, so sqrt(1/f) is not defined for them"
                )
        elif len(given) != labels.num_segmentation_heads:
            raise ValueError(
                f"class_weights: expected {labels.num_segmentation_heads} numbers, "
                + ("one per region" if labels.has_regions else "one per class, background first")
                + f", got {len(given)}"
            )
        else:
            loss.weighted.weight = class_weights("class_weights", given, self.device)
        return loss

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.class_weights is None:
            found = self._once("riskmap_class_weights.pt", (), self._count)
            weights = sqrt_inverse_frequency(found["voxels"])
            self.loss.weighted.weight = weights.to(self.device)
        numbers = ", ".join(f"{weight:.3g}" for weight in self.loss.weighted.weight)
        self.print_to_log_file(f"class weights, background first: {numbers}")

    def _count(self, dataset: Any) -> dict[str, Any]:
        classes = len(self.label_manager.all_labels)
        voxels = torch.zeros(classes, dtype=torch.int64)
        for key in dataset.identifiers:
            _, seg, *_ = dataset.load_case(key)
            # Outside of the image: background, as in training.
            labels = torch.from_numpy(np.array(seg[0])).clamp(min=0).flatten()
            voxels += torch.bincount(labels, minlength=classes)[:classes]  # the last may be ignored
        if self.is_ddp:
            everywhere = voxels.to(self.device)
            dist.all_reduce(everywhere)
            voxels = everywhere.cpu()
        return {"voxels": voxels}


class nnUNetTrainerRiskMap(nnUNetTrainerVoxelWeights):
    """nnU-Net's trainer with the transfer risk map as voxel weights.

    The source is the pretrained checkpoint with its own head (``-pretrained_weights``, or the
    environment variable RISKMAP_SOURCE). It is read when the trainer is initialised, before nnU-Net
    loads weights from it, and rejected if it would run code. Before the first epoch it
    runs over every training case, tile by tile, for the LEEP statistics; they are stored in
    ``riskmap_statistics.pt`` in the output folder, where ``--c`` finds them. In every
    training step the source sees the augmented batch, and the risk map of the finest scale weights
    all scales of deep supervision.

    Settings are attributes, to be changed in a subclass:
        risk_options: of :func:`riskmap_ext.risk_map` (scheme, base, alpha, scale).
        loss_options: see :class:`nnUNetTrainerVoxelWeights`.
    """

    risk_options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net's own signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_cascaded:
            raise RuntimeError(
                f"nnUNetTrainerRiskMap: the configuration {configuration!r} is the second stage of "
                "a cascade, which has no separate source model; use it for the others"
            )
        self.source: SourceNetwork | None = None
        self.statistics: riskmap_ext.TransferStatistics | None = None

    def initialize(self) -> None:
        super().initialize()
        path = self._source_path()
        if path is not None:
            self.source = SourceNetwork(path, self.num_input_channels, self.device)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.source is None:
            raise RuntimeError(
                "nnUNetTrainerRiskMap: expected the source model's checkpoint as "
                f"-pretrained_weights, or in the environment variable {SOURCE}"
            )
        self.statistics = self._statistics()
        self.print_to_log_file(
            f"transfer risk map: source {self.source.path}, LEEP {self.statistics.score:.4f} nats, "
            f"hardness {self.statistics.hardness_range[0]:.3f} to "
            f"{self.statistics.hardness_range[1]:.3f}"
        )

    def voxel_weights(self, data: Tensor, target: Tensor) -> Tensor:
        assert self.source is not None
        assert self.statistics is not None
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            logits = self.source.logits(data)
        return riskmap_ext.risk_map(
            logits,
            target,
            self.statistics.conditional.to(logits.device),
            range=self.statistics.hardness_range,
            ignore_index=self.statistics.ignore_index,
            regions=self.source.regions,
            **self.risk_options,
        )

    def _source_path(self) -> Path | None:
        """From the command line, else the environment, else what the run started with."""
        flag = _option("-pretrained_weights", sys.argv)
        variable = os.environ.get(SOURCE)
        if flag and variable and Path(flag).resolve() != Path(variable).resolve():
            raise RuntimeError(
                f"nnUNetTrainerRiskMap: -pretrained_weights {flag} and {SOURCE}={variable} differ; "
                "unset one of them"
            )
        stored = read_torch(Path(self.output_folder) / _STATISTICS) or {}
        given = flag or variable or stored.get("source")
        return Path(given) if given else None

    def _statistics(self) -> riskmap_ext.TransferStatistics:
        """Of all training cases."""
        assert self.source is not None
        ignored = self.label_manager.ignore_label
        statistics = riskmap_ext.TransferStatistics(
            len(self.label_manager.all_labels),
            ignore_index=_IGNORED if ignored is None else ignored,
            regions=self.source.regions,
        )

        def make(dataset: Any) -> dict[str, Any]:
            assert self.source is not None
            for step in (statistics.update, statistics.update_range):
                for key in dataset.identifiers:
                    for image, label in self._tiles(dataset, key, statistics.ignore_index):
                        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
                            logits = self.source.logits(image)
                        step(logits, label)
                if self.is_ddp:
                    statistics.all_reduce()
            path = str(self.source.path.resolve())
            return {"source": path, "statistics": statistics.state_dict()}

        found = self._once(_STATISTICS, (self.source.digest,), make)
        statistics.load_state_dict(found["statistics"])
        return statistics

    def _tiles(self, dataset: Any, key: str, ignored: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches that cover a preprocessed case; each voxel is labelled in only one of them."""
        data, seg, *_ = dataset.load_case(key)
        patch = list(self.configuration_manager.patch_size)
        flat = len(patch) == data.ndim - 2  # a 2-D configuration
        patch = [1] * flat + patch
        for starts in itertools.product(
            *(range(0, size, length) for size, length in zip(data.shape[1:], patch, strict=True))
        ):
            image, label = tile(data, seg, starts, patch, ignored)
            if flat:
                image, label = image[:, 0], label[:, 0]
            yield image[None].to(self.device), label[None].to(self.device)


class _SwitchedLoss(nn.Module):
    """nnU-Net's own loss; in a training step the weighted one."""

    plain: nn.Module
    weighted: RiskWeightedLoss

    def __init__(self, plain: nn.Module, weighted: RiskWeightedLoss) -> None:
        super().__init__()
        self.plain, self.weighted = plain, weighted
        self._on = False
        self._risk: Tensor | None = None

    @contextmanager
    def weighted_by(self, risk: Tensor | None) -> Iterator[None]:
        self._on, self._risk = True, risk
        try:
            yield
        finally:
            self._on, self._risk = False, None

    def forward(self, output: Any, target: Any) -> Tensor:
        if not self._on:
            return self.plain(output, target)
        return self.weighted(output, target, self._risk)


def _bare(network: nn.Module) -> nn.Module:
    """Without nnU-Net's wrappers for several processes and for torch.compile."""
    network = getattr(network, "module", network)
    return getattr(network, "_orig_mod", network)


def _option(name: str, arguments: Sequence[str]) -> str | None:
    """The value of a command-line option. argparse would read nnU-Net's -p as its abbreviation."""
    for index, word in enumerate(arguments):
        if word == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


if __name__ == "__main__":
    print(trainer_folder())
    sys.exit(0)

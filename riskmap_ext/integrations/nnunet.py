"""nnU-Net v2: a trainer whose loss is weighted by the transfer risk map of the pretrained model.

::

    export nnUNet_extTrainer="$(python -m riskmap_ext.integrations.nnunet)"
    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerRiskMap -pretrained_weights checkpoint.pth

Needs nnU-Net (``pip install nnunetv2``). docs/howto/nnunet.md has a complete example.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

try:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
except ImportError as error:
    raise ImportError(
        "riskmap_ext.integrations.nnunet needs nnU-Net >= 2.8: pip install nnunetv2"
    ) from error

import riskmap_ext
from riskmap_ext._files import digest, read_torch, write_torch
from riskmap_ext.integrations._nnunet_source import SourceNetwork, region_table, tile

__all__ = ["SourceNetwork", "nnUNetTrainerRiskMap", "trainer_folder"]

SOURCE = "RISKMAP_SOURCE"  # environment: the checkpoint, where -pretrained_weights does not name it
_IGNORED = -100


def trainer_folder() -> str:
    """The folder that ``nnUNet_extTrainer`` has to name for training and for prediction."""
    return str(Path(__file__).parent / "nnunet_trainers")


class nnUNetTrainerRiskMap(nnUNetTrainer):
    """nnU-Net's trainer with risk-weighted cross-entropy + Dice in the place of its loss.

    The source is the pretrained checkpoint with its own head (``-pretrained_weights``, or the
    environment variable RISKMAP_SOURCE); it is read, and refused if it wants to run code, when the
    trainer is initialised, which is before nnU-Net takes weights from it. Before the first epoch it
    is run over every training case, tile by tile, for the LEEP statistics; they are kept in
    ``riskmap_statistics.pt`` in the output folder, so that ``--c`` goes on with them. In every
    training step the source sees the augmented batch, and the risk map of the finest scale weights
    all scales of deep supervision. The loss of the validation steps stays nnU-Net's own.

    Regions and the ignore label are those of the data set. With several GPUs the Dice of each
    process is its own, as with ``batch_dice`` off.

    Settings are attributes, to be changed in a subclass:
        risk_options: of :func:`riskmap_ext.risk_map` (scheme, base, alpha, scale).
        loss_options: of :func:`riskmap_ext.weighted_loss`. ``normalization="valid"`` leaves
            cross-entropy and Dice on the scale they have in nnU-Net's own loss.
    """

    risk_options: ClassVar[dict[str, Any]] = {}
    loss_options: ClassVar[dict[str, Any]] = {"dice_weight": 1.0, "normalization": "valid"}

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
                "a cascade, which has no source model of its own; use it for the others"
            )
        self.source: SourceNetwork | None = None
        self.statistics: riskmap_ext.TransferStatistics | None = None

    def _build_loss(self) -> nn.Module:
        plain = super()._build_loss()
        labels = self.label_manager
        options = {
            "ignore_index": _IGNORED if labels.ignore_label is None else labels.ignore_label,
            "batch_dice": self.configuration_manager.batch_dice,
            **self.loss_options,
        }
        return _SwitchedLoss(
            plain,
            riskmap_ext.nn.RiskWeightedLoss(
                regions=region_table(labels),
                scale_weights=getattr(plain, "weight_factors", None),
                **options,
            ).to(self.device),
        )

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> Any:
        """nnU-Net's own, but targets stay labels: the loss makes the regions of them."""
        kwargs["regions"] = None
        return nnUNetTrainer.get_training_transforms(*args, **kwargs)

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

    def train_step(self, batch: dict) -> dict:
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"]
        finest = target[0] if isinstance(target, (list, tuple)) else target
        self.loss.risk = self._risk(data, finest.to(self.device, non_blocking=True))
        try:
            return super().train_step({**batch, "data": data})
        finally:
            self.loss.risk = None

    def _risk(self, data: Tensor, target: Tensor) -> Tensor:
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
        """From the command line, else the environment, else what the run was begun with."""
        flag = _option("-pretrained_weights", sys.argv)
        variable = os.environ.get(SOURCE)
        if flag and variable and Path(flag).resolve() != Path(variable).resolve():
            raise RuntimeError(
                f"nnUNetTrainerRiskMap: -pretrained_weights {flag} and {SOURCE}={variable} differ; "
                "unset one of them"
            )
        stored = read_torch(self._statistics_path()) or {}
        given = flag or variable or stored.get("source")
        return Path(given) if given else None

    def _statistics_path(self) -> Path:
        return Path(self.output_folder) / "riskmap_statistics.pt"

    def _statistics(self) -> riskmap_ext.TransferStatistics:
        """Of all training cases; kept in the output folder by source and cases."""
        assert self.source is not None
        keys, _ = self.do_split()
        ignore = self.label_manager.ignore_label
        statistics = riskmap_ext.TransferStatistics(
            len(self.label_manager.all_labels),
            ignore_index=_IGNORED if ignore is None else ignore,
            regions=self.source.regions,
        )
        made_of = digest(self.source.digest, self.configuration_name, self._data_digest(keys))
        stored = read_torch(self._statistics_path())
        if stored and stored["made_of"] == made_of:
            statistics.load_state_dict(stored["statistics"])
            return statistics
        mine = keys[self.local_rank :: torch.distributed.get_world_size()] if self.is_ddp else keys
        dataset = self.dataset_class(self.preprocessed_dataset_folder, mine)
        for step in (statistics.update, statistics.update_range):
            for key in mine:
                for image, label in self._tiles(dataset, key, statistics.ignore_index):
                    with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
                        logits = self.source.logits(image)
                    step(logits, label)
            if self.is_ddp:
                statistics.all_reduce()
        if self.local_rank == 0:
            content = {
                "source": str(self.source.path.resolve()),
                "made_of": made_of,
                "statistics": statistics.state_dict(),
            }
            write_torch(self._statistics_path(), content)
        return statistics

    def _data_digest(self, keys: Sequence[str]) -> str:
        """Of the preprocessed files by size and time, and of plans and labels."""
        folder, wanted = Path(self.preprocessed_dataset_folder), set(keys)
        files = [
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(folder.iterdir())
            if path.name.split(".")[0].removesuffix("_seg") in wanted
        ]
        return digest(files, self.plans_manager.plans, self.dataset_json)

    def _tiles(self, dataset: Any, key: str, ignored: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches that cover a preprocessed case; each voxel is labelled in one of them alone."""
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
    """nnU-Net's own loss, or the weighted one while a risk map is set."""

    def __init__(self, plain: nn.Module, weighted: nn.Module) -> None:
        super().__init__()
        self.plain, self.weighted = plain, weighted
        self.risk: Tensor | None = None

    def forward(self, output: Any, target: Any) -> Tensor:
        if self.risk is None:
            return self.plain(output, target)
        return self.weighted(output, target, self.risk)


def _option(name: str, arguments: Sequence[str]) -> str | None:
    """The value of a command-line option. argparse would take nnU-Net's -p for a short form."""
    for index, word in enumerate(arguments):
        if word == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


if __name__ == "__main__":
    print(trainer_folder())
    sys.exit(0)

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

import numpy as np
import torch
from torch import Tensor, nn

try:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
except ImportError as error:
    raise ImportError(
        "riskmap_ext.integrations.nnunet needs nnU-Net >= 2.8: pip install nnunetv2"
    ) from error

import riskmap_ext
from riskmap_ext._checkpoints import load_plain
from riskmap_ext._files import digest, read_torch, write_torch

__all__ = ["SourceNetwork", "nnUNetTrainerRiskMap", "trainer_folder"]

SOURCE = "RISKMAP_SOURCE"  # environment: the checkpoint, where -pretrained_weights does not name it
_IGNORED = -100


def trainer_folder() -> str:
    """The folder that ``nnUNet_extTrainer`` has to name for training and for prediction."""
    return str(Path(__file__).parent / "nnunet_trainers")


class SourceNetwork:
    """The network of an nnU-Net checkpoint with its own head, frozen.

    The file is read with ``weights_only``: one that wants to run code is refused.

    network: image [B, channels, *S] to logits [B, Z, *S], without deep supervision.
    regions: the table [R, Z] of a model trained on regions, else None.
    digest: of the weights.

    Raises:
        RuntimeError: a file that is no nnU-Net checkpoint, or of another number of input channels.
    """

    def __init__(self, path: str | Path, num_input_channels: int, device: torch.device) -> None:
        content = _read_checkpoint(Path(path))
        made_with = content["init_args"]
        plans = PlansManager(dict(made_with["plans"]))
        configuration = plans.get_configuration(made_with["configuration"])
        labels = plans.get_label_manager(made_with["dataset_json"])
        channels = determine_num_input_channels(plans, configuration, made_with["dataset_json"])
        if channels != num_input_channels:
            raise RuntimeError(
                f"{path}: expected a model of {num_input_channels} input channels, as this data "
                f"set has, got one of {channels}"
            )
        network = nnUNetTrainer.build_network_architecture(
            plans, configuration, channels, labels.num_segmentation_heads, False
        )
        state = {
            key.removeprefix("module."): value for key, value in content["network_weights"].items()
        }
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise RuntimeError(f"{path}: its weights do not fit its own plans: {error}") from None
        self.path = Path(path)
        self.network = network.to(device).eval().requires_grad_(False)
        self.regions = _region_table(labels)
        self.digest = digest(*(part for key in sorted(state) for part in (key, state[key])))

    def logits(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network(image)


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
                regions=_region_table(labels),
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
            image, label = _tile(data, seg, starts, patch, ignored)
            if flat:
                image, label = image[:, 0], label[:, 0]
            yield image[None].to(self.device), label[None].to(self.device)


def _tile(
    data: Any, seg: Any, starts: Sequence[int], patch: Sequence[int], ignored: int
) -> tuple[Tensor, Tensor]:
    """The patch at `starts`, moved back where it would reach past the end, padded where it must."""
    begins, ends, done, missing = [], [], [], []
    for start, length, size in zip(starts, patch, data.shape[1:], strict=True):
        begin = max(0, min(start, size - length))
        begins.append(begin)
        ends.append(min(begin + length, size))
        done.append(start - begin)
        missing.append(length - (ends[-1] - begin))
    where = tuple(slice(begin, end) for begin, end in zip(begins, ends, strict=True))
    image = torch.from_numpy(np.array(data[(slice(None), *where)], dtype=np.float32))
    label = torch.from_numpy(np.array(seg[(slice(0, 1), *where)], dtype=np.int64))
    label[label < 0] = 0  # outside of the image: background, as in training
    for axis, seen in enumerate(done, start=1):
        label.narrow(axis, 0, seen).fill_(ignored)
    padding = [side for each in reversed(missing) for side in (0, each)]
    return (
        nn.functional.pad(image, padding),
        nn.functional.pad(label, padding, value=ignored),
    )


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


def _region_table(labels: Any) -> Tensor | None:
    """[R, L] of nnU-Net's label manager, None where classes exclude each other."""
    if not labels.has_regions:
        return None
    table = torch.zeros(len(labels.foreground_regions), len(labels.all_labels), dtype=torch.bool)
    for row, region in zip(table, labels.foreground_regions, strict=True):
        row[list(region) if isinstance(region, (tuple, list)) else [region]] = True
    return table


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        content = load_plain(path)
    except FileNotFoundError:
        raise RuntimeError(f"{path}: no such checkpoint") from None
    except Exception as error:  # zip, pickle and torch errors of every kind
        raise RuntimeError(
            f"{path}: not loaded: it is damaged, or holds objects other than tensors, numbers and "
            f"plain types, which would run code ({str(error).splitlines()[0]})"
        ) from None
    wanted = ("network_weights", "init_args")
    if not isinstance(content, dict) or not all(key in content for key in wanted):
        raise RuntimeError(f"{path}: expected an nnU-Net checkpoint with {' and '.join(wanted)}")
    return content


if __name__ == "__main__":
    print(trainer_folder())
    sys.exit(0)

"""The source model of an nnU-Net checkpoint, and the patches it runs on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from riskmap_ext._checkpoints import load_plain
from riskmap_ext._files import digest
from riskmap_ext._head import WORTH_FUSING
from riskmap_ext.nn import DeferredLogits, fuse_head


class SourceNetwork:
    """The network of an nnU-Net checkpoint with its own head, frozen.

    The file is read with ``weights_only``: one that would run code is rejected.

    network: image [B, channels, *S] to logits [B, Z, *S], without deep supervision; from 16 of them
    on, to :class:`riskmap_ext.nn.DeferredLogits` if it has a 1x1 head.
    regions: the table [R, Z] of a model trained on regions, else None.
    digest: of the weights.

    Raises:
        RuntimeError: not an nnU-Net checkpoint, or a different number of input channels.
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
        if labels.num_segmentation_heads >= WORTH_FUSING:
            image = torch.zeros(1, channels, *configuration.patch_size, device="meta")
            with suppress(ValueError):  # a network without such a head returns logits
                fuse_head(self.network, "always", example_input=image)
        self.regions = region_table(labels)
        self.digest = digest(*(part for key in sorted(state) for part in (key, state[key])))

    def logits(self, image: Tensor) -> Tensor | DeferredLogits:
        with torch.no_grad():
            return self.network(image)


def tile(
    data: Any, seg: Any, starts: Sequence[int], patch: Sequence[int], ignored: int
) -> tuple[Tensor, Tensor]:
    """The patch at `starts`, moved back if it would reach past the end, padded if necessary."""
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


def region_table(labels: Any) -> Tensor | None:
    """[R, L] from nnU-Net's label manager, None for mutually exclusive classes."""
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

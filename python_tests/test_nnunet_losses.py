"""The losses of riskmap_ext.integrations.nnunet beside nnU-Net's own, in one process and in two."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("nnunetv2", reason="needs nnU-Net")

from nnunetv2.utilities.label_handling.label_handling import LabelManager

from riskmap_ext._files import read_torch
from riskmap_ext.integrations.nnunet import (
    nnUNetTrainerClassWeights,
    nnUNetTrainerRiskMap,
    nnUNetTrainerVoxelWeights,
)

CLASSES = {"background": 0, "anterior": 1, "posterior": 2}
REGIONS = {"background": 0, "hippocampus": [1, 2], "posterior": [2]}
LABELS = {
    "classes": CLASSES,
    "classes, ignored": {**CLASSES, "ignore": 3},
    "regions": REGIONS,
    "regions, ignored": {**REGIONS, "ignore": 3},
}
IMAGES = 4
POOLING = [[1, 1], [2, 2], [2, 2], [2, 2]]  # three scales


def trainer_of(
    kind: str, batch_dice: bool, make: type = nnUNetTrainerVoxelWeights, ddp: bool = False
) -> Any:
    """With no data set behind it: what its loss is made of."""
    trainer: Any = object.__new__(make)
    trainer.label_manager = LabelManager(LABELS[kind], [1, 2])
    trainer.configuration_manager = SimpleNamespace(
        batch_dice=batch_dice, pool_op_kernel_sizes=POOLING
    )
    trainer.device, trainer.is_ddp = torch.device("cpu"), ddp
    trainer.enable_deep_supervision = True
    return trainer


def loss_of(*of: Any, **more: Any) -> Any:
    return trainer_of(*of, **more)._build_loss()


def batch(kind: str, images: slice = slice(None)) -> tuple[list[Tensor], list[Tensor]]:
    """Logits that want a gradient, and labels; of three scales."""
    generator = torch.Generator().manual_seed(0)
    heads = 2 if "regions" in kind else 3
    label = torch.randint(0, 3, (IMAGES, 1, 16, 16), generator=generator)
    if "ignored" in kind:  # not the same share of each image, and all of one
        label[0, :, :5], label[1, :, ::2], label[2] = 3, 3, 3
    logits = [
        torch.randn(IMAGES, heads, size, size, generator=generator)[images].requires_grad_()
        for size in (16, 8, 4)
    ]
    return logits, [label[images, :, ::step, ::step] for step in (1, 2, 4)]


def for_nnunet(kind: str, targets: list[Tensor]) -> list[Tensor]:
    """Its trainers have the regions, and the ignore label behind them, as channels."""
    if "regions" not in kind:
        return targets
    channels = [[1, 2], [2], *([[3]] if "ignored" in kind else [])]
    return [
        torch.cat([torch.isin(label, torch.tensor(each)) for each in channels], dim=1)
        for label in targets
    ]


def weighted(loss: Any, logits: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
    """The value and the gradients with a map of ones."""
    with loss.weighted_by(torch.ones_like(targets[0], dtype=torch.float32)):
        return derived(loss(logits, targets), logits)


def derived(value: Tensor, logits: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(value, logits, allow_unused=True, materialize_grads=True)
    return [value.detach(), *gradients]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("kind", LABELS)
def test_a_map_of_ones_gives_nnunets_loss(kind: str, batch_dice: bool) -> None:
    """The Dice apart, which is 1 - Dice for -Dice: values, gradients, every scale."""
    loss, (logits, targets) = loss_of(kind, batch_dice), batch(kind)
    value, *gradients = derived(loss(logits, for_nnunet(kind, targets)), logits)
    assert_same(weighted(loss, logits, targets), [value + 1, *gradients])
    with loss.weighted_by(None):
        assert_same(derived(loss(logits, targets), logits), [value + 1, *gradients])


@pytest.mark.parametrize("kind", ["classes", "classes, ignored"])
def test_class_weights_are_divided_by_the_valid_voxels(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nnUNetTrainerClassWeights, "class_weights", [0.5, 2, 4])
    loss, (logits, targets) = loss_of(kind, True, nnUNetTrainerClassWeights), batch(kind)
    weights = torch.tensor([0.5, 2.0, 4.0])
    expected = loss.plain(logits, targets) + 1
    for scale, x, label in zip((2 / 3, 1 / 3), logits, targets, strict=False):
        y = label[:, 0]
        each = F.cross_entropy(x, y, weights, ignore_index=3, reduction="sum")
        plain = F.cross_entropy(x, y, ignore_index=3, reduction="sum")
        expected = expected + scale * (each - plain) / (y != 3).sum()
    with loss.weighted_by(None):
        assert_same(derived(loss(logits, targets), logits), derived(expected, logits))


def test_class_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    make = nnUNetTrainerClassWeights
    with pytest.raises(ValueError, match=r"class_weights: .* one per region, .* regions overlap"):
        loss_of("regions", True, make)
    monkeypatch.setattr(make, "class_weights", [1, 2])
    assert loss_of("regions", True, make).weighted.weight.tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"expected 3 numbers, one per class, .* got 2"):
        loss_of("classes", True, make)
    monkeypatch.setattr(make, "class_weights", [1, 2, -1])
    with pytest.raises(ValueError, match=r"class_weights: .*-1"):
        loss_of("classes", True, make)


class Cases:
    """Case i has i voxels of class 1, and one of class 0 outside of the image."""

    def __init__(self, folder: Path, identifiers: list[int]) -> None:
        self.identifiers = identifiers

    def load_case(self, number: int) -> tuple[None, np.ndarray]:
        return None, np.array([[-1] + [1] * number + [3] * 5], dtype=np.int16)


def voxels_of_two_processes(folder: Path) -> Tensor:
    trainer = trainer_of("classes, ignored", True, nnUNetTrainerClassWeights, ddp=True)
    trainer.local_rank, trainer.dataset_class = dist.get_rank(), Cases
    trainer.configuration_name, trainer.preprocessed_dataset_folder = "2d", folder
    trainer.output_folder = folder
    trainer.do_split = lambda: ([1, 2, 3, 4, 5], [])
    trainer._data_digest = lambda keys: ""
    return trainer._once("weights.pt", (), trainer._count)["voxels"]


def losses_of_process(rank: int, folder: str) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {}
    for kind in LABELS:
        for batch_dice in (False, True):
            loss = loss_of(kind, batch_dice, nnUNetTrainerRiskMap, ddp=True)
            logits, targets = batch(kind, slice(2 * rank, 2 * rank + 2))
            found[f"{kind} {batch_dice}"] = (
                weighted(loss, logits, targets),
                derived(loss(logits, for_nnunet(kind, targets)), logits),
            )
    voxels = voxels_of_two_processes(Path(folder))
    torch.save((found, voxels), f"{folder}/{rank}.pt")
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_have_nnunets_loss_and_that_of_one(tmp_path: Path) -> None:
    """DistributedDataParallel takes the mean of the gradients, we of the losses."""
    mp.spawn(losses_of_process, args=(str(tmp_path),), nprocs=2)
    (first, voxels), (second, same) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert voxels.tolist() == same.tolist() == [5, 15, 0]
    assert torch.equal(read_torch(tmp_path / "weights.pt")["voxels"], voxels)
    for name in first:
        kind, batch_dice = name.rsplit(" ", 1)
        for ours, (value, *gradients) in (first[name], second[name]):
            assert_same(ours, [value + 1, *gradients])
        if "ignored" in kind:
            continue  # nnU-Net's cross-entropy is then that of each process
        loss = loss_of(kind, batch_dice == "True", nnUNetTrainerRiskMap, ddp=True)
        assert loss.weighted.scale_weights[-1] == pytest.approx(1e-6 / 1.5, rel=1e-5)
        mean = [
            (one + other) / 2 if one.dim() == 0 else torch.cat([one, other]) / 2
            for one, other in zip(first[name][0], second[name][0], strict=True)
        ]
        assert_same(mean, weighted(loss, *batch(kind)))

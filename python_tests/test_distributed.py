"""DistributedDataParallel over two processes: the weights of one process on all the data."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import riskmap_ext

CLASSES, STEPS = 3, 4


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, CLASSES, (4, 12, 12), generator=generator)
    return label[:, None] + 0.5 * torch.randn(4, 1, 12, 12, generator=generator), label


def network(outputs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, outputs, 1))


def train(image: Tensor, label: Tensor, distributed: bool) -> tuple[nn.Module, Tensor]:
    """Statistics, then a few steps with the risk map; the model and the statistics."""
    source, model = network(4, seed=1).eval(), network(CLASSES, seed=2)
    statistics = riskmap_ext.TransferStatistics(CLASSES)
    with torch.no_grad():
        for step in (statistics.update, statistics.update_range):
            step(source(image), label)
            statistics.all_reduce()
        risk = riskmap_ext.risk_map(
            source(image), label, statistics.conditional, range=statistics.hardness_range
        )
    trained = DistributedDataParallel(model) if distributed else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        riskmap_ext.weighted_loss(trained(image), label, risk, dice_weight=1.0).backward()
        optimizer.step()
    return model, statistics.joint


def process(rank: int, folder: str) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.set_num_threads(1)
    image, label = data()
    mine = slice(2 * rank, 2 * rank + 2)
    model, joint = train(image[mine], label[mine], distributed=True)
    torch.save({"model": model.state_dict(), "joint": joint}, f"{folder}/{rank}.pt")
    gc.collect()  # DistributedDataParallel is part of a cycle and keeps gloo's threads
    dist.destroy_process_group()


REGIONS = [[0, 1, 1], [0, 0, 1], [1, 1, 0]]
LOSSES: dict[str, dict[str, Any]] = {
    "classes": {"weight": [0.5, 1.0, 2.0]},
    "squared": {
        "squared_pred": True,
        "dice_class_weight": [0.5, 1.0, 2.0],
        "alpha": 1.0,
        "beta": 1.0,
    },
    "regions": {"regions": REGIONS, "smooth_nr": 0.0},
    "background": {"include_background": True},
}


def gradients(image: Tensor, label: Tensor, distributed: bool) -> dict[str, list[Tensor]]:
    """Of a network's parameters by the loss with one Dice over the batch; first its value."""
    found: dict[str, list[Any]] = {}
    for name, options in LOSSES.items():
        model = network(CLASSES, seed=2).double()
        trained = DistributedDataParallel(model) if distributed else model
        loss = riskmap_ext.nn.RiskWeightedLoss(
            normalization="valid", dice_weight=1.0, batch_dice=True, sync_dice=True, **options
        )
        value = loss(trained(image.double()), label, torch.ones(label.shape))
        value.backward()
        found[name] = [value.detach(), *(each.grad for each in model.parameters())]
    return found


def with_a_bad_label(image: Tensor, label: Tensor, rank: int) -> list[float | str]:
    """Two calls, the first with a bad label in the second process."""
    results: list[float | str] = []
    for bad in (True, False):
        labels = label.clone()
        if bad and rank == 1:
            labels[0, 0, 0] = CLASSES
        try:
            loss = riskmap_ext.weighted_loss(
                network(CLASSES, seed=2)(image).detach(),
                labels,
                dice_weight=1.0,
                batch_dice=True,
                sync_dice=True,
            )
            results.append(loss.item())
        except ValueError as error:
            results.append(str(error))
    return results


def synced_process(rank: int, folder: str) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.set_num_threads(1)
    image, label = data()
    mine = slice(2 * rank, 2 * rank + 2)
    torch.save(gradients(image[mine], label[mine], distributed=True), f"{folder}/{rank}.pt")
    torch.save(with_a_bad_label(image[mine], label[mine], rank), f"{folder}/bad_{rank}.pt")
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_batch_dice_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """As nnU-Net has it: the sums of all processes, and a gradient that their mean makes whole."""
    mp.spawn(synced_process, args=(str(tmp_path),), nprocs=2)
    expected = gradients(*data(), distributed=False)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, (loss, *of_parameters) in expected.items():
        mean = (first[name][0] + second[name][0]) / 2
        torch.testing.assert_close(mean, loss, rtol=1e-12, atol=0)
        for rank in (first, second):
            for found, each in zip(rank[name][1:], of_parameters, strict=True):
                torch.testing.assert_close(found, each, rtol=1e-9, atol=1e-12)

    # An error in one process is NaN in the others, and the next call is a good one again.
    bad, good = zip(*(torch.load(tmp_path / f"bad_{rank}.pt") for rank in range(2)), strict=True)
    assert math.isnan(bad[0])
    assert "target must hold classes 0 to 2" in bad[1]
    assert all(math.isfinite(each) for each in good)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_end_in_the_weights_of_one(tmp_path: Path) -> None:
    mp.spawn(process, args=(str(tmp_path),), nprocs=2)
    expected, joint = train(*data(), distributed=False)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["joint"], joint, rtol=1e-6, atol=1e-9)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found["model"][name], value, rtol=1e-4, atol=1e-6)

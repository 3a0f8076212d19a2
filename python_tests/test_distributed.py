"""DistributedDataParallel over two processes: the weights of one process on all the data."""

from __future__ import annotations

import gc
from pathlib import Path

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


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_end_in_the_weights_of_one(tmp_path: Path) -> None:
    mp.spawn(process, args=(str(tmp_path),), nprocs=2)
    expected, joint = train(*data(), distributed=False)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["joint"], joint, rtol=1e-6, atol=1e-9)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found["model"][name], value, rtol=1e-4, atol=1e-6)

"""A small network with a head, and what a fused head is compared with."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from riskmap_ext.nn import RiskWeightedLoss, fuse_head

CLASSES = 5
LOSS = RiskWeightedLoss(dice_weight=1.0)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Net(nn.Module):
    """Of a body and a head, which nobody knows by name."""

    def __init__(self, dims: int = 2, head: nn.Module | None = None, bias: bool = True) -> None:
        super().__init__()
        kind = CONVOLUTIONS[dims - 1]
        self.body = nn.Sequential(kind(1, 6, 3, padding=1), nn.ReLU())
        self.head = head or kind(6, CLASSES, 1, bias=bias)

    def forward(self, image: Tensor) -> Any:
        return self.head(self.body(image))


def data(dims: int = 2, size: int = 8, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, *(size,) * dims)
    image = torch.randn(batch, 1, *shape[1:], generator=generator)
    return image, torch.randint(0, CLASSES, shape, generator=generator)


def net(*options: Any, **more: Any) -> Net:
    torch.manual_seed(0)
    return Net(*options, **more)


def fused(network: nn.Module, image: Tensor, when: str = "training") -> nn.Module:
    """A copy with a fused head."""
    network = copy.deepcopy(network)
    assert fuse_head(network, when, example_input=image)
    return network


def gradients(network: nn.Module) -> dict[str, Tensor | None]:
    return {name: each.grad for name, each in network.named_parameters()}


def assert_same_step(one: nn.Module, other: nn.Module, image: Tensor, label: Tensor) -> None:
    """The loss and the gradients in training."""
    values = []
    for network in (one, other):
        network.train().zero_grad()
        torch.manual_seed(1)
        value = LOSS(network(image), label)
        value.backward()
        values.append(value.detach())
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    found, expected = gradients(one), gradients(other)
    assert found.keys() == expected.keys()
    scale = max(float(each.abs().max()) for each in expected.values() if each is not None)
    for name, each in expected.items():
        found_text = partial("{}: {}".format, name)
        torch.testing.assert_close(found[name], each, rtol=1e-4, atol=1e-5 * scale, msg=found_text)


# ---- networks ------------------------------------------------------------------------------------

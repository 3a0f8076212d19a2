"""A head, a 1x1 convolution or a matrix product, and its loss: for benchmarks.gpu."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.problem import COMPILE, EAGER, OURS, Outputs

Head = tuple[Tensor, Tensor, Tensor]  # features [B, F, *S], weight [C, F], bias [C]


def runs(
    dice: bool, head: Head, maps: tuple[Tensor, Tensor], ours: bool
) -> Iterator[tuple[str, Callable[[], Outputs]]]:
    """Loss and gradients of features and weight, by name; ``maps``: target and risk. ``ours``:
    riskmap_ext is there, too."""
    target, risk = maps
    convolution = (torch.nn.functional.conv2d, torch.nn.functional.conv3d)[target.dim() - 3]

    def convolved(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return convolution(features, weight.view(*weight.shape, *(1,) * (target.dim() - 1)), bias)

    def multiplied(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weights = weight.expand(features.size(0), -1, -1)
        logits = torch.baddbmm(bias.view(1, -1, 1), weights, features.flatten(2))
        return logits.unflatten(2, features.shape[2:])

    def run(loss: Callable[..., Tensor]) -> Outputs:
        leaves = [each.detach().requires_grad_() for each in head]
        value = loss(*leaves)
        features, weight, _ = torch.autograd.grad(value, leaves)
        return value.detach(), features, weight

    if ours:
        import riskmap_ext  # not built yet where torch.compile's cache is filled

        given: dict[str, Any] = {"normalization": "valid", "dice_weight": float(dice)}
        linear = partial(riskmap_ext.linear_weighted_loss, target=target, risk=risk, **given)
        yield OURS, partial(run, linear)
        loss: Callable[..., Tensor] = partial(
            riskmap_ext.weighted_loss, target=target, risk=risk, **given
        )
        yield "matrix product + weighted_loss", partial(run, lambda *x: loss(multiplied(*x)))
        yield "convolution + weighted_loss", partial(run, lambda *x: loss(convolved(*x)))
    formula = peers.weighted_ce_dice_one_hot if dice else peers.weighted_cross_entropy

    def plain(*leaves: Tensor) -> Tensor:
        return formula(convolved(*leaves), target, risk)

    yield f"{COMPILE}, convolution", partial(run, torch.compile(plain, dynamic=False))
    yield f"{EAGER}, convolution", partial(run, plain)

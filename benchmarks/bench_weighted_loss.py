"""weighted_loss, forward and backward, against the same formula in PyTorch, MONAI and nnU-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import riskmap_ext
from benchmarks import peers, shapes
from benchmarks.problem import (
    COMPILE,
    EAGER,
    MONAI,
    NNUNET,
    OURS,
    OVERWRITE,
    RECOMPUTE,
    Case,
    Contender,
    Outputs,
    Problem,
)
from benchmarks.shapes import BRATS_REGIONS, Inputs
from benchmarks.support import contender_ids, run_benchmark

OP = "weighted_loss"
WEIGHTED_CE = "weighted CE"
WEIGHTED_CE_BF16 = "weighted CE, bf16"
FOREGROUND_CE = "weighted CE / foreground"
WEIGHTED_CE_DICE = "weighted CE + Dice"
WEIGHTED_CE_DICE_BF16 = "weighted CE + Dice, bf16"
CE_DICE = "CE + Dice"
CE_SQUARED_DICE = "CE + squared Dice"  # of most bundles in MONAI's zoo
REGIONS = "regions: weighted BCE + Dice"

_SHORT = {
    "a": (WEIGHTED_CE, WEIGHTED_CE_BF16, FOREGROUND_CE),
    "b": (WEIGHTED_CE, WEIGHTED_CE_BF16, CE_DICE),
    "c": (WEIGHTED_CE, WEIGHTED_CE_BF16),
    "d": (WEIGHTED_CE, WEIGHTED_CE_BF16, CE_DICE),
    "e": (WEIGHTED_CE_DICE, WEIGHTED_CE_DICE_BF16, CE_DICE, CE_SQUARED_DICE),
    "r": (REGIONS,),
}
_COMPILED = (WEIGHTED_CE, WEIGHTED_CE_DICE, REGIONS)  # in short runs: compiling takes its time
_SOFTMAX_WORKS = (
    WEIGHTED_CE,
    WEIGHTED_CE_BF16,
    FOREGROUND_CE,
    WEIGHTED_CE_DICE,
    WEIGHTED_CE_DICE_BF16,
    CE_DICE,
    CE_SQUARED_DICE,
)
_FULL = {
    **dict.fromkeys("abce", _SOFTMAX_WORKS),
    "d": (WEIGHTED_CE, WEIGHTED_CE_BF16, WEIGHTED_CE_DICE, CE_DICE),  # a round takes 15 s
    "r": (REGIONS,),
}


def cases(size: str) -> list[Case]:
    works = _FULL if size == "full" else _SHORT
    return [Case(f"{OP}-{key}", partial(build, key, size, works[key])) for key in works]


def build(key: str, size: str, works: tuple[str, ...]) -> Problem:
    shape = shapes.shape(key, size)
    problem = Problem(OP, shape)
    if works == (REGIONS,):
        inputs = shapes.make_inputs(shape, num_labels=len(BRATS_REGIONS[0]))
        problem.contenders += _regions(inputs)
        return problem
    inputs = shapes.make_inputs(shape)
    for work in works:
        dtype = torch.bfloat16 if work.endswith("bf16") else torch.float32
        logits = inputs.logits.detach().to(dtype).requires_grad_()
        problem.contenders += [
            each
            for each in _WORKS[work](work, inputs._replace(logits=logits))
            if size == "full" or work in _COMPILED or not each.name.startswith(COMPILE)
        ]
    return problem


def _with_gradient(
    loss: Callable[..., Tensor], logits: Tensor, *inputs: Tensor, plus: float = 0.0
) -> Outputs:
    value = loss(logits, *inputs)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach() + plus if plus else value.detach(), gradient


def _recompute(loss: Callable[..., Tensor], *inputs: Tensor) -> Outputs:
    with riskmap_ext.gradient_in_forward(False):
        return _with_gradient(loss, *inputs)


class _NetworkOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        return None, None


def _overwrite(loss: Callable[..., Tensor], values: Tensor, *inputs: Tensor) -> Outputs:
    """Later runs find the gradient of the one before as their logits; that takes the same time."""
    logits = _NetworkOutput.apply(torch.zeros((), requires_grad=True), values)
    gradients: list[Tensor] = []
    logits.register_hook(gradients.append)
    value = loss(logits, *inputs, overwrite_logits=True)
    value.backward()
    return value.detach(), *gradients


def _contenders(
    work: str, inputs: Inputs, ours: Callable[..., Tensor], formulas: dict[str, Callable]
) -> Iterator[Contender]:
    """Ours on both paths and in the memory of the logits, and the formulas by name."""
    logits = inputs.logits
    nbytes = 2 * logits.nbytes + inputs.target.nbytes + inputs.risk.nbytes
    bf16 = logits.dtype == torch.bfloat16
    make = partial(
        Contender,
        work,
        moved_bytes=nbytes,
        gradient_bytes=logits.nbytes,
        dtype=logits.dtype,
        tolerance=1e-2 if bf16 else 1e-4,
    )
    yield make(OURS, partial(_with_gradient, ours, *inputs))
    if "Dice" not in work:  # with Dice in the sum there is one path
        yield make(RECOMPUTE, partial(_recompute, ours, *inputs))
    own = [logits.detach().clone(), *inputs[1:]]
    yield replace(make(OVERWRITE, partial(_overwrite, ours, *own)), gradient_bytes=0)
    for name, formula in formulas.items():
        yield make(name, partial(_with_gradient, formula, *inputs))


def _compiled(formula: Callable) -> Callable:
    return torch.compile(formula, dynamic=False)


def _cross_entropy(work: str, inputs: Inputs) -> Iterator[Contender]:
    foreground = work == FOREGROUND_CE
    formula = peers.foreground_cross_entropy if foreground else peers.weighted_cross_entropy
    ours = partial(riskmap_ext.weighted_loss, normalization="foreground" if foreground else "valid")
    return _contenders(work, inputs, ours, {EAGER: formula, COMPILE: _compiled(formula)})


def _cross_entropy_dice(work: str, inputs: Inputs) -> Iterator[Contender]:
    ours = partial(riskmap_ext.weighted_loss, normalization="valid", dice_weight=1.0)
    gather, one_hot = peers.weighted_ce_dice_gather, peers.weighted_ce_dice_one_hot
    formulas = {
        f"{EAGER}, gather": gather,
        f"{EAGER}, one-hot": one_hot,
        f"{COMPILE}, gather": _compiled(gather),
        f"{COMPILE}, one-hot": _compiled(one_hot),
    }
    return _contenders(work, inputs, ours, formulas)


def _plain_cross_entropy_dice(work: str, inputs: Inputs) -> Iterator[Contender]:
    """Without voxel weights, as MONAI's and nnU-Net's losses have none."""
    logits, target, _ = inputs

    squared = work == CE_SQUARED_DICE
    options: dict[str, Any] = {
        "normalization": "valid",
        "dice_weight": 1.0,
        "squared_pred": squared,
    }
    ours = partial(riskmap_ext.weighted_loss, **options)
    make = partial(
        Contender,
        work,
        moved_bytes=2 * logits.nbytes + target.nbytes,
        gradient_bytes=logits.nbytes,
    )
    yield make(OURS, partial(_with_gradient, ours, logits, target))
    with_channel = target.unsqueeze(1)
    monai = peers.monai_dice_ce(squared_pred=squared)
    nnunet = None if squared else peers.nnunet_dice_ce()
    if monai is not None:
        yield make(MONAI, partial(_with_gradient, monai, logits, with_channel))
    if nnunet is not None:
        yield make(NNUNET, partial(_with_gradient, nnunet, logits, with_channel, plus=1.0))


def _regions(inputs: Inputs) -> Iterator[Contender]:
    table = torch.tensor(BRATS_REGIONS)
    ours = partial(riskmap_ext.weighted_loss, normalization="valid", dice_weight=1.0, regions=table)
    formula = partial(peers.region_bce_dice, regions=table.float())
    formulas: dict[str, Callable[..., Tensor]] = {
        EAGER: formula,
        COMPILE: partial(_compiled(formula.func), regions=table.float()),
    }
    inputs = inputs._replace(logits=inputs.logits.requires_grad_())
    return _contenders(REGIONS, inputs, ours, formulas)


_WORKS: dict[str, Callable[[str, Inputs], Iterator[Contender]]] = {
    WEIGHTED_CE: _cross_entropy,
    WEIGHTED_CE_BF16: _cross_entropy,
    FOREGROUND_CE: _cross_entropy,
    WEIGHTED_CE_DICE: _cross_entropy_dice,
    WEIGHTED_CE_DICE_BF16: _cross_entropy_dice,
    CE_DICE: _plain_cross_entropy_dice,
    CE_SQUARED_DICE: _plain_cross_entropy_dice,
}


@pytest.mark.parametrize(("case", "contender"), contender_ids(cases))
def test_weighted_loss(benchmark, case: str, contender: str) -> None:
    run_benchmark(benchmark, cases, case, contender)

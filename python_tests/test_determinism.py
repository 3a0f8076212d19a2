"""Bitwise the same result from run to run and for any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Case, loss_and_gradients

import riskmap_ext

CASES = [
    Case("one_large", batch=1, classes=4, source_classes=5, spatial=(64, 48, 41)),
    Case("many_small", batch=9, classes=3, source_classes=6, spatial=(37, 41)),
    Case("bfloat16", batch=2, classes=9, source_classes=3, spatial=(61, 67), dtype=torch.bfloat16),
    Case("channels_last", batch=2, classes=5, spatial=(61, 67), layout="channels_last"),
    Case("float64", batch=1, classes=2, spatial=(130, 131), dtype=torch.float64),
]


def _leep(case: Case, device: torch.device) -> tuple[torch.Tensor, ...]:
    args, kwargs = case.leep_call(device)
    return (riskmap_ext.leep_statistics(*args, **kwargs),)


def _maps(case: Case, device: torch.device) -> tuple[torch.Tensor, ...]:
    args, kwargs = case.map_call(device)
    return (
        riskmap_ext.transferability_map(*args, **kwargs),
        riskmap_ext.risk_map(*args, **kwargs),
        riskmap_ext.risk_map(*args, scheme="power", **kwargs),
    )


def _loss(case: Case, device: torch.device) -> tuple[torch.Tensor, ...]:
    args, kwargs = case.loss_call(device)
    results: list[torch.Tensor] = []
    for options in (
        {},
        {"dice_weight": 1.0, "label_smoothing": 0.1},
        {"dice_weight": 1.0, "batch_dice": True, "normalization": "batch_foreground"},
        {"reduction": "none"},
    ):
        results.extend(loss_and_gradients((args, {**kwargs, **options}), grad_output=1.5))
    return tuple(results)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("function", [_leep, _maps, _loss])
@pytest.mark.usefixtures("restored_threads")
def test_bitwise_for_any_number_of_threads(
    function: Callable[[Case, torch.device], tuple[torch.Tensor, ...]],
    case: Case,
    device: torch.device,
) -> None:
    torch.set_num_threads(1)
    expected = function(case, device)
    assert len(expected) > 0
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        for found, first in zip(function(case, device), expected, strict=True):
            assert torch.equal(found, first), f"differs with {threads} thread(s)"

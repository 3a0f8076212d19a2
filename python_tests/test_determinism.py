"""Bitwise the same result from run to run and for any number of threads."""

from __future__ import annotations

from typing import Any

import every_op
import pytest
import torch
from cases import Case

CASES = [
    Case("one_large", batch=1, classes=4, source_classes=5, spatial=(64, 48, 41)),
    Case("many_small", batch=9, classes=3, source_classes=6, spatial=(37, 41)),
    Case("bfloat16", batch=2, classes=9, source_classes=3, spatial=(61, 67), dtype=torch.bfloat16),
    Case("channels_last", batch=2, classes=5, spatial=(61, 67), layout="channels_last"),
    Case("float64", batch=1, classes=2, spatial=(130, 131), dtype=torch.float64),
]


LOSSES: dict[str, dict[str, Any]] = {
    "ce": {},
    "dice": {"dice_weight": 1.0, "label_smoothing": 0.1},
    "batch": {"dice_weight": 1.0, "batch_dice": True, "normalization": "batch_foreground"},
    "none": {"reduction": "none"},
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("restored_threads")
def test_bitwise_for_any_number_of_threads(case: Case, device: torch.device) -> None:
    torch.set_num_threads(1)
    expected = every_op.results(case, device, LOSSES)
    assert len(expected) > 0
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        for name, outputs in every_op.results(case, device, LOSSES).items():
            for found, first in zip(outputs, expected[name], strict=True):
                assert torch.equal(found, first), f"{name} differs with {threads} thread(s)"

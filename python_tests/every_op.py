"""Every op, for the tests that run them all: with it, a new op is tried wherever the others are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from cases import (
    EVERY_CASE,
    LOSS_CASES,
    REGION_CASES,
    RISK_CASES,
    SOURCE_REGION_CASES,
    Case,
    loss_and_gradients,
    loss_in_two_steps,
    overwritten,
)
from compare import assert_loss_matches_reference
from test_leep import test_matches_reference as leep_matches
from test_risk_map import test_matches_reference as risk_map_matches
from test_source_regions import test_maps_match_reference as source_region_maps_match
from test_source_regions import test_statistics_match_reference as source_region_leep_matches
from test_transferability_map import test_matches_reference as map_matches
from torch import Tensor

import riskmap_ext

Outputs = tuple[Tensor, ...]
Check = Callable[[Case, torch.device], None]


def recomputed_loss_matches(case: Case, device: torch.device) -> None:
    with riskmap_ext.gradient_in_forward(False):
        assert_loss_matches_reference(case, device)


# Each against float64, and the cases that are made for it.
OF_SOFTMAX: dict[str, tuple[Check, list[Case]]] = {
    "weighted loss": (assert_loss_matches_reference, LOSS_CASES),
    "loss recomputed": (recomputed_loss_matches, LOSS_CASES),
    "LEEP statistics": (leep_matches, EVERY_CASE),
    "transferability map": (map_matches, EVERY_CASE),
    "risk map": (risk_map_matches, RISK_CASES),
}
OF_REGIONS: dict[str, tuple[Check, list[Case]]] = {
    "regions": (assert_loss_matches_reference, REGION_CASES),
    "regions recomputed": (recomputed_loss_matches, REGION_CASES),
    "LEEP of regions": (source_region_leep_matches, SOURCE_REGION_CASES),
    "maps of regions": (source_region_maps_match, SOURCE_REGION_CASES),
}

LOSSES: dict[str, dict[str, Any]] = {
    "ce": {},
    "none": {"reduction": "none", "ce_voxels": "foreground"},
    "smooth": {"label_smoothing": 0.1, "normalization": "batch_foreground", "reduction": "sum"},
    "dice": {"dice_weight": 1.0},
    "batch_dice": {"dice_weight": 0.5, "batch_dice": True, "label_smoothing": 0.1},
    "squared_dice": {"dice_weight": 1.0, "squared_pred": True, "alpha": 0.3},
}


def results(
    case: Case, device: torch.device, losses: Mapping[str, Mapping[str, Any]] = LOSSES
) -> dict[str, Outputs]:
    """What every op makes of a case."""
    maps, source_options = case.map_call(device)
    leep, _ = case.leep_call(device)
    found: dict[str, Outputs] = {
        "leep": (riskmap_ext.leep_statistics(*leep, **source_options),),
        "transferability": (riskmap_ext.transferability_map(*maps, **source_options),),
    }
    for scheme, scope in (("exponential", None), ("linear", (0.5, 3.0)), ("power", None)):
        risk = riskmap_ext.risk_map(*maps, scheme=scheme, range=scope, **source_options)
        found[f"risk_{scheme}"] = (risk,)
    for name, options in losses.items():
        if "dice_weight" in options and case.classes == 1:
            continue
        for in_forward in (True, False) if "dice_weight" not in options else (False,):
            args, kwargs = case.loss_call(device)
            call = args, {**kwargs, **options}
            with riskmap_ext.gradient_in_forward(in_forward):
                found[f"loss_{name}_{in_forward}"] = loss_and_gradients(call, grad_output=1.5)
                found[f"overwritten_{name}_{in_forward}"] = overwritten(call, grad_output=1.5)
    if case.classes > 1:
        sums, finished, _ = loss_in_two_steps(case, device)
        found["sums"], found["finished"] = (sums,), finished
    return found

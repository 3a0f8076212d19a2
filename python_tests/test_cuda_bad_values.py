"""Values that the CPU kernels raise an error for turn results of the CUDA kernels into NaN.

An error would have to wait for the device. NaN may not be missed, nor may it reach what the bad
value has no part in.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import BASE, EVERY_WAY, Case, loss_and_gradients
from torch import Tensor

import riskmap_ext

pytestmark = pytest.mark.usefixtures("cuda_kernels")

BAD_RISKS = (-1.0, math.nan, math.inf)
each_path = pytest.mark.parametrize("in_forward", [True, False], ids=["in_forward", "recompute"])
AT = (0, 1, 2)  # a voxel of the first image
CASES = [
    *EVERY_WAY,
    Case("bfloat16", dtype=torch.bfloat16, classes=4, spatial=(16, 16), batch=2),
    Case("regions", classes=4, regions=3, spatial=(9, 10), batch=2),
    Case("few_regions", classes=4, regions=3, spatial=(12, 11), batch=2),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def loss_of(case: Case, device: torch.device, **changes: Any) -> tuple[Tensor, ...]:
    """Loss and gradients with a bad value at AT: label=..., risk=... or weight=..."""
    (logits, target, risk), options = case.loss_call(device)
    options = {**options, **changes.pop("options", {})}
    target = target.long().clone()
    at = AT[: target.dim()]
    target[at] = changes.get("label", 0)
    if "risk" in changes:
        risk = risk.detach().clone()
        risk[at] = changes["risk"]
    if "weight" in changes:
        options["weight"] = torch.ones(logits.size(1), device=device)
        options["weight"][1] = changes["weight"]
    return loss_and_gradients(((logits, target, risk), options))


def beyond(case: Case) -> int:
    return case.classes


@each_case
@each_path
@pytest.mark.parametrize("dice", [0.0, 1.0])
def test_a_bad_label_spoils_its_image(
    case: Case, dice: float, in_forward: bool, device: torch.device
) -> None:
    for label in (beyond(case), -1, 2**40):
        with riskmap_ext.gradient_in_forward(in_forward):
            options = {"dice_weight": dice}
            loss, *gradients = loss_of(case, device, label=label, options=options)
            good, *clean = loss_of(case, device, options=options)
        assert loss.isnan()
        assert good.isfinite()
        for found, expected in zip(gradients, clean, strict=True):
            assert found[AT[0]].isnan().any()
            torch.testing.assert_close(found[1:], expected[1:])


@each_case
@each_path
@pytest.mark.parametrize("bad", BAD_RISKS)
def test_a_bad_risk_spoils_its_image(
    case: Case, bad: float, in_forward: bool, device: torch.device
) -> None:
    with riskmap_ext.gradient_in_forward(in_forward):
        loss, *gradients = loss_of(case, device, risk=bad)
        _, *clean = loss_of(case, device)
    assert loss.isnan()
    for found, expected in zip(gradients, clean, strict=True):
        assert found[AT[0]].isnan().any()
        torch.testing.assert_close(found[1:], expected[1:])


@each_case
@each_path
@pytest.mark.parametrize("bad", BAD_RISKS)
def test_a_bad_class_weight_spoils_all(
    case: Case, bad: float, in_forward: bool, device: torch.device
) -> None:
    with riskmap_ext.gradient_in_forward(in_forward):
        loss, *gradients = loss_of(case, device, weight=bad)
    assert loss.isnan()
    for gradient in gradients:
        assert all(image.isnan().any() for image in gradient)


@pytest.mark.parametrize("bad", BAD_RISKS)
def test_a_bad_class_weight_of_dice_spoils_all(bad: float, device: torch.device) -> None:
    weight = torch.ones(BASE.classes, device=device)
    weight[1] = bad
    options = {"dice_weight": 1.0, "dice_class_weight": weight}
    loss, *_ = loss_of(BASE, device, options=options)
    assert loss.isnan()


@each_case
@each_path
@pytest.mark.parametrize("bad", BAD_RISKS)
def test_a_bad_risk_at_an_ignored_voxel_is_none(
    case: Case, bad: float, in_forward: bool, device: torch.device
) -> None:
    with riskmap_ext.gradient_in_forward(in_forward):
        found = loss_of(case, device, label=case.ignore_index, risk=bad)
    assert all(bool(each.isfinite().all()) for each in found)


@each_case
def test_the_map_of_losses_is_spoilt_at_the_voxel(case: Case, device: torch.device) -> None:
    for changes in ({"label": case.classes}, {"risk": -1.0}):
        loss, gradient, *_ = loss_of(case, device, options={"reduction": "none"}, **changes)
        spoilt = loss.isnan()
        assert spoilt.sum() == 1
        assert spoilt[AT[: loss.dim()]].all()
        assert gradient.isnan().any(dim=1)[spoilt].all()
        assert gradient[1:].isfinite().all()


@each_case
def test_maps_are_spoilt_at_the_voxel(case: Case, device: torch.device) -> None:
    (source, target, conditional), options = case.map_call(device)
    target = target.long().clone()
    at = AT[: target.dim()]
    for label in (conditional.size(0), -1):
        target[at] = label
        for found in (
            riskmap_ext.transferability_map(source, target, conditional, **options),
            riskmap_ext.risk_map(source, target, conditional, scheme="power", **options),
            riskmap_ext.risk_map(source, target, conditional, range=(0.5, 3.0), **options),
        ):
            assert found.isnan().sum() == 1
            assert found[at].isnan().all()


@each_case
@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan])
def test_a_table_of_no_probabilities_spoils_all(
    case: Case, bad: float, device: torch.device
) -> None:
    (source, target, conditional), options = case.map_call(device)
    conditional = conditional.clone()
    conditional[0, 0] = bad
    found = riskmap_ext.transferability_map(source, target, conditional, **options)
    valid = target.reshape(found.shape) != case.ignore_index
    assert torch.equal(found.isnan(), valid)


@each_case
def test_a_bad_label_spoils_the_statistics(case: Case, device: torch.device) -> None:
    (source, target, *rest), options = case.leep_call(device)
    target = target.long().clone()
    target[AT[: target.dim()]] = rest[0] + 3
    # The op itself: the function looks at what comes of tensors on the CPU.
    joint = torch.ops.riskmap_ext.leep_statistics(source, target, None, *rest, case.ignore_index)
    assert joint.isnan().all()
    statistics = riskmap_ext.TransferStatistics(rest[0], regions=options.get("regions"))
    with pytest.raises(ValueError, match="expected finite logits"):
        statistics.update(source, target)

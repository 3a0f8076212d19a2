"""weighted_loss and its gradients against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    BASE,
    EVERY_WAY,
    LOSS_CASES,
    Case,
    in_double,
    laid_out,
    loss_and_gradients,
    loss_in_two_steps,
)
from compare import assert_gradient_close, assert_loss_matches_reference, relative_l2

import riskmap_ext
from riskmap_ext import reference

pytestmark = pytest.mark.ops

every_way = pytest.mark.parametrize("case", EVERY_WAY, ids=lambda case: case.name)
# Logits that may not be looked at, and a loss that takes every number there is.
SPOILERS = (torch.nan, torch.inf, -torch.inf)
WITH_ALL = {"dice_weight": 1.0, "label_smoothing": 0.1, "squared_pred": True}


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.name)
def test_matches_reference(case: Case, device: torch.device) -> None:
    assert_loss_matches_reference(case, device)


@pytest.mark.parametrize(
    "case",
    [case for case in LOSS_CASES if case.with_risk],
    ids=lambda case: case.name,
)
def test_gradients_vanish_at_ignored_voxels(case: Case, device: torch.device) -> None:
    _, grad_logits, grad_risk = loss_and_gradients(case.loss_call(device))
    ignored = ~case.valid(device)
    assert torch.count_nonzero(grad_logits.movedim(1, -1)[ignored]) == 0
    assert torch.count_nonzero(grad_risk.reshape(ignored.shape)[ignored]) == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none", "ce_voxels": "foreground"},
        {"reduction": "sum", "label_smoothing": 0.1, "normalization": "batch_foreground"},
        {"dice_weight": 0.8, "ce_weight": 0.5},
        {"dice_weight": 0.8, "batch_dice": True, "label_smoothing": 0.2},
    ],
    ids=["default", "none", "sum", "dice", "batch_dice"],
)
def test_gradcheck(options: dict[str, Any], layout: str, device: torch.device) -> None:
    case = Case(
        "gradcheck",
        spatial=(3, 4),
        layout=layout,
        dtype=torch.float64,
        magnitude=1.0,
        with_weight=True,
        with_foreground=True,
        loss_options=options,
    )
    (logits, target, risk), kwargs = in_double(case.loss_call(device))
    risk = risk.nan_to_num(1.0)
    assert torch.autograd.gradcheck(
        lambda logits, risk: riskmap_ext.weighted_loss(logits, target, risk, **kwargs),
        (logits.requires_grad_(), risk.requires_grad_()),
    )


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "shifted", "images_shifted"])
@every_way
def test_map_takes_a_gradient_for_each_voxel(case: Case, layout: str, device: torch.device) -> None:
    case = replace(case, loss_options={"reduction": "none"}, with_weight=True)
    call = case.loss_call(device)
    grad_output = laid_out(torch.randn(case.batch, *case.spatial, device=device), layout)
    found = loss_and_gradients(call, riskmap_ext.weighted_loss, grad_output)
    truth = loss_and_gradients(in_double(call), reference.weighted_loss, grad_output)
    assert_gradient_close(found[1], truth[1])
    assert_gradient_close(found[2], truth[2])


def test_gradient_scales_with_grad_output(device: torch.device) -> None:
    call = BASE.loss_call(device)
    _, once, risk_once = loss_and_gradients(call, grad_output=1.0)
    for factor in (-3.0, 0.0, 1e-3, 65536.0):
        _, scaled, risk_scaled = loss_and_gradients(call, grad_output=factor)
        torch.testing.assert_close(scaled, factor * once, rtol=1e-5, atol=1e-30)
        torch.testing.assert_close(risk_scaled, factor * risk_once, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients(wanted: tuple[bool, bool], device: torch.device) -> None:
    (logits, target, risk), kwargs = BASE.loss_call(device)
    _, *expected = loss_and_gradients(BASE.loss_call(device))
    logits.requires_grad_(wanted[0])
    risk.requires_grad_(wanted[1])
    loss = riskmap_ext.weighted_loss(logits, target, risk, **kwargs)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for tensor, is_wanted, gradient in zip((logits, risk), wanted, expected, strict=True):
        if is_wanted:
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-6, atol=0)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("dice", [0.0, 1.0], ids=["ce", "dice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_extreme_logits(dtype: torch.dtype, dice: float, device: torch.device) -> None:
    case = Case(
        "extreme",
        dtype=dtype,
        classes=5,
        spatial=(5, 7),
        risk_dtype=dtype,
        loss_options={"dice_weight": dice, "label_smoothing": 0.1},
    )
    (logits, target, risk), kwargs = case.loss_call(device)
    logits = torch.where(logits > 0, 1e4, -1e4).to(dtype)
    call = (logits, target, risk), kwargs
    found = loss_and_gradients(call, grad_output=64.0)
    expected = loss_and_gradients(in_double(call), reference.weighted_loss, 64.0)
    assert found[0].isfinite()
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert_gradient_close(found[1], expected[1])
    assert_gradient_close(found[2], expected[2])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_common_offset_costs_no_precision(
    offset: float, label_smoothing: float, device: torch.device
) -> None:
    """Whole numbers around 1e4 are exact in float32, log-sum-exp as a number of 1e4 is not."""
    (logits, target, risk), kwargs = BASE.loss_call(device)
    kwargs["label_smoothing"] = label_smoothing
    call = (logits.round() + offset, target, risk), kwargs
    found = loss_and_gradients(call)
    expected = loss_and_gradients(in_double(call), reference.weighted_loss)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert_gradient_close(found[1], expected[1])
    assert_gradient_close(found[2], expected[2])


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("dice", [0.0, 1.0], ids=["ce", "dice"])
@every_way
def test_minus_infinity_elsewhere_than_the_target(
    case: Case, dice: float, weighted: bool, device: torch.device
) -> None:
    (logits, target, risk), kwargs = replace(case, with_weight=weighted).loss_call(device)
    target = target.clamp(max=1)
    logits[:, 2:] = -torch.inf
    call = (logits, target, risk), {**kwargs, "dice_weight": dice}
    found = loss_and_gradients(call)
    assert found[0].isfinite()
    assert found[1].isfinite().all()
    assert torch.count_nonzero(found[1][:, 2:]) == 0
    expected = loss_and_gradients(in_double(call), reference.weighted_loss)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert_gradient_close(found[1], expected[1])


def test_minus_infinity_at_the_target_is_an_infinite_loss(device: torch.device) -> None:
    logits = torch.zeros(1, 2, 3, device=device)
    logits[0, 1, 2] = -torch.inf
    target = torch.tensor([[0, 1, 1]], device=device)
    loss, gradient, _ = loss_and_gradients(((logits, target, None), {"normalization": "none"}))
    assert loss.item() == torch.inf
    expected = torch.tensor([[[-0.5, 0.5, 1.0], [0.5, -0.5, -1.0]]], device=device)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("ce", "dice"), [(1.0, 0.0), (1.0, 1.0), (0.0, 1.0)], ids=["ce", "both", "dice"]
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@every_way
def test_nan_is_not_hidden(
    case: Case, bad: float, ce: float, dice: float, device: torch.device
) -> None:
    for channel in range(min(case.classes, 4)):
        (logits, target, risk), kwargs = case.loss_call(device)
        target[0, 3, 4], risk[0, 3, 4] = 1, 1.0
        logits[0, channel, 3, 4] = bad
        call = (logits, target, risk), {**kwargs, "ce_weight": ce, "dice_weight": dice}
        loss, gradient, _ = loss_and_gradients(call)
        assert loss.isnan()
        assert gradient[0, :, 3, 4].isnan().all()
        if dice:  # its sums are over the image
            assert gradient[0].isnan()[:, case.valid(device)[0]].all()


@pytest.mark.parametrize("in_forward", [True, False], ids=["in_forward", "recompute"])
@pytest.mark.parametrize("bad", SPOILERS)
@pytest.mark.parametrize("options", [{}, {"dice_weight": 1.0}, WITH_ALL], ids=["", "dice", "all"])
@every_way
def test_nothing_is_looked_at_in_ignored_voxels(
    case: Case, options: dict[str, Any], bad: float, in_forward: bool, device: torch.device
) -> None:
    (logits, target, risk), kwargs = case.loss_call(device)
    kwargs.update(options)
    ignored = ~case.valid(device)
    spoiled = laid_out(logits.masked_fill(ignored.unsqueeze(1), bad), case.layout)
    with riskmap_ext.gradient_in_forward(in_forward):
        expected = loss_and_gradients(((logits, target, risk), kwargs))
        risk = risk.masked_fill(ignored, -torch.inf)
        found = loss_and_gradients(((spoiled, target, risk), kwargs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@every_way
def test_nothing_is_looked_at_outside_the_region(case: Case, device: torch.device) -> None:
    (logits, target, risk), kwargs = case.loss_call(device)
    kwargs["ce_voxels"] = "foreground"
    expected = loss_and_gradients(((logits, target, risk), kwargs))
    spoiled = laid_out(logits.masked_fill((target == 0).unsqueeze(1), torch.nan), case.layout)
    found = loss_and_gradients(((spoiled, target, risk), kwargs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@every_way
def test_part_of_weight_zero_is_switched_off(case: Case, device: torch.device) -> None:
    """An infinite cross-entropy does not spoil the Dice part."""
    (logits, target, risk), kwargs = case.loss_call(device)
    target[0, 3, 4], risk[0, 3, 4] = 1, 1.0
    logits[0, 1, 3, 4] = -torch.inf
    kwargs.update(ce_weight=0.0, dice_weight=1.0)
    found = loss_and_gradients(((logits, target, risk), kwargs))
    expected = loss_and_gradients(
        in_double(((logits, target, risk), kwargs)), reference.weighted_loss
    )
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert_gradient_close(found[1], expected[1])
    assert torch.count_nonzero(found[2]) == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("spatial", [(9,), (5, 7), (3, 4, 5)])
def test_gradient_is_laid_out_as_the_logits(
    layout: str, spatial: tuple[int, ...], device: torch.device
) -> None:
    call = Case("strides", layout=layout, spatial=spatial).loss_call(device)
    _, gradient, _ = loss_and_gradients(call)
    assert gradient.stride() == call[0][0].stride()


@pytest.mark.parametrize("dice", [0.0, 1.0], ids=["ce", "dice"])
@pytest.mark.parametrize(
    "normalization", ["foreground", "batch_foreground", "valid", "batch_valid", "weighted", "none"]
)
@pytest.mark.parametrize("ce_voxels", ["valid", "foreground"])
@pytest.mark.parametrize("labels", ["ignored", "few", "many", "no_voxels", "no_images"])
def test_nothing_valid_is_zero(
    labels: str, ce_voxels: str, normalization: str, dice: float, device: torch.device
) -> None:
    case = {
        "ignored": Case("nothing", labels="ignored"),
        "few": Case("nothing", labels="ignored", spatial=(12, 11)),
        "many": Case("nothing", labels="ignored", spatial=(12, 11), classes=11),
        "no_voxels": Case("nothing", spatial=(0, 3)),
        "no_images": Case("nothing", batch=0),
    }[labels]
    args, kwargs = case.loss_call(device)
    kwargs.update(normalization=normalization, ce_voxels=ce_voxels, dice_weight=dice)
    for reduction in ("mean", "sum"):
        loss, *gradients = loss_and_gradients((args, {**kwargs, "reduction": reduction}))
        assert loss.item() == 0
        for gradient, tensor in zip(gradients, (args[0], args[2]), strict=True):
            assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("batch_dice", [False, True], ids=["images", "batch"])
@pytest.mark.parametrize("shape", [{"batch": 0}, {"spatial": (0, 3)}], ids=str)
def test_dice_of_nothing(shape: dict[str, Any], batch_dice: bool, device: torch.device) -> None:
    """No image: 0. No voxel in an image: that of classes neither labelled nor predicted."""
    args, kwargs = Case("dice_of_nothing", **shape).loss_call(device)
    kwargs |= {"dice_weight": 0.5, "smooth_nr": 1.0, "smooth_dr": 4.0, "batch_dice": batch_dice}
    expected = 0.0 if shape.get("batch") == 0 else 0.5 * (1 - 1 / 4)
    assert riskmap_ext.weighted_loss(*args, **kwargs).item() == expected
    assert reference.weighted_loss(*args, **kwargs).item() == expected


def test_weighted_by_nothing_is_zero(device: torch.device) -> None:
    """All labels have weight 0, while smoothing gives the loss other classes."""
    logits = Case("weighted_by_nothing").logits(device).requires_grad_()
    target = torch.zeros(2, 7, 9, dtype=torch.int64, device=device)
    options: dict[str, Any] = {
        "normalization": "weighted",
        "weight": [0.0, 1.0, 2.0],
        "label_smoothing": 0.1,
    }
    for function in (riskmap_ext.weighted_loss, reference.weighted_loss):
        loss = function(logits, target, **options)
        assert loss.item() == 0
        assert torch.count_nonzero(torch.autograd.grad(loss, logits)[0]) == 0


def test_one_class_costs_nothing(device: torch.device) -> None:
    (logits, target, risk), kwargs = Case("one_class", classes=1).loss_call(device)
    loss, gradient, grad_risk = loss_and_gradients(((logits, target, risk), kwargs))
    assert loss.item() == 0
    assert torch.count_nonzero(gradient) == 0
    assert torch.count_nonzero(grad_risk) == 0


def test_large_volume_by_distance_and_direction(device: torch.device) -> None:
    case = Case(
        "large",
        batch=2,
        classes=4,
        spatial=(48, 40, 37),
        ignored=0.02,
        loss_options={"dice_weight": 1.0},
    )
    call = case.loss_call(device)
    found = loss_and_gradients(call)
    expected = loss_and_gradients(in_double(call), reference.weighted_loss)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert relative_l2(found[1], expected[1]) <= 1e-6
    assert_gradient_close(found[1], expected[1])
    assert_gradient_close(found[2], expected[2])


@pytest.mark.parametrize("made", [list, tuple, np.array, np.float32])
def test_class_weights_may_be_numbers(made: Callable[[Any], Any], device: torch.device) -> None:
    (logits, target, risk), _ = Case("numbers", classes=3).loss_call(device)
    numbers = [0.5, 0.0, 3.0]
    for function in (riskmap_ext.weighted_loss, reference.weighted_loss):
        expected = function(logits, target, risk, weight=torch.tensor(numbers, device=device))
        assert torch.equal(function(logits, target, risk, weight=made(numbers)), expected)


def test_inputs_are_left_alone(device: torch.device) -> None:
    args, kwargs = Case("inputs", with_weight=True, with_foreground=True).loss_call(device)
    kwargs["dice_weight"] = 1.0
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    loss_and_gradients((args, kwargs))
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(-1), copy.nan_to_num(-1))


@pytest.mark.parametrize("batch_dice", [False, True], ids=["images", "batch"])
@pytest.mark.parametrize(
    "case",
    [
        Case("two_steps", batch=3, with_weight=True, empty_image=True),
        Case("two_steps_many", classes=19, spatial=(12, 13), with_weight=True),
        Case("two_steps_double", classes=17, dtype=torch.float64, with_weight=True),
        Case("two_steps_regions", regions=3, classes=4, spatial=(9, 10), with_weight=True),
        Case("two_steps_empty", batch=0, with_weight=True),
    ],
    ids=lambda case: case.name,
)
def test_sums_and_what_becomes_of_them(case: Case, batch_dice: bool, device: torch.device) -> None:
    """weighted_loss in the two steps that sums of several processes take."""
    sums, found, expected = loss_in_two_steps(case, device, batch_dice)
    assert sums[:, 1].tolist() == case.valid(device).flatten(1).sum(1).tolist()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)

"""leep_statistics and conditional against their float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import BASE, EVERY_CASE, EVERY_WAY, Case, in_double, laid_out
from compare import assert_map_close, assert_relative_l2
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import riskmap_ext
from riskmap_ext import reference

pytestmark = pytest.mark.ops


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.name)
def test_matches_reference(case: Case, device: torch.device) -> None:
    call = case.leep_call(device)
    found = riskmap_ext.leep_statistics(*call[0], **call[1])
    args, kwargs = in_double(call)
    expected = reference.leep_statistics(*args, **kwargs)

    assert found.shape == (case.classes, case.source_classes)
    assert found.dtype == torch.float64
    assert found.device.type == device.type
    # Probabilities are computed in float32 (float64 for float64) and then added in float64.
    tolerance = 1e-12 if case.dtype == torch.float64 else 1e-6
    assert_relative_l2(found, expected, tolerance)
    assert_map_close(found, expected, rtol=10 * tolerance, atol=1e-12)


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.name)
def test_statistics_add_up_to_the_valid_voxels(case: Case, device: torch.device) -> None:
    args, kwargs = case.leep_call(device)
    joint = riskmap_ext.leep_statistics(*args, **kwargs)
    valid = case.valid(device)
    labels = args[1].to(torch.int64).reshape(valid.shape)[valid]

    # A softmax of many classes adds up to 1 within the rounding of its float32 denominator.
    counts = torch.bincount(labels, minlength=case.classes).double()
    torch.testing.assert_close(joint.sum(dim=1), counts, rtol=5e-6, atol=0)
    assert joint.sum().item() == pytest.approx(int(valid.sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_extreme_logits_give_one_hot_statistics(dtype: torch.dtype, device: torch.device) -> None:
    winners = torch.tensor([[0, 1, 1, 2, 2, 2]], device=device)
    source = torch.full((1, 3, 6), -1e4, dtype=dtype, device=device)
    source.scatter_(1, winners.unsqueeze(1), 1e4)
    target = torch.tensor([[0, 0, 1, 1, 1, 0]], device=device)

    joint = riskmap_ext.leep_statistics(source, target, 2)

    expected = torch.tensor([[1, 1, 1], [0, 1, 2]], dtype=torch.float64, device=device)
    assert torch.equal(joint, expected)


@pytest.mark.parametrize("case", EVERY_WAY, ids=lambda case: case.name)
def test_source_of_minus_infinity_has_no_mass(case: Case, device: torch.device) -> None:
    source, target = case.source(device), case.target(device)
    source[:, 3:] = -torch.inf
    joint = riskmap_ext.leep_statistics(source, target, case.classes)
    assert torch.count_nonzero(joint[:, 3:]) == 0
    without = riskmap_ext.leep_statistics(source[:, :3], target, case.classes)
    torch.testing.assert_close(joint[:, :3], without, rtol=1e-6, atol=0)


def test_nan_source_is_not_hidden(device: torch.device) -> None:
    source, target = BASE.source(device), torch.zeros_like(BASE.target(device))
    source[0, 1, 3, 4] = torch.nan
    if device.type != "cpu":  # an error would have to wait
        assert riskmap_ext.leep_statistics(source, target, BASE.classes)[0].isnan().all()
        return
    joint = torch.ops.riskmap_ext.leep_statistics(source, target, None, BASE.classes, -100)
    assert joint[0].isnan().all()
    for bad in (torch.nan, torch.inf):
        source[0, 1, 3, 4] = bad
        with pytest.raises(ValueError, match=r"^source: expected finite logits"):
            riskmap_ext.leep_statistics(source, target, BASE.classes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_largest_logits_are_finite(dtype: torch.dtype, device: torch.device) -> None:
    source, target = BASE.source(device).to(dtype), BASE.target(device)
    source[:, 1], source[:, 2] = torch.finfo(dtype).max, torch.finfo(dtype).min
    joint = riskmap_ext.leep_statistics(source, target, BASE.classes)
    torch.testing.assert_close(joint[:, 1], joint.sum(dim=1), rtol=1e-7, atol=0)


def test_values_are_not_read_where_they_are_not_there() -> None:
    args, kwargs = BASE.leep_call(torch.device("cpu"))
    with FakeTensorMode() as mode:
        source, target = map(mode.from_tensor, args[:2])
        assert (
            riskmap_ext.leep_statistics(source, target, args[2], **kwargs).shape[0] == BASE.classes
        )
    traced = make_fx(lambda x, y: riskmap_ext.leep_statistics(x, y, BASE.classes))(*args[:2])
    assert torch.equal(traced(*args[:2]), riskmap_ext.leep_statistics(*args, **kwargs))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", EVERY_WAY, ids=lambda case: case.name)
def test_nan_at_ignored_voxels_is_not_looked_at(
    case: Case, bad: float, device: torch.device
) -> None:
    case = replace(case, labels="runs")
    source, target = case.source(device), case.target(device)
    expected = riskmap_ext.leep_statistics(source, target, case.classes)
    spoiled = laid_out(source.masked_fill(~case.valid(device).unsqueeze(1), bad), case.layout)
    found = riskmap_ext.leep_statistics(spoiled, target, case.classes)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_more_classes_than_labels_give_empty_rows(device: torch.device) -> None:
    joint = riskmap_ext.leep_statistics(BASE.source(device), BASE.target(device), 10)
    assert torch.count_nonzero(joint[BASE.classes :]) == 0
    assert torch.count_nonzero(joint[: BASE.classes]) > 0


def test_many_voxels_lose_no_count(device: torch.device) -> None:
    """Above 2^24 voxels a float32 sum of ones would stand still."""
    voxels = 2**24 + 5
    source = torch.zeros(1, 1, 1, dtype=torch.float16, device=device).expand(1, 1, voxels)
    target = torch.zeros(1, 1, dtype=torch.uint8, device=device).expand(1, voxels)
    assert riskmap_ext.leep_statistics(source, target, 1).item() == voxels


def test_conditional_columns_are_distributions(device: torch.device) -> None:
    args, kwargs = Case("conditional", classes=5, source_classes=7).leep_call(device)
    joint = riskmap_ext.leep_statistics(*args, **kwargs)
    given = riskmap_ext.conditional(joint)
    assert given.dtype == torch.float64
    torch.testing.assert_close(given.sum(dim=0), torch.ones_like(given[0]), rtol=1e-12, atol=0)
    torch.testing.assert_close(given * joint.sum(dim=0), joint, rtol=1e-12, atol=0)


def test_conditional_without_mass_is_zero(device: torch.device) -> None:
    joint = torch.tensor([[1.0, 0.0, 3.0], [3.0, 0.0, 1.0]], device=device)
    expected = torch.tensor([[0.25, 0.0, 0.75], [0.75, 0.0, 0.25]], device=device).double()
    assert torch.equal(riskmap_ext.conditional(joint), expected)
    empty = torch.zeros(3, 2, dtype=torch.float64, device=device)
    assert torch.equal(riskmap_ext.conditional(empty), empty)

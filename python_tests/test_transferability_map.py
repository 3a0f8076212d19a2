"""transferability_map against its float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BASE, EVERY_CASE, EVERY_WAY, Case, in_double, laid_out
from compare import assert_map_close

import riskmap_ext
from riskmap_ext import reference

pytestmark = pytest.mark.ops


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.name)
def test_matches_reference(case: Case, device: torch.device) -> None:
    call = case.map_call(device)
    found = riskmap_ext.transferability_map(*call[0], **call[1])
    args, kwargs = in_double(call)
    expected = reference.transferability_map(*args, **kwargs)

    assert found.shape == (case.batch, *case.spatial)
    assert found.dtype == torch.float32
    assert found.device.type == device.type
    # p is right to about 1e-6 relative, so T = log p is right to 1e-6 absolute near T = 0.
    assert_map_close(found, expected, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.name)
def test_range_and_ignored_voxels(case: Case, device: torch.device) -> None:
    args, kwargs = case.map_call(device)
    found = riskmap_ext.transferability_map(*args, **kwargs)
    assert torch.all(found <= 0)
    assert torch.all(found >= math.log(1e-6) - 1e-5)
    assert torch.count_nonzero(found[~case.valid(device)]) == 0


def test_floor_of_the_likelihood(device: torch.device) -> None:
    source = torch.tensor([[[1e4, 0.0], [-1e4, 30.0]]], device=device)
    target = torch.tensor([[0, 0]], device=device)
    given = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=device)
    found = riskmap_ext.transferability_map(source, target, given)
    torch.testing.assert_close(
        found, torch.tensor([[math.log(1e-6), 0.0]], device=device), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_extreme_logits(dtype: torch.dtype, device: torch.device) -> None:
    winners = torch.tensor([[0, 1, 1, 0]], device=device)
    source = torch.full((1, 2, 4), -1e4, dtype=dtype, device=device)
    source.scatter_(1, winners.unsqueeze(1), 1e4)
    given = torch.tensor([[0.7, 0.2], [0.3, 0.8]], dtype=torch.float64, device=device)
    target = torch.tensor([[0, 0, 1, 1]], device=device)
    found = riskmap_ext.transferability_map(source, target, given)
    expected = torch.tensor([[0.7, 0.2, 0.8, 0.3]], device=device).log()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", EVERY_WAY, ids=lambda case: case.name)
def test_class_of_minus_infinity_has_no_share(case: Case, device: torch.device) -> None:
    source, target, given = case.map_call(device)[0]
    source[:, 3:] = -torch.inf
    found = riskmap_ext.transferability_map(source, target, given)
    expected = riskmap_ext.transferability_map(source[:, :3], target, given[:, :3])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", EVERY_WAY, ids=lambda case: case.name)
def test_nan_source_is_not_hidden(case: Case, device: torch.device) -> None:
    source, target, given = case.map_call(device)[0]
    target[0, 3, 4] = 1
    source[0, 1, 3, 4] = torch.nan
    found = riskmap_ext.transferability_map(source, target, given)
    assert found[0, 3, 4].isnan()
    assert found.isnan().sum() == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", EVERY_WAY, ids=lambda case: case.name)
def test_nan_at_ignored_voxels_is_not_looked_at(
    case: Case, bad: float, device: torch.device
) -> None:
    source, target, given = case.map_call(device)[0]
    expected = riskmap_ext.transferability_map(source, target, given)
    spoiled = laid_out(source.masked_fill(~case.valid(device).unsqueeze(1), bad), case.layout)
    found = riskmap_ext.transferability_map(spoiled, target, given)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_conditional_of_other_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    source, target, given = BASE.map_call(device)[0]
    given = given.to(dtype)
    found = riskmap_ext.transferability_map(source, target, given)
    expected = reference.transferability_map(source.double(), target, given.double())
    assert_map_close(found, expected, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("strides", ["transposed", "sliced"])
def test_conditional_of_other_strides(strides: str, device: torch.device) -> None:
    source, target, given = BASE.map_call(device)[0]
    expected = riskmap_ext.transferability_map(source, target, given)
    if strides == "transposed":
        strided = given.t().contiguous().t()
    else:
        strided = given.repeat_interleave(2, dim=1)[:, ::2]
    assert not strided.is_contiguous()
    assert torch.equal(riskmap_ext.transferability_map(source, target, strided), expected)


def test_source_gets_no_gradient(device: torch.device) -> None:
    source, target, given = BASE.map_call(device)[0]
    source.requires_grad_()
    assert not riskmap_ext.transferability_map(source, target, given).requires_grad
    assert not riskmap_ext.risk_map(source, target, given).requires_grad
    assert not riskmap_ext.leep_statistics(source, target, BASE.classes).requires_grad

"""risk_map against its float64 reference, and its scopes and degenerate cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import BASE, RISK_CASES, Case, in_double
from compare import assert_map_close

import riskmap_ext
from riskmap_ext import reference

pytestmark = pytest.mark.ops


@pytest.mark.parametrize("case", RISK_CASES, ids=lambda case: case.name)
def test_matches_reference(case: Case, device: torch.device) -> None:
    call = case.risk_call(device)
    found = riskmap_ext.risk_map(*call[0], **call[1])
    args, kwargs = in_double(call)
    expected = reference.risk_map(*args, **kwargs)

    assert found.shape == (case.batch, *case.spatial)
    assert found.dtype == torch.float32
    assert found.device.type == device.type
    # h is right to about 3e-6; the range divides it and the exponential multiplies by ln(base).
    assert_map_close(found, expected, rtol=2e-5)


@pytest.mark.parametrize("case", RISK_CASES, ids=lambda case: case.name)
def test_range_and_ignored_voxels(case: Case, device: torch.device) -> None:
    args, kwargs = case.risk_call(device)
    found = riskmap_ext.risk_map(*args, **kwargs)
    valid = case.valid(device)
    assert torch.count_nonzero(found[~valid]) == 0
    options: dict[str, Any] = {"scheme": "exponential", "base": 10.0, "scale": 9.0, "alpha": 0.5}
    options.update(case.risk_options)
    one, other = {
        "exponential": (1.0, options["base"]),
        "linear": (1.0, 1.0 + options["scale"]),
        "power": (1.0, 1e6 ** options["alpha"]),
    }[options["scheme"]]
    assert torch.all(found[valid] >= min(one, other) * (1 - 1e-5))
    assert torch.all(found[valid] <= max(one, other) * (1 + 1e-5))


def _source_of_likelihoods(likelihoods: torch.Tensor) -> torch.Tensor:
    """A two-class source [1, 2, N] that gives class 0 these probabilities."""
    return torch.stack([likelihoods.log(), (1 - likelihoods).log()]).unsqueeze(0)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"scheme": "exponential"}, [10 ** (1 / 3), 1.0, 10 ** (2 / 3), 10.0]),
        ({}, [1 + 9 / 3, 1.0, 1 + 9 * 2 / 3, 10.0]),
        ({"scheme": "power"}, [0.4**-0.5, 0.8**-0.5, 0.2**-0.5, 0.1**-0.5]),
        ({"scheme": "power", "alpha": 1.0, "range": (0.0, 0.1)}, [2.5, 1.25, 5.0, 10.0]),
        (
            {"range": (0.0, math.log(5)), "scheme": "exponential", "base": 5.0},
            [2.5, 1.25, 5.0, 5.0],
        ),
        (
            {"range": (math.log(2.5), math.log(5)), "scheme": "linear", "scale": 4.0},
            [1.0, 1.0, 5.0, 5.0],
        ),
    ],
)
def test_weights_worked_by_hand(
    options: dict[str, Any], weights: list[float], device: torch.device
) -> None:
    source = _source_of_likelihoods(torch.tensor([0.4, 0.8, 0.2, 0.1], device=device))
    target = torch.zeros(1, 4, dtype=torch.int64, device=device)
    given = torch.eye(2, dtype=torch.float64, device=device)
    found = riskmap_ext.risk_map(source, target, given, background=None, **options)
    torch.testing.assert_close(found, torch.tensor([weights], device=device), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scheme", ["exponential", "linear"])
def test_degenerate_range_gives_ones(scheme: str, device: torch.device) -> None:
    """A hardness range below 0.1 must not be stretched, one above is."""
    target = torch.ones(2, 3, dtype=torch.int64, device=device)
    given = torch.eye(2, dtype=torch.float64, device=device).flip(0)
    narrow = _source_of_likelihoods(torch.tensor([0.50, 0.52, 0.549], device=device))
    wide = _source_of_likelihoods(torch.tensor([0.50, 0.52, 0.557], device=device))
    found = riskmap_ext.risk_map(torch.cat([narrow, wide]), target, given, scheme=scheme)
    assert torch.equal(found[0], torch.ones_like(found[0]))
    torch.testing.assert_close(found[1].max().item(), 10.0, rtol=1e-5, atol=0)

    explicit = riskmap_ext.risk_map(wide, target[:1], given, scheme=scheme, range=(0.5, 0.55))
    assert torch.equal(explicit, torch.ones_like(explicit))


@pytest.mark.parametrize("scheme", ["exponential", "linear"])
def test_image_without_foreground_gives_ones(scheme: str, device: torch.device) -> None:
    args, _ = Case("no_foreground", labels="background").risk_call(device)
    found = riskmap_ext.risk_map(*args, scheme=scheme)
    valid = Case("no_foreground", labels="background").valid(device)
    assert torch.equal(found, valid.float())
    everything = riskmap_ext.risk_map(*args, scheme=scheme, background=None)
    assert everything.max() > 5
    explicit = riskmap_ext.risk_map(*args, scheme=scheme, range=(0.5, 3.0))
    assert explicit.max() > 5


@pytest.mark.parametrize("scheme", ["exponential", "linear", "power"])
def test_images_do_not_influence_each_other(scheme: str, device: torch.device) -> None:
    case = Case("images", batch=4, spatial=(9, 8))
    args, kwargs = case.risk_call(device)
    together = riskmap_ext.risk_map(*args, scheme=scheme, **kwargs)
    for image in range(case.batch):
        alone = riskmap_ext.risk_map(
            args[0][image : image + 1],
            args[1][image : image + 1],
            args[2],
            scheme=scheme,
            **kwargs,
        )
        torch.testing.assert_close(alone[0], together[image], rtol=1e-6, atol=0)


def test_ignored_voxels_do_not_move_the_range(device: torch.device) -> None:
    source, target, given = BASE.map_call(device)[0]
    expected = riskmap_ext.risk_map(source, target, given)
    ignored = ~BASE.valid(device).unsqueeze(1)
    for value in (torch.nan, 1e4):
        source = source.masked_fill(ignored, value)
        source[:, 0] = source[:, 0].masked_fill(ignored.squeeze(1), -1e4)
        found = riskmap_ext.risk_map(source, target, given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scheme", ["exponential", "linear", "power"])
def test_nan_source_is_not_hidden(scheme: str, device: torch.device) -> None:
    source, target, given = BASE.map_call(device)[0]
    target[0, 3, 4] = 1
    source[0, 1, 3, 4] = torch.nan
    for limits in (None, (0.5, 3.0)):
        found = riskmap_ext.risk_map(source, target, given, scheme=scheme, range=limits)
        assert found[0, 3, 4].isnan()

"""LEEP statistics and maps of a source with overlapping regions (sigmoids)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cases import BRATS, SOURCE_REGION_CASES, Case, in_double
from compare import assert_map_close, assert_relative_l2
from torch import Tensor

import riskmap_ext
from riskmap_ext import TransferStatistics, reference

pytestmark = pytest.mark.ops


@pytest.mark.parametrize("case", SOURCE_REGION_CASES, ids=lambda case: case.name)
def test_statistics_match_reference(case: Case, device: torch.device) -> None:
    call = case.leep_call(device)
    found = riskmap_ext.leep_statistics(*call[0], **call[1])
    args, kwargs = in_double(call)
    expected = reference.leep_statistics(*args, **kwargs)
    assert found.shape == (case.classes, case.source_classes)
    assert found.dtype == torch.float64
    tolerance = 1e-12 if case.dtype == torch.float64 else 1e-6
    assert_relative_l2(found, expected, tolerance)
    # Sums of several logits are rounded to float32 before the softmax.
    assert_map_close(found, expected, rtol=30 * tolerance, atol=1e-10)


@pytest.mark.parametrize("case", SOURCE_REGION_CASES, ids=lambda case: case.name)
def test_maps_match_reference(case: Case, device: torch.device) -> None:
    call = case.map_call(device)
    args, kwargs = in_double(call)
    found = riskmap_ext.transferability_map(*call[0], **call[1])
    expected = reference.transferability_map(*args, **kwargs)
    assert found.shape == (case.batch, *case.spatial)
    assert_map_close(found, expected, rtol=3e-6, atol=6e-6)
    each: dict[str, Any]
    for each in ({}, {"scheme": "power"}, {"scheme": "linear", "range": (0.2, 2.0)}):
        found = riskmap_ext.risk_map(*call[0], **{**call[1], **each})
        expected = reference.risk_map(*args, **{**kwargs, **each})
        assert_map_close(found, expected, rtol=5e-5)


def _posterior(x: Tensor, table: Tensor) -> Tensor:
    """Probability of each label, from the Bernoulli probabilities of the regions of one voxel.

    All 2^R answers of the regions are listed; those that are no label's are left out, and the
    rest shared out over the labels that give them.
    """
    inside = torch.sigmoid(x.double())
    outside = torch.sigmoid(-x.double())
    answers = {
        answer: math.prod((inside[r] if yes else outside[r]).item() for r, yes in enumerate(answer))
        for answer in itertools.product((0, 1), repeat=len(x))
    }
    assert sum(answers.values()) == pytest.approx(1.0)
    of_label = [answers[tuple(int(yes) for yes in column)] for column in table.t()]
    return torch.tensor(of_label, dtype=torch.float64) / sum(of_label)


TABLES = {
    "brats": BRATS,
    "empty_column": torch.tensor([[1, 0, 1], [0, 0, 1]]),
    "nothing_inside": torch.tensor([[0, 0, 0, 0]]),
    "everything_inside": torch.tensor([[1, 1], [1, 1], [1, 1]]),
    "same_columns": torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]),
    "one_of_each": torch.eye(5, dtype=torch.int64),
    "all_answers": torch.tensor(list(itertools.product((0, 1), repeat=4))).t(),
    "one_label": torch.tensor([[1], [0]]),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_theta_is_the_product_of_bernoullis(table: Tensor, device: torch.device) -> None:
    voxels = 29
    generator = torch.Generator().manual_seed(1)
    source = 3 * torch.randn(1, len(table), voxels, generator=generator, dtype=torch.float64)
    theta = torch.stack([_posterior(source[0, :, v], table) for v in range(voxels)])  # [N, Z]

    # Each voxel as a class of its own: row v of the statistics is theta of voxel v.
    target = torch.arange(voxels, device=device).unsqueeze(0)
    joint = riskmap_ext.leep_statistics(source.to(device), target, voxels, regions=table.to(device))
    torch.testing.assert_close(joint.cpu(), theta, rtol=1e-12, atol=1e-15)

    given = torch.rand(3, table.size(1), generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (1, voxels), generator=generator)
    expected = (given[labels[0]] * theta).sum(dim=1).clamp(1e-6, 1.0)
    maps = (source.to(device), labels.to(device), given.to(device))
    found = riskmap_ext.transferability_map(*maps, regions=table.to(device))
    torch.testing.assert_close(found[0].cpu().double(), expected.log(), rtol=1e-6, atol=1e-6)
    weights = riskmap_ext.risk_map(*maps, regions=table.to(device), scheme="power", alpha=0.5)
    torch.testing.assert_close(weights[0].cpu().double(), expected**-0.5, rtol=1e-6, atol=0)


def test_regions_without_overlap_are_a_softmax(device: torch.device) -> None:
    case = Case("identity_source", source_classes=6)
    args, kwargs = case.leep_call(device)
    table = torch.eye(6, dtype=torch.bool, device=device)
    expected = riskmap_ext.leep_statistics(*args, **kwargs)
    found = riskmap_ext.leep_statistics(*args, regions=table, **kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    args, kwargs = case.map_call(device)
    found = riskmap_ext.risk_map(*args, regions=table, **kwargs)
    torch.testing.assert_close(found, riskmap_ext.risk_map(*args, **kwargs), rtol=1e-5, atol=0)


@pytest.mark.parametrize("functions", [riskmap_ext, reference], ids=["compiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_certain_sources(functions: Any, dtype: torch.dtype, device: torch.device) -> None:
    """-inf and +-1e4: the labels that a region excludes, or is sure of, have no mass or all."""
    source = torch.tensor(
        [[[1e4, 1e4, -1e4, 0.0], [-1e4, 1e4, -1e4, -math.inf], [-1e4, 1e4, -1e4, -math.inf]]],
        dtype=dtype,
        device=device,
    )
    target = torch.arange(4, device=device).unsqueeze(0)
    joint = functions.leep_statistics(source, target, 4, regions=BRATS.to(device))
    expected = torch.tensor(
        [[0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0.5, 0.5, 0, 0]], dtype=torch.float64
    )
    torch.testing.assert_close(joint.cpu(), expected, rtol=1e-7, atol=0)


def test_nan_of_a_source_is_not_hidden(device: torch.device) -> None:
    source = torch.zeros(1, 3, 4, device=device)
    source[0, 1, 2] = math.nan
    target = torch.zeros(1, 4, dtype=torch.int64, device=device)
    joint = torch.ops.riskmap_ext.leep_statistics(source, target, BRATS.bool().to(device), 1, -100)
    assert joint.isnan().any()
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"^source: expected finite logits"):
            riskmap_ext.leep_statistics(source, target, 1, regions=BRATS)
    given = torch.full((1, 4), 1.0, device=device)
    found = riskmap_ext.transferability_map(source, target, given, regions=BRATS.to(device))
    assert found[0].isnan().tolist() == [False, False, True, False]


@pytest.mark.filterwarnings("ignore:LEEP score")
def test_statistics_of_a_training_set(device: torch.device) -> None:
    """Both passes, batch by batch, against the sums over all voxels at once."""
    case = Case("stream_regions", batch=6, source_regions=3, source_classes=4, classes=3)
    source, target = case.source(device), case.target(device)
    table = BRATS.to(device)
    parts = [TransferStatistics(3, regions=table) for _ in range(2)]
    for image in range(6):
        parts[image % 2].update(source[image : image + 1], target[image : image + 1])
    statistics = parts[0]
    statistics.merge(parts[1])
    joint = reference.leep_statistics(source.double(), target, 3, regions=table)
    torch.testing.assert_close(statistics.joint, joint, rtol=1e-5, atol=0)
    assert statistics.conditional.shape == (3, 4)

    statistics.update_range(source, target)
    given = reference.conditional(joint)
    truth = reference.transferability_map(source.double(), target, given, regions=table)
    valid = target != -100
    assert statistics.score == pytest.approx(truth[valid].double().mean().item(), rel=1e-5)
    low, high = statistics.hardness_range
    assert low == pytest.approx(-truth[valid].max().item(), rel=1e-5)
    assert high == pytest.approx(-truth[valid].min().item(), rel=1e-5)

    other = TransferStatistics(3, regions=table)
    other.load_state_dict(statistics.state_dict())
    assert torch.equal(other.conditional, statistics.conditional)


@pytest.mark.parametrize("function", ["map", "risk"])
def test_conditional_has_a_column_per_label(function: str) -> None:
    given = torch.full((2, 3), 0.5)  # as many as regions, but there are 4 labels
    call = {"map": riskmap_ext.transferability_map, "risk": riskmap_ext.risk_map}[function]
    with pytest.raises(ValueError, match=r"conditional: expected \[C, 4\].*\[2, 3\]"):
        call(torch.zeros(2, 3, 5), torch.zeros(2, 5, dtype=torch.int64), given, regions=BRATS)

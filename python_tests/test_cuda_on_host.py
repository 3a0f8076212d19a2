"""The CUDA kernels, run on the CPU: every op against its float64 reference, in any thread order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import cuda_on_host
import pytest
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
from test_leep import test_matches_reference as leep_matches_reference
from test_risk_map import test_matches_reference as risk_map_matches_reference
from test_source_regions import test_maps_match_reference as source_region_maps_match_reference
from test_source_regions import test_statistics_match_reference as source_regions_match_reference
from test_transferability_map import test_matches_reference as map_matches_reference
from torch import Tensor

import riskmap_ext
from riskmap_ext import _library
from riskmap_ext.ops import head_on_cuda

CPU = torch.device("cpu")
MOST_ELEMENTS = 40_000  # of logits; a fiber for every thread takes its time

Outputs = tuple[Tensor, ...]


@pytest.fixture(scope="module")
def kernels() -> None:
    if cuda_on_host.LIBRARY not in os.environ:
        pytest.skip("takes minutes to compile: make cuda-on-host builds and runs it")
    try:
        cuda_on_host.load(cuda_on_host.library())
    except cuda_on_host.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def routed(kernels: None) -> Iterator[None]:
    with cuda_on_host.in_place_of_the_cpu_kernels():
        yield


def small(cases: list[Case]) -> pytest.MarkDecorator:
    chosen = [
        case
        for case in cases
        if case.batch * max(case.classes, case.source_classes) * torch.Size(case.spatial).numel()
        <= MOST_ELEMENTS
    ]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


@pytest.mark.usefixtures("routed")
class TestAgainstTheReference:
    @small(EVERY_CASE)
    def test_leep_statistics(self, case: Case) -> None:
        leep_matches_reference(case, CPU)

    @small(EVERY_CASE)
    def test_transferability_map(self, case: Case) -> None:
        map_matches_reference(case, CPU)

    @small(RISK_CASES)
    def test_risk_map(self, case: Case) -> None:
        risk_map_matches_reference(case, CPU)

    @small(SOURCE_REGION_CASES)
    def test_source_regions(self, case: Case) -> None:
        source_regions_match_reference(case, CPU)
        source_region_maps_match_reference(case, CPU)

    @pytest.mark.parametrize("in_forward", [True, False], ids=["in_forward", "recompute"])
    @small(LOSS_CASES)
    def test_weighted_loss(self, case: Case, in_forward: bool) -> None:
        with riskmap_ext.gradient_in_forward(in_forward):
            assert_loss_matches_reference(case, CPU)

    @pytest.mark.parametrize("in_forward", [True, False], ids=["in_forward", "recompute"])
    @small(REGION_CASES)
    def test_regions(self, case: Case, in_forward: bool) -> None:
        with riskmap_ext.gradient_in_forward(in_forward):
            assert_loss_matches_reference(case, CPU)


EIGHT = (8, 8, 8)
VOLUMES = [
    Case("few_classes", batch=1, classes=4, source_classes=3, spatial=EIGHT),
    Case("many_classes", batch=1, classes=40, source_classes=70, spatial=EIGHT),
    Case("bfloat16", batch=1, classes=5, spatial=EIGHT, dtype=torch.bfloat16),
    Case("float64", batch=1, classes=3, spatial=EIGHT, dtype=torch.float64, with_weight=True),
    Case("channels_last", batch=1, classes=6, spatial=EIGHT, layout="channels_last"),
    Case(
        "many_channels_last",
        batch=2,
        classes=11,
        source_classes=20,
        spatial=(4, 6, 8),
        layout="channels_last",
    ),
    Case("many_labels", batch=2, classes=50, source_classes=8, spatial=(4, 6, 8), labels="runs"),
    Case("odd_sizes", batch=3, classes=9, source_classes=5, spatial=(3, 5, 7), empty_image=True),
    Case("regions", batch=1, classes=4, regions=3, source_regions=3, spatial=EIGHT),
]
LOSSES: dict[str, dict] = {
    "ce": {},
    "none": {"reduction": "none", "ce_voxels": "foreground"},
    "smooth": {"label_smoothing": 0.1, "normalization": "batch_foreground", "reduction": "sum"},
    "dice": {"dice_weight": 1.0},
    "batch_dice": {"dice_weight": 0.5, "batch_dice": True, "label_smoothing": 0.1},
    "squared_dice": {"dice_weight": 1.0, "squared_pred": True, "alpha": 0.3},
}
each_volume = pytest.mark.parametrize("case", VOLUMES, ids=lambda case: case.name)


def every_op(case: Case) -> dict[str, Outputs]:
    maps, source_options = case.map_call(CPU)
    leep, _ = case.leep_call(CPU)
    found: dict[str, Outputs] = {
        "leep": (riskmap_ext.leep_statistics(*leep, **source_options),),
        "transferability": (riskmap_ext.transferability_map(*maps, **source_options),),
    }
    for scheme, scope in (("exponential", None), ("linear", (0.5, 3.0)), ("power", None)):
        risk = riskmap_ext.risk_map(*maps, scheme=scheme, range=scope, **source_options)
        found[f"risk_{scheme}"] = (risk,)
    for name, options in LOSSES.items():
        for in_forward in (True, False) if "dice" not in name else (False,):
            args, kwargs = case.loss_call(CPU)
            with riskmap_ext.gradient_in_forward(in_forward):
                outputs = loss_and_gradients((args, {**kwargs, **options}), grad_output=1.5)
                in_place = overwritten((args, {**kwargs, **options}), grad_output=1.5)
            found[f"loss_{name}_{in_forward}"] = outputs
            found[f"overwritten_{name}_{in_forward}"] = in_place
    sums, finished, _ = loss_in_two_steps(case, CPU)
    found["sums"], found["finished"] = (sums,), finished
    return found


@each_volume
class TestEveryOrder:
    """These shapes are small enough for ThreadSanitizer."""

    @pytest.mark.parametrize("order", cuda_on_host.ORDERS)
    def test_gives_the_same_bits(
        self, order: str, case: Case, routed: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(cuda_on_host.ORDER, "forward")
        expected = every_op(case)
        monkeypatch.setenv(cuda_on_host.ORDER, order)
        for name, outputs in every_op(case).items():
            for found, first in zip(outputs, expected[name], strict=True):
                assert torch.equal(found, first), name


@each_volume
def test_agrees_with_the_cpu_kernels(case: Case, kernels: None) -> None:
    expected = every_op(case)
    with cuda_on_host.in_place_of_the_cpu_kernels():
        found = every_op(case)
    loose = {"rtol": 2e-5, "atol": 1e-6}
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if case.dtype == torch.float64 else loose
    if case.dtype == torch.bfloat16:  # the last bit may be rounded the other way
        tolerance = {"rtol": 2**-7, "atol": 1e-6}
    assert found.keys() == expected.keys()
    for name, outputs in found.items():
        for one, other in zip(outputs, expected[name], strict=True):
            within = loose if one.dtype == torch.float32 else tolerance
            torch.testing.assert_close(one, other, equal_nan=True, **within)


def test_every_op_has_a_cuda_kernel(kernels: None) -> None:
    assert set(cuda_on_host.operators()) | set(head_on_cuda.IMPLEMENTATIONS) == set(_library.ops())


def test_cpu_kernels_are_out_of_the_way(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def spied(name: str, operator: Any) -> SimpleNamespace:
        def run(*inputs: Any) -> Any:
            calls.append(name)
            return operator.default(*inputs)

        return SimpleNamespace(default=run)

    spies = {name: spied(name, operator) for name, operator in cuda_on_host.operators().items()}
    monkeypatch.setattr(cuda_on_host, "operators", lambda: spies)
    with cuda_on_host.in_place_of_the_cpu_kernels():
        every_op(VOLUMES[0])
    assert set(calls) == set(spies)
    calls.clear()
    every_op(VOLUMES[0])
    assert calls == []

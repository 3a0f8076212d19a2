"""The CUDA kernels, run on the CPU: every op against its float64 reference, in any thread order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import cuda_on_host
import every_op
import pytest
import torch
from cases import Case

from riskmap_ext import _library
from riskmap_ext.ops import head_on_cuda

CPU = torch.device("cpu")
MOST_ELEMENTS = 40_000  # of logits; a fiber for every thread takes its time


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


def small() -> list[Any]:
    return [
        pytest.param(check, case, id=f"{name}-{case.name}")
        for name, (check, cases) in {**every_op.OF_SOFTMAX, **every_op.OF_REGIONS}.items()
        for case in cases
        if case.batch * max(case.classes, case.source_classes) * torch.Size(case.spatial).numel()
        <= MOST_ELEMENTS
    ]


@pytest.mark.usefixtures("routed")
@pytest.mark.parametrize(("check", "case"), small())
def test_matches_reference(check: every_op.Check, case: Case) -> None:
    check(case, CPU)


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
each_volume = pytest.mark.parametrize("case", VOLUMES, ids=lambda case: case.name)


@each_volume
class TestEveryOrder:
    """These shapes are small enough for ThreadSanitizer."""

    firsts: ClassVar[dict[str, Any]] = {}  # by case, in the forward order

    @pytest.mark.parametrize("order", cuda_on_host.ORDERS)
    def test_gives_the_same_bits(
        self, order: str, case: Case, routed: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if case.name not in self.firsts:
            monkeypatch.setenv(cuda_on_host.ORDER, "forward")
            self.firsts[case.name] = every_op.results(case, CPU)
        monkeypatch.setenv(cuda_on_host.ORDER, order)
        for name, outputs in every_op.results(case, CPU).items():
            for found, first in zip(outputs, self.firsts[case.name][name], strict=True):
                assert torch.equal(found, first), name


@each_volume
def test_agrees_with_the_cpu_kernels(case: Case, kernels: None) -> None:
    expected = every_op.results(case, CPU)
    with cuda_on_host.in_place_of_the_cpu_kernels():
        found = every_op.results(case, CPU)
    loose: dict[str, Any] = {"rtol": 2e-5, "atol": 1e-6}
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
        every_op.results(VOLUMES[0], CPU)
    assert set(calls) == set(spies)
    calls.clear()
    every_op.results(VOLUMES[0], CPU)
    assert calls == []

"""What only a GPU can show: graphs, streams, reduce-overhead, not waiting, 64-bit indexing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from compare import assert_gradient_close
from torch import Tensor

import riskmap_ext

Run = Callable[[], tuple[Tensor, ...]]

pytestmark = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True
)

CASES = [
    Case("few_classes", classes=4, source_classes=5, spatial=(24, 20, 28), ignored=0.1),
    Case("many_classes", classes=40, source_classes=70, spatial=(13, 17, 9), batch=3),
    Case("bfloat16", dtype=torch.bfloat16, classes=8, source_classes=3, spatial=(32, 48)),
    Case("channels_last", layout="channels_last", classes=16, source_classes=8, spatial=(31, 33)),
]
LOSS_OPTIONS: dict[str, dict[str, Any]] = {
    "ce": {},
    "none": {"reduction": "none"},
    "dice": {"dice_weight": 1.0, "label_smoothing": 0.1},
    "batch_dice": {"dice_weight": 0.7, "batch_dice": True, "normalization": "batch_foreground"},
}
WORKS = ("leep", "transferability", "risk", "risk_range", "power", *LOSS_OPTIONS, "recompute")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_work = pytest.mark.parametrize("work", WORKS)


class Inputs:
    """Tensors of a case that stay where they are, and whose values can change."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.source, self.target, self.conditional = case.map_call(device)[0]
        self.logits, _, risk = case.loss_call(device)[0]
        self.risk = risk.nan_to_num(1.0)
        self.classes = case.classes

    def change(self) -> None:
        """Other values, as a next step of training would bring."""
        for tensor in (self.source, self.logits, self.target, self.risk):
            tensor.copy_(tensor.flip(0) if tensor.size(0) > 1 else tensor.roll(1, -1))

    def run(self, work: str) -> tuple[Tensor, ...]:
        maps = (self.source, self.target, self.conditional)
        if work == "leep":
            return (riskmap_ext.leep_statistics(self.source, self.target, self.classes),)
        if work == "transferability":
            return (riskmap_ext.transferability_map(*maps),)
        if work == "risk":
            return (riskmap_ext.risk_map(*maps),)
        if work == "risk_range":
            return (riskmap_ext.risk_map(*maps, range=(0.5, 3.0)),)
        if work == "power":
            return (riskmap_ext.risk_map(*maps, scheme="power"),)
        with riskmap_ext.gradient_in_forward(work != "recompute"):
            leaves = self.logits.detach().requires_grad_(), self.risk.detach().requires_grad_()
            options = LOSS_OPTIONS.get(work, {})
            loss = riskmap_ext.weighted_loss(leaves[0], self.target, leaves[1], **options)
            return (loss.detach(), *torch.autograd.grad(1.5 * loss.sum(), leaves))


def _assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@each_case
@each_work
def test_captured_in_a_graph(work: str, case: Case, device: torch.device) -> None:
    """A capture fails on any wait for the device; replays must follow the inputs."""
    inputs = Inputs(case, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            inputs.run(work)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = inputs.run(work)
    for _ in range(3):
        graph.replay()
        _assert_same(captured, inputs.run(work))
        inputs.change()


@each_work
def test_nothing_waits_for_the_device(work: str, device: torch.device) -> None:
    inputs = Inputs(CASES[0], device)
    expected = inputs.run(work)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = inputs.run(work)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    _assert_same(found, expected)


@each_work
def test_runs_on_the_current_stream(work: str, device: torch.device) -> None:
    """The inputs change on a side stream that is held up: who runs elsewhere sees old values."""
    inputs, changed = Inputs(CASES[0], device), Inputs(CASES[0], device)
    changed.change()
    expected = changed.run(work)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        inputs.change()
        found = inputs.run(work)
    side.synchronize()
    _assert_same(found, expected)


@each_work
def test_same_bits_again(work: str, device: torch.device) -> None:
    case = Case("large", batch=3, classes=6, source_classes=9, spatial=(96, 90, 101))
    inputs = Inputs(case, device)
    expected = inputs.run(work)
    for _ in range(4):
        _assert_same(inputs.run(work), expected)


@pytest.mark.parametrize("options", LOSS_OPTIONS.values(), ids=LOSS_OPTIONS)
def test_compiled_with_reduce_overhead(options: dict[str, Any], device: torch.device) -> None:
    def step(logits: Tensor, target: Tensor, risk: Tensor) -> Tensor:
        return (2 * riskmap_ext.weighted_loss(logits.exp(), target, risk, **options)).mean()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    inputs = Inputs(CASES[0], device)
    for _ in range(4):
        results = []
        for function in (step, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            leaf = inputs.logits.detach().clone().requires_grad_()
            loss = function(leaf, inputs.target, inputs.risk)
            loss.backward()
            results.append((loss.detach().clone(), leaf.grad.clone()))
        torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-7)
        assert_gradient_close(results[1][1], results[0][1], 1e-5)
        inputs.change()


def test_maps_compiled_with_reduce_overhead(device: torch.device) -> None:
    def maps(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        joint = riskmap_ext.leep_statistics(source, target, 4)
        given = riskmap_ext.conditional(joint)
        return joint, riskmap_ext.risk_map(source, target, given)

    torch.compiler.reset()
    compiled = torch.compile(maps, fullgraph=True, mode="reduce-overhead")
    inputs = Inputs(CASES[0], device)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(inputs.source, inputs.target)
        expected = maps(inputs.source, inputs.target)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        inputs.change()


def test_on_a_device_that_is_not_the_current_one(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first, second = (Inputs(CASES[0], torch.device("cuda", index)) for index in (0, 1))
    for work in WORKS:
        for one, other in zip(first.run(work), second.run(work), strict=True):
            assert other.device.index == 1
            assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.parametrize("classes", [2, 40])
def test_more_elements_than_32_bits_count(classes: int, device: torch.device) -> None:
    """The last voxels lie beyond element 2^31; what they give must be what they give alone."""
    voxels = (2**31 // classes // 1024 + 2) * 1024
    if torch.cuda.mem_get_info()[0] < 10 * classes * voxels:
        pytest.skip("needs about 25 GB of free memory on the GPU")
    tail = 1500
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.zeros(1, classes, voxels, dtype=torch.bfloat16, device=device)
    logits[..., -tail:].normal_(generator=generator)
    target = torch.zeros(1, voxels, dtype=torch.uint8, device=device)
    target[:, -tail:].random_(classes, generator=generator)
    alone = logits[..., -tail:].clone(), target[:, -tail:].clone()

    joint = riskmap_ext.leep_statistics(logits, target, classes)
    assert joint.sum().item() == pytest.approx(voxels, rel=1e-6)
    rest = riskmap_ext.leep_statistics(*alone, classes)
    torch.testing.assert_close(joint[1:], rest[1:], rtol=1e-6, atol=0)

    for path in (True, False):
        with riskmap_ext.gradient_in_forward(path):
            results = []
            for values, labels in ((logits, target), alone):
                leaf = values.detach().requires_grad_()
                loss = riskmap_ext.weighted_loss(leaf, labels, normalization="none")
                results.append(torch.autograd.grad(loss, leaf)[0][..., -tail:].clone())
                del leaf, loss
        assert torch.equal(*results)

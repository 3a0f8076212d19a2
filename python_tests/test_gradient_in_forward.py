"""The gradient made in the forward pass against the one made in the backward pass."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from typing import Any

import pytest
import torch
from cases import (
    BASE,
    LOSS_CASES,
    REGION_CASES,
    Case,
    in_double,
    loss_and_gradients,
    loss_leaves,
)
from compare import ROUNDING, assert_gradient_close, grad_of, relative_l2
from torch import Tensor

import riskmap_ext
from riskmap_ext import gradient_in_forward, reference

pytestmark = pytest.mark.ops

CPU = torch.device("cpu")
FORWARD_CASES = [
    case
    for case in (*LOSS_CASES, *REGION_CASES)
    if not case.loss_options.get("dice_weight")
    and case.loss_options.get("reduction") != "none"
    and not (case.with_weight and case.loss_options.get("normalization") == "weighted")
]


def _made_in_forward(loss: Tensor) -> bool:
    return "GradientInForward" in type(loss.grad_fn).__name__


def _both_paths(call: Any, *arguments: Any) -> tuple[Any, Any]:
    with gradient_in_forward(True):
        one = loss_and_gradients(call, *arguments)
    with gradient_in_forward(False):
        other = loss_and_gradients(call, *arguments)
    return one, other


@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda case: case.name)
def test_both_paths_agree(case: Case, device: torch.device) -> None:
    call = case.loss_call(device)
    found, expected = _both_paths(call)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            assert one.stride() == other.stride()
            assert torch.equal(one, other)

    # An incoming gradient is multiplied in after the gradient was rounded, not before.
    for factor in (-1.75, 65536.0):
        found, expected = _both_paths(call, None, factor)
        assert torch.equal(found[0], expected[0])
        for one, other in zip(found[1:], expected[1:], strict=True):
            if one is not None:
                limit = 1e-6 + 2 * ROUNDING.get(one.dtype, 0.0)
                assert relative_l2(one, other) <= limit


@pytest.mark.parametrize("case", FORWARD_CASES, ids=lambda case: case.name)
def test_without_a_gradient_for_the_risk(case: Case, device: torch.device) -> None:
    (logits, target, risk), kwargs = case.loss_call(device)
    expected = loss_and_gradients(((logits, target, risk), kwargs))
    logits.requires_grad_()
    loss = riskmap_ext.weighted_loss(logits, target, risk, **kwargs)
    assert _made_in_forward(loss) == (case.dtype != torch.float16)
    loss.backward()
    assert torch.equal(loss, expected[0])
    assert_gradient_close(logits.grad, expected[1])
    assert risk is None or risk.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_only_the_risk_wants_a_gradient(dtype: torch.dtype, device: torch.device) -> None:
    case = Case("risk_only", dtype=dtype, risk_dtype=torch.float64)
    logits, target, risk = loss_leaves(case, device)
    logits.requires_grad_(False)
    loss = riskmap_ext.weighted_loss(logits, target, risk)
    assert not _made_in_forward(loss)
    loss.backward()
    (truth_logits, _, truth_risk), _ = in_double(((logits, target, risk), {}))
    expected = loss_and_gradients(((truth_logits, target, truth_risk), {}), reference.weighted_loss)
    assert_gradient_close(risk.grad, expected[2], 1e-6)
    assert logits.grad is None


@pytest.mark.parametrize("asked", ["logits", "risk"])
def test_one_gradient_after_the_other(asked: str) -> None:
    """Both require grad, one is asked for, then the other."""
    _, *expected = loss_and_gradients(((*(t.detach() for t in loss_leaves(BASE, CPU)),), {}))
    logits, target, risk = loss_leaves(BASE, CPU)
    loss = riskmap_ext.weighted_loss(logits, target, risk)
    inputs = (logits, risk) if asked == "logits" else (risk, logits)
    (first,) = torch.autograd.grad(loss, inputs[0], retain_graph=True)
    (second,) = torch.autograd.grad(loss, inputs[1])
    found = (first, second) if asked == "logits" else (second, first)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_when_it_applies() -> None:
    logits, target, risk = loss_leaves(BASE, CPU)
    double = logits.detach().double().requires_grad_()
    half = logits.detach().half().requires_grad_()
    half_risk = risk.detach().half()
    assert _made_in_forward(riskmap_ext.weighted_loss(logits, target, risk))
    assert _made_in_forward(riskmap_ext.weighted_loss(double, target, reduction="sum"))
    assert _made_in_forward(riskmap_ext.weighted_loss(logits.bfloat16(), target))
    assert _made_in_forward(riskmap_ext.weighted_loss(logits, target, half_risk))
    table = torch.ones(3, 5, dtype=torch.bool)
    assert _made_in_forward(riskmap_ext.weighted_loss(logits, target, regions=table))

    others = [
        riskmap_ext.weighted_loss(half, target),
        riskmap_ext.weighted_loss(logits, target, half_risk.requires_grad_()),
        riskmap_ext.weighted_loss(logits, target, dice_weight=1.0),
        riskmap_ext.weighted_loss(logits, target, reduction="none"),
        riskmap_ext.weighted_loss(logits.detach(), target, risk),
    ]
    with gradient_in_forward(False):
        others.append(riskmap_ext.weighted_loss(logits, target))
    assert not any(map(_made_in_forward, others))
    assert all(loss.requires_grad for loss in others)
    with torch.no_grad():
        assert not riskmap_ext.weighted_loss(logits, target, risk).requires_grad


@pytest.mark.parametrize("which", ["logits", "risk"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_survive_a_grad_scaler(dtype: torch.dtype, which: str) -> None:
    """Gradients of 4e-9 are 0 in float16, the same times 65536 are not."""
    case = Case("scaler", spatial=(30, 31), magnitude=1.0, ignored=0.0)
    (logits, target, risk), _ = case.loss_call(CPU)
    if which == "logits":
        logits, risk = logits.to(dtype), None
    else:
        risk = risk.to(dtype)
    call = (logits, target, risk), {"normalization": "none", "ce_weight": 4e-9}
    index = {"logits": 1, "risk": 2}[which]
    unscaled = loss_and_gradients(call)[index]
    if dtype == torch.float16:
        assert torch.count_nonzero(unscaled) == 0
    found = loss_and_gradients(call, None, 65536.0)[index]
    expected = loss_and_gradients(in_double(call), reference.weighted_loss, 65536.0)[index]
    assert found.dtype == dtype
    assert relative_l2(found, expected) <= 2 * ROUNDING[dtype]


@pytest.mark.parametrize("layout", ["contiguous", "shifted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradients_are_scaled_in_place(
    dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    """Wherever they begin: the op may be given what is no gradient of ours."""
    gradient = Case("scaled", dtype=dtype, layout=layout).logits(device)
    for factor in (1.0, -2.5, 0.0):
        expected = gradient * factor
        torch.ops.riskmap_ext._scale_gradient_(gradient, torch.tensor(factor, device=device))
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("factor", [-3.0, 0.5, 0.0, 1e-30, 1e30])
def test_incoming_gradients(factor: float, device: torch.device) -> None:
    found, expected = _both_paths(BASE.loss_call(device), None, factor)
    for one, other in zip(found, expected, strict=True):
        assert relative_l2(one, other) <= 1e-6
    if factor == 0:
        assert torch.count_nonzero(found[1]) == torch.count_nonzero(found[2]) == 0


@pytest.mark.parametrize("path", [True, False])
def test_incoming_zero_hides_even_an_infinite_gradient(path: bool) -> None:
    logits, target, risk = loss_leaves(BASE, CPU)
    with torch.no_grad():
        target[0, 3, 4] = 1
        logits[0, 0, 3, 4] = math.nan
    with gradient_in_forward(path):
        loss = riskmap_ext.weighted_loss(logits, target, risk)
    assert loss.isnan()
    loss.backward(torch.tensor(0.0))
    assert torch.count_nonzero(grad_of(logits)) == torch.count_nonzero(grad_of(risk)) == 0


@pytest.mark.parametrize("path", [True, False])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_incoming_nan_or_infinity_is_seen(factor: float, path: bool) -> None:
    with gradient_in_forward(path):
        _, gradient, grad_risk = loss_and_gradients(BASE.loss_call(CPU), None, factor)
    assert not gradient.isfinite().all()
    assert not grad_risk.isfinite().all()


@pytest.mark.parametrize("factor", [1.0, -0.25])
def test_graph_may_be_kept(factor: float, device: torch.device) -> None:
    """Whoever got the first gradient may do with it as he likes."""
    logits, target, risk = loss_leaves(BASE, device)
    loss = riskmap_ext.weighted_loss(logits, target, risk) * factor
    expected = [g.clone() for g in torch.autograd.grad(loss, (logits, risk), retain_graph=True)]
    for _ in range(3):
        found = torch.autograd.grad(loss, (logits, risk), retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
            one.fill_(math.nan)
    loss.backward()
    torch.testing.assert_close(logits.grad, expected[0], rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_add_up_in_the_leaf() -> None:
    """Two losses of the same logits, the second one scaled."""
    logits, target, risk = loss_leaves(BASE, CPU)
    _, expected, expected_risk = loss_and_gradients(((logits, target, risk), {}))
    first = riskmap_ext.weighted_loss(logits, target, risk)
    second = riskmap_ext.weighted_loss(logits, target, risk)
    (first + 2 * second).backward()
    torch.testing.assert_close(logits.grad, 3 * expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(risk.grad, 3 * expected_risk, rtol=1e-6, atol=1e-9)
    first = riskmap_ext.weighted_loss(logits, target, risk)
    first.backward()
    torch.testing.assert_close(logits.grad, 4 * expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("path", [True, False])
def test_second_derivatives_are_refused(path: bool) -> None:
    logits, target, risk = loss_leaves(BASE, CPU)
    with gradient_in_forward(path):
        loss = riskmap_ext.weighted_loss(logits, target, risk)
    first = torch.autograd.grad(loss, (logits, risk), create_graph=True)
    expected = loss_and_gradients(((logits, target, risk), {}))[1:]
    for one, other in zip(first, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    for one in first:
        with pytest.raises(RuntimeError, match=r"second derivative.*reference"):
            one.sum().backward(retain_graph=True)


def test_nothing_keeps_the_gradient_alive() -> None:
    """A loss that is dropped without a backward pass frees everything at once, without gc."""
    logits, target, _ = loss_leaves(BASE, CPU)
    gc.collect()
    gc.disable()
    try:
        scaled = logits * 2
        alive = weakref.ref(scaled)
        loss = riskmap_ext.weighted_loss(scaled, target)
        node = weakref.ref(loss.grad_fn)
        assert _made_in_forward(loss)
        del scaled, loss
        assert alive() is None
        assert node() is None
    finally:
        gc.enable()


# ---- the switch ----------------------------------------------------------------------------------


def _is_on() -> bool:
    logits, target, _ = loss_leaves(BASE, CPU)
    return _made_in_forward(riskmap_ext.weighted_loss(logits, target))


def test_switch_nests_and_survives_errors() -> None:
    assert _is_on()
    with gradient_in_forward(False):
        assert not _is_on()
        with gradient_in_forward(True):
            assert _is_on()
            with gradient_in_forward(False):
                assert not _is_on()
            assert _is_on()
        assert not _is_on()
        with pytest.raises(KeyError), gradient_in_forward(True):
            raise KeyError("anything")
        assert not _is_on()
    assert _is_on()


def test_switch_of_the_forward_pass_decides() -> None:
    logits, target, _ = loss_leaves(BASE, CPU)
    with gradient_in_forward(False):
        outside = riskmap_ext.weighted_loss(logits, target)
    inside = riskmap_ext.weighted_loss(logits, target)
    (one,) = torch.autograd.grad(outside, logits)
    with gradient_in_forward(False):
        (other,) = torch.autograd.grad(inside, logits)
    assert torch.equal(one, other)


def test_switch_as_a_decorator() -> None:
    assert not gradient_in_forward(False)(_is_on)()
    assert _is_on()


@pytest.mark.parametrize("value", [None, "no", 0, 1.0])
def test_switch_takes_true_or_false(value: Any) -> None:
    with pytest.raises(TypeError, match="enabled: expected True or False"):
        gradient_in_forward(value).__enter__()
    assert _is_on()


def test_switch_belongs_to_its_thread() -> None:
    """As torch.no_grad does; threads that leave in another order do not mix their states up."""
    seen: dict[str, bool] = {}
    inside, outside = threading.Event(), threading.Event()

    def other() -> None:
        seen["started"] = _is_on()
        with gradient_in_forward(False):
            inside.set()
            outside.wait(30)
            seen["inside"] = _is_on()
        seen["after"] = _is_on()

    thread = threading.Thread(target=other)
    with gradient_in_forward(False):
        thread.start()
        assert inside.wait(30)
    assert _is_on()
    outside.set()
    thread.join(30)
    assert seen == {"started": True, "inside": False, "after": True}
    assert _is_on()


def test_threads_at_once() -> None:
    cases = [Case(f"thread_{i}", spatial=(20 + i, 31), batch=3) for i in range(6)]
    expected = [loss_and_gradients(case.loss_call(CPU)) for case in cases]
    found: dict[int, list[Any]] = {i: [] for i in range(len(cases))}

    def work(index: int) -> None:
        for turn in range(5):
            with gradient_in_forward(bool((index + turn) % 2)):
                found[index].append(loss_and_gradients(cases[index].loss_call(CPU)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, results in found.items():
        assert len(results) == 5
        for result in results:
            for one, other in zip(result, expected[index], strict=True):
                assert torch.equal(one, other)


def test_compiled_code_takes_the_operator() -> None:
    (logits, target, risk), _ = BASE.loss_call(CPU)

    def step(logits: Tensor, target: Tensor, risk: Tensor) -> Tensor:
        with gradient_in_forward(True):
            return riskmap_ext.weighted_loss(logits, target, risk)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = compiled(logits.detach().requires_grad_(), target, risk)
    assert not _made_in_forward(loss)
    found = loss_and_gradients(((logits, target, risk), {}), compiled)
    expected = loss_and_gradients(((logits, target, risk), {}))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    assert _is_on()


@pytest.mark.usefixtures("cpu_kernels")
def test_errors_of_the_values_come_on_both_paths(device: torch.device) -> None:
    for path in (True, False):
        for bad in (-1.0, math.nan, math.inf):
            logits, target, risk = loss_leaves(BASE, device)
            with torch.no_grad():
                target[0, 1, 2], risk[0, 1, 2] = 1, bad
            with gradient_in_forward(path), pytest.raises(ValueError, match=r"risk.*1 valid voxel"):
                riskmap_ext.weighted_loss(logits, target, risk)
        target[0, 1, 2] = 3
        with gradient_in_forward(path), pytest.raises(ValueError, match=r"target.*0 to 2"):
            riskmap_ext.weighted_loss(logits, target)


@pytest.mark.parametrize("voxels", [(64, 64, 272), (65, 67, 271)])
@pytest.mark.parametrize("classes", [4, 12])
def test_gradient_beyond_the_caches(
    classes: int, voxels: tuple[int, ...], device: torch.device
) -> None:
    """Large enough for stores that bypass the caches, with rows aligned and not."""
    spatial = voxels if classes == 4 else (*voxels[:2], 96)
    case = Case("beyond_caches", batch=1, classes=classes, spatial=spatial)
    call = case.loss_call(device)
    assert call[0][0].numel() * 4 > 16 << 20
    found, other = _both_paths(call, None, 1.0)
    expected = loss_and_gradients(in_double(call), reference.weighted_loss)
    for one, two, truth in zip(found, other, expected, strict=True):
        assert torch.equal(one, two)
        assert relative_l2(one, truth) <= 1e-6

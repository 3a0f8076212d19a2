"""Comparisons with a float64 truth."""

from __future__ import annotations

import torch
from cases import Case, in_double, loss_and_gradients
from torch import Tensor

import riskmap_ext
from riskmap_ext import reference

# Half a unit in the last place, relative: the least a result rounded to the dtype can differ by.
# A relative L2 distance of rounded values stays below it.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; 0 where both are all zero, infinite where one is."""
    found, expected = found.detach().double(), expected.detach().double()
    difference, size = (found - expected).norm().item(), expected.norm().item()
    if difference == 0:
        return 0.0
    return difference / size if size > 0 else float("inf")


def assert_relative_l2(found: Tensor, expected: Tensor, limit: float) -> None:
    """Says by how much, outside pytest too."""
    error = relative_l2(found, expected)
    assert error <= limit, f"relative L2 error {error:.1e}, allowed {limit:.1e}"


def grad_of(tensor: Tensor) -> Tensor:
    """After a backward pass that has reached it."""
    assert tensor.grad is not None
    return tensor.grad


def cosine(found: Tensor, expected: Tensor) -> float:
    """The cosine of the angle between two gradients; 1 where both are all zero."""
    found, expected = found.detach().double().flatten(), expected.detach().double().flatten()
    norms = (found.norm() * expected.norm()).item()
    if norms == 0:
        return 1.0 if torch.equal(found, expected) else 0.0
    return (found @ expected).item() / norms


def assert_map_close(found: Tensor, expected: Tensor, rtol: float, atol: float = 0.0) -> None:
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True
    )


def assert_gradient_close(
    found: Tensor | None, expected: Tensor | None, tolerance: float | None = None
) -> None:
    """Elementwise, by relative L2 and by direction; looser only by the rounding of the dtype."""
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    assert found.shape == expected.shape
    exact = {torch.float64: 1e-12}.get(found.dtype, 1e-6)
    limit = (tolerance or exact) + ROUNDING.get(found.dtype, 0.0)
    assert_relative_l2(found, expected, limit)
    assert cosine(found, expected) >= 1 - 1e-6 - limit**2
    # Small differences of large terms (softmax - 1 at a confident voxel) carry the rounding of
    # the terms, which the largest entry bounds.
    largest = expected.abs().max().item() if expected.numel() else 0.0
    assert_map_close(found, expected, rtol=10 * limit, atol=limit * largest)


def assert_loss_matches_reference(case: Case, device: torch.device) -> None:
    """weighted_loss and its gradients against those of the float64 reference."""
    call = case.loss_call(device)
    # As a gradient scaler does: float16 gradients of a mean over voxels would fall below the
    # smallest normal number, and their rounding is then no measure of the operator.
    grad_output = 512.0 if case.dtype == torch.float16 else 0.75
    found = loss_and_gradients(call, riskmap_ext.weighted_loss, grad_output)
    expected = loss_and_gradients(in_double(call), reference.weighted_loss, grad_output)

    result = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert found[0].dtype == result
    assert found[0].shape == expected[0].shape
    assert found[0].device.type == device.type
    assert found[1].dtype == case.dtype
    rtol = 1e-12 if case.dtype == torch.float64 else 1e-5
    # A voxel of the map may be a small -log(softmax) = log(1 + tiny), right to 1e-6 absolute.
    atol = 1e-5 if found[0].dim() else 1e-7
    assert_map_close(found[0], expected[0], rtol=rtol, atol=atol)
    assert_gradient_close(found[1], expected[1])
    # Even for a float64 risk the gradient is computed as the logits are, in float32.
    assert_gradient_close(found[2], expected[2], None if case.dtype == torch.float64 else 1e-6)
    if found[2] is None:
        return
    # As in training: the CUDA kernels that make no gradient of the risk are others.
    (logits, target, risk), kwargs = call
    logits = logits.detach().requires_grad_()
    loss = riskmap_ext.weighted_loss(logits, target, risk, **kwargs)
    loss.backward(torch.full_like(loss, grad_output))
    assert torch.equal(loss, found[0])
    assert_gradient_close(logits.grad, expected[1])

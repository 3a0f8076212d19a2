"""Comparisons with a float64 truth."""

from __future__ import annotations

import torch
from torch import Tensor

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
    assert relative_l2(found, expected) <= limit
    assert cosine(found, expected) >= 1 - 1e-6 - limit**2
    # Small differences of large terms (softmax - 1 at a confident voxel) carry the rounding of
    # the terms, which the largest entry bounds.
    largest = expected.abs().max().item() if expected.numel() else 0.0
    assert_map_close(found, expected, rtol=10 * limit, atol=limit * largest)

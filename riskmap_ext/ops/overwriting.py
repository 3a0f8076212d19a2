"""A gradient in the memory of the logits (``overwrite_logits``): when it is possible, and errors
for later use of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from riskmap_ext._loss_arguments import LossOptions
from riskmap_ext.ops.tracing import is_batched, is_traced

_NAME = "overwrite_logits"


def applies(logits: Tensor, options: LossOptions) -> bool:
    """Raises: ValueError if the gradient cannot use this memory."""
    if (
        not options.overwrite_logits
        or torch.compiler.is_compiling()  # inductor plans the memory
        or not logits.requires_grad
        or not torch.is_grad_enabled()
        or is_traced(logits)
    ):
        return False
    base = logits._base
    if logits.is_leaf or (base is not None and base.is_leaf):
        raise ValueError(
            f"{_NAME}: expected logits that an operation has made, such as a network's output, got "
            "a leaf of the graph, whose values are kept"
        )
    if base is not None and base.numel() != logits.numel():
        raise ValueError(
            f"{_NAME}: expected logits with memory of their own, got a part {list(logits.shape)} "
            f"of a tensor {list(base.shape)}; give the loss a copy, logits.clone()"
        )
    if not _is_dense(logits):
        raise ValueError(
            f"{_NAME}: expected logits without gaps or overlaps in memory, got shape "
            f"{list(logits.shape)} with strides {list(logits.stride())}"
        )
    return True


def _is_dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def require_only_backward(done: bool, grad_loss: Tensor) -> None:
    """Raises: RuntimeError unless this is the only possible backward pass."""
    again = "a second backward pass" if done else None
    if torch.is_grad_enabled():
        again = "create_graph=True"
    elif is_batched(grad_loss):
        again = "more than one incoming gradient"
    if again is not None:
        raise RuntimeError(
            f"riskmap_ext.weighted_loss: {again} needs the logits, whose memory the gradient has "
            f"taken ({_NAME}=True)"
        )


def require_unchanged(gradient: Tensor, version: int) -> None:
    """Raises: RuntimeError if the memory of the logits was written to since the forward pass."""
    if gradient._version != version:
        raise RuntimeError(
            "riskmap_ext.weighted_loss: its logits were modified by an inplace operation after "
            f"their gradient had taken their memory ({_NAME}=True)"
        )


def mark_lost(logits: Tensor) -> None:
    """Makes later uses of the logits an error: a saved tensor for a backward pass, or in the graph
    from here on."""
    _Lost.apply(logits)


class _Lost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        raise RuntimeError(
            "riskmap_ext.weighted_loss: its logits were used again after their gradient had taken "
            f"their memory ({_NAME}=True); use them before the loss is computed"
        )

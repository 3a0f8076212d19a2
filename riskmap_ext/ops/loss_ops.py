"""Shared code of the weighted loss's ops: of logits, and of features with a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from riskmap_ext._arguments import compute_dtype
from riskmap_ext._loss_arguments import REDUCTIONS

Gradients = Sequence[Tensor | None]


class LossOps(NamedTuple):
    """The op ``name`` and its private companions.

    ``tensors``: how many inputs are tensors, without the class weights of the Dice, which follow.
    ``differentiable``: the inputs with a gradient, in the order of the ops that compute it.
    ``asked``: for each flag of those ops, the inputs of which at least one needs its gradient.
    """

    name: str
    tensors: int
    differentiable: tuple[int, ...]
    asked: tuple[tuple[int, ...], ...]

    @property
    def risk(self) -> int:
        """The input that is the risk; the class weights follow."""
        return self.differentiable[-1]

    def classes(self, tensors: Sequence[Any]) -> int:
        return tensors[1].size(0) if self is OF_HEAD else tensors[0].size(1)

    def call(self, part: str, *inputs: Any) -> Any:
        """``part``: "" for the public op, or the suffix of a private one."""
        name = f"_{self.name}{part}" if part else self.name
        return getattr(torch.ops.riskmap_ext, name)(*inputs)

    def flags(self, wanted: Sequence[bool]) -> list[bool]:
        return [any(wanted[i] for i in inputs) for inputs in self.asked]

    def of_inputs(self, gradients: Gradients, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """The gradients, each where autograd expects that of its input."""
        result: list[Tensor | None] = [None] * len(wanted)
        for i, gradient in zip(self.differentiable, gradients, strict=True):
            result[i] = gradient if wanted[i] else None
        return tuple(result)


OF_LOGITS = LossOps("weighted_loss", 6, (0, 2), ((2,),))
OF_HEAD = LossOps("linear_weighted_loss", 8, (0, 1, 2, 4), ((0,), (1, 2), (4,)))

NONE = REDUCTIONS.index("none")
IMAGE_COLUMNS = 5  # of an image's sums, before those of the classes: see _weighted_loss_sums


def require_reverse_mode(ops: LossOps, *tensors: Tensor | None) -> None:
    """Torch silently drops the tangents of a custom op, and torch.func does not name the op."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is None:
            continue
        of_torch_func = torch._C._functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad
        if of_torch_func or unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"riskmap_ext.{ops.name} is differentiated by backward() and torch.autograd.grad "
                "only, not by forward-mode derivatives or torch.func (grad, vjp, jvp, ...). Use "
                f"riskmap_ext.reference.{ops.name} for those."
            )


def register_autograd(ops: LossOps) -> None:
    """The gradient in the backward pass, from scale and slopes of the forward pass."""
    first = ops.tensors + 1  # option

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # ignore_index, background, ce_voxels, label_smoothing, squared_pred
        ctx.options = tuple(inputs[first + i] for i in (0, 1, 4, 6, 13))
        _, scale, dice_slopes = output
        ctx.mark_non_differentiable(scale, dice_slopes)
        ctx.set_materialize_grads(False)  # zeros for outputs without a gradient cost memory
        ctx.save_for_backward(*inputs[: ops.tensors], scale, dice_slopes)

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Gradients:
        wanted = ctx.needs_input_grad
        if grad_loss is None:
            return (None,) * len(wanted)
        saved = ctx.saved_tensors  # read once: checkpointing recomputes at every access
        flags = ops.flags(wanted)
        gradients = ops.call("_backward", grad_loss, *saved, *ctx.options, *flags)
        return ops.of_inputs(gradients, wanted)

    def no_second_derivative(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"riskmap_ext.{ops.name} has no second derivative: its backward pass cannot be "
            "differentiated (create_graph=True with a later backward, gradient penalties). Use "
            f"riskmap_ext.reference.{ops.name} for that."
        )

    torch.library.register_autograd(
        f"riskmap_ext::{ops.name}", backward, setup_context=setup_context
    )
    torch.library.register_autograd(f"riskmap_ext::_{ops.name}_backward", no_second_derivative)


def fake_loss(
    volume: Tensor, classes: int, reduction: int, dice_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, scale and slopes; ``volume``: logits or features."""
    batch = volume.size(0)
    shape = (batch, *volume.shape[2:]) if reduction == NONE else ()
    slopes = (batch, 2, classes) if dice_weight != 0 else (0,)
    return (
        volume.new_empty(shape, dtype=compute_dtype(volume.dtype)),
        volume.new_empty((batch,), dtype=torch.float64),
        volume.new_empty(slopes, dtype=torch.float64),
    )


def fake_grad_risk(volume: Tensor, risk: Tensor | None, wanted: bool) -> Tensor:
    if risk is None or not wanted:
        return volume.new_empty((0,), dtype=torch.float32)
    return volume.new_empty((volume.size(0), *volume.shape[2:]), dtype=risk.dtype)

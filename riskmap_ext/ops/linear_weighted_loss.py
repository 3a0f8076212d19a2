"""The weighted loss from features: a 1x1 convolution and the loss, fused, without logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from riskmap_ext._arguments import compute_dtype
from riskmap_ext._loss_arguments import (
    head_tensors,
    loss_tensors,
    shape_of_logits,
)
from riskmap_ext.ops import (
    head_on_cuda,  # noqa: F401
    in_backward,
    in_forward,
    synced_dice,
)
from riskmap_ext.ops.loss_ops import (
    OF_HEAD,
    fake_grad_risk,
    fake_loss,
    register_autograd,
    require_reverse_mode,
)


def linear_weighted_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    risk: Tensor | None = None,
    *,
    class_weight: Tensor | Sequence[float] | None = None,
    dice_class_weight: Tensor | Sequence[float] | None = None,
    foreground: Tensor | None = None,
    regions: Tensor | None = None,
    **options: Any,
) -> Tensor:
    r"""The weighted loss of a segmentation head, a 1x1 convolution, from its features.

    .. math:: x_p[c] = b[c] + \sum_f W[c, f]\, z_p[f], \qquad
              \mathrm{loss} = \mathrm{weighted\_loss}(x, \ldots)

    for the features z of every voxel p. The logits x, [B, C, \*S], and their gradient are never
    stored: voxels are processed in tiles that stay in a cache, on a GPU in chunks of logits that
    stay in its second-level cache. With a hundred classes these two tensors would be most of a
    training step's memory. Cross-entropy computes logits and gradients in one pass where
    :func:`riskmap_ext.gradient_in_forward` applies; with Dice the logits are computed twice.

    Args:
        features: z, [B, F, \*S] with 1 to 3 spatial dimensions, the input of the network's last
            convolution; float32, float64, float16 or bfloat16; contiguous and channels-last memory
            is read in place.
        weight: W, [C, F], or [C, F, 1, 1, 1] as in a convolution. Autocast casts features, weight
            and bias to its dtype; without it they must have the same dtype. Products are summed,
            and the softmax taken, in float32 or better.
        bias: b, [C], or None.
        target, risk: as in :func:`riskmap_ext.weighted_loss`.
        class_weight: the class weights that :func:`riskmap_ext.weighted_loss` calls ``weight``.
        dice_class_weight, foreground, regions, options: as in :func:`riskmap_ext.weighted_loss`,
            which defines formula and normalisers. ``overwrite_logits`` has no effect, since there
            are no logits.

    As with a convolution, a NaN or infinite feature makes the gradient of its column of the
    weight NaN, even at an ignored voxel; ignored voxels affect nothing else.

    Returns:
        A scalar, or the map for reduction="none"; float32 (float64 for float64 features).
        Differentiable once with respect to ``features``, ``weight``, ``bias`` and ``risk``;
        bitwise the same from run to run and, on a CPU, for any number of threads.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`riskmap_ext.weighted_loss`.
    """
    head = head_tensors(features, weight, bias)
    beside = loss_tensors(
        shape_of_logits(head), target, risk, class_weight, foreground, regions, dice_class_weight,
        class_weight_name="class_weight",
    )  # fmt: skip
    checked = beside.options(**options)
    tensors = (*head, *beside[1:])
    require_reverse_mode(OF_HEAD, *head, tensors[OF_HEAD.risk])
    if in_forward.applies(OF_HEAD, tensors[:-1], checked):
        return in_forward.loss(OF_HEAD, tensors[:-1], checked)
    if synced_dice.applies(checked):
        return in_backward.loss(OF_HEAD, tensors, checked)
    return OF_HEAD.call("", *tensors, *checked.of_cross_entropy, *checked.of_dice)[0]


@torch.library.register_fake("riskmap_ext::linear_weighted_loss")
def _fake(features: Tensor, weight: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduction, dice_weight = inputs[12], inputs[15]
    return fake_loss(features, weight.size(0), reduction, dice_weight)


register_autograd(OF_HEAD)


@torch.library.register_fake("riskmap_ext::_linear_weighted_loss_backward")
def _backward_fake(grad_loss: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(*inputs)


@torch.library.register_fake("riskmap_ext::_linear_weighted_loss_with_gradient")
def _with_gradient_fake(features: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    loss = features.new_empty((), dtype=compute_dtype(features.dtype))
    return (loss, *_fake_gradients(features, *inputs))


def _fake_gradients(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    risk: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    grad_features, grad_parameters, grad_risk = options[-3:]
    nothing = features.new_empty((0,), dtype=torch.float32)
    with_bias = bias is not None and grad_parameters
    return (
        torch.empty_like(features) if grad_features else nothing,
        weight.new_empty(weight.shape) if grad_parameters else torch.empty_like(nothing),
        bias.new_empty(bias.shape) if with_bias else torch.empty_like(nothing),  # type: ignore[union-attr]
        fake_grad_risk(features, risk, grad_risk),
    )

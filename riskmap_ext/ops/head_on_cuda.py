"""linear_weighted_loss on CUDA, in chunks of voxels whose logits stay in the second-level cache.

The matrix products are torch's (cuBLAS), everything between them is our kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from riskmap_ext._arguments import compute_dtype
from riskmap_ext._library import no_cuda_reason
from riskmap_ext._loss_arguments import NORMALIZATIONS, REDUCTIONS
from riskmap_ext.ops.loss_ops import IMAGE_COLUMNS, NONE

CHUNK_BYTES = 24 << 20  # of logits: half of an H100's second-level cache
_TILE = 1024  # voxels: chunks begin where the kernels can read whole tiles
_CE, _VALID, _FOREGROUND, _BAD_LABELS = range(4)  # columns of the sums, see _weighted_loss_sums
_NOT_NORMALIZED = NORMALIZATIONS.index("none")
_SUM = REDUCTIONS.index("sum")
_NO_DICE = (0.0, 0.0, 0.0, 0.5, 0.5)


class _Chunk(NamedTuple):
    image: int
    voxels: slice
    logits: Tensor  # [1, C, n], then their gradient, then the next chunk's


class Head:
    """A head whose logits are computed in chunks."""

    def __init__(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.features, self.weight, self.bias = features, weight, bias
        self.flat = features.flatten(2)  # a copy where the voxels have no common stride
        self.batch, _, self.voxels = self.flat.shape
        self.classes = weight.size(0)

    def chunks(self, limit: int | None = None) -> Iterator[_Chunk]:
        """Depend on the shapes alone. limit: bytes of logits; None: CHUNK_BYTES."""
        limit = CHUNK_BYTES if limit is None else limit
        row = self.classes * self.features.element_size()
        step = max(limit // row // _TILE, 1) * _TILE
        buffer = self.features.new_empty(self.classes * min(step, self.voxels))
        for image in range(self.batch):
            for begin in range(0, self.voxels, step):
                voxels = slice(begin, min(begin + step, self.voxels))
                n = voxels.stop - begin
                logits = buffer[: self.classes * n].view(self.classes, n)
                features = self.flat[image, :, voxels]
                if self.bias is None:
                    torch.mm(self.weight, features, out=logits)
                else:
                    torch.addmm(self.bias.unsqueeze(1), self.weight, features, out=logits)
                yield _Chunk(image, voxels, logits.unsqueeze(0))


def _of_chunk(voxel_map: Tensor | None, chunk: _Chunk) -> Tensor | None:
    """Of a map [B, *S] the part [1, n]."""
    if voxel_map is None:
        return None
    return voxel_map[chunk.image].reshape(-1)[chunk.voxels].unsqueeze(0)


def _tensors(chunk: _Chunk, maps: Sequence[Any]) -> tuple[Any, ...]:
    """What the ops of logits take first; ``maps``: target, risk, class weights, foreground and
    regions of the batch."""
    target, risk, class_weight, foreground, regions = maps
    voxel_maps = [_of_chunk(each, chunk) for each in (target, risk, foreground)]
    return chunk.logits, *voxel_maps[:2], class_weight, voxel_maps[2], regions


class _Gradients:
    """Gradients of a head and of the risk, chunk by chunk; those not requested have shape [0]."""

    def __init__(self, head: Head, risk: Tensor | None, wanted: tuple[bool, bool, bool]) -> None:
        self.head = head
        self.of_features, self.of_parameters, of_risk = wanted
        self.features = torch.empty_like(head.flat) if self.of_features else None
        shape = (head.batch, head.classes, head.weight.size(1) + 1)
        dtype = compute_dtype(head.weight.dtype)
        # Of each image, the bias behind the weight.
        self.parameters = head.weight.new_zeros(shape if self.of_parameters else (0,), dtype=dtype)
        self.risk = None
        if of_risk and risk is not None:
            self.risk = risk.new_empty((head.batch, head.voxels))

    def add(self, chunk: _Chunk, grad_risk: Tensor) -> None:
        """The chunk's logits hold their gradient."""
        grad = chunk.logits[0]
        if self.features is not None:
            out = self.features[chunk.image, :, chunk.voxels]
            torch.mm(self.head.weight.t(), grad, out=out)
        if self.of_parameters:
            features = self.head.flat[chunk.image, :, chunk.voxels]
            total = self.parameters[chunk.image]
            total[:, :-1] += torch.mm(grad, features.t())
            total[:, -1] += grad.sum(dim=1, dtype=total.dtype)
        if self.risk is not None:
            self.risk[chunk.image, chunk.voxels] = grad_risk[0]

    def scale(self, scale: Tensor) -> None:
        """By a factor for each image."""
        for each in (self.features, self.parameters, self.risk):
            if each is not None and each.numel() > 0:
                each *= scale.to(compute_dtype(each.dtype)).view(-1, *(1,) * (each.dim() - 1))

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of features, weight, bias and risk."""
        features, weight, bias = self.head.features, self.head.weight, self.head.bias
        of_features = of_weight = of_bias = of_risk = None
        if self.features is not None:
            of_features = self.features.unflatten(2, features.shape[2:])
            if of_features.stride() != torch.empty_like(features, device="meta").stride():
                of_features = torch.empty_like(features).copy_(of_features)
        if self.of_parameters:
            total = self.parameters.sum(dim=0)
            of_weight = total[:, :-1].to(weight.dtype).contiguous()
            of_bias = None if bias is None else total[:, -1].to(bias.dtype).contiguous()
        if self.risk is not None:
            of_risk = self.risk.unflatten(1, features.shape[2:])
        results = (of_features, of_weight, of_bias, of_risk)
        nothing = [features.new_empty(0, dtype=torch.float32) for _ in results]
        found = [b if a is None else a for a, b in zip(results, nothing, strict=True)]
        return found[0], found[1], found[2], found[3]


def _sums(head: Head, maps: tuple[Any, ...], of_gradient: tuple[Any, ...]) -> Tensor:
    """[B, 5 + 3 C], see _weighted_loss_sums."""
    parts: list[Tensor] = [
        torch.ops.riskmap_ext._weighted_loss_sums(
            *_tensors(chunk, maps),
            *of_gradient,
        )
        for chunk in head.chunks()
    ]
    columns = IMAGE_COLUMNS + 3 * head.classes
    if not parts:
        return head.features.new_zeros((head.batch, columns), dtype=torch.float64)
    return torch.cat(parts).view(head.batch, -1, columns).sum(dim=1)


def linear_weighted_loss_sums(
    features: Tensor, weight: Tensor, bias: Tensor | None, *inputs: Any
) -> Tensor:
    return _sums(Head(features, weight, bias), inputs[:5], inputs[5:])


def linear_weighted_loss(
    features: Tensor, weight: Tensor, bias: Tensor | None, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    maps, dice_class_weight, options = inputs[:5], inputs[5], inputs[6:]
    class_weight, regions = maps[2], maps[4]
    ignore_index, background, floor, normalization, ce_voxels, reduction, smoothing = options[:7]
    ce, dice, *formula, squared_pred, include_background, batch_dice = options[7:]
    head = Head(features, weight, bias)
    if reduction == NONE:
        return _loss_map(head, inputs)
    sums = _sums(head, maps, (ignore_index, background, ce_voxels, smoothing, squared_pred))
    loss, scale, slopes = torch.ops.riskmap_ext._weighted_loss_finish(
        sums,
        class_weight,
        dice_class_weight,
        None if include_background or regions is not None else background,
        floor,
        normalization,
        reduction,
        ce,
        dice,
        *formula,
        batch_dice,
        features.dtype == torch.float64,
    )
    return loss, scale, slopes if dice != 0 else slopes.new_empty(0)


def _loss_map(head: Head, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(head.features.dtype)
    loss = head.features.new_empty((head.batch, head.voxels), dtype=dtype)
    for chunk in head.chunks():
        part, _, _ = torch.ops.riskmap_ext.weighted_loss(
            *_tensors(chunk, inputs[:5]),
            *inputs[5:],
        )
        loss[chunk.image, chunk.voxels] = part[0]
    ce_weight = inputs[6 + 7]
    scale = loss.new_full((head.batch,), ce_weight, dtype=torch.float64)
    return loss.unflatten(1, head.features.shape[2:]), scale, scale.new_empty(0)


def linear_weighted_loss_backward(
    grad_loss: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    maps, (scale, slopes), options = inputs[:5], inputs[5:7], inputs[7:]
    *of_gradient, _, _, grad_risk = options
    head = Head(features, weight, bias)
    gradients = _Gradients(head, maps[1], options[-3:])
    for chunk in head.chunks():
        image = slice(chunk.image, chunk.image + 1)
        of_risk = torch.ops.riskmap_ext._weighted_loss_backward_(
            grad_loss if grad_loss.dim() == 0 else _of_chunk(grad_loss, chunk),
            *_tensors(chunk, maps),
            scale[image],
            slopes[image] if slopes.numel() > 0 else slopes,
            *of_gradient,
            grad_risk,
        )
        gradients.add(chunk, of_risk)
    return gradients.results()


def linear_weighted_loss_with_gradient(
    features: Tensor, weight: Tensor, bias: Tensor | None, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One pass: the gradient of a sum, then multiplied by each image's scale from its labels."""
    maps, (*options, _, _, grad_risk) = inputs[:5], inputs[5:]
    target, risk, _, foreground, _ = maps
    ignore_index, background, floor, normalization, ce_voxels, reduction, smoothing, ce = options
    head = Head(features, weight, bias)
    gradients = _Gradients(head, risk, inputs[-3:])
    losses = []
    for chunk in head.chunks():
        loss, of_risk = torch.ops.riskmap_ext._weighted_loss_with_gradient_(
            *_tensors(chunk, maps),
            ignore_index,
            background,
            floor,
            _NOT_NORMALIZED,
            ce_voxels,
            _SUM,
            smoothing,
            1.0,
            grad_risk,
        )
        losses.append(loss)
        gradients.add(chunk, of_risk)

    columns = IMAGE_COLUMNS + 3 * head.classes
    sums = features.new_zeros((head.batch, columns), dtype=torch.float64)
    if losses:
        of_images = torch.stack(losses).double().view(head.batch, -1).sum(dim=1)
        sums[:, _CE] = of_images
        sums[:, _BAD_LABELS] = of_images.isnan()  # how the kernels mark invalid values
        # A smaller integer dtype would wrap an ignore_index that it cannot hold.
        labels = target if target.is_floating_point() else target.to(torch.int64)
        valid = labels != ignore_index
        sums[:, _VALID] = valid.flatten(1).sum(dim=1)
        if background is not None:
            inside = labels != background
            valid &= inside if foreground is None else inside | (foreground != 0)
        sums[:, _FOREGROUND] = valid.flatten(1).sum(dim=1)
    loss, scale, _ = torch.ops.riskmap_ext._weighted_loss_finish(
        sums, None, None, None, floor, normalization, reduction, ce, *_NO_DICE, False,
        features.dtype == torch.float64,
    )  # fmt: skip
    gradients.scale(scale)
    return loss, *gradients.results()


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "linear_weighted_loss": linear_weighted_loss,
    "_linear_weighted_loss_sums": linear_weighted_loss_sums,
    "_linear_weighted_loss_backward": linear_weighted_loss_backward,
    "_linear_weighted_loss_with_gradient": linear_weighted_loss_with_gradient,
}


def register(library: torch.library.Library, dispatch_key: str) -> None:
    for name, implementation in IMPLEMENTATIONS.items():
        library.impl(name, implementation, dispatch_key, allow_override=dispatch_key != "CUDA")


if no_cuda_reason() is None:
    _registered = torch.library.Library("riskmap_ext", "IMPL")
    register(_registered, "CUDA")

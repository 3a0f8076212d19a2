"""Source models whose logits are computed chunk by chunk and never kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from riskmap_ext._deferred import DeferredLogits
from riskmap_ext._loss_arguments import head_tensors, shape_of_logits
from riskmap_ext.ops.head_on_cuda import CHUNK_BYTES, Head

_CPU_BYTES = 2**22  # of logits at once: they stay in a cache


def as_checked(source: Any) -> Any:
    """The input of the argument checks: for deferred logits, a tensor of their shape that takes no
    memory."""
    if not isinstance(source, DeferredLogits):
        return source
    return shape_of_logits(head_tensors(*source.parts, autocast=False))


def in_chunks(
    source: DeferredLogits, target: Tensor
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """(images, voxels of each, logits [b, Z, n], labels [b, n]) of target [B, *S], in order: a
    part of an image, or several small ones.

    Chunks depend on shapes alone. The next chunk may reuse the memory of the logits.
    """
    head = Head(*(_detached(each) for each in head_tensors(*source.parts, autocast=False)))
    kind = head.features.device.type
    labels = target.flatten(1)
    chunks = _chunks(head, CHUNK_BYTES if kind == "cuda" else _CPU_BYTES)
    while True:
        # Their dtype is that of their parts, even if autocast would now choose another.
        with torch.autocast(kind, enabled=False):
            chunk = next(chunks, None)
        if chunk is None:
            return
        images, voxels, logits = chunk
        yield images, voxels, logits, labels[images, voxels]


def _chunks(head: Head, limit: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """limit: bytes of logits."""
    image_bytes = head.classes * head.voxels * head.features.element_size()
    together = limit // max(image_bytes, 1)
    if together < 2:
        for chunk in head.chunks(limit):
            yield slice(chunk.image, chunk.image + 1), chunk.voxels, chunk.logits
        return
    for first in range(0, head.batch, together):
        images = slice(first, min(first + together, head.batch))
        logits = torch.matmul(head.weight, head.flat[images])
        if head.bias is not None:
            logits += head.bias.unsqueeze(1)
        yield images, slice(0, head.voxels), logits


def _detached(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach()


@contextmanager
def place(images: slice, voxels: slice) -> Iterator[None]:
    """Adds the chunk to its errors: they count voxels and positions within the chunk."""
    try:
        yield
    except ValueError as error:
        last = images.stop - 1
        among = f"image {last}" if last == images.start else f"images {images.start} to {last}"
        where = f"of voxels {voxels.start} to {voxels.stop - 1}, row by row, of {among}"
        raise ValueError(f"{error} {where}") from None


def voxel_map(
    source: DeferredLogits, target: Tensor, of_logits: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """[B, *S] float32 of a function of logits [b, Z, n] and labels [b, n]."""
    found = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    images = found.view(target.size(0), math.prod(target.shape[1:]))
    for some, voxels, logits, labels in in_chunks(source, target):
        with place(some, voxels):
            images[some, voxels] = of_logits(logits, labels)
    return found

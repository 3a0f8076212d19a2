"""Source models whose logits are made chunk by chunk and never kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from riskmap_ext._deferred import DeferredLogits
from riskmap_ext._loss_arguments import head_tensors, shape_of_logits
from riskmap_ext.ops.head_on_cuda import Head

_CPU_BYTES = 2**22  # of logits at once: they stay in a cache


def as_checked(source: Any) -> Any:
    """What the checks of arguments see: for logits that have not been made, a tensor of their
    shape that takes no memory."""
    if not isinstance(source, DeferredLogits):
        return source
    return shape_of_logits(head_tensors(*source.parts, autocast=False))


def in_chunks(
    source: DeferredLogits, target: Tensor
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """(image, its voxels, logits [1, Z, n], labels [1, n]) of target [B, *S], in order.

    Chunks depend on shapes alone. The memory of the logits is used again for the next ones.
    """
    head = Head(*(_detached(each) for each in head_tensors(*source.parts, autocast=False)))
    kind = head.features.device.type
    chunks = head.chunks(None if kind == "cuda" else _CPU_BYTES)
    while True:
        # Their dtype is that of their parts, even where autocast would have another one now.
        with torch.autocast(kind, enabled=False):
            chunk = next(chunks, None)
        if chunk is None:
            return
        labels = target[chunk.image].reshape(-1)[chunk.voxels]
        yield chunk.image, chunk.voxels, chunk.logits, labels.unsqueeze(0)


def _detached(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach()


@contextmanager
def place(image: int, voxels: slice) -> Iterator[None]:
    """An error of a chunk says which it is: it counts voxels and positions of the chunk alone."""
    try:
        yield
    except ValueError as error:
        where = f"of voxels {voxels.start} to {voxels.stop - 1} of image {image}, row by row"
        raise ValueError(f"{error} {where}") from None


def voxel_map(
    source: DeferredLogits, target: Tensor, of_logits: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """[B, *S] float32 of a function of logits [1, Z, n] and labels [1, n]."""
    found = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    images = found.view(target.size(0), math.prod(target.shape[1:]))
    for image, mine, logits, labels in in_chunks(source, target):
        with place(image, mine):
            images[image, mine] = of_logits(logits, labels)[0]
    return found

"""Source models whose logits are made chunk by chunk and never kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from riskmap_ext._deferred import DeferredLogits
from riskmap_ext._loss_arguments import head_tensors, shape_of_logits

# Of logits at once: what stays in a cache, or fills a GPU.
_CPU_BYTES, _CUDA_BYTES = 2**22, 2**25
_STEP = 1024  # voxels that a chunk has a multiple of, for aligned rows


def as_checked(source: Any) -> Any:
    """What the checks of arguments see: for logits that have not been made, a tensor of their
    shape that takes no memory."""
    if not isinstance(source, DeferredLogits):
        return source
    return shape_of_logits(head_tensors(*source, autocast=False))


def in_chunks(
    source: DeferredLogits, target: Tensor
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """(image, its voxels, logits [1, Z, n], labels [1, n]) of target [B, *S], in order.

    Chunks depend on shapes alone. The memory of the logits is used again for the next ones.
    """
    head = head_tensors(*source, autocast=False)
    features, weight, bias = (None if each is None else each.detach() for each in head)
    assert features is not None
    assert weight is not None
    classes, voxels = weight.size(0), math.prod(features.shape[2:])
    limit = _CUDA_BYTES if features.device.type == "cuda" else _CPU_BYTES
    size = max(1, limit // (classes * features.element_size()))
    size = size - size % _STEP if size > _STEP else size
    size = max(1, min(voxels, size))
    memory = features.new_empty(classes * size)
    for image in range(features.size(0)):
        rows, labels = features[image].flatten(1), target[image].reshape(-1)
        for start in range(0, voxels, size):
            mine = slice(start, min(start + size, voxels))
            logits = memory[: classes * (mine.stop - start)].view(classes, -1)
            # Their dtype is that of their parts, even where autocast would have another one now.
            with torch.autocast(features.device.type, enabled=False):
                if bias is None:
                    torch.mm(weight, rows[:, mine], out=logits)
                else:
                    torch.addmm(bias.unsqueeze(1), weight, rows[:, mine], out=logits)
            yield image, mine, logits.unsqueeze(0), labels[mine].unsqueeze(0)


def voxel_map(
    source: DeferredLogits, target: Tensor, of_logits: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """[B, *S] float32 of a function of logits [1, Z, n] and labels [1, n]."""
    found = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    images = found.view(target.size(0), math.prod(target.shape[1:]))
    for image, mine, logits, labels in in_chunks(source, target):
        images[image, mine] = of_logits(logits, labels)[0]
    return found

"""LEEP statistics: how the classes of a source model meet the labels of the target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from riskmap_ext._arguments import leep_arguments
from riskmap_ext._deferred import DeferredLogits
from riskmap_ext.ops.deferred import as_checked, in_chunks, place
from riskmap_ext.ops.tracing import is_traced
from riskmap_ext.reference.leep import conditional  # a [C, Z] table: plain torch is enough

__all__ = ["NOT_FINITE", "conditional", "leep_statistics"]

NOT_FINITE = "source: expected finite logits at valid voxels, got NaN or infinity"


def leep_statistics(
    source: Tensor | DeferredLogits,
    target: Tensor,
    num_classes: int,
    *,
    ignore_index: int = -100,
    regions: Tensor | None = None,
) -> Tensor:
    r"""Joint mass of target labels and source classes: the statistics behind LEEP.

    .. math:: J_{yz} = \sum_{p\,:\,y_p = y} \theta_p[z], \qquad \theta_p = \mathrm{softmax}(s_p)

    ``J.sum()`` is the number of valid voxels. Add the results of batches, files or processes to
    get those of their union; :class:`riskmap_ext.TransferStatistics` does that.

    Args:
        source: logits of the frozen source model, [B, Z, \*S] with 1 to 3 spatial dimensions;
            float32, float64, float16 or bfloat16. Contiguous and channels-last memory is read in
            place, other strides are copied first. No gradient flows to it. Or
            :class:`riskmap_ext.nn.DeferredLogits`: the logits are computed in chunks, never kept.
        target: labels 0 .. num_classes - 1 or ``ignore_index``, [B, \*S] or [B, 1, \*S]; any
            integer dtype, bool, or integral floats.
        num_classes: number of target classes C, at most 65,536.
        ignore_index: label of voxels to ignore.
        regions: for a source of R overlapping regions (one sigmoid each): table [R, Z], bool or
            0/1, of the labels that make up each region; source is then [B, R, \*S]. A label's
            logit is the sum of the logits of the regions it is in, and theta their softmax: the
            posterior of the labels under independent sigmoids. None: a softmax source.

    Returns:
        J, [C, Z] float64. Sums run in float32 (float64 for a float64 source) over at most 2048
        voxels and in float64 beyond; bitwise the same for any number of threads.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: incompatible shapes, a label outside 0 .. num_classes - 1, or a source whose
            softmax is undefined at a valid voxel (a logit of NaN or +inf). On a GPU, raising an
            error for values would have to wait for the device: there J is NaN, everywhere for a
            bad label, in the row of the voxel's label for a bad source. Under torch.compile the
            latter also holds on the CPU.

    Source: C. V. Nguyen et al., "LEEP: A New Measure to Evaluate Transferability of Learned
    Representations", ICML 2020.
    """
    source_logits, target, *options = leep_arguments(
        as_checked(source), target, num_classes, ignore_index, regions
    )
    op = torch.ops.riskmap_ext.leep_statistics
    if isinstance(source, DeferredLogits):
        joint = op(source_logits[:0], target[:0], *options)
        for images, voxels, logits, labels in in_chunks(source, target):
            with place(images, voxels):
                joint += op(logits, labels, *options)
    else:
        joint = op(source_logits.detach(), target, *options)
    if _is_at_hand(joint) and not math.isfinite(joint.sum().item()):
        raise ValueError(NOT_FINITE)
    return joint


def _is_at_hand(joint: Tensor) -> bool:
    """Whether reading values needs no wait: C * Z numbers on the CPU, not traced."""
    return not torch.compiler.is_compiling() and joint.device.type == "cpu" and not is_traced(joint)


@torch.library.register_fake("riskmap_ext::leep_statistics")
def _fake(
    source: Tensor, target: Tensor, regions: Tensor | None, num_classes: int, ignore_index: int
) -> Tensor:
    source_classes = source.size(1) if regions is None else regions.size(1)
    return source.new_empty((num_classes, source_classes), dtype=torch.float64)

"""Voxel-wise transferability (LEEP) of a source model."""

from __future__ import annotations

import torch
from torch import Tensor

from riskmap_ext._arguments import map_arguments
from riskmap_ext._deferred import DeferredLogits
from riskmap_ext.ops.deferred import as_checked, voxel_map


def transferability_map(
    source: Tensor | DeferredLogits,
    target: Tensor,
    conditional: Tensor,
    *,
    ignore_index: int = -100,
    regions: Tensor | None = None,
) -> Tensor:
    r"""Log-likelihood of each voxel's label under the source model, in nats.

    .. math:: T_p = \log \max\Big(\sum_z P(y_p|z)\,\theta_p[z],\; 10^{-6}\Big) \in [-13.82, 0],
              \qquad \theta_p = \mathrm{softmax}(s_p)

    Its mean over the valid voxels of the target training set is the LEEP score; ``-T`` is the
    hardness that :func:`risk_map` turns into voxel weights. Each voxel reads only
    row ``y_p`` of the table: no tensor [B, C, \*S] is created.

    Args:
        source: logits of the frozen source model, [B, Z, \*S] with 1 to 3 spatial dimensions;
            float32, float64, float16 or bfloat16. No gradient flows to it. Or
            :class:`riskmap_ext.nn.DeferredLogits`: the logits are computed in chunks, never kept.
        target: labels 0 .. C - 1 or ``ignore_index``, [B, \*S] or [B, 1, \*S]; any integer dtype,
            bool, or integral floats.
        conditional: P(y|z), [C, Z] floating, from :func:`conditional`.
        ignore_index: label of voxels to ignore; they get T = 0.
        regions: table [R, Z] for a source of overlapping regions, see :func:`leep_statistics`.

    Returns:
        T, [B, \*S] float32; NaN at a valid voxel where the softmax is NaN (a logit of NaN or +inf).
        This raises no error on any device, since the check would need another pass over T.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: incompatible shapes, a label outside 0 .. C - 1, or a table whose entries are
            not probabilities. On a GPU, raising an error for values would have to wait for the
            device: there a voxel with such a label is NaN; with such a table every voxel is.

    Source: C. V. Nguyen et al., ICML 2020 (LEEP); S. Duan et al., "Transfer Risk Map: Mitigating
    Pixel-level Negative Transfer in Medical Segmentation", ICASSP 2025 (arXiv 2502.02340).
    """
    source_logits, target, conditional, *options = map_arguments(
        as_checked(source), target, conditional, ignore_index, regions
    )
    conditional = conditional.detach()
    op = torch.ops.riskmap_ext.transferability_map
    if isinstance(source, DeferredLogits):
        return voxel_map(source, target, lambda x, y: op(x, y, conditional, *options))
    return op(source_logits.detach(), target, conditional, *options)


@torch.library.register_fake("riskmap_ext::transferability_map")
def _fake(
    source: Tensor,
    target: Tensor,
    conditional: Tensor,
    regions: Tensor | None,
    ignore_index: int,
) -> Tensor:
    return source.new_empty((source.size(0), *source.shape[2:]), dtype=torch.float32)

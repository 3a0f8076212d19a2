"""Transfer risk map: voxel weights from the transferability of a source model."""

from __future__ import annotations

import torch
from torch import Tensor

from riskmap_ext._arguments import SCHEMES, map_arguments, risk_options
from riskmap_ext._deferred import DeferredLogits
from riskmap_ext.ops.deferred import as_checked, voxel_map
from riskmap_ext.ops.transferability_map import transferability_map
from riskmap_ext.reference.risk_map import voxel_weight  # of a map: plain torch is enough


def risk_map(
    source: Tensor | DeferredLogits,
    target: Tensor,
    conditional: Tensor,
    *,
    scheme: str = "linear",
    base: float = 10.0,
    alpha: float = 0.5,
    scale: float = 9.0,
    range: tuple[float, float] | None = None,
    background: int | None = 0,
    ignore_index: int = -100,
    regions: Tensor | None = None,
) -> Tensor:
    r"""Voxel weights that are large where the source model transfers badly.

    With the hardness :math:`h_p = -T_p` of :func:`transferability_map` and
    :math:`t = \mathrm{clip}\big((h - lo) / (hi - lo), 0, 1\big)`:

    ============= ============================ =============================================
    ``scheme``    weight                       uses
    ============= ============================ =============================================
    exponential   :math:`base^{\,t}`           ``base``; 1 to 10 by default
    power         :math:`p^{-alpha}`           ``alpha``; needs no range, always one pass
    linear        :math:`1 + scale \cdot t`    ``scale``
    ============= ============================ =============================================

    Args:
        source: logits of the frozen source model, [B, Z, \*S] with 1 to 3 spatial dimensions;
            float32, float64, float16 or bfloat16. No gradient flows to it. Or
            :class:`riskmap_ext.nn.DeferredLogits`: the logits are computed in chunks, never kept.
        target: labels 0 .. C - 1 or ``ignore_index``, [B, \*S] or [B, 1, \*S]; any integer dtype,
            bool, or integral floats.
        conditional: P(y|z), [C, Z] floating, from :func:`conditional`.
        scheme: "exponential", "power" or "linear".
        base: > 0, alpha: in (0, 1], scale: >= 0; base and scale up to 1e38.
        range: (lo, hi) of the hardness over the whole data set, in nats
            (``TransferStatistics.hardness_range``); one pass. None: the range over the valid
            voxels of each image; two passes over the map.
        background: class that is not foreground; None: every class is foreground.
        ignore_index: label of voxels to ignore; they get weight 0.
        regions: table [R, Z] for a source of overlapping regions, see :func:`leep_statistics`.

    Returns:
        w, [B, \*S] float32, >= 0. If the range is degenerate (hi - lo < 0.1), or with
        ``range=None`` in an image without foreground, w = 1: otherwise background noise would be
        stretched to ``base``. NaN at a valid voxel where the softmax of ``source`` is NaN (a logit
        of NaN or +inf). This raises no error on any device, but on the CPU :func:`weighted_loss`
        rejects such a ``risk``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: incompatible shapes or options, a label outside 0 .. C - 1, or a table
            whose entries are not probabilities. On a GPU, raising an error for values would have to
            wait for the device: there a voxel with such a label gets the weight NaN; with such a
            table every voxel does.

    Source: S. Duan et al., "Transfer Risk Map: Mitigating Pixel-level Negative Transfer in Medical
    Segmentation", ICASSP 2025 (arXiv 2502.02340).
    """
    source_logits, labels, table, regions, ignore_index = map_arguments(
        as_checked(source), target, conditional, ignore_index, regions
    )
    options = risk_options(scheme, base, alpha, scale, range, background, table.size(0))
    if isinstance(source, DeferredLogits) and options.range is None and scheme != "power":
        hardness = -transferability_map(
            source, labels, table, ignore_index=ignore_index, regions=regions
        )
        return voxel_weight(hardness, labels, options, ignore_index)
    low, high = options.range if options.range is not None else (None, None)
    table = table.detach()

    def weight(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.ops.riskmap_ext.risk_map(
            logits,
            labels,
            table,
            regions,
            SCHEMES.index(options.scheme),
            options.base,
            options.alpha,
            options.scale,
            low,
            high,
            options.background,
            ignore_index,
        )

    if isinstance(source, DeferredLogits):
        return voxel_map(source, labels, weight)
    return weight(source_logits.detach(), labels)


@torch.library.register_fake("riskmap_ext::risk_map")
def _fake(source: Tensor, target: Tensor, conditional: Tensor, *options: object) -> Tensor:
    return source.new_empty((source.size(0), *source.shape[2:]), dtype=torch.float32)

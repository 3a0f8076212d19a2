"""Sliding-window inference over whole cases."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import SliceInferer, SlidingWindowInferer
from monai.networks.utils import eval_mode
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from riskmap_ext.finetune.base.files import write_nifti
from riskmap_ext.finetune.base.structures import Structures
from riskmap_ext.finetune.config.schema import InferenceConfig
from riskmap_ext.finetune.data.prepare import Case
from riskmap_ext.finetune.source.network import check_fits, first_output, sizes_of

_WINDOWS_AT_ONCE = {2: 16, 3: 2}


class Predictor:
    """Sliding-window logits of whole volumes, slice by slice for a 2-D network."""

    def __init__(
        self,
        network: nn.Module,
        dims: int,
        patch: Sequence[int],
        inference: InferenceConfig,
        channels: Sequence[int] | None = None,
        geometry: str = "monai",
    ) -> None:
        """channels: the image channels that it sees; None: all. geometry: data.geometry."""
        self.channels = None if channels is None else list(channels)
        self.patch = sizes_of("inference.patch_size", inference.patch_size or patch, dims)
        check_fits("inference.patch_size", self.patch, 4 * math.prod(self.patch))
        count = inference.batch_size or _WINDOWS_AT_ONCE[dims]
        options: dict[str, Any] = {
            "roi_size": self.patch,
            "sw_batch_size": count,
            "overlap": inference.overlap,
            "mode": "gaussian",
            # Training crops repeat the border in the same way.
            "padding_mode": "replicate",
            # MONAI caches the window's weights in the network's dimensions: of no use for slices.
            "cache_roi_weight_map": dims == 3,
        }
        self._infer: Callable[[Tensor, Callable[[Tensor], Any]], Any]
        if geometry == "nnunet":
            self._infer = functools.partial(_even_windows, self.patch, inference.overlap, count)
        elif dims == 2:
            self._infer = SliceInferer(spatial_dim=2, **options)
        else:
            self._infer = SlidingWindowInferer(**options)
        self._network = network

    def __call__(self, image: Tensor) -> Tensor:
        """Logits [1, K, X, Y, Z] float32 of an image [M, X, Y, Z], without gradients."""
        if self.channels is not None:
            image = image[self.channels]
        device = next(self._network.parameters()).device
        with eval_mode(self._network):
            logits: Any = self._infer(image.to(device)[None], self._forward)
            return logits.float()

    def _forward(self, window: Tensor) -> Any:
        return first_output(self._network(window), window)


def _even_windows(
    patch: Sequence[int],
    overlap: float,
    count: int,
    image: Tensor,
    network: Callable[[Tensor], Tensor],
) -> Tensor:
    """Logits of an image [1, M, X, Y, Z] from evenly spread windows, as nnU-Net does it.

    count: windows per forward pass. A smaller image is padded with 0 on both sides.
    """
    size, dims = list(image.shape[2:]), len(patch)
    patch = [*patch, *[1] * (3 - dims)]  # a slice is a window one voxel deep
    missing = [max(0, wanted - have) for wanted, have in zip(patch, size, strict=True)]
    both = [side for each in reversed(missing) for side in (each // 2, each - each // 2)]
    image = F.pad(image[0], both)
    steps = [
        _starts(have, wanted, overlap if axis < dims else 0)
        for axis, (have, wanted) in enumerate(zip(image.shape[1:], patch, strict=True))
    ]
    boxes: list[tuple[Any, ...]] = [
        (..., *(slice(start, start + each) for start, each in zip(starts, patch, strict=True)))
        for starts in itertools.product(*steps)
    ]
    weight = _window_weight(tuple(patch)).to(image.device)
    sums: Tensor | None = None
    weights = image.new_zeros(image.shape[1:])
    for group in (boxes[start : start + count] for start in range(0, len(boxes), count)):
        windows = torch.stack([image[box] for box in group])
        logits = network(windows.squeeze(-1) if dims == 2 else windows)
        logits = logits.float().reshape(len(group), -1, *patch)
        if sums is None:
            sums = logits.new_zeros((logits.shape[1], *image.shape[1:]))
        for box, each in zip(group, logits, strict=True):
            sums[box] += each * weight
            weights[box] += weight
    assert sums is not None
    inner = (slice(each // 2, each // 2 + n) for each, n in zip(missing, size, strict=True))
    return (sums / weights)[(None, ..., *inner)]


@functools.lru_cache(maxsize=2)
def _window_weight(patch: tuple[int, ...]) -> Tensor:
    """A Gaussian around the centre; its standard deviation is an eighth of the patch."""
    peak = np.zeros(patch)
    peak[tuple(size // 2 for size in patch)] = 1
    weight = gaussian_filter(peak, [size / 8 for size in patch], mode="constant")
    return torch.from_numpy(weight / weight.max()).float().clamp(min=1e-8)


def _starts(size: int, patch: int, overlap: float) -> list[int]:
    """First voxels of windows that overlap by at least `overlap` and end at the border."""
    count = math.ceil((size - patch) / (patch * (1 - overlap))) + 1
    return [round(index * (size - patch) / max(1, count - 1)) for index in range(count)]


def predict(
    predictors: Sequence[Predictor], case: Case, structures: Structures, *, full: bool = False
) -> Tensor:
    """Class indices int16 on the prepared grid or, with `full`, of the file's whole volume.

    With several predictors, their probabilities are averaged; in nnU-Net's geometry, their logits,
    as there.
    """
    grid, resampled = case.grid, full and case.grid.resampled
    as_logits = grid.nnunet or (len(predictors) == 1 and not resampled)
    made: Iterator[Tensor] = (predictor(case.image) for predictor in predictors)
    if not as_logits:
        made = map(structures.probabilities, made)
    mean = functools.reduce(torch.add, made)[0] / len(predictors)
    if resampled:
        mean = grid.to_box(mean.cpu(), mode="bilinear")
    found = structures.segmentation(mean, threshold=0.0 if as_logits else 0.5).cpu()
    return grid.uncropped(found) if full else found


def write_segmentation(
    path: Path, case: Case, segmentation: Tensor, structures: Structures
) -> None:
    """Class numbers on the grid of the image's file, in uint8 (int16 beyond 256 classes)."""
    dtype = "uint8" if len(structures.classes) <= 256 else "int16"
    values = case.grid.to_file(segmentation).astype(dtype)
    write_nifti(path, values, case.grid.affine, case.grid.codes)

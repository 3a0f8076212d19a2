"""Sliding-window inference over whole cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.inferers import SliceInferer, SlidingWindowInferer
from monai.networks.utils import eval_mode
from torch import Tensor, nn

from riskmap_ext.finetune.base.files import write_nifti
from riskmap_ext.finetune.base.structures import Structures
from riskmap_ext.finetune.config.schema import InferenceConfig
from riskmap_ext.finetune.data.prepare import Case
from riskmap_ext.finetune.source.network import first_output, sizes_of

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
    ) -> None:
        """channels: those of the image that the network sees; None: all."""
        self.channels = None if channels is None else list(channels)
        self.patch = sizes_of("inference.patch_size", inference.patch_size or patch, dims)
        options: dict[str, Any] = {
            "roi_size": self.patch,
            "sw_batch_size": inference.batch_size or _WINDOWS_AT_ONCE[dims],
            "overlap": inference.overlap,
            "mode": "gaussian",
            # Crops of training repeat the border in the same way.
            "padding_mode": "replicate",
            # MONAI keeps the window's weights in the network's dimensions: no use for slices.
            "cache_roi_weight_map": dims == 3,
        }
        self._infer = (
            SliceInferer(spatial_dim=2, **options) if dims == 2 else SlidingWindowInferer(**options)
        )
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


def predict(
    predictor: Predictor, case: Case, structures: Structures, *, full: bool = False
) -> Tensor:
    """Class indices int16 on the prepared grid or, with `full`, at the file's resolution."""
    logits = predictor(case.image)
    if not (full and case.grid.resampled):
        return structures.segmentation(logits[0]).cpu()
    values = case.grid.to_full(structures.probabilities(logits).cpu(), mode="bilinear")
    return structures.segmentation(values[0], threshold=0.5)


def write_segmentation(
    path: Path, case: Case, segmentation: Tensor, structures: Structures
) -> None:
    """Class numbers on the grid of the image's file, in uint8 (int16 beyond 256 classes)."""
    dtype = "uint8" if len(structures.classes) <= 256 else "int16"
    values = case.grid.to_file(segmentation).astype(dtype)
    write_nifti(path, values, case.grid.affine, case.grid.codes)

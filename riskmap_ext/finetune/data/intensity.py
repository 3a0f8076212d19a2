"""The image's own foreground, and intensities as a network gets them."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.ndimage import binary_fill_holes

from riskmap_ext.finetune.base.errors import ConfigError
from riskmap_ext.finetune.config.schema import DataConfig

_MIN_STD = 1e-8


def crop_mask(image: np.ndarray) -> np.ndarray:
    """Voxels other than 0 in any channel [M, X, Y, Z], with holes filled."""
    mask: np.ndarray = binary_fill_holes((image != 0).any(axis=0))
    return mask


def image_foreground(image: np.ndarray, data: DataConfig) -> np.ndarray:
    """Brain or body rather than air, in any channel; everything if nothing would be left."""
    mask = np.ones(image.shape[1:], dtype=bool)
    if data.image_foreground == "nonzero":
        mask = crop_mask(image) if data.crop == "nonzero" else (image != 0).any(axis=0)
    elif data.image_foreground == "otsu":
        mask = np.any([channel > _otsu_threshold(channel) for channel in image], axis=0)
    return mask if mask.any() else ~mask


def _otsu_threshold(image: np.ndarray) -> float:
    """The grey level that splits the histogram with the largest variance between the parts."""
    counts, edges = np.histogram(image, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = counts.sum() - below
    total = np.cumsum(counts * centres)
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = total / below - (total[-1] - total) / above
        between = np.nan_to_num(below * above * difference**2)
    return float(edges[int(between.argmax()) + 1])


def normalized(image: np.ndarray, mask: np.ndarray, data: DataConfig) -> np.ndarray:
    """[M, X, Y, Z] by data.window, data.normalize and data.mean_std; mask: the foreground.

    Raises: ConfigError if one of these has a different number of channels.
    """
    options = [
        _of_channels(key, getattr(data, key), len(image))
        for key in ("normalize", "window", "mean_std")
    ]
    channels = zip(image, *options, strict=True)
    return np.stack([_scaled(values, mask, *given) for values, *given in channels])


def _of_channels(key: str, value: Any, count: int) -> list[Any]:
    """One for each channel; a single one (a text, or a pair of numbers) applies to all."""
    several = isinstance(value, list) and not isinstance(value[0], (int, float))
    if not several:
        return [value] * count
    if len(value) != count:
        raise ConfigError(f"data.{key}: expected one for each of {count} channels, got {value}")
    return list(value)


def _scaled(
    image: np.ndarray,
    mask: np.ndarray,
    kind: str,
    window: list[float] | None,
    mean_std: list[float] | None,
) -> np.ndarray:
    if window is not None:
        image = image.clip(np.float32(window[0]), np.float32(window[1]))
    if kind == "none":
        return image
    if kind == "rescale":
        low, high = window or (float(image.min()), float(image.max()))
        return (image - low) / (high - low if high > low else 1.0)
    inside = image[mask].astype(np.float64)
    mean, std = mean_std or (float(inside.mean()), float(inside.std()))
    # A constant image has no range to scale by.
    scaled = (image - mean) / (std if std > _MIN_STD else 1.0)
    return np.where(mask, scaled, np.float32(0)) if kind == "zscore_foreground" else scaled

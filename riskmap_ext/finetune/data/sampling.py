"""Random crops of whole volumes in memory, rotated, scaled and flipped as they are cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from riskmap_ext._files import digest
from riskmap_ext.finetune.base.errors import ConfigError
from riskmap_ext.finetune.base.orientation import slice_axis_of
from riskmap_ext.finetune.base.structures import IGNORE_INDEX
from riskmap_ext.finetune.config.schema import AugmentConfig, TrainConfig
from riskmap_ext.finetune.data.prepare import Case, kept


@dataclass(frozen=True)
class Batch:
    """image [B, M, *P] float32; label [B, *P] int16; foreground [B, *P] bool; risk [B, *P].

    cases: the case of each crop.
    """

    image: Tensor
    label: Tensor
    foreground: Tensor
    risk: Tensor | None
    cases: list[str]


@dataclass(frozen=True)
class _Volume:
    """image [N, M, *S], guides [N, 3, *S] = label, image foreground, risk: N slices or 1 volume.

    foreground: flat indices of labelled voxels in `shape` [X, Y, Z], by class; class_voxels: their
    number for each class.
    """

    name: str
    image: Tensor
    guides: Tensor
    spacing: np.ndarray
    shape: tuple[int, ...]
    foreground: np.ndarray
    class_voxels: list[np.ndarray]
    intensity_unit: np.ndarray


def flip_axes(orientation: str, dims: int, augment: AugmentConfig) -> list[int]:
    """The axes, prepared in this order of letters, that `augment.flip` names."""
    names = [slice_axis_of(letter) for letter in orientation[:dims]]
    for wanted in augment.flip:
        if wanted not in names:
            raise ConfigError(
                f"train.augment.flip: {wanted} is the slice axis of this 2-D network; "
                f"expected {' or '.join(names)}"
            )
    return [names.index(wanted) for wanted in augment.flip]


def _storage_device(cases: Sequence[Case], device: torch.device) -> torch.device:
    """The GPU if all volumes take less than half of its free memory, else the CPU."""
    if device.type != "cuda":
        return device
    needed = sum(4 * (case.image.numel() + 3 * case.label.numel()) for case in cases)
    free, _ = torch.cuda.mem_get_info(device)
    return device if 2 * needed < free else torch.device("cpu")


class CropSampler:
    """Batches of random crops of `patch` voxels from all cases, each case equally often.

    One sampling grid per crop combines all spatial changes, so only the crop is touched. The image
    is interpolated linearly. Label, image foreground and risk map use the nearest voxel of the same
    grid: the weight belongs to the voxel's label, and linear interpolation at a border would give
    one class the weight of the other. Outside the volume, the image repeats its border or is 0, and
    the label is ignored (weight 0).
    """

    def __init__(
        self,
        cases: Sequence[Case],
        risk: Mapping[str, Tensor] | None,
        patch: Sequence[int],
        train: TrainConfig,
        *,
        seed: int,
        device: torch.device,
        store: Path | None = None,
        part: tuple[int, int] = (0, 1),
        geometry: str = "monai",
    ) -> None:
        """part: (rank, processes); each process draws its share of the same batch.

        geometry: data.geometry.
        """
        self._padding = "zeros" if geometry == "nnunet" else "border"
        self._dims = len(patch)
        self._patch = np.array(patch)
        self._train = train
        self._device = device
        self._with_risk = risk is not None
        self._folder = store
        self._home = torch.device("cpu") if store else _storage_device(cases, device)
        rank, processes = part
        share = train.batch_size // processes
        self._mine = slice(rank * share, (rank + 1) * share)
        self._flip_axes = flip_axes(cases[0].grid.orientation, self._dims, train.augment)
        self._volumes = [
            self._store(case, None if risk is None else risk[case.name]) for case in cases
        ]
        self._rng = np.random.default_rng(seed)
        self._noise = torch.Generator(device)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, in plain numbers."""
        return {"rng": self._rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]

    def next_batch(self) -> Batch:
        picks = [self._pick() for _ in range(self._train.batch_size)]
        turned = [self._theta(volume, start) for volume, _, start in picks]
        picks, theta = picks[self._mine], np.stack(turned[self._mine])
        size = [len(picks), 1, *self._patch.tolist()]
        grids = F.affine_grid(
            torch.from_numpy(theta.astype(np.float32)), size, align_corners=False
        ).to(self._home)
        images, guides = [], []
        for (volume, index, _), grid in zip(picks, grids, strict=True):
            images.append(_read(volume.image[index], grid, "bilinear", self._padding))
            guides.append(_read(volume.guides[index], grid, "nearest"))
        image, guide = (torch.cat(parts).to(self._device) for parts in (images, guides))
        outside = (grids.to(self._device).abs() > 1).any(dim=-1)
        units = np.array([volume.intensity_unit for volume, _, _ in picks])
        return Batch(
            image=self._change_intensity(image, units),
            label=torch.where(outside, float(IGNORE_INDEX), guide[:, 0]).to(torch.int16),
            foreground=(guide[:, 1] > 0) & ~outside,
            risk=torch.where(outside, 0.0, guide[:, 2]) if self._with_risk else None,
            cases=[volume.name for volume, _, _ in picks],
        )

    def _store(self, case: Case, risk: Tensor | None) -> _Volume:
        risk = torch.ones(case.label.shape) if risk is None else risk
        guides = torch.stack([case.label.float(), case.mask.float(), risk.float()])
        # In 2-D, each slice contiguous: [slices, channels, X, Y].
        image, guides = (
            each.permute(3, 0, 1, 2) if self._dims == 2 else each[None]
            for each in (case.image, guides)
        )
        label = case.label.numpy().ravel()
        foreground = np.flatnonzero(label > 0)
        foreground = foreground[np.argsort(label[foreground], kind="stable")]
        _, first = np.unique(label[foreground], return_index=True)
        inside = case.image[:, case.mask].numpy()
        tensors = {"image": image.contiguous(), "guides": guides.contiguous()}
        if self._folder is not None:
            made_of = digest(case.digest, risk, self._dims)
            tensors = kept(self._folder, f"crops-{made_of[:32]}", tensors)
        return _Volume(
            name=case.name,
            image=tensors["image"].to(self._home),
            guides=tensors["guides"].to(self._home),
            spacing=np.array(case.grid.spacing[: self._dims]),
            shape=case.grid.prepared_shape,
            foreground=foreground,
            class_voxels=np.split(foreground, first[1:]),
            intensity_unit=inside.std(axis=1, dtype=np.float64),
        )

    def _pick(self) -> tuple[_Volume, int, np.ndarray]:
        """A volume, the index of a slice (0 in 3-D), and the crop's first voxel."""
        rng = self._rng
        volume = self._volumes[rng.integers(len(self._volumes))]
        size = np.array(volume.image.shape[2:])
        room = size - self._patch
        # A crop larger than the volume is centred on it.
        low, high = np.minimum(room // 2, 0), np.where(room < 0, room // 2, room)
        if len(volume.foreground) and rng.random() < self._train.foreground_crops:
            voxels = volume.foreground
            if self._train.crop_balance == "class":
                voxels = volume.class_voxels[rng.integers(len(volume.class_voxels))]
            flat = voxels[rng.integers(len(voxels))]
            voxel = np.array(np.unravel_index(flat, volume.shape))
            start = np.clip(voxel[: self._dims] - self._patch // 2, low, high)
            return volume, int(voxel[2]) if self._dims == 2 else 0, start
        index = int(rng.integers(len(volume.image)))
        return volume, index, rng.integers(low, high + 1)

    def _theta(self, volume: _Volume, start: np.ndarray) -> np.ndarray:
        """[D, D + 1] from the crop's [-1, 1] coordinates to the volume's, last axis first.

        Crop voxel u lies at volume voxel v = centre + M (u - (P - 1) / 2), where M rotates and
        scales in millimetres; torch's coordinate of voxel v on an axis of n is (2 v + 1) / n - 1.
        """
        size = np.array(volume.image.shape[2:])
        centre = start + (self._patch - 1) / 2
        matrix = self._random_matrix(volume.spacing)
        linear = (2 / size)[:, None] * matrix * (self._patch / 2)
        offset = (2 * centre + 1) / size - 1
        return np.concatenate([linear[::-1, ::-1], offset[::-1, None]], axis=1)

    def _random_matrix(self, spacing: np.ndarray) -> np.ndarray:
        augment, rng = self._train.augment, self._rng
        matrix = np.eye(self._dims)
        if rng.random() < augment.affine_probability:
            limit = math.radians(augment.rotation)
            planes = [(0, 1)] if self._dims == 2 else [(0, 1), (0, 2), (1, 2)]
            for a, b in planes:
                angle = rng.uniform(-limit, limit)
                cos, sin = math.cos(angle), math.sin(angle)
                turn = np.eye(self._dims)
                turn[[a, b, a, b], [a, b, b, a]] = cos, cos, -sin, sin
                matrix = turn @ matrix
            matrix *= rng.uniform(1 - augment.scale, 1 + augment.scale)
            matrix = matrix * spacing / spacing[:, None]
        for axis in self._flip_axes:
            if rng.random() < 0.5:
                matrix[:, axis] *= -1
        return matrix

    def _change_intensity(self, image: Tensor, units: np.ndarray) -> Tensor:
        """Contrast, gamma, brightness and noise, drawn for each image of the whole batch.

        image: this process's part of it; units: [B, M] of the part.
        """
        augment, rng, count = self._train.augment, self._rng, self._train.batch_size
        mine, lead = self._mine, image.shape[:2]
        per_channel = (*lead, *(1,) * (image.dim() - 2))

        def column(values: np.ndarray) -> Tensor:
            """[B] or [B, M] of the part, to combine with its image."""
            values = np.broadcast_to(values.reshape(len(values), -1), lead)
            return torch.from_numpy(values.astype(np.float32)).view(per_channel).to(image.device)

        chosen = rng.random(count) < augment.intensity_probability
        if chosen.any():
            contrast = rng.uniform(1 - augment.contrast, 1 + augment.contrast, count)[mine]
            shift = rng.normal(0, augment.brightness, count)[mine, None] * units
            reach = math.log(1 / (1 - augment.gamma))
            gamma = np.exp(rng.uniform(-reach, reach, count))[mine]
            low, high = (edge.view(per_channel) for edge in torch.aminmax(image.flatten(2), dim=2))
            extent = (high - low).clamp(min=1e-6)
            bent = ((image - low) / extent).clamp(0, 1) ** column(gamma) * extent + low
            mean = bent.flatten(2).mean(dim=2).view(per_channel)
            changed = (bent - mean) * column(contrast) + mean + column(shift)
            image = torch.where(column(chosen[mine]) > 0, changed, image)
        sigma = rng.uniform(0, augment.noise, count)
        sigma *= rng.random(count) < augment.noise_probability
        if sigma.any():
            # One seed per image, so that no process has to draw the noise of the others.
            seeds = rng.integers(2**62, size=count)[mine]
            for index, (scale, seed) in enumerate(zip(sigma[mine], seeds, strict=True)):
                self._noise.manual_seed(int(seed))
                noise = torch.randn(image[index].shape, generator=self._noise, device=image.device)
                unit = torch.from_numpy((scale * units[index]).astype(np.float32))
                image[index] += unit.view(per_channel[1:]).to(image.device) * noise
        return image


def _read(volume: Tensor, grid: Tensor, mode: str, padding: str = "border") -> Tensor:
    return F.grid_sample(
        volume[None], grid[None], mode=mode, padding_mode=padding, align_corners=False
    )

"""Small NIfTI cases and configurations for the tests of the driver."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from riskmap_ext.finetune import Cases, Config, DataError, parse_config, prepare_cases
from riskmap_ext.finetune.data.sampling import CropSampler

NETWORK_2D: dict[str, Any] = {
    "name": "UNet",
    "args": {"spatial_dims": 2, "channels": [4, 8], "strides": [2], "num_res_units": 1},
}
NETWORK_3D: dict[str, Any] = {
    "name": "UNet",
    "args": {"spatial_dims": 3, "channels": [4, 8], "strides": [2], "num_res_units": 1},
}
DYNUNET_2D: dict[str, Any] = {
    "name": "DynUNet",
    "args": {
        "spatial_dims": 2,
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [4, 8, 8],
    },
}
# Another task on the same labels: what a source is trained for.
MERGED = {"classes": ["background", "thing"], "label_map": {1: 1, 2: 1}}
RAS = np.diag([1.0, 1.0, 1.0, 1.0])
TURNED = np.array([[0, 0, -1.5, 4], [-1, 0, 0, 3], [0, 2, 0, -7], [0, 0, 0, 1]], dtype=float)
SHAPE = (20, 24, 12)


def real_data(folder: str) -> Path:
    """A folder of the real images, or a skip that says how to have them."""
    root = os.environ.get("RISKMAP_DATA")
    base = Path(root) if root else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (base / folder).is_dir():
        pytest.skip(f"no real data in {base / folder}; set RISKMAP_DATA to the folder above it")
    return base / folder


def save(path: Path, values: np.ndarray, affine: np.ndarray = RAS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def phantom(
    seed: int, shape: Sequence[int] = SHAPE, num_classes: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image with air around it, and boxes of classes 1 .. num_classes - 1 in it."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, dtype=np.uint8)
    for value in range(1, num_classes):
        start = [int(rng.integers(2, size // 2)) for size in shape]
        label[tuple(slice(s, s + size // 3) for s, size in zip(start, shape, strict=True))] = value
    image = 100 + 60 * label + rng.normal(0, 5, shape)
    image[:2] = 0
    return image.astype(np.float32), label


def write_cases(
    root: Path, count: int, *, num_classes: int = 3, affine: np.ndarray = RAS, **options: Any
) -> list[str]:
    """images/ and labels/ in `root`; returns the case names."""
    names = [f"case{index:02d}" for index in range(count)]
    for index, name in enumerate(names):
        image, label = phantom(index, num_classes=num_classes, **options)
        save(root / "images" / f"{name}.nii.gz", image, affine)
        save(root / "labels" / f"{name}.nii.gz", label, affine)
    return names


def settings(root: Path, output: Path, **sections: Any) -> dict[str, Any]:
    """A quick run as plain mappings; `sections` are merged in, key by key."""
    content: dict[str, Any] = {
        "output": str(output),
        "threads": 1,
        "device": "cpu",
        "data": {
            "root": str(root),
            "train": 2,
            "validation": 1,
            "classes": ["background", "box", "crate"],
        },
        "network": NETWORK_2D,
        "train": {"steps": 2, "batch_size": 2, "patch_size": 16, "lr": 0.01, "validate_every": 1},
        "write": {"overlays": False, "tensorboard": False},
    }
    for section, value in sections.items():
        if isinstance(value, dict) and isinstance(content.get(section), dict):
            value = {**content[section], **value}
        content[section] = value
    return content


def configuration(root: Path, output: Path, **sections: Any) -> Config:
    return parse_config(settings(root, output, **sections))


def read(root: Path, /, **data: Any) -> Cases:
    """The prepared cases of a `data` section."""
    return prepare_cases(configuration(root, root / "unused", data=data))


def problem(root: Path, /, **data: Any) -> str:
    """Why they cannot be read."""
    with pytest.raises(DataError) as caught:
        read(root, **data)
    return str(caught.value)


def image_of(root: Path, name: str = "case00") -> Path:
    return root / "images" / f"{name}.nii.gz"


def label_of(root: Path, name: str = "case00") -> Path:
    return root / "labels" / f"{name}.nii.gz"


def write_config(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def stop_at(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is stopped when the sampler is asked for its so many-th batch."""
    taken = 0
    next_batch = CropSampler.next_batch

    def counted(self: CropSampler) -> Any:
        nonlocal taken
        taken += 1
        if taken == batch:
            raise KeyboardInterrupt
        return next_batch(self)

    monkeypatch.setattr(CropSampler, "next_batch", counted)


def train_source(
    root: Path, output: Path, steps: int, data: dict[str, Any] = MERGED, **train: Any
) -> Path:
    """The checkpoint of a source model."""
    from riskmap_ext.finetune import finetune

    train = {"steps": steps, "validate_every": 0, **train}
    finetune(configuration(root, output, data=data, train=train), progress=False)
    return output / "last.pt"

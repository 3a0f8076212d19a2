"""Raw data sets of nnU-Net, made from the real hippocampus images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from finetune_data import real_data


def write_raw_data_set(
    folder: Path,
    cases: int,
    labels: dict[str, Any],
    change: Callable[[np.ndarray], np.ndarray] = lambda values: values,
    **more: Any,
) -> None:
    """The first `cases` images, with labels as `change` makes them; `more` goes into the JSON."""
    data = real_data("hippocampus")
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for image in sorted((data / "images").iterdir())[:cases]:
        case = image.name.removesuffix(".nii.gz")
        shutil.copyfile(image, folder / "imagesTr" / f"{case}_0000.nii.gz")
        values = np.asarray(nib.load(data / "labels" / image.name).dataobj).astype(np.uint8)
        label = nib.Nifti1Image(change(values), nib.load(image).affine)
        nib.save(label, folder / "labelsTr" / image.name)
    content = {
        "channel_names": {"0": "MRI"},
        "labels": labels,
        "numTraining": cases,
        "file_ending": ".nii.gz",
        **more,
    }
    (folder / "dataset.json").write_text(json.dumps(content))

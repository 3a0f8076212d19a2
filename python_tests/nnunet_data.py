"""Raw data sets of nnU-Net, made from the real hippocampus images."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
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


class _Threads:
    """A context of multiprocessing whose pools have threads."""

    Pool = staticmethod(ThreadPool)

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


@contextmanager
def nnunet_folders(root: Path) -> Iterator[pytest.MonkeyPatch]:
    """nnU-Net's folders below `root`; its work is done in this process.

    Each of its pools would start eight processes, all of which import torch for a case or two.
    """
    context = multiprocessing.get_context
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_compile", "f")
        patch.setenv("nnUNet_def_n_proc", "1")  # of commands that a test starts
        for name in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setattr(multiprocessing, "get_context", lambda *kind: _Threads(context(*kind)))
        yield patch


def prepare(
    root: Path, names: Sequence[str], configurations: Sequence[str], patch: pytest.MonkeyPatch
) -> None:
    """Plans, with a quarter of the features and few images a batch, and preprocessed volumes."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    numbers = [int(name[7:10]) for name in names]
    patch.setenv("nnUNet_n_proc_DA", "1")  # the planner takes no 0
    api.extract_fingerprints(numbers, num_processes=1)
    api.plan_experiments(numbers)
    for name in names:
        path = root / "preprocessed" / name / "nnUNetPlans.json"
        plans = json.loads(path.read_text())
        for each in (plans["configurations"][key] for key in configurations):
            each["batch_size"] = 2
            arguments = each["architecture"]["arch_kwargs"]
            arguments["features_per_stage"] = [n // 4 for n in arguments["features_per_stage"]]
        path.write_text(json.dumps(plans))
    processes = [1] * len(configurations)
    api.preprocess(numbers, configurations=configurations, num_processes=processes)
    patch.setenv("nnUNet_n_proc_DA", "0")  # augmentation in this process

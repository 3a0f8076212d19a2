"""A small data set with models, runs and tables of every kind that the driver reads."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import source_data
import torch
from finetune_data import (
    configuration,
    real_data,
    settings,
    stop_at,
    write_cases,
    write_config,
)

from riskmap_ext.finetune import cross_validate, finetune, parse_config
from riskmap_ext.finetune.source.network import NetworkConfig, build_network

SHAPE = (12, 16, 10)
SMALLER: dict[str, Any] = {
    "name": "UNet",
    "args": {"spatial_dims": 2, "channels": [2, 2], "strides": [2]},
}


class Place:
    """The files in `folder`, made once and copied for each call."""

    def __init__(self, work: Path) -> None:
        self.folder, self.whole = work / "place", work / "whole"
        self.output, self.marker = self.folder / "out", self.folder / "RAN"
        self.folder.mkdir(parents=True)
        _fill(self.folder, self.marker)
        self.folder.rename(self.whole)

    def renew(self) -> None:
        """Everything as it was made."""
        if not self.folder.exists():
            shutil.copytree(self.whole, self.folder)
        _made_equal(self.whole, self.folder, ())

    def restore(self, *outputs: str) -> None:
        """The inputs as they were made; the folders of outputs stay."""
        _made_equal(self.whole, self.folder, outputs)

    def inputs(self) -> dict[str, int]:
        """Sizes of the files that no command may change."""
        return {
            str(path.relative_to(self.folder)): path.lstat().st_size
            for path in self.folder.rglob("*")
            if path.relative_to(self.folder).parts[0] not in ("out", "stopped", "cache")
            and not (path.is_dir() and not path.is_symlink())
        }

    def written(self, pattern: str) -> list[Path]:
        return [path for path in self.output.rglob(pattern) if path.is_file()]

    def in_format(self, pick: random.Random, path: Path, formats: Sequence[str]) -> Path:
        """The image in another format, in its place."""
        wanted = pick.choice(formats or ("same",))
        if wanted == "same":
            return path
        image: Any = nib.load(path, mmap=False)
        values, stem = np.asarray(image.dataobj), path.name.removesuffix(".nii.gz")
        path.unlink()
        if wanted in (".mgz", ".mgh"):
            made: Any = nib.MGHImage(values.astype(np.float32), image.affine)
        elif wanted == "nifti2":
            made = nib.Nifti2Image(values, image.affine)
        elif wanted == "swapped":
            made = nib.Nifti1Image(values, image.affine, image.header.as_byteswapped())
        else:
            kind = nib.Nifti1Pair if wanted in (".hdr", ".img") else nib.Nifti1Image
            made = kind(values, image.affine)
        ending = wanted if wanted.startswith(".") else pick.choice((".nii", ".nii.gz"))
        made.to_filename(path.with_name(stem + ending))
        return path.with_name(stem + ending)


def _made_equal(whole: Path, folder: Path, left: Sequence[str]) -> None:
    """Copies what differs, and removes what is new. left: names that stay."""
    theirs = {each.name: each for each in os.scandir(whole) if each.name not in left}
    for mine in [*os.scandir(folder)]:
        other = theirs.get(mine.name)
        is_folder = mine.is_dir(follow_symlinks=False)
        if mine.name in left or (other and is_folder and other.is_dir()):
            continue
        if other is None or is_folder or _stamp(mine) != _stamp(other):
            shutil.rmtree(mine.path) if is_folder else os.unlink(mine.path)
    for name, other in theirs.items():
        there = folder / name
        if other.is_dir():
            there.mkdir(exist_ok=True)
            _made_equal(Path(other.path), there, ())
        elif not os.path.lexists(there):
            shutil.copy2(other.path, there)


def _stamp(entry: os.DirEntry[str]) -> tuple[int, int, int]:
    found = entry.stat(follow_symlinks=False)
    return found.st_mode, found.st_size, found.st_mtime_ns


# The files.


def _fill(folder: Path, marker: Path) -> None:
    write_cases(folder / "data", 3, shape=SHAPE)
    shutil.copytree(folder / "data" / "labels", folder / "predictions")
    small: dict[str, Any] = {"train": {"steps": 1, "patch_size": 8}, "network": SMALLER}
    content = settings(folder / "data", folder / "out", **small)
    write_config(folder / "run.yaml", content | {"output": "out"})
    options: dict[str, Any] = {"risk": {"use": True}, "train": {**small["train"], "steps": 2}}
    finetune(configuration(folder / "data", folder / "run", **small), progress=False)
    source = folder / "source.pt"
    shutil.move(folder / "run" / "last.pt", source)
    shutil.rmtree(folder / "run")
    options |= {"source": {"checkpoint": str(source)}, "network": small["network"]}
    finetune(configuration(folder / "data", folder / "run", **options), progress=False)
    cached = settings(folder / "data", folder / "out", **options, cache=str(folder / "cache"))
    cached["data"]["storage"] = "disk"
    write_config(folder / "cached.yaml", cached)
    finetune(parse_config(cached), progress=False)
    shutil.rmtree(folder / "out")
    stopped = settings(folder / "data", folder / "stopped", **options)
    write_config(folder / "stopped.yaml", stopped)
    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        stop_at(2, patch)
        finetune(configuration(folder / "data", folder / "stopped", **options), progress=False)
    folds = {**small, "data": {"folds": 2, "train": 2, "validation": 1}}
    cross_validate(configuration(folder / "data", folder / "folds", **folds), progress=False)
    _tables(folder)
    _sources(folder, marker)
    _real(folder)


def _tables(folder: Path) -> None:
    names = [f"case0{number}" for number in range(3)]
    for mark, path in ((",", "labels.csv"), ("\t", "labels.tsv")):
        rows = (mark.join(row) for row in (("value", "name"), ("1", "box"), ("2", "crate")))
        (folder / path).write_text("\n".join(rows) + "\n")
    splits = [{"train": [*set(names) - {name}], "val": [name]} for name in names]
    _json(folder / "splits_final.json", splits)
    pairs = [
        {"image": f"../data/images/{name}.nii.gz", "label": f"../data/labels/{name}.nii.gz"}
        for name in names
    ]
    labels = {"0": "background", "1": "box", "2": "crate"}
    told = {"name": "Boxes", "modality": {"0": "MRI"}, "labels": labels}
    _json(folder / "dec" / "dataset.json", {**told, "training": pairs[:2], "validation": pairs[2:]})
    raw = source_data.nnunet_dataset(numTraining=3)
    _json(folder / "nnu" / "dataset.json", raw)
    for name in names:
        for kind, ending in (("images", "_0000"), ("labels", "")):
            there = folder / "nnu" / f"{kind}Tr" / f"{name}{ending}.nii.gz"
            there.parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / "data" / kind / f"{name}.nii.gz", there)
    listed = {
        n: {"images": [p["image"]], "label": p["label"]} for n, p in zip(names, pairs, strict=True)
    }
    _json(folder / "listed" / "dataset.json", {**raw, "dataset": listed})


def _sources(folder: Path, marker: Path) -> None:
    network = build_network(NetworkConfig(**SMALLER), 3)
    torch.save(network.state_dict(), folder / "state.pt")
    config = source_data.bundle_config(
        network_def={**source_data.BUNDLE_NETWORK, "channels": [2, 2]}
    )
    config = json.loads(json.dumps(config).replace("'ran'", repr(str(marker))))
    definition = {k: v for k, v in config["network_def"].items() if not k.startswith("_")}
    network = build_network(NetworkConfig(name="UNet", args=definition), 3)
    source_data.save_bundle(folder / "bundle", network, config, source_data.bundle_metadata())
    try:
        plans = source_data.nnunet_plans(3)
        network = source_data.nnunet_network(plans, 1, 3)
    except ImportError:
        return
    source_data.save_nnunet(
        folder / "nnunet" / "final.pth", network, plans, source_data.nnunet_dataset()
    )


def _real(folder: Path) -> None:
    try:
        hippocampi, headers = real_data("hippocampus"), real_data("headers")
    except pytest.skip.Exception:
        return
    for name in ("images", "labels"):
        (folder / "real" / name).mkdir(parents=True)
        for path in sorted((hippocampi / name).iterdir())[:2]:
            shutil.copyfile(path, folder / "real" / name / path.name)
    (folder / "headers").mkdir()
    for path in headers.iterdir():
        if path.stat().st_size < 1_000_000 and nib.load(path, mmap=False).ndim == 3:
            shutil.copyfile(path, folder / "headers" / path.name)


def _json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))

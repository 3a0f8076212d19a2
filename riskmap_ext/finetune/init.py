"""Makes a first configuration from a folder of images and labels."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from riskmap_ext.finetune.base.device import available_memory, device_of
from riskmap_ext.finetune.base.errors import ConfigError, DataError, Problems
from riskmap_ext.finetune.base.files import named_output, stem, write_text
from riskmap_ext.finetune.base.log import Log, gib
from riskmap_ext.finetune.base.orientation import PREPARED, arranged, slice_axis_of
from riskmap_ext.finetune.config.load import parse_config
from riskmap_ext.finetune.config.schema import DataConfig, SourceConfig
from riskmap_ext.finetune.config.yaml_text import read_yaml
from riskmap_ext.finetune.data.bids import bids_files
from riskmap_ext.finetune.data.datalist import CaseFiles, Found, find_cases, list_cases, volumes_in
from riskmap_ext.finetune.data.grid import Grid
from riskmap_ext.finetune.data.labels import read_label_map
from riskmap_ext.finetune.data.volumes import (
    grid_problems,
    read_header,
    read_image_files,
    read_label,
)
from riskmap_ext.finetune.dry_run import header_problems
from riskmap_ext.finetune.folder.workspace import check_folder
from riskmap_ext.finetune.source.checkpoint import SourceModel, load_source
from riskmap_ext.finetune.source.network import spatial_dims

# For reading labels, and the images of the first of them.
_SECONDS = 20.0
_IMAGES = 5
# In Hounsfield units, air is -1000; scaled images of other modalities may be below 0, too.
_CT_BELOW = -800
# Thinner volumes get a 2-D network.
_LEAST_DEPTH = 16
_MOST_VOXELS = {"cpu": 64**3, "cuda": 128**3}
# Per voxel of a training crop, plus 24 per output: measured on the networks written here.
_BYTES = {2: 1600, 3: 600}


def write_first_config(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str] = "run.yaml",
    *,
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Writes a commented configuration for the data set in `folder` that runs without changes.

    Args:
        folder: a data set, as `data.root`; suffixes, classes and channels are detected.
        output: the file to write.
        source: checkpoint of a source model; None: train a network from scratch.
        overwrite: replace the file.
        progress: print a progress bar.

    Raises: InputError naming the folder or the files: nothing to train on, unreadable, no labels.
    """
    root, path = Path(os.path.realpath(folder)), named_output(Path(output))
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(f"--output: expected a name that ends in .yaml, got {path}")
    if path.exists() and not overwrite:
        raise ConfigError(f"--output: {path} exists already; --overwrite replaces it")
    check_folder("--output", path.absolute().parent)
    model = (
        None if source is None else load_source(SourceConfig(checkpoint=Path(source).absolute()))
    )
    data, found = _on_one_grid({"root": str(root), **_suffixes(root)})
    known, count = found.told.get("classes"), len(found.cases)
    labels: dict[str, Any] = {} if known else {"classes": ["background", "foreground"]}
    listing = list_cases(DataConfig.model_validate(data | labels))
    header_problems(listing).tell()
    log = Log(quiet=not progress)
    for note in listing.notes:
        log.warn(note)
    looked_at = found.cases[:_IMAGES] if known else found.cases
    values, read, lowest = _look(looked_at, len(listing.channels), log)
    if known:
        told = f"Classes from dataset.json: {', '.join(known)}."
    else:
        labels, told = _labels(root, found.cases, values)
        told += f" ({read} of {count} label files were read.)"
    ct = lowest < _CT_BELOW
    if ct:
        log.warn(f"assumed to be CT in Hounsfield units: the lowest intensity is {lowest:g}")
    base, run = path.absolute().parent, f"runs/{root.name}"
    runs = (run, *(f"{run}_{number}" for number in range(2, 1000)))
    text = _TEMPLATES.get_template("init.yaml.j2").render(
        cases=count,
        run=next(each for each in runs if not (base / each).exists()),
        data=data,
        told=told,
        labels=labels,
        validation=None if found.validation else math.ceil(count / 5) if count > 1 else 0,
        # A CT source has its own window.
        ct=ct and not (model and model.preprocessing.get("window")),
        source=model,
        channels=listing.channels,
        seen=_seen(model, listing.channels),
        **_sizes(found.cases, model, len(known or values)),
    )
    list_cases(parse_config(read_yaml(text)[0], base=base, origin=str(path)).data)
    write_text(path, text)
    return path


def _suffixes(root: Path) -> dict[str, Any]:
    """data.image_suffix and data.label_suffix, as far as file names show them."""
    if os.path.lexists(root / "dataset.json"):
        return {}
    for folders in (("images", "labels"), ("imagesTr", "labelsTr")):
        if all((root / name).is_dir() for name in folders):
            return _endings(*([stem(path) for path in volumes_in(root / n)] for n in folders))
    images, labels = bids_files(root)
    if not (images and labels):
        return {}
    kind = Counter(kind for _, kind, _ in labels).most_common(1)[0][0]
    cases = {case for case, label, _ in labels if label == kind}
    of_most = _of_most((image for case, image, _ in images if case in cases), cases)
    return {"image_suffix": of_most, "label_suffix": kind}


def _endings(images: list[str], labels: list[str]) -> dict[str, Any]:
    """The suffixes that most cases have."""
    for start in _cuts(labels[0]):
        suffix = labels[0][start:]
        cases = {label.removesuffix(suffix) for label in labels if label.endswith(suffix)}
        found = (next((i[n:] for n in _cuts(i) if i[:n] in cases), None) for i in images)
        if kept := _of_most((ending for ending in found if ending is not None), cases):
            return {"image_suffix": kept if any(kept) else "", "label_suffix": suffix}
    return {}


def _of_most(kinds: Iterable[str], cases: set[str]) -> list[str]:
    return sorted(kind for kind, count in Counter(kinds).items() if 2 * count > len(cases))


def _cuts(name: str) -> list[int]:
    """Where a suffix may start, searched from the end of the name."""
    return [len(name), *(n for n in reversed(range(1, len(name))) if name[n] in "_-.")]


def _on_one_grid(data: dict[str, Any]) -> tuple[dict[str, Any], Found]:
    """Drops the channels that are not on the grid of the first case's label."""
    found = find_cases(DataConfig.model_validate(data))
    suffixes, first = data.get("image_suffix", []), found.cases[0]
    if len(suffixes) > 1:
        grid, pairs = read_header(first.label), zip(suffixes, first.images, strict=True)
        fitting = [s for s, image in pairs if not grid_problems(grid, read_header(image))]
        if 0 < len(fitting) < len(suffixes):
            return _on_one_grid(data | {"image_suffix": fitting})
    return data, found


def _look(cases: Sequence[CaseFiles], channels: int, log: Log) -> tuple[list[int], int, float]:
    """Label values except 0, the number of files read and the lowest intensity, as time allows."""
    values, lowest, problems, read = set[int](), 0.0, Problems(), 0
    until = time.monotonic() + _SECONDS
    with log.counting("Looking at labels", len(cases)) as advance:
        for case in cases:
            if time.monotonic() < until:
                with problems.collected():
                    values |= set(np.unique(read_label(case.label).values).tolist())
                    if read < _IMAGES and channels == 1:
                        lowest = min(lowest, read_image_files(case.images, 1).values.min())
                read += 1
            advance(case.name)
    problems.tell()
    return sorted(values - {0}), read, lowest


def _labels(
    root: Path, cases: Sequence[CaseFiles], values: list[int]
) -> tuple[dict[str, Any], str]:
    """data.label_map from a table that has all values, and a note on where it is from."""
    if not values:
        raise DataError(f"{cases[0].label.parent}: no labels: every voxel is 0")
    for folder in (root, cases[0].label.parent, *root.glob("derivatives/*/")):
        for path in sorted(p for p in folder.iterdir() if p.suffix in (".csv", ".tsv")):
            with suppress(DataError):
                table = read_label_map(path)
                if set(values) <= table.keys():
                    whole = len(table) == len(values)
                    used = str(path) if whole else {value: table[value] for value in values}
                    return {"label_map": used}, f"Classes from {path.name}."
    names = [f"label_{value}" for value in values] if len(values) > 1 else ["foreground"]
    return {"label_map": dict(zip(values, names, strict=True))}, "Names for the values found."


def _sizes(cases: Sequence[CaseFiles], source: SourceModel | None, outputs: int) -> dict[str, Any]:
    """Sizes of a median case; the patch: the source's, or what volumes and memory allow."""
    grids = [Grid.reoriented(read_header(case.label), "RAS") for case in cases]
    spacings = np.array([grid.spacing for grid in grids])
    shape = np.median([grid.prepared_shape for grid in grids], axis=0).tolist()
    spacing = np.median(spacings, axis=0).tolist()
    dims, axis, told = 3, "axial", {} if source is None else source.preprocessing
    if source is not None:
        dims, axis = spatial_dims(source.config), told.get("slice_axis") or axis
    elif min(shape) < _LEAST_DEPTH:
        dims, axis = 2, slice_axis_of("RAS"[shape.index(min(shape))])
    shape, spacing = (arranged(values, "RAS", PREPARED[axis]) for values in (shape, spacing))
    # Deeper for large volumes; a source's network may have any depth.
    depth = 5 if source is not None else 4 if min(shape[:dims]) >= 64 else 3
    step, device = 2**depth, device_of("auto")
    cuda = device.type == "cuda"
    memory = torch.cuda.mem_get_info(device)[0] if cuda else available_memory()
    most = min(_MOST_VOXELS[device.type], memory / 8 / (_BYTES[dims] + 24 * outputs))
    patch = [max(2 * step, int(size) // step * step) for size in shape[:dims]]
    while math.prod(patch) > most and max(patch) > 2 * step:
        patch[patch.index(max(patch))] -= step
    why = f"As large as volumes and {gib(memory)} of memory allow, divisible by {step} (network)."
    if told.get("patch_size"):
        patch, why = list(told["patch_size"]), "As in the source's training."
    return {
        "sizes": [round(size) for size in shape],
        "spacing": [float(f"{size:.3g}") for size in spacing],
        "uneven": (spacings.max(axis=0) > 1.25 * spacings.min(axis=0)).any(),
        "patch": patch,
        "why": why,
        "depth": depth,
        "slice_axis": axis,
    }


def _seen(source: SourceModel | None, channels: list[str]) -> list[int]:
    """The channels that the source sees: by name, else the first ones."""
    wanted = channels if source is None else source.channels
    named = [channels.index(name) for name in wanted if name in channels]
    return named if len(named) == len(wanted) else [*range(len(wanted))]


def _yaml(value: Any) -> str:
    """On one line, or on several lines indented deeper than any key."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=90)
    return text.removesuffix("...\n").strip().replace("\n", "\n    ")


_TEMPLATES = Environment(
    loader=PackageLoader("riskmap_ext.finetune", ""),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["yaml"] = _yaml

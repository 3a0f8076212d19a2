"""A run checked without being begun: files, grids, labels, keys of the checkpoint, memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from rich.table import Table
from rich.text import Text

from riskmap_ext.finetune.base.errors import Errors, Problems
from riskmap_ext.finetune.base.lock import check_free
from riskmap_ext.finetune.base.log import Log, some
from riskmap_ext.finetune.base.processes import started
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.data.datalist import Listing
from riskmap_ext.finetune.data.memory import MemoryNeed, described
from riskmap_ext.finetune.data.prepare import all_ignored, class_voxels, each_case
from riskmap_ext.finetune.data.sampling import flip_axes
from riskmap_ext.finetune.data.splits import Split, not_validated
from riskmap_ext.finetune.data.volumes import grid_problems, read_header
from riskmap_ext.finetune.folder.workspace import check_same_run
from riskmap_ext.finetune.source.checkpoint import KeyReport
from riskmap_ext.finetune.source.model import preparation_warnings
from riskmap_ext.finetune.train.cross_validation import check_folds
from riskmap_ext.finetune.train.plan import (
    Outline,
    check_inputs,
    check_start,
    inputs_digest,
    make_outline,
    resolved,
)
from riskmap_ext.finetune.train.session import session
from riskmap_ext.finetune.train.step import loss_in_words

# For reading whole volumes; of further ones the headers are enough.
_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run would work on. class_voxels: class -> voxels in the training cases read.

    Of a cross-validation, train and validation are the cases of all `folds`.
    """

    train: list[str]
    validation: list[str]
    folds: list[Split]
    read: list[str]
    class_voxels: dict[str, int]
    parameters: int
    keys: KeyReport | None
    memory: MemoryNeed


@dataclass(frozen=True, kw_only=True)
class _Read:
    """names: of the cases that were read. digests: of the training cases among them."""

    names: list[str]
    class_voxels: dict[str, int]
    digests: list[str]


def check_run(config: Config, *, progress: bool = True, resume: bool = False) -> DryRun:
    """Checks everything a run would check, in under a minute, and writes nothing.

    All headers are looked at; whole volumes and their labels are read for half a minute.

    Raises: InputError as finetune does, with a line for each problem.
    """
    group, errors, read, resumed = started(), Errors(), None, None
    with errors.collected():
        if group.is_main:  # two that look at once would each find the other
            check_free(config.output)
        config, resumed = check_start(config, resume)
    with session(config, progress=progress, processes=group) as run:
        listing, outline = make_outline(run, errors)
    log, folds = run.log, list[Split]()
    config = config if outline is None else outline.config
    if listing is not None:
        with errors.collected():
            if config.data.folds is not None:
                folds, _ = check_folds(resolved(config, listing), listing, resume)
        with errors.collected():
            if resumed is not None:
                check_same_run(resolved(config, listing))
        with errors.collected():
            read = _read_some(config, listing, outline, log)
    errors.tell()
    assert listing is not None
    assert outline is not None
    assert read is not None
    models = outline.models
    if len(read.digests) == len(listing.train):
        check_inputs(resumed, inputs_digest(models.source, read.digests))
    names = [case.name for case in listing.train]
    warnings = [*config.notes, *(not_validated(folds, names) if folds else [])]
    if models.source is not None:
        warnings += preparation_warnings(config, models.source)
    for warning in warnings:
        log.warn(warning)
    result = DryRun(
        train=[case.name for case in listing.train],
        validation=[case.name for case in listing.validation]
        + [name for fold in folds for name in fold.val],
        folds=folds,
        read=read.names,
        class_voxels=read.class_voxels,
        parameters=models.parameters,
        keys=models.keys,
        memory=outline.memory,
    )
    log.table(_table(config, outline, result, f"{run.device}"))
    log(described(outline.memory, outline.store))
    for name, count in read.class_voxels.items():
        if count == 0:
            log.warn(
                f"no voxel of class {name} in the {len(read.digests)} training cases that were read"
            )
    total = len({*result.train, *result.validation})
    rest = total - len(read.names)
    by_header = f" ({rest} by their headers alone)" if rest else ""
    verdict = "nothing is in the way of this run, and nothing was written"
    log(f"{total} cases checked{by_header}: {verdict}")
    return result


def header_problems(listing: Listing) -> Problems:
    problems = Problems()
    for case in (*listing.train, *listing.validation):
        with problems.collected():
            stacked = len(listing.channels) if len(case.images) == 1 else 1
            image = read_header(case.images[0], stacked)
            problems += grid_problems(image, read_header(case.label))
            for path in case.images[1:]:
                problems += grid_problems(image, read_header(path))
    return problems


def _read_some(config: Config, listing: Listing, outline: Outline | None, log: Log) -> _Read:
    """Raises: DataError with a line for each problem of the cases that were read."""
    classes, train = listing.structures.classes, {case.name for case in listing.train}
    counts = torch.zeros(len(classes), dtype=torch.float64)
    names: list[str] = []
    digests: list[str] = []
    problems = Problems()
    until = time.monotonic() + _SECONDS
    for case in each_case(listing, config.data, problems, log=log, until=until):
        if not names and outline is not None:
            flip_axes(case, outline.models.dims, config.train.augment)
        names.append(case.name)
        if case.name in train:
            counts += class_voxels([case], len(counts))
            digests.append(case.digest)
    problems = Problems(dict.fromkeys([*header_problems(listing), *problems]))
    problems.tell()
    if len(digests) == len(train) and not counts.any():
        raise all_ignored(listing)
    voxels = {name: int(count) for name, count in zip(classes, counts, strict=True)}
    return _Read(names=names, class_voxels=voxels, digests=digests)


def _table(config: Config, outline: Outline, result: DryRun, device: str) -> Table:
    listing, models = outline.listing, outline.models
    table = Table(title="The run", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    voxels = sum(result.class_voxels.values())
    shares = ", ".join(
        f"{name} {count / max(voxels, 1):.2%}" for name, count in result.class_voxels.items()
    )
    rows = {
        "output": str(config.output),
        "training cases": _names(result.train),
        "validation cases": _names(result.validation) or "none: no Dice",
        "folds": ", ".join(f"{len(fold.train)} + {len(fold.val)} cases" for fold in result.folds),
        "channels": ", ".join(listing.channels) if len(listing.channels) > 1 else "",
        "training classes": shares,
        "regions": ", ".join(listing.structures.regions or []),
        "network": f"{models.config.name}, {result.parameters:,} parameters, on {device}",
        "patches": f"{config.train.batch_size} of {models.patch}, {config.train.steps} steps",
        "source": "none: training from scratch"
        if models.source is None
        else str(models.source.path),
        "weights": "" if result.keys is None else result.keys.summary(),
        "loss": loss_in_words(config),
        "fused with the loss": ", ".join(models.fused),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    return table


def _names(names: list[str]) -> str:
    return f"{len(names)} ({some(names)})" if names else ""

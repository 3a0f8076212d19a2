"""Checks a run without starting it: files, grids, labels, keys of the checkpoint, memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from riskmap_ext.finetune.base.errors import InputError, Problems
from riskmap_ext.finetune.base.processes import started
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.data.datalist import Listing
from riskmap_ext.finetune.data.memory import MemoryNeed, described
from riskmap_ext.finetune.data.prepare import all_ignored, class_voxels, each_case
from riskmap_ext.finetune.data.splits import Split, not_validated
from riskmap_ext.finetune.data.volumes import grid_problems, read_header
from riskmap_ext.finetune.source.checkpoint import KeyReport
from riskmap_ext.finetune.train.plan import (
    check_inputs,
    make_outline,
    memory_of,
    tell_cases,
)
from riskmap_ext.finetune.train.session import Session, session
from riskmap_ext.finetune.train.step import loss_in_words

# For reading whole volumes; of the others, only the headers are checked.
_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run would work on. class_voxels: class -> voxels in the training cases read.

    For a cross-validation, train and validation are the cases of all `folds`.
    """

    train: list[str]
    validation: list[str]
    folds: list[Split]
    read: list[str]
    class_voxels: dict[str, int]
    keys: KeyReport | None
    memory: MemoryNeed


class _Read(NamedTuple):
    """What is kept of a case after reading it."""

    digest: str
    class_voxels: Tensor


def check_run(config: Config, *, progress: bool = True, resume: bool = False) -> DryRun:
    """Checks everything a run would check, in under a minute, and writes nothing.

    All headers are checked; whole volumes and their labels are read for half a minute.

    Raises: InputError as finetune does, with a line for each problem.
    """
    problems, read, need, store = Problems(), dict[str, _Read](), None, None
    with session(config, progress=progress, processes=started()) as run:
        listing, outline = make_outline(run, problems, resume=resume)
        if listing is not None:
            with problems.collected(InputError):
                read = _read_some(outline or run, listing)
        if outline is not None:
            with problems.collected(InputError):
                need, store = memory_of(outline)
    problems.tell()
    assert outline is not None
    assert need is not None
    log, listing, folds = run.log, outline.listing, outline.splits
    train = [read[case.name] for case in listing.train if case.name in read]
    cases = [*listing.train, *listing.validation]
    if all(case.name in read for case in cases):
        check_inputs(outline, [read[case.name].digest for case in cases])
    names, classes = [case.name for case in listing.train], listing.structures.classes
    voxels = sum((case.class_voxels for case in train), torch.zeros(len(classes)))
    log(f"Loss: {loss_in_words(config)}")
    which = f"the {len(train)} training cases that were read"
    tell_cases(outline, voxels, which)
    for warning in not_validated(folds, names) if folds else []:
        log.warn(warning)
    log(described(need, store))
    validation = [case.name for case in listing.validation]
    validation += [name for fold in folds for name in fold.val]
    total = len({*names, *validation})
    by_header = f" ({total - len(read)} by header only)" if len(read) < total else ""
    log(f"{total} cases checked{by_header}: nothing is in the way of this run")
    return DryRun(
        train=names,
        validation=validation,
        folds=folds,
        read=[*read],
        class_voxels={name: int(n) for name, n in zip(classes, voxels, strict=True)},
        keys=outline.models.keys,
        memory=need,
    )


def header_problems(listing: Listing) -> Problems:
    problems = Problems()
    for case in (*listing.train, *listing.validation):
        with problems.collected():
            stacked = len(listing.channels) if len(case.images) == 1 else 1
            image = read_header(case.images[0], stacked)
            for path in (case.label, *case.images[1:]):
                problems += grid_problems(image, read_header(path))
    return problems


def _read_some(run: Session, listing: Listing) -> dict[str, _Read]:
    """By case name. Raises: DataError with a line for each problem of the cases read."""
    count, problems, read = len(listing.structures.classes), Problems(), dict[str, _Read]()
    until = time.monotonic() + _SECONDS
    for case in each_case(listing, run.config.data, problems, log=run.log, until=until):
        read[case.name] = _Read(case.digest, class_voxels([case], count))
    Problems(dict.fromkeys([*header_problems(listing), *problems])).tell()
    train = [read.get(case.name) for case in listing.train]
    if not any(case is None or case.class_voxels.any() for case in train):
        raise all_ignored(listing)
    return read

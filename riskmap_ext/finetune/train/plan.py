"""Every input of a run, checked before anything is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from riskmap_ext._files import digest
from riskmap_ext._prior import add_prior, prior_logits
from riskmap_ext.finetune.base.device import available_memory
from riskmap_ext.finetune.base.errors import ConfigError, InputError, Problems
from riskmap_ext.finetune.base.lock import check_free
from riskmap_ext.finetune.base.log import gib, some
from riskmap_ext.finetune.base.orientation import PREPARED
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.data.datalist import Listing, list_cases
from riskmap_ext.finetune.data.memory import MemoryNeed, described, memory_need, volume_store
from riskmap_ext.finetune.data.prepare import Case, Cases, prepare_cases
from riskmap_ext.finetune.data.sampling import flip_axes
from riskmap_ext.finetune.data.splits import SPLITS_FILE, Split, make_splits, read_splits
from riskmap_ext.finetune.folder.workspace import (
    check_inputs_stay,
    check_output,
    check_same_run,
    finished,
    fold_folders,
    unfinished_run,
)
from riskmap_ext.finetune.source.checkpoint import source_of
from riskmap_ext.finetune.source.model import preparation_warnings, prepared_as_source
from riskmap_ext.finetune.train.maps import SourceMaps
from riskmap_ext.finetune.train.models import Models, build_models, network_and_patch
from riskmap_ext.finetune.train.session import Session

# (logits [B, C, *P], label, risk or None, foreground, as in Batch) -> a scalar.
LossFunction = Callable[[Any, Tensor, Tensor | None, Tensor], Tensor]
# (maps, training cases) -> case name -> voxel weights [X, Y, Z] on the prepared grid.
WeightFunction = Callable[[SourceMaps, Sequence[Case]], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Outline(Session):
    """What headers and blank patches tell about a run, before any volume is read.

    config: with what the data set specifies, and the source's preprocessing. splits: of
    `data.folds`. resume: whether to go on with what the output folder holds. resumed: the content
    of resume.pt if a run is resumed; empty for a cross-validation.
    """

    listing: Listing
    models: Models
    splits: list[Split]
    resume: bool
    resumed: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Plan(Outline):
    """Everything that is known once all inputs have been checked.

    inputs: digest of the source and all cases.
    """

    cases: Cases
    inputs: str


def make_outline(
    run: Session, problems: Problems, *, resume: bool = False, cases: Cases | None = None
) -> tuple[Listing | None, Outline | None]:
    """What can be known without reading a volume, about the cases whose files exist.

    problems: collects the InputErrors of the checks. cases: if they have been read already.
    """
    config = run.config
    listing = models = resumed = None
    splits: list[Split] = []
    with problems.collected(InputError):
        if run.processes.is_main:  # two checks at once would each find the other
            check_free(config.output)
        resumed = unfinished_run(config) if resume else None
        if resumed is None:
            check_output(config, replace=resume)  # without resume.pt, nothing would be lost
    with problems.collected(InputError):
        _check_options(run)
    with problems.collected(InputError):
        if cases is not None:
            _check_cases(config, cases)
        listing = list_cases(config.data) if cases is None else cases.listing
        check_inputs_stay(config, listing)
        config = _resolved(config, listing)
        _tell_listing(run, listing)
    with problems.collected(InputError):
        source = source_of(config)
        if cases is None:
            config = prepared_as_source(config, source)
        if listing is None:
            network_and_patch(config, source)
        else:
            models = build_models(replace(run, config=config), listing, source)
            _check_batch(run, models, listing)
            flip_axes(PREPARED[config.data.slice_axis], len(models.patch), config.train.augment)
    if listing is not None:
        with problems.collected(InputError):
            if resumed is not None:
                check_same_run(config)
            if config.data.folds is not None:
                splits = make_splits(config, [case.name for case in listing.train])
                sizes = Counter(f"{len(each.train)} + {len(each.val)}" for each in splits)
                told = ", ".join(f"{n} of {size} cases" for size, n in sizes.items())
                run.log(f"Folds: {told}")
                if resumed is not None:
                    _check_folds(config, splits)
    if listing is None or models is None:
        return listing, None
    given = vars(run) | {"config": config, "resume": resume, "resumed": resumed}
    return listing, Outline(**given, listing=listing, models=models, splits=splits)


def read_inputs(run: Session, *, resume: bool, cases: Cases | None = None) -> tuple[Outline, Cases]:
    """The outline, and the cases unless they are given. Raises: InputError with all problems."""
    problems = Problems()
    _, outline = make_outline(run, problems, resume=resume, cases=cases)
    problems.tell()
    assert outline is not None
    if cases is None:
        need, store = memory_of(outline)
        config, listing = outline.config, outline.listing
        cases = prepare_cases(config, listing=listing, store=store, log=run.log)
        run.log(described(need, store))
    return outline, cases


def make_plan(run: Session, *, cases: Cases | None = None, resume: bool = False) -> Plan:
    """Checks every input. Raises: InputError."""
    outline, cases = read_inputs(run, resume=resume, cases=cases)
    inputs = check_inputs(outline, [case.digest for case in (*cases.train, *cases.validation)])
    tell_cases(outline, cases.class_voxels)
    if outline.config.data.spacing is not None:
        _check_sizes(outline, cases.train)
    if outline.models.fresh and outline.resumed is None:
        counts, table = cases.class_voxels, cases.structures.table
        if table is None:
            prior = prior_logits(counts)
        else:
            prior = prior_logits(table.double() @ counts / counts.sum(), sigmoid=True)
        add_prior(outline.models.fresh, prior)
        named = zip(cases.structures.outputs, prior, strict=True)
        told = ", ".join(f"{name} {value:.2f}" for name, value in named)
        run.log(f"The output layer starts at the class prior: {told}")
    return Plan(**vars(outline), cases=cases, inputs=inputs)


def memory_of(outline: Outline) -> tuple[MemoryNeed, Path | None]:
    """What the run will take, and the folder of its volumes. Raises: DataError if it cannot fit."""
    config, listing, source = outline.config, outline.listing, outline.models.source
    outputs = listing.structures.num_outputs
    if source is not None:
        outputs = max(outputs, source.structures.num_outputs)
    need = memory_need(config, listing, outputs)
    return need, volume_store(config, need, outline.device)


def _resolved(config: Config, listing: Listing) -> Config:
    """With what the data set itself specifies about labels and channels, as keys of `data`."""
    told = {
        "classes": listing.structures.classes,
        "label_map": listing.label_map,
        "regions": listing.structures.regions,
        "region_classes": listing.structures.region_classes,
        "channels": listing.channels,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=told)})


def check_inputs(outline: Outline, cases: Sequence[str]) -> str:
    """The digest of the source's weights and of the cases' own digests.

    Raises: ConfigError if a resumed run started with others.
    """
    source, resumed = outline.models.source, outline.resumed
    inputs = digest(None if source is None else source.digest, list(cases))
    if resumed and resumed["inputs"] != inputs:
        raise ConfigError(
            "--resume: the source checkpoint or the cases have changed since the run started; set "
            "overwrite=true without --resume to start anew"
        )
    return inputs


def _check_folds(config: Config, splits: list[Split]) -> None:
    """Checks that the folds are those of the unfinished run, and can be resumed."""
    path = config.output / SPLITS_FILE
    if read_splits(path) != splits:
        raise ConfigError(f"--resume: {path}: has other folds than data.folds makes of the cases")
    for folder in fold_folders(config.output):
        if not finished(folder):
            unfinished_run(config.model_copy(update={"output": folder}))


def _check_options(run: Session) -> None:
    """Keys that only the device or the number of processes can reject."""
    train, processes = run.config.train, run.processes
    if train.amp == "fp16" and run.device.type != "cuda":
        raise ConfigError("train.amp: fp16 needs a CUDA device; use bf16 or none")
    if train.batch_size % processes.size:
        raise ConfigError(
            f"train.batch_size: expected a multiple of the {processes.size} processes of torchrun, "
            f"got {train.batch_size}"
        )


def _check_batch(run: Session, models: Models, listing: Listing) -> None:
    """Crops, logits and their gradient must fit; what else the network keeps is unknown."""
    count = run.config.train.batch_size
    voxels = count // run.processes.size * math.prod(models.patch)
    needed = voxels * (4 * len(listing.channels) + 8 * listing.structures.num_outputs)
    available = available_memory()
    if run.device.type == "cpu" and needed > available:
        raise ConfigError(
            f"train.batch_size: {count} crops of {models.patch} take {gib(needed)} or more, and "
            f"{gib(available)} of memory is available"
        )


def _check_sizes(outline: Outline, train: Sequence[Case]) -> None:
    """Warns of volumes that are small compared with the patch."""
    patch, shapes = outline.models.patch, {case.name: tuple(case.label.shape) for case in train}
    small = [n for n, s in shapes.items() if any(2 * a < b for a, b in zip(s, patch, strict=False))]
    if small:
        outline.log.warn(
            f"data.spacing makes {len(small)} of {len(train)} training volumes less than half as "
            f"large as the patch {patch} (such as {small[0]}, {shapes[small[0]]}): most of each "
            "crop lies outside the image; use a finer spacing or a smaller train.patch_size"
        )


def _check_cases(config: Config, cases: Cases) -> None:
    """Checks that they match this `data` section; where volumes are kept does not matter."""
    mine, theirs = (data.model_dump(exclude={"storage"}) for data in (config.data, cases.data))
    if changed := [key for key in mine if mine[key] != theirs[key]]:
        key = changed[0]
        raise ConfigError(
            f"cases: prepared with data.{key}={theirs[key]!r}, the configuration has "
            f"{mine[key]!r}; call prepare_cases with it"
        )


def _tell_listing(run: Session, listing: Listing) -> None:
    for note in (*listing.notes, *run.config.notes):
        run.log.warn(note)
    for title, cases in (("Training", listing.train), ("Validation", listing.validation)):
        if cases:
            names = some([case.name for case in cases])
            run.log(f"{title} cases: {len(cases)} ({names})")
    if len(listing.channels) > 1:
        run.log("Channels: " + ", ".join(listing.channels))
    if listing.structures.regions is not None:
        run.log("Regions: " + ", ".join(listing.structures.regions))


def tell_cases(
    outline: Outline,
    class_voxels: Tensor,
    which: str = "the training cases",
) -> None:
    """Logs the classes of the training cases."""
    counts = dict(zip(outline.listing.structures.classes, class_voxels.tolist(), strict=True))
    total = max(sum(counts.values()), 1)
    shares = (f"{name} {count / total:.2%}" for name, count in counts.items())
    outline.log("Classes: " + ", ".join(shares))
    for name in (name for name, count in counts.items() if count == 0):
        outline.log.warn(f"no voxel of class {name} in {which}")
    if outline.models.source is not None:
        for warning in preparation_warnings(outline.config, outline.models.source):
            outline.log.warn(warning)

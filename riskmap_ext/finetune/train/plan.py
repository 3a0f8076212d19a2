"""Every input of a run, checked before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from riskmap_ext._files import digest
from riskmap_ext._prior import add_prior, prior_logits
from riskmap_ext.finetune.base.device import available_memory
from riskmap_ext.finetune.base.errors import ConfigError, Errors, Problems
from riskmap_ext.finetune.base.log import gib
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.data.datalist import Listing, list_cases
from riskmap_ext.finetune.data.memory import MemoryNeed, described, memory_need, volume_store
from riskmap_ext.finetune.data.prepare import Case, Cases, prepare_cases
from riskmap_ext.finetune.data.sampling import flip_axes
from riskmap_ext.finetune.folder.workspace import check_output, unfinished_run
from riskmap_ext.finetune.source.checkpoint import SourceModel, source_of
from riskmap_ext.finetune.source.model import preparation_warnings, prepared_as_source
from riskmap_ext.finetune.train.maps import SourceMaps
from riskmap_ext.finetune.train.models import Models, build_models, network_and_patch
from riskmap_ext.finetune.train.session import Session

# (logits [B, C, *P], label, risk or None, foreground, as in Batch) -> a scalar.
LossFunction = Callable[[Any, Tensor, Tensor | None, Tensor], Tensor]
# (maps, training cases) -> case name -> voxel weights [X, Y, Z] on the prepared grid.
WeightFunction = Callable[[SourceMaps, Sequence[Case]], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What headers and blank patches tell of a run, before a volume is read.

    config: with the source's preparation.
    """

    config: Config
    listing: Listing
    models: Models
    memory: MemoryNeed
    store: Path | None


@dataclass(frozen=True, kw_only=True)
class Plan(Session):
    """Everything that is known once all inputs are checked.

    inputs: digest of the source and the training cases. resumed: what resume.pt holds. loss,
    weights: the caller's own.
    """

    cases: Cases
    models: Models
    inputs: str
    resumed: dict[str, Any] | None
    loss: LossFunction | None
    weights: WeightFunction | None


def check_start(config: Config, resume: bool = False) -> tuple[Config, dict[str, Any] | None]:
    """Whether a run may begin in, or go on from, what the output folder holds.

    Returns: the configuration, and what resume.pt holds where there is a run to go on with.
    """
    resumed = unfinished_run(config) if resume else None
    if resumed is None:
        if resume:  # nothing that would be lost
            config = config.model_copy(update={"overwrite": True})
        check_output(config)
    return config, resumed


def make_outline(session: Session, errors: Errors) -> tuple[Listing | None, Outline | None]:
    """What can be known without reading a volume, of the cases whose files are there.

    errors: takes the InputErrors, each of a check of its own.
    """
    config, missing = session.config, Problems()
    listing = outline = None
    with errors.collected():
        _check_options(session)
    with errors.collected():
        listing = list_cases(config.data, missing)
        for note in listing.notes:
            session.log.warn(note)
        missing.tell()
    with errors.collected():
        source = source_of(config)
        config = prepared_as_source(config, source)
        if listing is None:
            network_and_patch(config, source)
        else:
            outline = _outline(replace(session, config=config), listing, source)
    return listing, outline


def whole_outline(session: Session) -> Outline:
    """Raises: InputError with all that is in the way."""
    errors = Errors()
    _, outline = make_outline(session, errors)
    errors.tell()
    assert outline is not None
    return outline


def _outline(session: Session, listing: Listing, source: SourceModel | None) -> Outline:
    config, models = session.config, build_models(session, listing, source)
    sources = [] if models.source is None else [models.source.structures]
    outputs = max(each.num_outputs for each in (listing.structures, *sources))
    _check_batch(session, models, len(listing.channels), listing.structures.num_outputs)
    memory = memory_need(config, listing, outputs)
    store = volume_store(config, memory, session.device)
    return Outline(config=config, listing=listing, models=models, memory=memory, store=store)


def make_plan(
    session: Session,
    *,
    cases: Cases | None = None,
    resumed: dict[str, Any] | None = None,
    loss: LossFunction | None = None,
    weights: WeightFunction | None = None,
) -> Plan:
    """Checks every input. Raises: InputError."""
    config = session.config
    if cases is None:
        outline = whole_outline(session)
        config, models = outline.config, outline.models
        cases = read_cases(session, outline)
    else:
        _check_options(session)
        _check_cases(config, cases)
        models = build_models(session, cases.listing, source_of(config))
        for note in cases.listing.notes:
            session.log.warn(note)
    flip_axes(cases.train[0], models.dims, config.train.augment)
    if models.fresh:
        add_prior(models.fresh, class_prior(cases))
    inputs = inputs_digest(models.source, [case.digest for case in cases.train])
    check_inputs(resumed, inputs)
    return Plan(
        **vars(session) | {"config": resolved(config, cases.listing)},
        cases=cases,
        models=models,
        inputs=inputs,
        resumed=resumed,
        loss=loss,
        weights=weights,
    )


def read_cases(session: Session, outline: Outline) -> Cases:
    """Raises: DataError with a line for each problem."""
    listing, store = outline.listing, outline.store
    cases = prepare_cases(outline.config, listing=listing, store=store, log=session.log)
    session.log(described(outline.memory, store))
    return cases


def resolved(config: Config, listing: Listing) -> Config:
    """With what the data set itself has said of labels and channels, as keys of `data`."""
    told = {
        "classes": listing.structures.classes,
        "label_map": listing.label_map,
        "regions": listing.structures.regions,
        "region_classes": listing.structures.region_classes,
        "channels": listing.channels,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=told)})


def class_prior(cases: Cases) -> Tensor:
    """What the outputs start at: log frequencies, or logits of the regions' frequencies."""
    counts, table = cases.class_voxels, cases.structures.table
    if table is None:
        return prior_logits(counts)
    return prior_logits(table.double() @ counts / counts.sum(), sigmoid=True)


def inputs_digest(source: SourceModel | None, cases: list[str]) -> str:
    """Of the source's weights and the digests of the training cases."""
    return digest(None if source is None else source.digest, cases)


def check_inputs(resumed: dict[str, Any] | None, inputs: str) -> None:
    """Raises: ConfigError where a run that is gone on with was begun with others."""
    if resumed is not None and resumed["inputs"] != inputs:
        raise ConfigError(
            "--resume: the source checkpoint or the training cases have changed since the run was "
            "begun; overwrite=true without --resume starts anew"
        )


def _check_options(session: Session) -> None:
    """Keys that only the device or the number of processes can refuse."""
    train, processes = session.config.train, session.processes
    if train.amp == "fp16" and session.device.type != "cuda":
        raise ConfigError("train.amp: fp16 needs a CUDA device; use bf16 or none")
    if train.batch_size % processes.size:
        raise ConfigError(
            f"train.batch_size: expected a multiple of the {processes.size} processes of torchrun, "
            f"got {train.batch_size}"
        )


def _check_batch(session: Session, models: Models, channels: int, outputs: int) -> None:
    """Crops, logits and their gradient alone must fit; what the network keeps is unknown."""
    train = session.config.train
    voxels = train.batch_size // session.processes.size * math.prod(models.patch)
    needed, available = voxels * (4 * channels + 8 * outputs), available_memory()
    if session.device.type == "cpu" and needed > available:
        raise ConfigError(
            f"train.batch_size: {train.batch_size} crops of {models.patch} take {gib(needed)} or "
            f"more, and {gib(available)} of memory is available"
        )


def _check_cases(config: Config, cases: Cases) -> None:
    """That they are of this `data` section; where volumes are kept changes nothing."""
    mine, theirs = (data.model_dump(exclude={"storage"}) for data in (config.data, cases.data))
    if changed := [key for key in mine if mine[key] != theirs[key]]:
        key = changed[0]
        raise ConfigError(
            f"cases: prepared with data.{key}={theirs[key]!r}, the configuration has "
            f"{mine[key]!r}; prepare_cases makes them for it"
        )


def tell_plan(plan: Plan) -> None:
    """What will be trained, in the log."""
    log, cases, models, config = plan.log, plan.cases, plan.models, plan.config
    log(
        f"{len(cases.train)} training and {len(cases.validation)} validation cases; classes: "
        + ", ".join(cases.classes)
    )
    for name, count in zip(cases.classes, cases.class_voxels, strict=True):
        if count == 0:
            log.warn(f"no voxel of class {name} in the training cases")
    if cases.structures.regions is not None:
        log("Regions: " + ", ".join(cases.structures.regions))
    if len(cases.channels) > 1:
        log("Channels: " + ", ".join(cases.channels))
    if config.data.spacing is not None:
        _warn_of_small_volumes(plan)
    many = f", {plan.processes.size} processes" if plan.processes.size > 1 else ""
    log(
        f"{models.config.name}, {models.parameters:,} parameters, patches of {models.patch}, on "
        f"{plan.device}{many}"
    )
    if models.fused:
        log(f"No logits are kept in training: {', '.join(models.fused)} is fused with the loss")
    if models.not_fused is not None:
        log(f"The loss takes whole logits, loss.fused_head does not apply: {models.not_fused}")
    _tell_source(plan)
    _tell_head(plan)
    norms = [m for m in models.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms and plan.processes.size > 1 and plan.device.type != "cuda":
        log.warn(
            "the network has batch normalization: on the CPU each process normalizes by its own "
            "part of the batch"
        )


def _tell_source(plan: Plan) -> None:
    log, source, keys = plan.log, plan.models.source, plan.models.keys
    if source is None:
        return
    for warning in preparation_warnings(plan.config, source):
        log.warn(warning)
    if keys is None:
        return
    log(f"Weights from {source.path}: {keys.summary()}")
    theirs, mine = (list(each.scored) for each in (source.structures, plan.cases.structures))
    if not keys.reinitialized and theirs != mine:
        log(
            f"The output layer is the source's ({', '.join(theirs)}); "
            "source.head=reinitialize makes a fresh one"
        )
    if len(keys.loaded) * 2 < len(plan.models.network.state_dict()):
        log.warn("less than half of the network's weights come from the source")


def _tell_head(plan: Plan) -> None:
    models, structures = plan.models, plan.cases.structures
    if plan.resumed is not None:
        return
    if models.no_prior is not None:
        plan.log.warn(f"train.head_init: no class prior: {models.no_prior}")
    elif models.fresh:
        prior = zip(structures.outputs, class_prior(plan.cases), strict=True)
        told = ", ".join(f"{name} {value:.2f}" for name, value in prior)
        plan.log(f"The output layer starts at the class prior: {told}")


def _warn_of_small_volumes(plan: Plan) -> None:
    train, patch = plan.cases.train, plan.models.patch
    small = [
        case
        for case in train
        if any(2 * size < crop for size, crop in zip(case.label.shape, patch, strict=False))
    ]
    if small:
        shape = list(small[0].label.shape)
        plan.log.warn(
            f"data.spacing makes {len(small)} of {len(train)} training volumes less than half as "
            f"large as the patch {patch} (such as {small[0].name}, {shape}): most of each crop "
            "lies outside the image; use a finer spacing or a smaller train.patch_size"
        )

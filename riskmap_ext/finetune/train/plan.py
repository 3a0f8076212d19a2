"""Every input of a run, checked before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from riskmap_ext._files import digest
from riskmap_ext.finetune.base.errors import ConfigError
from riskmap_ext.finetune.base.log import Log
from riskmap_ext.finetune.base.orientation import PREPARED, arranged, orient
from riskmap_ext.finetune.base.processes import Processes
from riskmap_ext.finetune.base.structures import Structures
from riskmap_ext.finetune.config.schema import Config, NetworkConfig
from riskmap_ext.finetune.data.datalist import list_cases
from riskmap_ext.finetune.data.memory import described, memory_need, volume_store
from riskmap_ext.finetune.data.prepare import Cases, prepare_cases
from riskmap_ext.finetune.data.sampling import flip_axes
from riskmap_ext.finetune.data.storage import TensorStore
from riskmap_ext.finetune.source.checkpoint import (
    KeyReport,
    SourceModel,
    load_source,
    start_from_source,
)
from riskmap_ext.finetune.source.network import (
    build_network,
    check_forward,
    check_single_crops,
    fused_heads,
    patch_size,
    spatial_dims,
    without_channels,
)
from riskmap_ext.finetune.source.predictor import Predictor

# Of data.normalize; sources of other tools may have been trained with more.
KNOWN_NORMALIZATIONS = ("zscore", "none")

Spacings = Sequence[tuple[float, float, float]]


@dataclass
class Models:
    """The network that is trained and the source it starts from, both tried on a blank patch."""

    source: SourceModel | None
    source_predictor: Predictor | None
    network: nn.Module
    config: NetworkConfig
    predictor: Predictor
    dims: int
    patch: list[int]
    keys: KeyReport | None
    fused: list[str]  # heads that the loss carries out
    not_fused: str | None  # why there are none with many outputs


@dataclass
class Plan:
    """Everything that is known once all inputs are checked."""

    config: Config
    log: Log
    device: torch.device
    processes: Processes
    cases: Cases
    store: TensorStore
    models: Models
    inputs: str  # digest of the source and the training cases
    resumed: dict[str, Any] | None


def make_plan(
    config: Config,
    cases: Cases | None,
    device: torch.device,
    processes: Processes,
    log: Log,
    resumed: dict[str, Any] | None,
) -> Plan:
    """Checks every input. Raises: InputError."""
    check_options(config, device, processes)
    store = TensorStore()
    if cases is None:
        listing = list_cases(config.data)
        models = build_models(config, listing.structures, listing.channels, device, processes)
        need = memory_need(config, listing, most_outputs(models, listing.structures))
        store = volume_store(config, need, device)
        cases = read_cases(config, log, store)
        log(described(need, store))
    else:
        models = build_models(config, cases.structures, cases.channels, device, processes)
    flip_axes(cases.train[0], models.dims, config.train.augment)
    config = resolved(config, cases.structures, cases.label_map, cases.channels)
    inputs = inputs_digest(models.source, [case.digest for case in cases.train])
    check_inputs(resumed, inputs)
    return Plan(config, log, device, processes, cases, store, models, inputs, resumed)


def resolved(
    config: Config,
    structures: Structures,
    label_map: dict[int, int | str] | None,
    channels: list[str],
) -> Config:
    """With what the data set itself has said of labels and channels, as keys of `data`."""
    told = {
        "classes": structures.classes,
        "label_map": label_map,
        "regions": structures.regions,
        "region_classes": structures.region_classes,
        "channels": channels,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=told)})


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


def check_options(config: Config, device: torch.device, processes: Processes) -> None:
    """Keys that only the device or the number of processes can refuse."""
    train = config.train
    if train.amp == "fp16" and device.type != "cuda":
        raise ConfigError("train.amp: fp16 needs a CUDA device; use bf16 or none")
    if train.batch_size % processes.size:
        raise ConfigError(
            f"train.batch_size: expected a multiple of the {processes.size} processes of torchrun, "
            f"got {train.batch_size}"
        )


def build_models(
    config: Config,
    structures: Structures,
    channels: list[str],
    device: torch.device,
    processes: Processes,
) -> Models:
    """Raises: InputError for a checkpoint, a network or a patch size that does not fit."""
    source = None if config.source is None else load_source(config.source)
    source_predictor = (
        None if source is None else predictor_of_source(config, source, channels, device)
    )
    wanted = _wanted_network(config, source)
    dims = spatial_dims(wanted)
    patch = patch_size(config, dims)
    count = structures.num_outputs
    wanted = without_channels(wanted, count, len(channels), "network.args")
    weights = config.loss.class_weights
    if isinstance(weights, str) and structures.regions is not None:
        raise ConfigError(f"loss.class_weights: {weights} is for classes; give a number a region")
    if isinstance(weights, list) and len(weights) != count:
        raise ConfigError(f"loss.class_weights: expected {count} numbers, got {len(weights)}")
    network = build_network(wanted, count, len(channels)).to(device)
    orient(network, wanted.orientation, config.data.slice_axis, dims)
    check_forward(network, patch, count, len(channels), "train.patch_size")
    # GPUs normalize over the batch of all processes.
    if config.train.batch_size // (1 if device.type == "cuda" else processes.size) == 1:
        check_single_crops(network, patch, len(channels))
    predictor = Predictor(network, dims, patch, config.inference)
    check_forward(network, predictor.patch, count, len(channels), "inference.patch_size")
    theirs = patch
    if wanted.orientation is not None:
        theirs = arranged(patch, PREPARED[config.data.slice_axis][:dims], wanted.orientation)
    fused, not_fused = fused_heads(
        network, config.loss.fused_head, count, [2, len(channels), *theirs]
    )
    keys = None
    if source is not None and config.source is not None and config.source.initialize:
        keys = start_from_source(network, wanted, structures, source, config.source.head)
    return Models(
        source, source_predictor, network, wanted, predictor, dims, patch, keys, fused, not_fused
    )


def _wanted_network(config: Config, source: SourceModel | None) -> NetworkConfig:
    """With the source's order of axes where its weights are taken: kernels have directions."""
    wanted = config.network or (source.config if source else None)
    assert wanted is not None  # Config asks for one of the two
    starts = source is not None and config.source is not None and config.source.initialize
    if starts and source is not None and wanted.orientation is None:
        wanted = wanted.model_copy(update={"orientation": source.config.orientation})
    return wanted


def most_outputs(models: Models, structures: Structures) -> int:
    source = 0 if models.source is None else models.source.structures.num_outputs
    return max(structures.num_outputs, source)


def predictor_of_source(
    config: Config, source: SourceModel, channels: list[str], device: torch.device
) -> Predictor:
    """Of images with these channels. Raises: ConfigError where the source sees others."""
    assert config.source is not None
    seen = _source_channels(config.source.channels, source, channels)
    dims = spatial_dims(source.config, "source.network.args")
    # The source sees windows of the size it was trained with.
    patch = _in_my_order(source, source.preprocessing.get("patch_size"), config)
    patch = patch or patch_size(config, dims)
    network = source.network.to(device)
    orient(network, source.config.orientation, config.data.slice_axis, dims)
    predictor = Predictor(network, dims, patch, config.inference, seen)
    outputs = source.structures.num_outputs
    key = "inference.patch_size"
    check_forward(network, predictor.patch, outputs, len(source.channels), key)
    return predictor


def _in_my_order(source: SourceModel, values: Any, config: Config) -> Any:
    """Sizes of a volume's axes in this run's order; a network without an order takes any."""
    if source.config.orientation is None or values is None or len(values) != 3:
        return values
    theirs = source.preprocessing.get("slice_axis", "axial")
    return arranged(values, PREPARED[theirs], PREPARED[config.data.slice_axis])


def _source_channels(
    wanted: list[int | str] | None, source: SourceModel, channels: list[str]
) -> list[int] | None:
    has = f"this data set has {len(channels)} ({', '.join(channels)})"
    if wanted is None:
        if len(source.channels) == len(channels):
            return None
        raise ConfigError(
            f"source.channels: {source.path} sees images of {len(source.channels)} channels, "
            f"{has}; say which of them it is to see, in its order, such as source.channels=[0]"
        )
    found = []
    for each in wanted:
        index = channels.index(each) if each in channels else each
        if not isinstance(index, int) or index >= len(channels):
            raise ConfigError(f"source.channels: {each!r} is no channel; {has}")
        found.append(index)
    if len(found) != len(source.channels):
        raise ConfigError(
            f"source.channels: expected {len(source.channels)}, as many as {source.path} sees, got "
            f"{len(found)}"
        )
    return found


def read_cases(config: Config, log: Log, store: TensorStore | None = None) -> Cases:
    with log.progress("cases") as bar:
        task = bar.add_task("Reading", total=None, note="")

        def advance(total: int, name: str) -> None:
            bar.update(task, total=total, advance=1, note=name)

        return prepare_cases(config, advance, store)


def preprocessing(config: Config, patch: list[int], cases: Cases | None = None) -> dict[str, Any]:
    """How images were prepared, as a checkpoint keeps it."""
    data = config.data
    return {
        "spacing": data.spacing,
        "normalize": data.normalize,
        "image_foreground": data.image_foreground,
        "slice_axis": data.slice_axis,
        "patch_size": patch,
        "image_suffix": None if cases is None else cases.image_suffix,
    }


def check_preprocessing(config: Config, source: SourceModel, spacings: Spacings, log: Log) -> None:
    """Warns where the source was trained on images prepared otherwise.

    spacings: voxel sizes of the prepared training cases.
    """
    for note in source.notes:
        log.warn(note)
    mine, theirs = preprocessing(config, []), source.preprocessing
    suffers = "its logits and the maps may suffer"
    for key in ("normalize", "image_foreground", "slice_axis"):
        if key not in theirs or mine[key] == theirs[key]:
            continue
        if key == "normalize" and theirs[key] not in KNOWN_NORMALIZATIONS:
            log.warn(
                f"the source's images were normalized by {theirs[key]}, which data.normalize does "
                f"not have; this run has {mine[key]}; {suffers}"
            )
            continue
        if key == "image_foreground" and mine["normalize"] == "none":
            continue
        log.warn(
            f"the source was trained with data.{key}={theirs[key]}, this run has {mine[key]}; "
            + suffers
        )
    spacing = _in_my_order(source, theirs.get("spacing"), config)
    if "spacing" in theirs and not _same_spacing(spacing, config, spacings):
        log.warn(
            f"the source was trained with data.spacing={spacing}, this run has "
            f"{mine['spacing']}; {suffers}"
        )
    if "pixel_size" in theirs and not _same_spacing(theirs["pixel_size"], config, spacings):
        log.warn(
            f"the source was trained on slices with pixels of {theirs['pixel_size']} mm, this run "
            f"has others (data.spacing={mine['spacing']}); {suffers}"
        )


def _same_spacing(theirs: list[float] | None, config: Config, spacings: Spacings) -> bool:
    """Up to 1 %. Voxels as they are in the files count where nothing is resampled to."""
    if theirs is None or config.data.spacing is not None:
        found = [config.data.spacing]
    else:
        found = [list(spacing) for spacing in spacings]
    if theirs is None:
        return found == [None]
    return all(
        each is not None
        and all(
            math.isclose(one, other, rel_tol=0.01) for one, other in zip(theirs, each, strict=False)
        )
        for each in found
    )


def tell_plan(plan: Plan) -> None:
    """What will be trained, in the log."""
    log, cases, models, config = plan.log, plan.cases, plan.models, plan.config
    for note in cases.notes:
        log.warn(note)
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
    parameters = sum(p.numel() for p in models.network.parameters())
    if config.data.spacing is not None:
        _warn_of_small_volumes(cases, models.patch, log)
    where = f"{plan.device}" + (
        f", {plan.processes.size} processes" if plan.processes.size > 1 else ""
    )
    name = models.config.name
    log(f"{name}, {parameters:,} parameters, patches of {models.patch}, on {where}")
    if models.fused:
        log(f"No logits are kept in training: {', '.join(models.fused)} is fused with the loss")
    if models.not_fused is not None:
        log(f"The loss takes whole logits, loss.fused_head does not apply: {models.not_fused}")
    if models.source is not None:
        check_preprocessing(config, models.source, cases.spacings, log)
    if models.keys is not None and models.source is not None:
        log(f"Weights from {models.source.path}: {models.keys.summary()}")
        theirs, mine = (list(s.scored) for s in (models.source.structures, cases.structures))
        if not models.keys.reinitialized and theirs != mine:
            log(
                f"The output layer is the source's ({', '.join(theirs)}); "
                "source.head=reinitialize makes a fresh one"
            )
        if len(models.keys.loaded) * 2 < len(models.network.state_dict()):
            log.warn("less than half of the network's weights come from the source")
    norms = [m for m in models.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms and plan.processes.size > 1 and plan.device.type != "cuda":
        log.warn(
            "the network has batch normalization: on the CPU each process normalizes by its own "
            "part of the batch"
        )


def _warn_of_small_volumes(cases: Cases, patch: list[int], log: Log) -> None:
    small = [
        case
        for case in cases.train
        if any(2 * n < p for n, p in zip(case.label.shape, patch, strict=False))
    ]
    if small:
        shape = list(small[0].label.shape)
        log.warn(
            f"data.spacing makes {len(small)} of {len(cases.train)} training volumes less than "
            f"half as large as the patch {patch} (such as {small[0].name}, {shape}): most of each "
            "crop lies outside the image; use a finer spacing or a smaller train.patch_size"
        )

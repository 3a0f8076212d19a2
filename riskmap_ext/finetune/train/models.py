"""The network to train and its source, both tried on a blank patch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from riskmap_ext._prior import head_biases
from riskmap_ext.finetune.base.errors import ConfigError
from riskmap_ext.finetune.base.orientation import PREPARED, arranged, orient
from riskmap_ext.finetune.base.structures import Structures
from riskmap_ext.finetune.config.schema import Config, NetworkConfig
from riskmap_ext.finetune.data.datalist import Listing
from riskmap_ext.finetune.source.checkpoint import (
    KeyReport,
    SourceModel,
    start_from_source,
)
from riskmap_ext.finetune.source.model import in_prepared_order
from riskmap_ext.finetune.source.network import (
    blank_image,
    build_network,
    check_forward,
    fused_heads,
    head_keys,
    patch_size,
    spatial_dims,
    without_channels,
)
from riskmap_ext.finetune.source.predictor import Predictor
from riskmap_ext.finetune.train.session import Session


@dataclass(frozen=True, kw_only=True)
class Models:
    """keys: what was done with the source's weights. fresh: biases of an output layer that is not
    the source's and is to start at the class prior."""

    source: SourceModel | None
    source_predictor: Predictor | None
    network: nn.Module
    config: NetworkConfig
    predictor: Predictor
    patch: list[int]
    keys: KeyReport | None
    fresh: dict[str, nn.Parameter]


def build_models(session: Session, listing: Listing, source: SourceModel | None) -> Models:
    """Builds them, and describes them in the log.

    Raises: InputError for a checkpoint, a network or a patch size that does not fit.
    """
    config, device, log, group = session.config, session.device, session.log, session.processes
    structures, channels = listing.structures, listing.channels
    wanted, patch = network_and_patch(config, source)
    source_predictor = (
        None if source is None else predictor_of_source(config, source, channels, device)
    )
    dims, outputs = len(patch), structures.num_outputs
    wanted = without_channels(wanted, outputs, len(channels))
    _check_class_weights(config, structures)
    network = build_network(wanted, outputs, len(channels)).to(device)
    orient(network, wanted.orientation, config.data.slice_axis, dims)
    check_forward(network, patch, outputs, len(channels), "train.patch_size")
    predictor = Predictor(network, dims, patch, config.inference, geometry=config.data.geometry)
    check_forward(network, predictor.patch, outputs, len(channels), "inference.patch_size")
    count, many = sum(each.numel() for each in network.parameters()), ""
    if group.size > 1:
        many = f", {group.size} processes"
        norms = nn.modules.batchnorm._BatchNorm
        if device.type != "cuda" and any(isinstance(m, norms) for m in network.modules()):
            log.warn(
                "the network has batch normalization: on the CPU, each process normalizes over its "
                "own part of the batch"
            )
    log(f"{wanted.name}, {count:,} parameters, patches of {patch}, on {device}{many}")
    if wanted.orientation is None:
        patch_it_sees = patch
    else:
        patch_it_sees = arranged(patch, PREPARED[config.data.slice_axis][:dims], wanted.orientation)
    shape = [2, len(channels), *patch_it_sees]
    fused, not_fused = fused_heads(network, config.loss.fused_head, outputs, shape)
    if fused:
        log(f"No logits are kept in training: {', '.join(fused)} is fused with the loss")
    if not_fused is not None:
        log(f"The loss takes whole logits, loss.fused_head does not apply: {not_fused}")
    keys = None
    if source is None or config.source is None:
        log("No source model: training from scratch")
    elif config.source.initialize:
        keys = start_from_source(network, wanted, structures, source, config.source.head)
        log(f"Weights from {source.path}: {keys.summary()}")
        theirs, mine = (list(each.scored) for each in (source.structures, structures))
        if not keys.reinitialized and theirs != mine:
            log(
                f"The output layer is the source's ({', '.join(theirs)}); "
                "source.head=reinitialize makes a fresh one"
            )
        if len(keys.loaded) * 2 < len(network.state_dict()):
            log.warn("less than half of the network's weights come from the source")
    fresh: dict[str, nn.Parameter] = {}
    loaded = set() if keys is None else set(keys.loaded)
    if config.train.head_init == "prior":
        try:
            found = head_biases(network, outputs, blank_image(network, patch, len(channels)))
            fresh = {name: bias for name, bias in found.items() if name not in loaded}
        except ValueError as error:
            if not head_keys(wanted, outputs) <= loaded:
                log.warn(f"train.head_init: no class prior: {error}")
    return Models(
        source=source,
        source_predictor=source_predictor,
        network=network,
        config=wanted,
        predictor=predictor,
        patch=patch,
        keys=keys,
        fresh=fresh,
    )


def network_and_patch(
    config: Config, source: SourceModel | None
) -> tuple[NetworkConfig, list[int]]:
    """Network and patch, as far as they do not depend on the cases.

    If the source's weights are used, the network has its order of axes: kernels have directions.
    """
    wanted = config.network or (source.config if source else None)
    assert wanted is not None  # Config requires one of the two
    starts = source is not None and config.source is not None and config.source.initialize
    if starts and source is not None and wanted.orientation is None:
        wanted = wanted.model_copy(update={"orientation": source.config.orientation})
    return wanted, patch_size(config, spatial_dims(wanted))


def _check_class_weights(config: Config, structures: Structures) -> None:
    weights, outputs = config.loss.class_weights, structures.num_outputs
    if isinstance(weights, str) and structures.regions is not None:
        raise ConfigError(f"loss.class_weights: {weights} is for classes; give a number a region")
    if isinstance(weights, list) and len(weights) != outputs:
        raise ConfigError(f"loss.class_weights: expected {outputs} numbers, got {len(weights)}")


def predictor_of_source(
    config: Config, source: SourceModel, channels: list[str], device: torch.device
) -> Predictor:
    """For images with these channels. Raises: ConfigError if the source sees others."""
    assert config.source is not None
    seen = _source_channels(config.source.channels, source, channels)
    dims = spatial_dims(source.config)
    # The source sees windows of the size it was trained with.
    patch = in_prepared_order(
        source, source.preprocessing.get("patch_size"), config.data.slice_axis
    )
    network = source.network.to(device)
    orient(network, source.config.orientation, config.data.slice_axis, dims)
    predictor = Predictor(
        network,
        dims,
        patch or patch_size(config, dims),
        config.inference,
        channels=seen,
        geometry=config.data.geometry,
    )
    outputs = source.structures.num_outputs
    check_forward(
        *(network, predictor.patch, outputs, len(source.channels), "inference.patch_size"),
        told=f" (the source, {source.path})",
    )
    return predictor


def _source_channels(
    wanted: list[int | str] | None, source: SourceModel, channels: list[str]
) -> list[int] | None:
    has = f"this data set has {len(channels)} ({', '.join(channels)})"
    if wanted is None:
        if len(source.channels) == len(channels):
            return None
        raise ConfigError(
            f"source.channels: {source.path} sees images of {len(source.channels)} channels, "
            f"{has}; set which of them it sees, in its order, such as source.channels=[0]"
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

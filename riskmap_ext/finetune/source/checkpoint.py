"""Checkpoints of tensors and plain types, and starting a network from a source model's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from riskmap_ext._files import digest
from riskmap_ext.finetune.base.errors import CheckpointError
from riskmap_ext.finetune.base.files import write_checkpoint
from riskmap_ext.finetune.base.structures import Structures, structures_of
from riskmap_ext.finetune.config.schema import NetworkConfig, SourceConfig
from riskmap_ext.finetune.folder.workspace import RESUME_FORMAT
from riskmap_ext.finetune.source.file import (
    SourceFile,
    named_classes,
    read_checkpoint,
    state_dict_in,
    without_wrappers,
)
from riskmap_ext.finetune.source.monai_bundle import bundle_root, bundle_source, bundle_weights
from riskmap_ext.finetune.source.network import build_network, head_keys, without_channels
from riskmap_ext.finetune.source.nnunet import is_nnunet, nnunet_source

FORMAT = "riskmap_ext.checkpoint.1"


@dataclass(frozen=True)
class SourceModel:
    """The frozen source network and what its checkpoint says about it.

    preprocessing: what is known of plan.preprocessing. notes: warnings for the log. foreign: it is
    of another tool.
    """

    path: Path
    network: nn.Module
    config: NetworkConfig
    structures: Structures
    channels: list[str]
    preprocessing: dict[str, Any]
    digest: str
    notes: list[str] = field(default_factory=list)
    foreign: bool = False

    @property
    def classes(self) -> list[str]:
        return self.structures.classes


@dataclass
class KeyReport:
    """What became of each state-dict key when a network was started from a source's weights.

    loaded: copied. reinitialized: the output layer, fresh. mismatched: same name, other shape,
    left fresh. new: not in the source, left fresh. skipped: in the source, not in the network.
    """

    loaded: list[str] = field(default_factory=list)
    reinitialized: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, list[str]]:
        return dict(vars(self))

    def summary(self) -> str:
        parts = [f"{len(self.loaded)} keys loaded"]
        for name, keys in list(vars(self).items())[1:]:
            if keys:
                shown = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
                parts.append(f"{len(keys)} {name} ({shown})")
        return "; ".join(parts)


def save_checkpoint(
    path: Path,
    network: nn.Module,
    config: NetworkConfig,
    structures: Structures,
    channels: Sequence[str],
    preprocessing: Mapping[str, Any],
    progress: Mapping[str, Any],
) -> None:
    """A file that torch.load(weights_only=True) reads and `source.checkpoint` takes."""
    state = {key: value.detach().cpu() for key, value in network.state_dict().items()}
    write_checkpoint(
        path,
        {
            "format": FORMAT,
            "network": config.model_dump(exclude_defaults=True),
            **structures.as_dict(),
            "channels": list(channels),
            "preprocessing": dict(preprocessing),
            "progress": dict(progress),
            "state_dict": state,
        },
    )


def load_source(source: SourceConfig) -> SourceModel:
    """The source network with its weights, in eval mode and without gradients.

    The checkpoint is one of this package's, of nnU-Net, a MONAI bundle, or any file of tensors and
    plain types with a state dict in it; then `source.network` and `source.classes` must be given.

    Raises: CheckpointError naming the file and what is missing or does not fit.
    """
    found = _source_file(source)
    path, structures, channels = found.path, found.structures, found.channels
    config = without_channels(
        found.network, structures.num_outputs, len(channels), found.network_key
    )
    network = build_network(config, structures.num_outputs, len(channels))
    state = without_wrappers(found.state, network.state_dict().keys())
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(_misfit(found, config, network, state, error)) from None
    network.eval().requires_grad_(False)
    ordered = network.state_dict()
    fingerprint = digest(
        config.model_dump(mode="json"),
        structures.regions,
        *(ordered[key] for key in sorted(ordered)),
    )
    return SourceModel(
        path,
        network,
        config,
        structures,
        channels,
        found.preprocessing,
        fingerprint,
        found.notes,
        found.foreign,
    )


def _source_file(source: SourceConfig) -> SourceFile:
    """By what the file holds."""
    path = source.checkpoint
    root = bundle_root(path)
    weights = path if root is None else bundle_weights(path, root)
    content = read_checkpoint(weights)
    if content.get("format") == RESUME_FORMAT:
        raise CheckpointError(
            f"{path}: is what --resume goes on from; take last.pt or best.pt beside it"
        )
    if content.get("format") != FORMAT and source.network is None:
        if is_nnunet(path, content):
            return nnunet_source(source, content)
        if root is not None:
            return bundle_source(source, root, content)
    return _own_or_plain(source.model_copy(update={"checkpoint": weights}), content)


def _own_or_plain(source: SourceConfig, content: dict[str, Any]) -> SourceFile:
    path, own = source.checkpoint, content if content.get("format") == FORMAT else {}
    state = state_dict_in(path, content)
    config = source.network or _stored_network(path, own)
    if own:
        outputs = len(own.get("regions") or own.get("classes") or [])
        told = f"it holds {own.get('network', {}).get('name')} with {outputs} outputs"
        remedy = "leave source.network and source.classes out to take the file's own"
    else:
        told = f"its keys are such as {', '.join(list(state)[:3])}"
        remedy = "set source.network and source.classes to the model's own"
    return SourceFile(
        path,
        state,
        config,
        _structures(source, own, path),
        _channels(own, config),
        own.get("preprocessing") or {},
        "source.network.args" if source.network else f"{path}: network.args",
        told,
        remedy,
        foreign=not own,
    )


def start_from_source(
    network: nn.Module,
    config: NetworkConfig,
    structures: Structures,
    source: SourceModel,
    head: str,
) -> KeyReport:
    """Copies the source's weights into `network` and reports every key.

    head: "auto" gives the output layer fresh weights where the numbers of outputs differ or only
    one of the two has regions, "keep" asks for equal numbers, "reinitialize" always does.

    Raises: CheckpointError where nothing can be loaded or the head cannot be kept.
    """
    mine = network.state_dict()
    theirs = source.network.state_dict()
    num_outputs, theirs_count = structures.num_outputs, source.structures.num_outputs
    outputs = head_keys(config, num_outputs)
    # Sigmoids say nothing of a softmax, however many there are.
    same_kind = (structures.regions is None) == (source.structures.regions is None)
    alike = same_kind and num_outputs == theirs_count
    fresh_head = head == "reinitialize" or (head == "auto" and not alike)
    if head == "keep" and num_outputs != theirs_count:
        raise CheckpointError(
            f"source.head: keep needs as many outputs as the source has ({theirs_count}), got "
            f"{num_outputs}"
        )
    report = KeyReport(skipped=[key for key in theirs if key not in mine])
    for key, value in mine.items():
        if key not in theirs:
            report.new.append(key)
        elif key in outputs and fresh_head:
            report.reinitialized.append(key)
        elif theirs[key].shape != value.shape:
            report.mismatched.append(key)
        else:
            report.loaded.append(key)
    if not report.loaded:
        raise CheckpointError(
            f"{source.path}: none of its weights fits the network: the file holds "
            f"{_described(source.config)}, and network says {_described(config)}; leave network "
            "out to take the file's, or set source.initialize=false to take only the risk map "
            "from it"
        )
    network.load_state_dict({key: theirs[key] for key in report.loaded}, strict=False)
    return report


def _described(config: NetworkConfig) -> str:
    args = ", ".join(f"{name}={value}" for name, value in config.args.items())
    return f"{config.name}({args})"


def _misfit(
    found: SourceFile,
    config: NetworkConfig,
    network: nn.Module,
    state: Mapping[str, Tensor],
    error: RuntimeError,
) -> str:
    """Which network the file is of, as far as it tells, and how that differs from `config`."""
    wanted = f"{_described(config)} with {found.structures.num_outputs} outputs"
    if not set(state) & set(network.state_dict()):
        return f"{found.path}: no weight in it belongs to {wanted}: {found.told}; {found.remedy}"
    lines = "; ".join(" ".join(line.split()) for line in str(error).splitlines()[1:4])
    return f"{found.path}: the weights do not fit {wanted}: {found.told} ({lines}); {found.remedy}"


def _stored_network(path: Path, own: dict[str, Any]) -> NetworkConfig:
    stored = own.get("network")
    if stored is None:
        raise CheckpointError(
            f"{path}: does not say which network it belongs to; set source.network.name and "
            "source.network.args"
        )
    try:
        return NetworkConfig.model_validate(stored)
    except ValidationError as error:
        raise CheckpointError(f"{path}: its network entry cannot be used ({error})") from None


def _structures(source: SourceConfig, own: dict[str, Any], path: Path) -> Structures:
    if source.classes is None and own.get("regions"):
        return structures_of(own["classes"], own["regions"], own["region_classes"], f"{path}: its")
    classes = own.get("classes") if source.classes is None else source.classes
    if classes is None:
        raise CheckpointError(
            f"{path}: does not say which classes it has; set source.classes to their number or "
            "names"
        )
    return Structures(named_classes(classes))


def _channels(own: dict[str, Any], config: NetworkConfig) -> list[str]:
    """Of the images that the network sees: as stored, else by its own number of them."""
    if own.get("channels"):
        return [str(name) for name in own["channels"]]
    count = config.args.get("in_channels", 1)
    return [f"channel {index}" for index in range(count if isinstance(count, int) else 1)]

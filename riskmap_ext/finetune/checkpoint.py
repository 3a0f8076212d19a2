"""Checkpoints of tensors and plain types, and starting a network from a source model's weights."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from riskmap_ext._files import digest, write_torch
from riskmap_ext.finetune.config import NetworkConfig, SourceConfig
from riskmap_ext.finetune.datalist import EXTENSIONS
from riskmap_ext.finetune.errors import CheckpointError
from riskmap_ext.finetune.network import build_network, head_keys, without_channels
from riskmap_ext.finetune.structures import Structures, structures_of

FORMAT = "riskmap_ext.checkpoint.1"
RESUME_FILE, RESUME_FORMAT = "resume.pt", "riskmap_ext.resume.1"
# Where other tools keep the weights: MONAI, Lightning, nnU-Net, and many training scripts.
_STATE_KEYS = ("state_dict", "model_state_dict", "network_weights", "model", "net", "network")
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class SourceModel:
    """The frozen source network and what its checkpoint says about it."""

    path: Path
    network: nn.Module
    config: NetworkConfig
    structures: Structures
    channels: list[str]
    preprocessing: dict[str, Any]
    digest: str

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
            "network": {"name": config.name, "args": dict(config.args)},
            **structures.as_dict(),
            "channels": list(channels),
            "preprocessing": dict(preprocessing),
            "progress": dict(progress),
            "state_dict": state,
        },
    )


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Raises: CheckpointError naming the file, which is then as it was before."""
    try:
        write_torch(path, content)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the second
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be written ({reason}); is the disk full?") from None


def load_source(source: SourceConfig) -> SourceModel:
    """The source network with its weights, in eval mode and without gradients.

    The checkpoint is one of this package's, or any file of tensors and plain types with a state
    dict in it; then `source.network` and `source.classes` must be given.

    Raises: CheckpointError naming the file and what is missing or does not fit.
    """
    path = source.checkpoint
    content = _read(path)
    if content.get("format") == RESUME_FORMAT:
        raise CheckpointError(
            f"{path}: is what --resume goes on from; take last.pt or best.pt beside it"
        )
    state = _state_dict(path, content)
    _check_finite(path, state)
    config = source.network or _stored_network(path, content)
    structures = _structures(source, content, path)
    key = "source.network.args" if source.network else f"{path}: network.args"
    channels = _channels(content, config)
    config = without_channels(config, structures.num_outputs, len(channels), key)
    network = build_network(config, structures.num_outputs, len(channels))
    state = _without_wrappers(state, network.state_dict().keys())
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            _misfit(path, content, config, structures, network, state, error)
        ) from None
    network.eval().requires_grad_(False)
    ordered = network.state_dict()
    fingerprint = digest(
        config.model_dump(mode="json"),
        structures.regions,
        *(ordered[key] for key in sorted(ordered)),
    )
    preprocessing = content.get("preprocessing") or {}
    return SourceModel(path, network, config, structures, channels, preprocessing, fingerprint)


def start_from_source(
    network: nn.Module, config: NetworkConfig, num_outputs: int, source: SourceModel, head: str
) -> KeyReport:
    """Copies the source's weights into `network` and reports every key.

    head: "auto" gives the output layer fresh weights where the numbers of outputs differ, "keep"
    asks for equal numbers, "reinitialize" always does.

    Raises: CheckpointError where nothing can be loaded or the head cannot be kept.
    """
    mine = network.state_dict()
    theirs = source.network.state_dict()
    outputs = head_keys(config, num_outputs)
    theirs_count = source.structures.num_outputs
    fresh_head = head == "reinitialize" or (head == "auto" and num_outputs != theirs_count)
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


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        why = "is a folder; expected a checkpoint file" if path.is_dir() else "no such checkpoint"
        raise CheckpointError(f"{path}: {why} (source.checkpoint)")
    try:
        with warnings.catch_warnings():
            # torch warns of archives that are refused below.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch errors of every kind
        raise CheckpointError(f"{path}: {_why_unreadable(path, error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content


def _why_unreadable(path: Path, error: Exception) -> str:
    """What the file is instead of a checkpoint. torch's own text advises to run the file's code."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror})"
    with path.open("rb") as file:
        start = file.read(512)
    expected = "; expected a torch checkpoint (source.checkpoint)"
    if not start:
        return "is empty" + expected
    if path.name.lower().endswith((*EXTENSIONS, ".img")):
        return "is an image" + expected
    if start.startswith(b"PK") or start.startswith(b"\x80"):
        if "TorchScript" in str(error):
            return "is a TorchScript archive, which is not loaded; save the model's state_dict()"
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper():
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            example = f" (such as {found[1]})" if found else ""
            return (
                f"holds objects other than tensors and plain types{example}, and is not loaded, "
                "since that would run its code; save the model's state_dict() alone"
            )
        return "is damaged or incomplete" + expected
    try:
        start.decode("utf-8")
    except UnicodeDecodeError:
        return "is not a torch checkpoint" + expected.replace("a torch checkpoint", "one")
    return "is a text file" + expected


def _check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    bad = [
        key
        for key, value in state.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if bad:
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise CheckpointError(
            f"{path}: NaN or infinite weights in {len(bad)} of {len(state)} tensors ({shown}); its "
            "training has failed, choose another checkpoint"
        )


def _described(config: NetworkConfig) -> str:
    args = ", ".join(f"{name}={value}" for name, value in config.args.items())
    return f"{config.name}({args})"


def _misfit(
    path: Path,
    content: Mapping[str, Any],
    config: NetworkConfig,
    structures: Structures,
    network: nn.Module,
    state: Mapping[str, Tensor],
    error: RuntimeError,
) -> str:
    """Which network the file is of, as far as it tells, and how that differs from `config`."""
    wanted = f"{_described(config)} with {structures.num_outputs} outputs"
    stored = content.get("network") if content.get("format") == FORMAT else None
    if isinstance(stored, dict):
        outputs = len(content.get("regions") or content.get("classes") or [])
        file = f"it holds {stored.get('name')} with {outputs} outputs"
        remedy = "leave source.network and source.classes out to take the file's own"
    else:
        file = f"its keys are such as {', '.join(list(state)[:3])}"
        remedy = "set source.network and source.classes to the model's own"
    if not set(state) & set(network.state_dict()):
        return f"{path}: no weight in it belongs to {wanted}: {file}; {remedy}"
    lines = "; ".join(" ".join(line.split()) for line in str(error).splitlines()[1:4])
    return f"{path}: the weights do not fit {wanted}: {file} ({lines}); {remedy}"


def _state_dict(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    for candidate in (*(content.get(key) for key in _STATE_KEYS), content):
        if not isinstance(candidate, dict) or not candidate:
            continue
        if all(isinstance(value, Tensor) for value in candidate.values()):
            return candidate
    raise CheckpointError(
        f"{path}: no weights in it; expected a state dict, or one under {', '.join(_STATE_KEYS)}"
    )


def _stored_network(path: Path, content: dict[str, Any]) -> NetworkConfig:
    stored = content.get("network") if content.get("format") == FORMAT else None
    if stored is None:
        raise CheckpointError(
            f"{path}: does not say which network it belongs to; set source.network.name and "
            "source.network.args"
        )
    try:
        return NetworkConfig.model_validate(stored)
    except ValidationError as error:
        raise CheckpointError(f"{path}: its network entry cannot be used ({error})") from None


def _structures(source: SourceConfig, content: dict[str, Any], path: Path) -> Structures:
    mine = content if content.get("format") == FORMAT else {}
    if source.classes is None and mine.get("regions"):
        return structures_of(
            mine["classes"], mine["regions"], mine["region_classes"], f"{path}: its"
        )
    classes = mine.get("classes") if source.classes is None else source.classes
    if classes is None:
        raise CheckpointError(
            f"{path}: does not say which classes it has; set source.classes to their number or "
            "names"
        )
    if isinstance(classes, int):
        return Structures([f"class {index}" for index in range(classes)])
    return Structures([str(name) for name in classes])


def _channels(content: dict[str, Any], config: NetworkConfig) -> list[str]:
    """Of the images that the network sees: as stored, else by its own number of them."""
    stored = content.get("channels") if content.get("format") == FORMAT else None
    if stored:
        return [str(name) for name in stored]
    count = config.args.get("in_channels", 1)
    return [f"channel {index}" for index in range(count if isinstance(count, int) else 1)]


def _without_wrappers(state: dict[str, Tensor], wanted: Any) -> dict[str, Tensor]:
    """Keys without the prefixes of DataParallel, torch.compile or a surrounding module."""
    for prefix in _WRAPPERS:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if not set(state) & set(wanted):
        heads = {key.split(".")[0] for key in state}
        inner = {key.partition(".")[2]: value for key, value in state.items()}
        if len(heads) == 1 and set(inner) & set(wanted):
            return inner
    return state

"""Reads checkpoints of tensors and plain types, and starts a network from a source's weights."""

from __future__ import annotations

import errno
import re
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from riskmap_ext._checkpoints import load_plain
from riskmap_ext._files import TooMuch, digest
from riskmap_ext.finetune.base.errors import CheckpointError, one_line
from riskmap_ext.finetune.base.files import IMAGE_ENDINGS, write_checkpoint
from riskmap_ext.finetune.base.log import some
from riskmap_ext.finetune.base.structures import Structures, structures_of
from riskmap_ext.finetune.config.schema import (
    Axis,
    Config,
    Names,
    NetworkConfig,
    Sizes,
    SourceConfig,
)
from riskmap_ext.finetune.folder.workspace import RESUME_FORMAT
from riskmap_ext.finetune.source.model import (
    SourceModel,
    checked,
    given_structures,
    numbered,
    placed,
)
from riskmap_ext.finetune.source.monai_bundle import bundle_root, bundle_source
from riskmap_ext.finetune.source.network import (
    build_network,
    head_keys,
    without_channels,
    without_downloads,
)
from riskmap_ext.finetune.source.nnunet import nnunet_source

FORMAT = "riskmap_ext.checkpoint.1"
# Where other tools store the weights: MONAI, Lightning, nnU-Net, and many training scripts.
_STATE_KEYS = ("state_dict", "model_state_dict", "network_weights", "model", "net", "network")
_WEIGHTS = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool),
)


class _Preprocessing(BaseModel):
    """What is used of a checkpoint's preprocessing without being checked as keys of `data`."""

    model_config = ConfigDict(extra="allow")
    patch_size: Sizes | None = None
    image_suffix: list[str] | None = None
    slice_axis: Axis = "axial"


class _Own(BaseModel):
    """What a checkpoint of this package says about its model."""

    network: NetworkConfig | None = None
    classes: Names | None = None
    regions: dict[str, list[int | str]] | None = None
    region_classes: list[int | str] | None = None
    channels: Names | None = None
    preprocessing: _Preprocessing | None = None


@dataclass
class KeyReport:
    """What happened to each state-dict key when a network started from a source's weights.

    loaded: copied. reinitialized: the output layer, fresh. mismatched: same name, different shape,
    left fresh. new: not in the source, left fresh. skipped: in the source, not in the network.
    """

    loaded: list[str] = field(default_factory=list)
    reinitialized: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def summary(self) -> str:
        others = {name: keys for name, keys in vars(self).items() if keys and name != "loaded"}
        told = (f"{len(keys)} {name} ({some(keys, 4)})" for name, keys in others.items())
        return "; ".join([f"{len(self.loaded)} keys loaded", *told])


def save_checkpoint(
    path: Path,
    network: nn.Module,
    config: NetworkConfig,
    structures: Structures,
    channels: Sequence[str],
    preprocessing: Mapping[str, Any],
    progress: Mapping[str, Any],
) -> None:
    """Writes a file that torch.load(weights_only=True) reads and `source.checkpoint` takes."""
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


def source_of(config: Config) -> SourceModel | None:
    """The source of a run, if any. Raises: CheckpointError."""
    return None if config.source is None else load_source(config.source)


def load_source(source: SourceConfig) -> SourceModel:
    """The source network with its weights, in eval mode and without gradients.

    The checkpoint is one of this package's, of nnU-Net, a MONAI bundle, or any file of tensors and
    plain types with a state dict; for the latter, set `source.network` and `source.classes`.

    Raises: CheckpointError naming the file and what is missing or does not fit.
    """
    path = source.checkpoint
    root = bundle_root(path)
    weights = path / "models" / "model.pt" if path == root else path
    content = _read_checkpoint(weights)
    if content.get("format") == RESUME_FORMAT:
        raise CheckpointError(
            f"{path}: is what --resume goes on from; take last.pt or best.pt beside it"
        )
    state = _state_dict_in(weights, content)
    own = content if content.get("format") == FORMAT else {}
    foreign = not own and source.network is None
    if foreign and "network_weights" in content:
        found = nnunet_source(source, content)
    elif foreign and root is not None:
        found = bundle_source(source, root)
    else:
        found = _plain(source, weights, own, state)
    outputs, channels = found.structures.num_outputs, len(found.channels)
    with placed("source." if source.network else f"{found.path}: "):
        found.config = without_channels(found.config, outputs, channels)
        if source.network is None:
            found.config = without_downloads(found.config)
        found.network = build_network(found.config, outputs, channels)
    _load(found, state)
    found.network.eval().requires_grad_(False)
    ordered = found.network.state_dict()
    found.digest = digest(
        found.config.model_dump(mode="json"),
        found.structures.regions,
        *(ordered[key] for key in sorted(ordered)),
    )
    return found


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Raises: CheckpointError saying what the file is instead."""
    if not path.is_file():
        there = sorted(each.name for each in path.parent.glob("*"))
        why = f"no such checkpoint; its folder holds {some(there) or 'nothing'}"
        if path.is_dir():
            why = "is a folder; expected a checkpoint file, or a MONAI bundle's folder"
        if folds := sorted((*path.glob("fold_*/last.pt"), *path.glob("fold_*/*.pth"))):
            why = f"is a folder of folds; take a checkpoint of one, such as {folds[-1]}"
        raise CheckpointError(f"{path}: {why} (source.checkpoint)")
    try:
        with warnings.catch_warnings():
            # torch warns of archives that are rejected below.
            warnings.simplefilter("ignore")
            content = load_plain(path)
    except Exception as error:  # zip, pickle and torch errors of every kind
        raise CheckpointError(f"{path}: {_why_unreadable(path, error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content


def _why_unreadable(path: Path, error: Exception) -> str:
    """What the file is instead of a checkpoint. torch's own text advises to run the file's code."""
    if isinstance(error, TooMuch):
        return f"is not loaded: {error}"
    # A truncated archive makes torch seek to places before its start, which is EINVAL.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return f"cannot be read ({error.strerror})"
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as gone:
        return f"cannot be read ({gone.strerror})"
    if start.startswith((b"PK", b"\x80")):
        if "TorchScript" in str(error):
            return "is a TorchScript archive, which is not loaded; save the model's state_dict()"
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            return (
                f"holds objects other than tensors and plain types (such as {found[1]}), and is "
                "not loaded, since that would run its code; save the model's state_dict() alone"
            )
        what = "is damaged or incomplete, or an archive to be unpacked"
    elif path.name.lower().endswith((*IMAGE_ENDINGS, ".img")):
        what = "is an image"
    else:
        try:
            what = "is a text file" if start.decode("utf-8") else "is empty"
        except UnicodeDecodeError:
            what = "is of an unknown kind"
    return f"{what}; expected a torch checkpoint (source.checkpoint)"


def _state_dict_in(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint, all of them finite. Raises: CheckpointError."""
    for state in (*(content.get(key) for key in _STATE_KEYS), content):
        if isinstance(state, dict) and state and _is_named(state):
            break
    else:
        expected = f"a state dict, or one under {', '.join(_STATE_KEYS)}"
        raise CheckpointError(f"{path}: no weights in it; expected {expected}")
    if odd := [key for key, value in state.items() if not _is_plain(value)]:
        raise CheckpointError(
            f"{path}: expected plain tensors of real numbers, with all of their values in the "
            f"file; {some(odd, 3)} are not"
        )
    bad = [key for key, value in state.items() if not value.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{path}: NaN or infinite weights in {len(bad)} of {len(state)} tensors "
            f"({some(bad, 3)}); its training has failed, choose another checkpoint"
        )
    return state


def _is_named(state: dict[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())


def _is_plain(value: Tensor) -> bool:
    """Not sparse, quantized, nested, without values, or a few values repeated without end."""
    if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
        return False
    held = value.untyped_storage().nbytes()
    return value.dtype in _WEIGHTS and value.numel() * value.element_size() <= held


def _without_wrappers(state: dict[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """Keys without the prefixes of DataParallel, torch.compile or a surrounding module."""
    while not state.keys() & wanted:
        heads = {key.partition(".")[0] for key in state}
        if len(heads) > 1 or heads == state.keys():
            break
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return state


def _load(found: SourceModel, state: dict[str, Tensor]) -> None:
    """Raises: CheckpointError saying which network the file belongs to, as far as it says so."""
    known = found.network.state_dict().keys()
    state = _without_wrappers(state, known)
    try:
        found.network.load_state_dict(state)
    except RuntimeError as error:
        wanted = f"{_described(found.config)} with {found.structures.num_outputs} outputs"
        why = f"no weight in it belongs to {wanted}: {found.told}"
        if state.keys() & known:
            lines = "; ".join(one_line(line) for line in str(error).splitlines()[1:4])
            why = f"the weights do not fit {wanted}: {found.told} ({lines})"
        raise CheckpointError(
            f"{found.path}: {why}; source.network and source.classes, if set, must be those of "
            "the model"
        ) from None


def _plain(
    source: SourceConfig, path: Path, own: dict[str, Any], state: dict[str, Tensor]
) -> SourceModel:
    """own: of a checkpoint of this package. `source` must give what a file does not say."""
    config, structures = source.network, given_structures(source)
    told = f"its keys are such as {', '.join(list(state)[:3])}"
    said = checked(_Own, own, path, "")
    config = config or said.network
    if said.classes:
        stored = structures_of(said.classes, said.regions, said.region_classes, f"{path}: its")
        structures = structures or stored
        name = said.network.name if said.network else None
        told = f"it holds {name} with {stored.num_outputs} outputs"
    missing = "which network it belongs to; set source.network.name and source.network.args"
    if config is not None:
        missing = "which classes it has; set source.classes to their number or names"
    if config is None or structures is None:
        raise CheckpointError(f"{path}: does not say {missing}")
    count = config.args.get("in_channels", 1)
    return SourceModel(
        path=path,
        config=config,
        structures=structures,
        channels=said.channels or numbered("channel", count if type(count) is int else 1),
        preprocessing=said.preprocessing.model_dump(exclude_unset=True)
        if said.preprocessing
        else {},
        told=told,
    )


def start_from_source(
    network: nn.Module,
    config: NetworkConfig,
    structures: Structures,
    source: SourceModel,
    head: str,
) -> KeyReport:
    """Copies the source's weights into `network` and reports every key.

    head: "auto" gives the output layer fresh weights if the numbers of outputs differ or only one
    of the two has regions, "keep" requires equal numbers, "reinitialize" always gives fresh ones.

    Raises: CheckpointError if nothing can be loaded or the head cannot be kept.
    """
    mine, theirs = network.state_dict(), source.network.state_dict()
    count, their_count = structures.num_outputs, source.structures.num_outputs
    if head == "keep" and count != their_count:
        raise CheckpointError(
            f"source.head: keep needs as many outputs as the source has ({their_count}), got "
            f"{count}"
        )
    # Sigmoids say nothing about a softmax, however many there are.
    same_kind = (structures.regions is None) == (source.structures.regions is None)
    alike = same_kind and count == their_count
    renewed = head == "reinitialize" or (head == "auto" and not alike)
    fresh = head_keys(config, count) if renewed else set()
    report = KeyReport(skipped=[key for key in theirs if key not in mine])
    for key, value in mine.items():
        if key not in theirs:
            report.new.append(key)
        elif key in fresh:
            report.reinitialized.append(key)
        elif theirs[key].shape != value.shape:
            report.mismatched.append(key)
        else:
            report.loaded.append(key)
    if not report.loaded:
        raise CheckpointError(
            f"{source.path}: none of its weights fits network: the file holds "
            f"{_described(source.config)}, network says {_described(config)}; leave network out, "
            "or set source.initialize=false to take only the risk map from the file"
        )
    network.load_state_dict({key: theirs[key] for key in report.loaded}, strict=False)
    return report


def _described(config: NetworkConfig) -> str:
    args = ", ".join(f"{name}={value}" for name, value in config.args.items())
    return f"{config.name}({args})"

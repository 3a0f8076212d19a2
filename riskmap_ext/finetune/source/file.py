"""What a source model's file says of it, and reading its weights; every refusal in words."""

from __future__ import annotations

import errno
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from riskmap_ext._checkpoints import load_plain
from riskmap_ext.finetune.base.errors import CheckpointError, one_line
from riskmap_ext.finetune.base.log import some
from riskmap_ext.finetune.base.structures import Structures
from riskmap_ext.finetune.config.schema import NetworkConfig, SourceConfig
from riskmap_ext.finetune.config.yaml_text import read_yaml
from riskmap_ext.finetune.data.datalist import EXTENSIONS

# Where other tools keep the weights: MONAI, Lightning, nnU-Net, and many training scripts.
_STATE_KEYS = ("state_dict", "model_state_dict", "network_weights", "model", "net", "network")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """What a source's file says of its network, whatever tool has written it.

    network_key: where `config` stands. told: what the file itself says of its network, for
    messages. remedy: what to do where the weights do not fit. preprocessing: as plan.preprocessing
    has it, as far as it is known; `normalize` may be a scheme that the driver lacks. notes:
    warnings for the log. foreign: it is of another tool.
    """

    path: Path
    config: NetworkConfig
    structures: Structures
    channels: list[str]
    preprocessing: dict[str, Any]
    network_key: str
    told: str
    remedy: str
    notes: list[str] = field(default_factory=list)
    foreign: bool = True


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Raises: CheckpointError with what the file is instead."""
    if not path.is_file():
        why = "no such checkpoint"
        if path.is_dir():
            why = (
                "is a folder; expected a checkpoint file, or the folder of a MONAI bundle (with "
                "configs and models in it)"
            )
        if folds := sorted(each.name for each in path.glob("fold_*")):
            why = f"is a folder of nnU-Net; take {folds[0]}/checkpoint_final.pth in it"
        raise CheckpointError(f"{path}: {why} (source.checkpoint)")
    try:
        with warnings.catch_warnings():
            # torch warns of archives that are refused below.
            warnings.simplefilter("ignore")
            content = load_plain(path)
    except Exception as error:  # zip, pickle and torch errors of every kind
        raise CheckpointError(f"{path}: {_why_unreadable(path, error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content


def _why_unreadable(path: Path, error: Exception) -> str:
    """What the file is instead of a checkpoint. torch's own text advises to run the file's code."""
    # A cut archive makes torch seek to places before its start, which is EINVAL.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return f"cannot be read ({error.strerror})"
    with path.open("rb") as file:
        start = file.read(512)
    expected = "expected a torch checkpoint (source.checkpoint)"
    if not start:
        return f"is empty; {expected}"
    if path.name.lower().endswith((*EXTENSIONS, ".img")):
        return f"is an image; {expected}"
    if not start.startswith((b"PK", b"\x80")):
        try:
            start.decode("utf-8")
        except UnicodeDecodeError:
            return "is not a torch checkpoint; expected one (source.checkpoint)"
        return f"is a text file; {expected}"
    if "TorchScript" in str(error):
        return "is a TorchScript archive, which is not loaded; save the model's state_dict()"
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper():
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        example = f" (such as {found[1]})" if found else ""
        return (
            f"holds objects other than tensors and plain types{example}, and is not loaded, "
            "since that would run its code; save the model's state_dict() alone"
        )
    try:
        names = zipfile.ZipFile(path).namelist()
    except (OSError, zipfile.BadZipFile):
        names = []
    if names and not any(name.endswith("data.pkl") for name in names):
        return f"is a zip archive of files; unpack it; {expected}"
    return f"is damaged or incomplete; {expected}"


def read_mapping(file: Path) -> dict[str, Any]:
    """The keys of a JSON or YAML file. Raises: CheckpointError."""
    kind = "JSON" if file.suffix == ".json" else "YAML"
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if kind == "JSON" else read_yaml(text)[0]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file}: cannot be read as {kind} ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a mapping, got {type(content).__name__}")
    return content


def state_dict_in(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint, all of them finite. Raises: CheckpointError."""
    for state in (*(content.get(key) for key in _STATE_KEYS), content):
        if isinstance(state, dict) and state and all(isinstance(v, Tensor) for v in state.values()):
            break
    else:
        expected = f"a state dict, or one under {', '.join(_STATE_KEYS)}"
        raise CheckpointError(f"{path}: no weights in it; expected {expected}")
    bad = [
        key
        for key, value in state.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if bad:
        shown = some(bad, 3)
        raise CheckpointError(
            f"{path}: NaN or infinite weights in {len(bad)} of {len(state)} tensors ({shown}); its "
            "training has failed, choose another checkpoint"
        )
    return state


def without_wrappers(state: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Keys without the prefixes of DataParallel, torch.compile or a surrounding module."""
    found = state
    while not set(found) & set(wanted):
        heads = {key.partition(".")[0] for key in found}
        if len(heads) > 1 or heads == set(found):
            return state
        found = {key.partition(".")[2]: value for key, value in found.items()}
    return found


def given_structures(source: SourceConfig) -> Structures | None:
    """`source.classes`, names or how many, where it is given."""
    given = source.classes
    if given is None:
        return None
    return Structures(numbered("class", given) if isinstance(given, int) else given)


def numbered(what: str, count: int) -> list[str]:
    return [f"{what} {index}" for index in range(count)]


def stored_orientation(source: SourceConfig, why: str) -> tuple[str, list[str]]:
    """Of files that do not say it: `source.orientation`, or RAS and a warning with the reason."""
    if source.orientation is not None:
        return source.orientation, []
    otherwise = "RAS is assumed (source.orientation=LPS, for example, says otherwise)"
    return "RAS", [f"{why}; {otherwise}"]

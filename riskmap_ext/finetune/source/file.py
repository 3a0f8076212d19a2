"""What a source model's file says of it, and reading its weights; every refusal in words."""

from __future__ import annotations

import errno
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from riskmap_ext._checkpoints import load_plain
from riskmap_ext.finetune.base.errors import CheckpointError
from riskmap_ext.finetune.base.structures import Structures
from riskmap_ext.finetune.config.schema import NetworkConfig
from riskmap_ext.finetune.data.datalist import EXTENSIONS

# Where other tools keep the weights: MONAI, Lightning, nnU-Net, and many training scripts.
_STATE_KEYS = ("state_dict", "model_state_dict", "network_weights", "model", "net", "network")
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class SourceFile:
    """The weights of a source and the network they are of, whatever tool has written them.

    told: what the file itself says of its network, for messages. remedy: what to do where the
    weights do not fit. preprocessing: as plan.preprocessing has it, as far as it is known;
    `normalize` may be a scheme that the driver lacks. notes: warnings for the log. foreign: it is
    of another tool.
    """

    path: Path
    state: dict[str, Tensor]
    network: NetworkConfig
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
        if _is_zip_of_files(path):
            return "is a zip archive of files; unpack it" + expected
        return "is damaged or incomplete" + expected
    try:
        start.decode("utf-8")
    except UnicodeDecodeError:
        return "is not a torch checkpoint" + expected.replace("a torch checkpoint", "one")
    return "is a text file" + expected


def _is_zip_of_files(path: Path) -> bool:
    try:
        names = zipfile.ZipFile(path).namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    return not any(name.endswith("data.pkl") for name in names)


def state_dict_in(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint, all of them finite. Raises: CheckpointError."""
    for candidate in (*(content.get(key) for key in _STATE_KEYS), content):
        if not isinstance(candidate, dict) or not candidate:
            continue
        if all(isinstance(value, Tensor) for value in candidate.values()):
            _check_finite(path, candidate)
            return candidate
    raise CheckpointError(
        f"{path}: no weights in it; expected a state dict, or one under {', '.join(_STATE_KEYS)}"
    )


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


def without_wrappers(state: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
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


def named_classes(classes: int | list[str]) -> list[str]:
    """`source.classes`: names, or how many."""
    if isinstance(classes, int):
        return [f"class {index}" for index in range(classes)]
    return [str(name) for name in classes]

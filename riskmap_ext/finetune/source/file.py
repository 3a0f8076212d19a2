"""What a source model's file says of it, and reading its weights; every refusal in words."""

from __future__ import annotations

import errno
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from riskmap_ext._checkpoints import load_plain
from riskmap_ext.finetune.base.errors import CheckpointError, ConfigError
from riskmap_ext.finetune.base.files import IMAGE_ENDINGS
from riskmap_ext.finetune.base.log import some
from riskmap_ext.finetune.base.structures import Structures
from riskmap_ext.finetune.config.load import problems_of
from riskmap_ext.finetune.config.schema import NetworkConfig, SourceConfig

Section = TypeVar("Section", bound=BaseModel)
# Where other tools keep the weights: MONAI, Lightning, nnU-Net, and many training scripts.
_STATE_KEYS = ("state_dict", "model_state_dict", "network_weights", "model", "net", "network")


@dataclass(kw_only=True)
class SourceModel:
    """The frozen source network, and what its file says of it, whatever tool has written it.

    told: what the file itself says of its network, for messages. preprocessing: as a run's
    `preparation`, as far as it is known; `normalize` may be a scheme that the driver lacks, and
    `spacing` has two numbers where the depth of slices is not known. notes: warnings for the log.
    """

    path: Path
    config: NetworkConfig
    structures: Structures
    channels: list[str]
    preprocessing: dict[str, Any]
    told: str
    notes: list[str] = field(default_factory=list)
    network: nn.Module = field(init=False)
    digest: str = field(init=False)

    @property
    def classes(self) -> list[str]:
        return self.structures.classes


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Says of which network it is that an argument cannot be used."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}{error}") from None


def checked(model: type[Section], content: Any, path: Path, section: str) -> Section:
    """A pydantic model of a section of a file. Raises: CheckpointError naming file and keys."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        told = (f"{section}{key and '.'}{key}: {why}" for key, why in problems_of(error, model))
        raise CheckpointError(f"{path}: its {'; '.join(told)}") from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Raises: CheckpointError with what the file is instead."""
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


def state_dict_in(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint, all of them finite. Raises: CheckpointError."""
    for state in (*(content.get(key) for key in _STATE_KEYS), content):
        if isinstance(state, dict) and state and all(isinstance(v, Tensor) for v in state.values()):
            break
    else:
        expected = f"a state dict, or one under {', '.join(_STATE_KEYS)}"
        raise CheckpointError(f"{path}: no weights in it; expected {expected}")
    bad = [key for key, value in state.items() if not value.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{path}: NaN or infinite weights in {len(bad)} of {len(state)} tensors "
            f"({some(bad, 3)}); its training has failed, choose another checkpoint"
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
    names = source.classes
    if isinstance(names, int):
        names = numbered("class", names)
    return None if names is None else Structures(names)


def numbered(what: str, count: int) -> list[str]:
    return [f"{what} {index}" for index in range(count)]


def stored_orientation(source: SourceConfig, why: str) -> tuple[str, list[str]]:
    """Of files that do not say it: `source.orientation`, or RAS and a warning with the reason."""
    if source.orientation is not None:
        return source.orientation, []
    otherwise = "RAS is assumed (source.orientation=LPS, for example, says otherwise)"
    return "RAS", [f"{source.checkpoint}: {why}; {otherwise}"]

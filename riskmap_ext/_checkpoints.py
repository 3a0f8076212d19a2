"""Reads checkpoint files of other tools without running any code in them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from riskmap_ext._files import check_archive, check_content

# Beside tensors and plain types: the numpy numbers that training scripts and nnU-Net's log store.
_SAFE: list[Any] = [
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "b1")},
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]


def load_plain(path: Path) -> Any:
    """The content of a torch file of tensors, numbers and plain types, on the CPU.

    Raises: what torch.load(weights_only=True) raises, such as pickle.UnpicklingError for a file
    with other objects, none of which is created; TooMuch for one made to fill memory.
    """
    if zipfile.is_zipfile(path):
        check_archive(path)
    with torch.serialization.safe_globals(_SAFE):
        content = torch.load(path, map_location="cpu", weights_only=True)
    check_content(content)
    return content

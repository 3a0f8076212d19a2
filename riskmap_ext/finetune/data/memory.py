"""How much memory a run takes, from the headers of its files, and where its volumes are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from riskmap_ext.finetune.base.device import available_memory
from riskmap_ext.finetune.base.errors import DataError
from riskmap_ext.finetune.base.log import gib
from riskmap_ext.finetune.base.processes import local_size
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.data.datalist import CaseFiles, Listing
from riskmap_ext.finetune.data.resample import resampled_shape
from riskmap_ext.finetune.data.volumes import read_header

# A logit, its share of the sliding window's weights and sums, and its softmax.
_BYTES_PER_LOGIT = 12


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes per process. volumes: of all prepared cases, their crops' sources and their maps.

    largest: what the largest case takes while the source or the network runs on it.
    """

    volumes: int
    largest: int
    largest_case: str


def memory_need(config: Config, listing: Listing, outputs: int) -> MemoryNeed:
    """outputs: the larger number of output channels of the source and the network."""
    spacing, image = config.data.spacing or [None] * 3, 4 * len(listing.channels)
    trained, validated = (
        {case.name: _prepared_voxels(case, spacing) for case in cases}
        for cases in (listing.train, listing.validation)
    )
    largest, largest_case = max((n, name) for name, n in (trained | validated).items())
    # Image, label, mask and the two maps; for crops once more, label, mask and risk in float32.
    held, crops = image + 11, image + 12
    return MemoryNeed(
        volumes=sum(trained.values()) * (held + crops) + sum(validated.values()) * held,
        largest=largest * (outputs * _BYTES_PER_LOGIT + image),
        largest_case=largest_case,
    )


def _prepared_voxels(case: CaseFiles, spacing: list[float | None]) -> int:
    """Voxels of a case after resampling; 0 for a file whose error is reported when it is read."""
    try:
        label = read_header(case.label)
    except DataError:
        return 0
    return math.prod(max(1, n) for n in resampled_shape(label.shape, label.spacing, spacing))


def volume_store(config: Config, need: MemoryNeed, device: torch.device) -> Path | None:
    """The folder for prepared volumes, by data.storage; None: they stay in memory.

    Raises: DataError if memory cannot hold them, or not even one case's logits.
    """
    share, storage = available_memory() // local_size(), config.data.storage
    if need.largest > share and device.type == "cpu":
        raise DataError(
            f"{need.largest_case}: the logits of this case take about {gib(need.largest)}, "
            f"and {gib(share)} of memory is available for this process; use coarser "
            "data.spacing or smaller images"
        )
    if storage == "memory" and need.volumes + need.largest > share:
        raise DataError(
            f"data.storage: memory: the prepared volumes take about {gib(need.volumes)}, and "
            f"{gib(share)} is available for this process; set data.storage=disk"
        )
    if storage == "memory" or (storage == "auto" and need.volumes <= share / 2):
        return None
    return (config.cache or config.output / "cache") / "volumes"


def described(need: MemoryNeed, store: Path | None) -> str:
    """One line for the log."""
    where = "in memory" if store is None else f"on disk, in {store}"
    return (
        f"Volumes: about {gib(need.volumes)}, {where}; the largest case takes {gib(need.largest)} "
        f"more of {gib(available_memory())} available"
    )

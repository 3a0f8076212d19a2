"""A run checked without being begun: files, grids, labels, keys of the checkpoint, memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from rich.table import Table
from rich.text import Text

from riskmap_ext.finetune.base.errors import DataError
from riskmap_ext.finetune.base.lock import check_free
from riskmap_ext.finetune.base.log import Log
from riskmap_ext.finetune.base.processes import started
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.data.datalist import CaseFiles, Listing, list_cases
from riskmap_ext.finetune.data.label_table import plain_label_map
from riskmap_ext.finetune.data.memory import MemoryNeed, described, memory_need, volume_store
from riskmap_ext.finetune.data.prepare import class_voxels, read_case
from riskmap_ext.finetune.data.sampling import flip_axes
from riskmap_ext.finetune.data.storage import TensorStore
from riskmap_ext.finetune.data.volumes import grid_problems, read_header
from riskmap_ext.finetune.folder.workspace import (
    check_output,
    check_same_run,
    check_threads,
    run_device,
    torch_state,
    unfinished_run,
)
from riskmap_ext.finetune.source.checkpoint import KeyReport
from riskmap_ext.finetune.train.plan import (
    Models,
    build_models,
    check_inputs,
    check_options,
    check_preprocessing,
    inputs_digest,
    most_outputs,
    resolved,
)
from riskmap_ext.finetune.train.step import loss_in_words

# For reading whole volumes; of further ones the headers are enough.
_SECONDS = 30.0


@dataclass(frozen=True)
class DryRun:
    """What a run would work on. class_voxels: class -> voxels in the training cases read."""

    train: list[str]
    validation: list[str]
    read: list[str]
    class_voxels: dict[str, int]
    parameters: int
    keys: KeyReport | None
    memory: MemoryNeed


def check_run(config: Config, *, progress: bool = True, resume: bool = False) -> DryRun:
    """Checks everything a run would check, in under a minute, and writes nothing.

    All headers are looked at; whole volumes and their labels are read for half a minute.

    Raises: InputError as finetune does, with a line for each problem.
    """
    group = started()
    log = Log(quiet=not (progress and group.is_main))
    resumed = unfinished_run(config) if resume else None
    if resumed is None:
        check_output(config.model_copy(update={"overwrite": config.overwrite or resume}))
    check_free(config.output)
    check_threads(config)
    device = run_device(config)
    check_options(config, device, group)
    listing = list_cases(config.data)
    with torch_state(config, device):
        models = build_models(config, listing.structures, listing.channels, device, group)
    _check_headers(listing)
    need = memory_need(config, listing, most_outputs(models, listing.structures))
    store = volume_store(config, need, device)
    label_map = plain_label_map(listing.label_table)
    if resumed is not None:
        check_same_run(resolved(config, listing.structures, label_map, listing.channels))
    read, voxels, cases = _read_some(config, listing, models, log)
    if len(cases) == len(listing.train):
        check_inputs(resumed, inputs_digest(models.source, [digest for digest, _ in cases]))
    for note in (*listing.notes, *config.notes):
        log.warn(note)
    if models.source is not None:
        check_preprocessing(config, models.source, [spacing for _, spacing in cases], log)
    total = len(listing.train) + len(listing.validation)
    parameters = sum(p.numel() for p in models.network.parameters())
    result = DryRun(
        [case.name for case in listing.train],
        [case.name for case in listing.validation],
        read,
        voxels,
        parameters,
        models.keys,
        need,
    )
    log.table(_table(config, listing, models, result, f"{device}"))
    log(described(need, store))
    for name, count in voxels.items():
        if count == 0:
            log.warn(f"no voxel of class {name} in the {len(cases)} training cases that were read")
    rest = "" if len(read) == total else f" ({total - len(read)} by their headers alone)"
    log(f"{total} cases checked{rest}: nothing is in the way of this run, and nothing was written")
    return result


def _check_headers(listing: Listing) -> None:
    problems: list[str] = []
    for case in (*listing.train, *listing.validation):
        try:
            problems += _header_problems(case, len(listing.channels))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)


def _header_problems(case: CaseFiles, channels: int) -> list[str]:
    stacked = channels if len(case.images) == 1 else 1
    image = read_header(case.images[0], stacked)
    found = grid_problems(case.image, image, case.label, read_header(case.label))
    for path in case.images[1:]:
        found += grid_problems(case.image, image, path, read_header(path))
    return found


def _read_some(
    config: Config, listing: Listing, models: Models, log: Log
) -> tuple[list[str], dict[str, int], list[tuple[str, tuple[float, float, float]]]]:
    """Names of the cases that were read, the voxels of each class, and of the training cases their
    digests and voxel sizes."""
    files = [*listing.train, *listing.validation]
    counts = torch.zeros(len(listing.structures.classes), dtype=torch.float64)
    read: list[str] = []
    trained = []
    problems: list[str] = []
    until = time.monotonic() + _SECONDS
    with log.progress("cases") as bar:
        task = bar.add_task("Reading", total=len(files), note="")
        for entry in files:
            if time.monotonic() > until:
                break
            try:
                case = read_case(entry, config.data, listing, TensorStore())
                if len(read) < len(listing.train):
                    counts += class_voxels([case], len(counts))
                    trained.append((case.digest, case.grid.spacing))
                if not read:
                    flip_axes(case, models.dims, config.train.augment)
            except DataError as error:
                problems.extend(error.problems)
            read.append(entry.name)
            if len(read) == len(listing.train) and not (problems or counts.any()):
                problems += [f"{each.label}: every voxel is ignored" for each in listing.train]
            bar.update(task, advance=1, note=entry.name)
    if problems:
        raise DataError(problems)
    names = listing.structures.classes
    voxels = {name: int(count) for name, count in zip(names, counts, strict=True)}
    return read, voxels, trained


def _table(config: Config, listing: Listing, models: Models, result: DryRun, device: str) -> Table:
    table = Table(title="The run", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    voxels = sum(result.class_voxels.values())
    shares = ", ".join(
        f"{name} {count / max(voxels, 1):.2%}" for name, count in result.class_voxels.items()
    )
    rows = {
        "output": str(config.output),
        "training cases": _names(result.train),
        "validation cases": _names(result.validation) or "none: no Dice",
        "channels": ", ".join(listing.channels) if len(listing.channels) > 1 else "",
        "training classes": shares,
        "regions": ", ".join(listing.structures.regions or []),
        "network": f"{models.config.name}, {result.parameters:,} parameters, on {device}",
        "patches": f"{config.train.batch_size} of {models.patch}, {config.train.steps} steps",
        "source": "none: training from scratch"
        if models.source is None
        else str(models.source.path),
        "weights": "" if result.keys is None else result.keys.summary(),
        "loss": loss_in_words(config),
        "fused with the loss": ", ".join(models.fused),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    return table


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} ({shown})" if names else ""

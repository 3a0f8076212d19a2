"""A whole fine-tuning run: inputs checked, maps made, network trained, results written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from riskmap_ext._files import digest
from riskmap_ext.finetune.checkpoint import (
    RESUME_FILE,
    KeyReport,
    SourceModel,
    load_source,
    save_checkpoint,
    start_from_source,
)
from riskmap_ext.finetune.config import Config, NetworkConfig
from riskmap_ext.finetune.data import Case, Cases, prepare_cases
from riskmap_ext.finetune.errors import ConfigError
from riskmap_ext.finetune.evaluate import class_means, dice_per_class, mean_without_nan, predict
from riskmap_ext.finetune.files import write_json, write_nifti
from riskmap_ext.finetune.maps import SourceMapper, SourceMaps, write_maps
from riskmap_ext.finetune.network import (
    Predictor,
    build_network,
    check_forward,
    patch_size,
    spatial_dims,
    without_channels,
)
from riskmap_ext.finetune.records import note_end, note_start, write_leep
from riskmap_ext.finetune.report import Log, dice_table, write_dice, write_overlay
from riskmap_ext.finetune.run_report import report_at_end
from riskmap_ext.finetune.sampling import flip_axes
from riskmap_ext.finetune.train import Trained, TrainSetup, train_network
from riskmap_ext.finetune.workspace import (
    check_output,
    check_threads,
    claim_output,
    run_device,
    told_when_stopped,
    torch_state,
    unfinished_run,
)


@dataclass
class FinetuneResult:
    """What a run ended with.

    dice: class -> mean over the validation cases that have it (NaN where none has), background
    left out. cases: case -> class -> Dice. leep, remark: the source's LEEP score and the warning
    that it tells nothing, None without a source. history: the rows of metrics.csv.
    """

    output: Path
    classes: list[str]
    dice: dict[str, float]
    mean_dice: float
    cases: dict[str, dict[str, float]]
    leep: float | None
    remark: str | None
    keys: KeyReport | None
    history: list[dict[str, float]] = field(repr=False)
    seconds: float = 0.0

    @property
    def checkpoint(self) -> Path:
        return self.output / "last.pt"


@dataclass
class _Run:
    """Everything that is known once all inputs are checked."""

    config: Config
    log: Log
    device: torch.device
    cases: Cases
    source: SourceModel | None
    source_predictor: Predictor | None
    network_config: NetworkConfig
    network: nn.Module
    predictor: Predictor
    patch: list[int]
    keys: KeyReport | None
    inputs: str
    resumed: dict[str, Any] | None


def finetune(
    config: Config, *, cases: Cases | None = None, progress: bool = True, resume: bool = False
) -> FinetuneResult:
    """Runs a whole configuration and writes its output folder.

    Args:
        config: from load_config, or built in code.
        cases: the result of prepare_cases for the same `data` section, to share between runs.
        progress: print the log and progress bars.
        resume: go on with the unfinished run in the output folder from its last validation; begin
            where there is none.

    Raises: InputError (ConfigError, DataError, CheckpointError) before anything is written.
    """
    log = Log(quiet=not progress)
    started = time.perf_counter()
    resumed = unfinished_run(config) if resume else None
    if resume and resumed is None:  # nothing that would be lost
        config = config.model_copy(update={"overwrite": True})
    if resumed is None:
        check_output(config)
    check_threads(config)
    device = run_device(config)
    with told_when_stopped(config, log), torch_state(config, device):
        run = _prepare(config, cases, device, log, resumed)
        maps = _source_maps(run)
        trained = _train(run, maps)
        table = _evaluate(run, maps, trained.predictions)
    (config.output / RESUME_FILE).unlink(missing_ok=True)
    classes = run.cases.classes
    means = class_means(table, len(classes))
    seconds = time.perf_counter() - started
    note_end(config.output, device, seconds)
    if config.write.report:
        report_at_end(config.output, log)
    log(f"Done in {seconds:.1f} s: {config.output}")
    return FinetuneResult(
        config.output,
        classes,
        dict(zip(classes[1:], means, strict=True)),
        mean_without_nan(means),
        {name: dict(zip(classes[1:], row, strict=True)) for name, row in table.items()},
        None if maps is None else maps.score,
        None if maps is None else maps.remark,
        run.keys,
        trained.history,
        seconds,
    )


def make_maps(config: Config, *, progress: bool = True) -> SourceMaps:
    """The maps of all cases of `config` with its frozen source, without any training.

    Statistics and range come from the training cases. Writes maps/ and overlays/ into the output
    folder. Raises: InputError as finetune does.
    """
    if config.source is None:
        raise ConfigError("source: missing; the maps need a source model")
    log = Log(quiet=not progress)
    check_output(config)
    check_threads(config)
    device = run_device(config)
    with told_when_stopped(config, log), torch_state(config, device):
        source = load_source(config.source)
        predictor = predictor_of_source(config, source, device)
        cases = read_cases(config, log)
        claim_output(config, log)
        for note in cases.notes:
            log.warn(note)
        check_preprocessing(config, source, log)
        log.stage = "before all maps were made"
        maps = _map_cases(config, log, source, predictor, cases, cases.validation)
        for case in _drawn(config, [*cases.train, *cases.validation]):
            risk = maps.risk[case.name]
            write_overlay(config.output / "overlays", case, cases.classes, None, risk)
    log(f"Done: {config.output}")
    return maps


def read_cases(config: Config, log: Log) -> Cases:
    with log.progress("cases") as bar:
        task = bar.add_task("Reading", total=None, note="")

        def advance(total: int, name: str) -> None:
            bar.update(task, total=total, advance=1, note=name)

        return prepare_cases(config, advance)


def _prepare(
    config: Config,
    cases: Cases | None,
    device: torch.device,
    log: Log,
    resumed: dict[str, Any] | None,
) -> _Run:
    """Checks every input, then makes the output folder."""
    if config.train.amp == "fp16" and device.type != "cuda":
        raise ConfigError("train.amp: fp16 needs a CUDA device; use bf16 or none")
    source = None if config.source is None else load_source(config.source)
    source_predictor = None if source is None else predictor_of_source(config, source, device)
    network_config = config.network or (source.config if source else None)
    assert network_config is not None  # Config asks for one of the two
    dims = spatial_dims(network_config)
    patch = patch_size(config, dims)
    cases = cases or read_cases(config, log)
    count = len(cases.classes)
    network_config = without_channels(network_config, count, "network.args")
    weights = config.loss.class_weights
    if isinstance(weights, list) and len(weights) != count:
        raise ConfigError(f"loss.class_weights: expected {count} numbers, got {len(weights)}")
    network = build_network(network_config, count).to(device)
    check_forward(network, patch, count, "train.patch_size")
    predictor = Predictor(network, dims, patch, config.inference)
    check_forward(network, predictor.patch, count, "inference.patch_size")
    flip_axes(cases.train[0], dims, config.train.augment)
    keys = None
    if source is not None and config.source is not None and config.source.initialize:
        keys = start_from_source(network, network_config, count, source, config.source.head)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"classes": cases.classes})}
    )
    inputs = digest(None if source is None else source.digest, [c.digest for c in cases.train])
    if resumed is not None and resumed["inputs"] != inputs:
        raise ConfigError(
            "--resume: the source checkpoint or the training cases have changed since the run was "
            "begun; overwrite=true without --resume starts anew"
        )
    claim_output(config, log, resumed=resumed is not None)
    counts = {"train": len(cases.train), "validation": len(cases.validation)}
    note_start(config.output, device, counts, resumed=resumed is not None)
    if resumed is not None:
        log(f"Going on after step {resumed['step']} of {config.train.steps}")
    for note in cases.notes:
        log.warn(note)
    log(
        f"{len(cases.train)} training and {len(cases.validation)} validation cases; classes: "
        + ", ".join(cases.classes)
    )
    parameters = sum(p.numel() for p in network.parameters())
    if config.data.spacing is not None:
        _warn_of_small_volumes(cases, patch, log)
    log(f"{network_config.name}, {parameters:,} parameters, patches of {patch}, on {device}")
    if source is not None:
        check_preprocessing(config, source, log)
    if keys is not None:
        log(f"Weights from {config.source.checkpoint}: {keys.summary()}")  # type: ignore[union-attr]
        if resumed is None:
            write_json(config.output / "keys.json", keys.as_dict())
        if len(keys.loaded) * 2 < len(network.state_dict()):
            log.warn("less than half of the network's weights come from the source")
    return _Run(
        config,
        log,
        device,
        cases,
        source,
        source_predictor,
        network_config,
        network,
        predictor,
        patch,
        keys,
        inputs,
        resumed,
    )


def _warn_of_small_volumes(cases: Cases, patch: list[int], log: Log) -> None:
    small = [
        case
        for case in cases.train
        if any(2 * n < p for n, p in zip(case.image.shape, patch, strict=False))
    ]
    if small:
        shape = list(small[0].image.shape)
        log.warn(
            f"data.spacing makes {len(small)} of {len(cases.train)} training volumes less than "
            f"half as large as the patch {patch} (such as {small[0].name}, {shape}): most of each "
            "crop lies outside the image; use a finer spacing or a smaller train.patch_size"
        )


def _preprocessing(config: Config, patch: list[int]) -> dict[str, Any]:
    data = config.data
    return {
        "spacing": data.spacing,
        "normalize": data.normalize,
        "image_foreground": data.image_foreground,
        "slice_axis": data.slice_axis,
        "patch_size": patch,
    }


def check_preprocessing(config: Config, source: SourceModel, log: Log) -> None:
    mine = _preprocessing(config, [])
    for key, theirs in source.preprocessing.items():
        if key in mine and key != "patch_size" and mine[key] != theirs:
            log.warn(
                f"the source was trained with data.{key}={theirs}, this run has {mine[key]}; its "
                "logits and the maps may suffer"
            )


def predictor_of_source(config: Config, source: SourceModel, device: torch.device) -> Predictor:
    dims = spatial_dims(source.config, "source.network.args")
    # The source sees windows of the size it was trained with.
    patch = source.preprocessing.get("patch_size") or patch_size(config, dims)
    predictor = Predictor(source.network.to(device), dims, patch, config.inference)
    check_forward(source.network, predictor.patch, len(source.classes), "inference.patch_size")
    return predictor


def mapper_of(
    config: Config,
    source: SourceModel,
    predictor: Predictor,
    cases: Cases,
    progress: Callable[[str], Any],
) -> SourceMapper:
    """Statistics and maps of a source as `config` has them, with its cache."""
    return SourceMapper(
        source,
        predictor,
        len(cases.classes),
        config.risk,
        {"patch_size": predictor.patch, "overlap": config.inference.overlap},
        config.cache or config.output / "cache",
        progress,
    )


def _map_cases(
    config: Config,
    log: Log,
    source: SourceModel,
    predictor: Predictor,
    cases: Cases,
    others: list[Case],
) -> SourceMaps:
    with log.progress("cases") as bar:
        total = 3 * len(cases.train) + len(others)
        task = bar.add_task("Source model", total=total, note="")
        mapper = mapper_of(
            config, source, predictor, cases, lambda note: bar.update(task, advance=1, note=note)
        )
        maps = mapper.run(cases.train, others)
    write_leep(config.output, maps, cases.classes, source.classes)
    lo, hi = maps.hardness_range
    cached = f" ({maps.num_cached} maps from the cache)" if maps.num_cached else ""
    log(f"LEEP score {maps.score:.4f}, hardness from {lo:.3f} to {hi:.3f}{cached}")
    if maps.remark:
        log.warn(maps.remark)
    if config.write.maps:
        for case in (*cases.train, *others):
            write_maps(config.output / "maps", case, maps)
    return maps


def _source_maps(run: _Run) -> SourceMaps | None:
    if run.source is None or run.source_predictor is None:
        run.log("No source model: plain training")
        return None
    # Maps of validation cases are only looked at: neither statistics nor training see them.
    shown = run.config.write.maps or bool(run.config.write.overlays)
    others = run.cases.validation if shown else []
    maps = _map_cases(run.config, run.log, run.source, run.source_predictor, run.cases, others)
    if not run.config.risk.use:
        run.log("risk.use is false: the loss takes no risk map")
    return maps


def _train(run: _Run, maps: SourceMaps | None) -> Trained:
    preprocessing = _preprocessing(run.config, run.patch)

    def save(path: Path, progress: dict[str, Any]) -> None:
        classes = run.cases.classes
        save_checkpoint(path, run.network, run.network_config, classes, preprocessing, progress)

    setup = TrainSetup(
        run.config,
        run.log,
        run.device,
        run.cases,
        run.network,
        run.predictor,
        run.patch,
        maps.risk if maps is not None and run.config.risk.use else None,
        save,
        run.inputs,
        run.resumed,
    )
    return train_network(setup)


def _evaluate(
    run: _Run, maps: SourceMaps | None, predictions: dict[str, Tensor]
) -> dict[str, list[float]]:
    """Dice at the files' resolution; writes dice.csv, predictions/ and overlays/."""
    config, classes = run.config, run.cases.classes
    table = {}
    for case in run.cases.validation:
        prediction = predictions[case.name]
        if case.grid.resampled:
            prediction = predict(run.predictor, case, full=True)
        table[case.name] = dice_per_class(prediction, case.full_label, len(classes))
        if config.write.predictions:
            dtype = "uint8" if len(classes) <= 256 else "int16"
            write_nifti(
                config.output / "predictions" / f"{case.name}.nii.gz",
                case.grid.to_file(prediction).astype(dtype),
                case.grid.affine,
                case.grid.codes,
            )
    if not table:
        run.log("No validation cases: no Dice")
        return table
    write_dice(config.output / "dice.csv", table, classes)
    run.log.table(dice_table(table, classes, f"Dice of {len(table)} validation cases"))
    for case in _drawn(config, run.cases.validation):
        risk = None if maps is None else maps.risk[case.name]
        folder = config.output / "overlays"
        write_overlay(folder, case, classes, predictions[case.name], risk)
    return table


def _drawn(config: Config, cases: list[Case]) -> list[Case]:
    wanted = config.write.overlays
    return cases if wanted is True else cases[: int(wanted)]

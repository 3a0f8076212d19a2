"""A whole fine-tuning run: inputs checked, maps made, network trained, results written."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from riskmap_ext.finetune.base.errors import ConfigError
from riskmap_ext.finetune.base.files import write_json, write_nifti
from riskmap_ext.finetune.base.log import Log
from riskmap_ext.finetune.base.processes import Processes, processes
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.data.prepare import Case, Cases
from riskmap_ext.finetune.data.storage import TensorStore
from riskmap_ext.finetune.folder.metrics import dice_table, write_dice
from riskmap_ext.finetune.folder.records import note_end, note_start
from riskmap_ext.finetune.folder.workspace import (
    RESUME_FILE,
    check_output,
    check_threads,
    claimed_output,
    run_device,
    told_when_stopped,
    torch_state,
    unfinished_run,
)
from riskmap_ext.finetune.metrics.dice import dice_per_structure, mean_without_nan, structure_means
from riskmap_ext.finetune.pictures.overlay import write_overlay
from riskmap_ext.finetune.report.write import report_at_end
from riskmap_ext.finetune.source.checkpoint import KeyReport, SourceModel, load_source
from riskmap_ext.finetune.source.predictor import Predictor, predict
from riskmap_ext.finetune.train.loop import Trained, train_network
from riskmap_ext.finetune.train.maps import SourceMaps, mapper_of, write_leep, write_maps
from riskmap_ext.finetune.train.plan import (
    Plan,
    check_preprocessing,
    make_plan,
    predictor_of_source,
    read_cases,
    tell_plan,
)
from riskmap_ext.finetune.train.step import LossFunction, loss_in_words

# (maps, training cases) -> case name -> voxel weights [X, Y, Z] on the prepared grid.
WeightFunction = Callable[[SourceMaps, Sequence[Case]], Mapping[str, Tensor]]


@dataclass
class FinetuneResult:
    """What a run ended with.

    dice: class -> mean over the validation cases that have it (NaN where none has), background
    left out. cases: case -> class -> Dice. leep, remark: the source's LEEP score and the warning
    that it tells nothing, None without a source. history: the rows of metrics.csv. step_seconds:
    mean of a step, validations left out.
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
    step_seconds: float = math.nan

    @property
    def checkpoint(self) -> Path:
        return self.output / "last.pt"


def finetune(
    config: Config,
    *,
    cases: Cases | None = None,
    progress: bool = True,
    resume: bool = False,
    loss: LossFunction | None = None,
    weights: WeightFunction | None = None,
) -> FinetuneResult:
    """Runs a whole configuration and writes its output folder.

    Started by torchrun, the processes share each batch, the source's maps and the validation; the
    first of them writes.

    Args:
        config: from load_config, or built in code.
        cases: the result of prepare_cases for the same `data` section, to share between runs.
        progress: print the log and progress bars.
        resume: go on with the unfinished run in the output folder from its last validation; begin
            where there is none.
        loss: in the place of the configuration's: (logits [B, C, *P], label [B, *P] int16 with -100
            for ignored voxels, risk [B, *P] or None, image foreground [B, *P]) -> a scalar.
        weights: in the place of the risk maps, with `risk.use`: (maps, training cases) -> case name
            -> voxel weights, such as a function of `maps.transferability`.

    Raises: InputError (ConfigError, DataError, CheckpointError) before anything is written;
    ValueError for `weights` without `risk.use`, or that lack a training case or have another shape.
    """
    if weights is not None and not config.uses_risk:
        raise ValueError(
            "weights: stand in the place of the risk map; expected a source and risk.use=true"
        )
    device = run_device(config)
    with processes(device) as group:
        log = Log(quiet=not (progress and group.is_main))
        return _finetune(config, cases, device, group, log, resume, loss, weights)


def _finetune(
    config: Config,
    cases: Cases | None,
    device: torch.device,
    group: Processes,
    log: Log,
    resume: bool,
    loss: LossFunction | None,
    weights: WeightFunction | None,
) -> FinetuneResult:
    started = time.perf_counter()
    check_threads(config)
    if loss is not None:
        config = _with_logits(config)
    resumed = group.together(lambda: unfinished_run(config)) if resume else None
    if resume and resumed is None:  # nothing that would be lost
        config = config.model_copy(update={"overwrite": True})
    if resumed is None:
        group.on_main(lambda: check_output(config))
    with (
        contextlib.ExitStack() as held,
        told_when_stopped(config, log),
        torch_state(config, device),
    ):
        plan = group.together(lambda: make_plan(config, cases, device, group, log, resumed))
        group.on_main(lambda: _begin(plan, held, loss, weights))
        maps = _source_maps(plan)
        trained = _train(plan, maps, loss, weights)
        table = _evaluate(plan, maps, trained.predictions)
        names = list(plan.cases.structures.scored)
        means = structure_means(table, len(names))
        group.wait()  # for what the others still write
        seconds = time.perf_counter() - started
        if group.is_main:
            note_end(config.output, device, seconds)
            (config.output / RESUME_FILE).unlink(missing_ok=True)
            if config.write.report:
                report_at_end(config.output, log)
        log(f"Done in {seconds:.1f} s: {config.output}")
    return FinetuneResult(
        config.output,
        plan.cases.classes,
        dict(zip(names, means, strict=True)),
        mean_without_nan(means),
        {name: dict(zip(names, row, strict=True)) for name, row in table.items()},
        None if maps is None else maps.score,
        None if maps is None else maps.remark,
        plan.models.keys,
        trained.history,
        seconds,
        trained.step_seconds,
    )


def _with_logits(config: Config) -> Config:
    """For a loss of the caller's own, which takes them."""
    if config.loss.fused_head is True:
        raise ConfigError("loss.fused_head: true is for the configuration's loss, got another one")
    return config.model_copy(update={"loss": config.loss.model_copy(update={"fused_head": False})})


def _begin(
    plan: Plan,
    held: contextlib.ExitStack,
    loss: LossFunction | None,
    weights: WeightFunction | None,
) -> None:
    """The output folder, and what the plan says in its log."""
    config, resumed = plan.config, plan.resumed
    told = loss_in_words(config, loss=loss is not None, weights=weights is not None)
    held.enter_context(claimed_output(config, plan.log, resumed=resumed is not None))
    counts = {"train": len(plan.cases.train), "validation": len(plan.cases.validation)}
    note_start(config.output, plan.device, counts, told, resumed=resumed is not None)
    if resumed is not None:
        plan.log(f"Going on after step {resumed['step']} of {config.train.steps}")
    tell_plan(plan)
    plan.log(f"Loss: {told}")
    for note in config.notes:
        plan.log.warn(note)
    if plan.models.keys is not None and resumed is None:
        write_json(config.output / "keys.json", plan.models.keys.as_dict())


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
    with (
        contextlib.ExitStack() as held,
        told_when_stopped(config, log),
        torch_state(config, device),
    ):
        source = load_source(config.source)
        cases = read_cases(config, log)
        predictor = predictor_of_source(config, source, cases.channels, device)
        held.enter_context(claimed_output(config, log))
        for note in cases.notes:
            log.warn(note)
        check_preprocessing(config, source, cases.spacings, log)
        log.stage = "before all maps were made"
        others = cases.validation
        maps = _map_cases(config, log, source, predictor, cases, others, Processes(), None)
        for case in _drawn(config, [*cases.train, *others]):
            risk = maps.risk[case.name]
            write_overlay(config.output / "overlays", case, cases.classes, None, risk)
    log(f"Done: {config.output}")
    return maps


def _map_cases(
    config: Config,
    log: Log,
    source: SourceModel,
    predictor: Predictor,
    cases: Cases,
    others: list[Case],
    group: Processes,
    store: TensorStore | None,
) -> SourceMaps:
    with log.progress("cases") as bar:
        total = 2 * len(group.share(cases.train)) + len(cases.train) + len(others)
        task = bar.add_task("Source model", total=total, note="")

        def advance(note: str) -> None:
            bar.update(task, advance=1, note=note)

        mapper = mapper_of(config, source, predictor, cases, advance, group, store)
        maps = mapper.run(cases.train, others)
    if group.is_main:
        write_leep(config.output, maps, cases.classes, source.classes)
    lo, hi = maps.hardness_range
    cached = f" ({maps.num_cached} maps from the cache)" if maps.num_cached else ""
    log(f"LEEP score {maps.score:.4f}, hardness from {lo:.3f} to {hi:.3f}{cached}")
    if maps.remark:
        log.warn(maps.remark)
    if config.write.maps:
        for case in group.share([*cases.train, *others]):
            write_maps(config.output / "maps", case, maps)
    return maps


def _source_maps(plan: Plan) -> SourceMaps | None:
    config, models = plan.config, plan.models
    if models.source is None or models.source_predictor is None:
        plan.log("No source model: training from scratch")
        return None
    # Maps of validation cases are only looked at: neither statistics nor training see them.
    shown = config.write.maps or bool(config.write.overlays)
    others = plan.cases.validation if shown else []
    return _map_cases(
        config,
        plan.log,
        models.source,
        models.source_predictor,
        plan.cases,
        others,
        plan.processes,
        plan.store,
    )


def _train(
    plan: Plan,
    maps: SourceMaps | None,
    loss: LossFunction | None,
    weights: WeightFunction | None,
) -> Trained:
    risk: Mapping[str, Tensor] | None = None
    if maps is not None and plan.config.uses_risk:
        risk = maps.risk if weights is None else _checked(weights(maps, plan.cases.train), plan)
    return train_network(plan, risk, loss)


def _checked(weights: Mapping[str, Tensor], plan: Plan) -> Mapping[str, Tensor]:
    for case in plan.cases.train:
        if case.name not in weights:
            raise ValueError(
                f"weights: expected a tensor for each training case, none of {case.name}"
            )
        found, expected = list(weights[case.name].shape), list(case.label.shape)
        if found != expected:
            raise ValueError(f"weights: {case.name}: expected the shape {expected}, got {found}")
    return weights


def _evaluate(
    plan: Plan, maps: SourceMaps | None, predictions: dict[str, Tensor]
) -> dict[str, list[float]]:
    """Dice at the files' resolution; writes dice.csv, predictions/ and overlays/."""
    config, cases, group = plan.config, plan.cases, plan.processes
    structures = cases.structures
    mine = {}
    for case in group.share(cases.validation):
        prediction = predictions[case.name]
        if case.grid.resampled:
            prediction = predict(plan.models.predictor, case, structures, full=True)
        mine[case.name] = dice_per_structure(prediction, case.full_label, structures)
        if config.write.predictions:
            dtype = "uint8" if len(structures.classes) <= 256 else "int16"
            write_nifti(
                config.output / "predictions" / f"{case.name}.nii.gz",
                case.grid.to_file(prediction).astype(dtype),
                case.grid.affine,
                case.grid.codes,
            )
    table = group.merged(mine, [case.name for case in cases.validation])
    if not table:
        plan.log("No validation cases: no Dice")
    elif group.is_main:
        names = list(structures.scored)
        write_dice(config.output / "dice.csv", table, names)
        title = f"Dice of {len(table)} validation cases"
        plan.log.table(dice_table(table, names, title))
    for case in group.share(_drawn(config, cases.validation)):
        risk = None if maps is None else maps.risk[case.name]
        folder = config.output / "overlays"
        write_overlay(folder, case, structures.classes, predictions[case.name], risk)
    return table


def _drawn(config: Config, cases: list[Case]) -> list[Case]:
    wanted = config.write.overlays
    return cases if wanted is True else cases[: int(wanted)]

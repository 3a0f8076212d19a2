"""A whole fine-tuning run: checks inputs, makes maps, trains the network, writes results."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from riskmap_ext.finetune.base.device import device_of
from riskmap_ext.finetune.base.errors import ConfigError
from riskmap_ext.finetune.base.files import write_json
from riskmap_ext.finetune.base.lock import check_free
from riskmap_ext.finetune.base.processes import processes
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.data.prepare import Case, Cases, prepare_cases
from riskmap_ext.finetune.folder.metrics import dice_table, write_dice
from riskmap_ext.finetune.folder.records import note_end, note_start
from riskmap_ext.finetune.folder.workspace import (
    RESUME_FILE,
    check_inputs_stay,
    check_output,
    claimed_output,
)
from riskmap_ext.finetune.metrics.dice import dice_per_structure, mean_without_nan
from riskmap_ext.finetune.pictures.figures import comparison
from riskmap_ext.finetune.pictures.slices import volumes_of
from riskmap_ext.finetune.report.write import report_at_end
from riskmap_ext.finetune.source.checkpoint import KeyReport, load_source
from riskmap_ext.finetune.source.model import preparation_warnings, prepared_as_source
from riskmap_ext.finetune.source.predictor import predict, write_segmentation
from riskmap_ext.finetune.train.loop import Callback, Trainer
from riskmap_ext.finetune.train.maps import SourceMaps, map_cases
from riskmap_ext.finetune.train.models import predictor_of_source
from riskmap_ext.finetune.train.plan import LossFunction, Plan, WeightFunction, make_plan
from riskmap_ext.finetune.train.session import Session, session
from riskmap_ext.finetune.train.step import loss_in_words


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The final Dice of the validation, without background.

    structures: classes or regions. cases: case -> structure -> Dice, NaN if its label lacks it.
    """

    output: Path
    structures: list[str]
    cases: dict[str, dict[str, float]]

    @property
    def dice(self) -> dict[str, float]:
        """Structure -> mean over the cases that have it, NaN if none has."""
        rows = self.cases.values()
        return {name: mean_without_nan([row[name] for row in rows]) for name in self.structures}

    @property
    def mean_dice(self) -> float:
        return mean_without_nan(list(self.dice.values()))


@dataclass(frozen=True, kw_only=True)
class FinetuneResult(Scores):
    """The results of a run.

    leep, remark: the source's LEEP score and the warning that it tells nothing, None without a
    source. history: the rows of metrics.csv. step_seconds: mean of a step, without validations.
    """

    classes: list[str]
    leep: float | None
    remark: str | None
    keys: KeyReport | None
    history: list[dict[str, float]] = field(repr=False)
    seconds: float
    step_seconds: float

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
    prepare: Callable[[Plan, SourceMaps | None], None] | None = None,
    callback: Callback | None = None,
) -> FinetuneResult:
    """Runs a whole configuration and writes its output folder.

    Under torchrun, the processes share each batch, the source's maps and the validation; the first
    one writes.

    Args:
        config: from load_config, or built in code.
        cases: the result of prepare_cases for the same `data` section, to share between runs.
        progress: print the log and progress bars.
        resume: resume the unfinished run in the output folder from its last validation; start a
            new one if there is none.
        loss: replaces the configuration's: (logits [B, C, *P], label [B, *P] int16 with -100
            for ignored voxels, risk [B, *P] or None, image foreground [B, *P]) -> a scalar.
        weights: replace the risk maps, with `risk.use`: (maps, training cases) -> case name
            -> voxel weights, such as a function of `maps.transferability`.
        prepare: called with the plan and the maps before the first step, for example to put hooks
            on `plan.models.network`.
        callback: called with the step and a dict of numbers, for example to log them elsewhere:
            every 25 steps `train_loss` (mean since the last validation) and `lr`; at a validation
            the known columns of metrics.csv, including `dice_CLASS` and `mean_dice`.

    Raises: InputError (ConfigError, DataError, CheckpointError) before anything is written;
    ValueError for `weights` without `risk.use`, or that lack a training case or have another shape.
    """
    started = time.perf_counter()
    config = _checked(config, loss, weights)
    with (
        processes(device_of(config.device)) as group,
        session(config, progress=progress, processes=group) as run,
    ):
        plan = group.together(lambda: make_plan(run, cases=cases, resume=resume))
        words = loss_in_words(config, loss is not None, weights is not None)
        group.on_main(lambda: _begin(plan, words))
        maps = _source_maps(plan)
        if prepare is not None:
            prepare(plan, maps)
        trainer = Trainer(plan, _voxel_weights(plan, maps, weights), loss, callback)
        trainer.run()
        dice = _evaluate(plan, maps, trainer.predictions)
        plan.processes.gather(None)  # waits for the other processes to finish writing
        seconds = time.perf_counter() - started
        if run.processes.is_main:
            note_end(config.output, run.device, seconds)
            make_report(run)
            tell_end(run, config.output / "last.pt", f"Done in {seconds:.1f} s")
            # Last: until then, --resume does again what is missing.
            (config.output / RESUME_FILE).unlink(missing_ok=True)
    names = list(plan.cases.structures.scored)
    return FinetuneResult(
        output=config.output,
        structures=names,
        cases={name: dict(zip(names, row, strict=True)) for name, row in dice.items()},
        classes=plan.cases.classes,
        leep=None if maps is None else maps.score,
        remark=None if maps is None else maps.remark,
        keys=plan.models.keys,
        history=trainer.history,
        seconds=seconds,
        step_seconds=trainer.step_seconds,
    )


def make_report(run: Session) -> None:
    if run.config.write.report:
        report_at_end(run.config.output, run.log)


def tell_end(run: Session, model: Path, done: str) -> None:
    """Prints the next commands. model: what `riskmap predict` takes."""
    output, log = run.config.output, run.log
    told = [f"{shlex.join(['riskmap', 'predict', str(model)])} --image IMAGES --output FOLDER"]
    if not run.config.write.report:
        told.append(shlex.join(["riskmap", "report", str(output)]))
    log("\n  ".join(["Next:", *told]))
    log(f"{done}: {output}")


def make_maps(config: Config, *, progress: bool = True) -> SourceMaps:
    """The maps of all cases of `config` with its frozen source, without training.

    Statistics and range come from the training cases. Writes maps/ and overlays/ to the output
    folder. Raises: InputError as finetune does.
    """
    if config.source is None:
        raise ConfigError("source: missing; the maps need a source model")
    check_free(config.output)
    check_output(config)
    with session(config, progress=progress) as run:
        source = load_source(config.source)
        config = prepared_as_source(config, source)
        run = replace(run, config=config)
        cases = prepare_cases(config, log=run.log)
        check_inputs_stay(config, cases.listing)
        predictor = predictor_of_source(config, source, cases.channels, run.device)
        run.held.enter_context(claimed_output(config, run.log))
        differences = preparation_warnings(config, source)
        for warning in (*cases.listing.notes, *differences):
            run.log.warn(warning)
        run.log.stage = "before all maps were made"
        maps = map_cases(run, source, predictor, cases, cases.validation)
        _draw(run, [*cases.train, *cases.validation], cases.classes, maps)
        run.log(f"Done: {config.output}")
    return maps


def _checked(config: Config, loss: LossFunction | None, weights: WeightFunction | None) -> Config:
    """The configuration that the caller's own functions need."""
    if config.data.folds is not None:
        raise ConfigError("data.folds: are for cross_validate; expected null for one run")
    if weights is not None and not config.risk.use:
        raise ValueError("weights: they replace the risk map; expected a source and risk.use=true")
    if loss is None:
        return config
    if config.loss.fused_head is True:
        raise ConfigError("loss.fused_head: true is for the configuration's loss, got another one")
    # The caller's loss takes logits.
    return config.model_copy(update={"loss": config.loss.model_copy(update={"fused_head": False})})


def _begin(plan: Plan, loss: str) -> None:
    """Claims the output folder. loss: in words."""
    config, resumed = plan.config, plan.resumed
    claimed = claimed_output(config, plan.log, resume=plan.resume, resumed=resumed)
    plan.held.enter_context(claimed)
    counts = {"train": len(plan.cases.train), "validation": len(plan.cases.validation)}
    note_start(config.output, plan.device, counts, loss, resumed=resumed is not None)
    if resumed is not None:
        plan.log(f"Resuming after step {resumed['step']} of {config.train.steps}")
    elif plan.models.keys is not None:
        write_json(config.output / "keys.json", vars(plan.models.keys))
    plan.log(f"Loss: {loss}")


def _source_maps(plan: Plan) -> SourceMaps | None:
    config, models = plan.config, plan.models
    if models.source is None or models.source_predictor is None:
        return None
    # Maps of validation cases are for viewing only: neither statistics nor training use them.
    shown = config.write.maps or bool(config.write.overlays)
    validation = plan.cases.validation if shown else []
    return map_cases(plan, models.source, models.source_predictor, plan.cases, validation)


def _voxel_weights(
    plan: Plan, maps: SourceMaps | None, own: WeightFunction | None
) -> Mapping[str, Tensor] | None:
    """The risk maps, or the caller's weights instead; None if the loss uses neither."""
    if maps is None or not plan.config.risk.use:
        return None
    if own is None:
        return maps.risk
    weights = own(maps, plan.cases.train)
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected case names with tensors, got {type(weights).__name__}")
    for case in plan.cases.train:
        found, shape = weights.get(case.name), case.label.shape
        if found is None or found.shape != shape:
            got = f"none of {case.name}" if found is None else list(found.shape)
            raise ValueError(f"weights: {case.name}: expected a tensor {list(shape)}, got {got}")
    return weights


def _evaluate(
    plan: Plan, maps: SourceMaps | None, predictions: Mapping[str, Tensor]
) -> dict[str, list[float]]:
    """Dice at the files' resolution; writes dice.csv, predictions/ and overlays/."""
    config, cases, structures = plan.config, plan.cases, plan.cases.structures

    def dice(case: Case) -> list[float]:
        prediction = predictions[case.name]
        if case.grid.resampled:
            prediction = predict([plan.models.predictor], case, structures, full=True)
        else:
            prediction = case.grid.uncropped(prediction)
        if config.write.predictions:
            path = config.output / "predictions" / f"{case.name}.nii.gz"
            write_segmentation(path, case, prediction, structures)
        return dice_per_structure(prediction, case.full_label, structures)

    table = plan.processes.spread({case.name: case for case in cases.validation}, dice)
    if not table:
        plan.log("No validation cases: no Dice")
    elif plan.processes.is_main:
        names = list(structures.scored)
        write_dice(config.output / "dice.csv", table, names)
        plan.log.table(dice_table(table, names, f"Dice of {len(table)} validation cases"))
    _draw(plan, cases.validation, structures.classes, maps, predictions)
    return table


def _draw(
    session: Session,
    cases: Sequence[Case],
    classes: Sequence[str],
    maps: SourceMaps | None,
    predictions: Mapping[str, Tensor] | None = None,
) -> None:
    """overlays/ of as many cases as write.overlays says."""
    wanted, folder = session.config.write.overlays, session.config.output / "overlays"
    drawn = cases if wanted is True else cases[: int(wanted)]
    for case in session.processes.share(drawn):
        prediction = None if predictions is None else predictions[case.name]
        risk = None if maps is None else maps.risk[case.name]
        volumes = volumes_of(case, prediction, risk)
        comparison(folder / f"{case.name}.png", [volumes], classes, case.name)

"""A run for each fold of the cases, and what they reach together."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from riskmap_ext.finetune.base.device import device_of
from riskmap_ext.finetune.base.errors import ConfigError
from riskmap_ext.finetune.base.files import write_json
from riskmap_ext.finetune.base.lock import check_free
from riskmap_ext.finetune.base.processes import processes
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.data.datalist import Listing
from riskmap_ext.finetune.data.prepare import Cases
from riskmap_ext.finetune.data.splits import (
    SPLITS_FILE,
    Split,
    cases_of,
    make_splits,
    not_validated,
    read_splits,
)
from riskmap_ext.finetune.folder.metrics import dice_table, write_dice
from riskmap_ext.finetune.folder.workspace import (
    check_same_run,
    claimed_output,
    finished,
    fold_folders,
    unfinished_run,
)
from riskmap_ext.finetune.metrics.dice import mean_without_nan
from riskmap_ext.finetune.report.read import RunFiles, read_run
from riskmap_ext.finetune.report.write import report_at_end
from riskmap_ext.finetune.train.finetune import finetune
from riskmap_ext.finetune.train.plan import check_start, read_cases, resolved, whole_outline
from riskmap_ext.finetune.train.session import Session, session


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """What the runs in OUTPUT/fold_0, fold_1, ... ended with; each case was validated once.

    splits: the cases of each fold. dice, mean_dice, cases: as FinetuneResult has them, over the
    validation cases of all folds, in the digits of dice.csv.
    """

    output: Path
    splits: list[Split]
    dice: dict[str, float]
    mean_dice: float
    cases: dict[str, dict[str, float]]


def cross_validate(
    config: Config, *, progress: bool = True, resume: bool = False, **options: Any
) -> CrossValidation:
    """Runs a configuration with `data.folds`: one run for each fold, and a report over all.

    The cases are read once. Args as of finetune, which also takes the `options` (loss, weights,
    prepare); with `resume`, folds that are done stay as they are.

    Raises: InputError as finetune does, for all folds before the first one begins.
    """
    with processes(device_of(config.device)) as group:
        group.on_main(lambda: check_free(config.output))
        config, _ = group.together(lambda: check_start(config, resume))
        with session(config, progress=progress, processes=group) as run:
            run, splits, cases, resumed = _checked(run, resume)
            config = run.config
            shares = group.together(lambda: [cases_of(split, cases) for split in splits])
            group.on_main(lambda: _claim(run, splits, cases.listing, resumed))
            folders = fold_folders(config.output)
            done = group.on_main(lambda: [resumed and finished(folder) for folder in folders])
            for folder, mine, before in zip(folders, shares, done, strict=True):
                run.log.stage = f"in {folder.name}"
                run.log(f"{folder.name} of {len(folders)} folds{', done before' if before else ''}")
                if not before:
                    cache = config.cache or config.output / "cache"
                    own = {"output": folder, "cache": cache, "data": mine.data}
                    fold = config.model_copy(update=own)
                    finetune(fold, cases=mine, progress=progress, resume=resumed, **options)
            found = group.on_main(lambda: _end(run))
    return CrossValidation(
        output=config.output,
        splits=splits,
        dice=dict(zip(found.classes, found.class_means, strict=True)),
        mean_dice=mean_without_nan(found.class_means),
        cases={n: dict(zip(found.classes, row, strict=True)) for n, row in found.dice.items()},
    )


def check_folds(config: Config, listing: Listing, resume: bool) -> tuple[list[Split], bool]:
    """The splits, and whether there is a cross-validation to go on with.

    Raises: InputError where the cases do not make these folds, or those begun were others.
    """
    splits = make_splits(config, [case.name for case in listing.train])
    folders = fold_folders(config.output) if resume else []
    if not folders:
        return splits, False
    check_same_run(config)
    path = config.output / SPLITS_FILE
    if read_splits(path) != splits:
        raise ConfigError(f"--resume: {path}: has other folds than data.folds makes of the cases")
    for folder in folders:
        if not finished(folder):
            unfinished_run(config.model_copy(update={"output": folder}))
    return splits, True


def _checked(run: Session, resume: bool) -> tuple[Session, list[Split], Cases, bool]:
    """With the source's preparation: the folds, all their cases, and whether some were begun.

    Raises: InputError.
    """
    group = run.processes
    outline = group.together(lambda: whole_outline(run))
    told = resolved(outline.config, outline.listing)
    splits, resumed = group.on_main(lambda: check_folds(told, outline.listing, resume))
    cases = group.together(lambda: read_cases(run, outline))
    return replace(run, config=outline.config), splits, cases, resumed


def _claim(run: Session, splits: list[Split], listing: Listing, resumed: bool) -> None:
    config = resolved(run.config, listing)
    run.held.enter_context(claimed_output(config, run.log, resumed=resumed))
    write_json(config.output / SPLITS_FILE, [split.model_dump() for split in splits])
    for note in not_validated(splits, [case.name for case in listing.train]):
        run.log.warn(note)


def _end(run: Session) -> RunFiles:
    """What the folds have reached; writes dice.csv and the report."""
    output = run.config.output
    found = read_run(output)
    write_dice(output / "dice.csv", found.dice, found.classes, found.fold_of)
    title = f"Dice of {len(found.dice)} cases, each validated once"
    run.log.table(dice_table(found.dice, found.classes, title))
    if run.config.write.report:
        report_at_end(output, run.log)
    command = shlex.join(["riskmap", "predict", str(output)])
    run.log(f"Next:\n  {command} --image IMAGES --output FOLDER")
    run.log(f"Done: {output}")
    return found

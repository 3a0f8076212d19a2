"""One run per fold of the cases, and their joint result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from riskmap_ext.finetune.base.device import device_of
from riskmap_ext.finetune.base.files import write_json
from riskmap_ext.finetune.base.processes import processes
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.data.prepare import Cases
from riskmap_ext.finetune.data.splits import (
    SPLITS_FILE,
    Split,
    cases_of,
    make_splits,
    not_validated,
)
from riskmap_ext.finetune.folder.metrics import dice_table, write_dice
from riskmap_ext.finetune.folder.workspace import claimed_output, finished, fold_folders
from riskmap_ext.finetune.report.read import RunFiles, read_run
from riskmap_ext.finetune.report.write import REPORT_FILE, report_at_end
from riskmap_ext.finetune.train.finetune import Scores, finetune, make_report, tell_end
from riskmap_ext.finetune.train.plan import read_inputs
from riskmap_ext.finetune.train.session import Session, session


@dataclass(frozen=True, kw_only=True)
class CrossValidation(Scores):
    """The results of the runs in OUTPUT/fold_0, fold_1, ...; each case was validated once.

    cases: of all folds, in the digits of dice.csv. splits: the cases of each fold.
    """

    splits: list[Split]


def cross_validate(
    config: Config, *, progress: bool = True, resume: bool = False, **options: Any
) -> CrossValidation:
    """Runs a configuration with `data.folds`: one run for each fold, and a report over all.

    The cases are read once. Args as for finetune, which also takes the `options` (loss, weights,
    prepare); with `resume`, finished folds stay as they are.

    Raises: InputError as finetune does, for all folds before the first one starts.
    """
    with (
        processes(device_of(config.device)) as group,
        session(config, progress=progress, processes=group) as run,
    ):
        outline, cases = group.together(lambda: read_inputs(run, resume=resume))
        config, before = outline.config, outline.resumed
        # Raises if there is no `data.folds`.
        splits = outline.splits or make_splits(config, [case.name for case in cases.train])
        run = replace(run, config=config)
        del outline  # and its networks
        resumed = before is not None
        shares = group.together(lambda: [cases_of(split, cases) for split in splits])
        group.on_main(lambda: _claim(run, splits, cases, resume, before))
        folders = fold_folders(config.output)
        done = group.on_main(lambda: [resumed and finished(folder) for folder in folders])
        for folder, mine, is_done in zip(folders, shares, done, strict=True):
            run.log.stage = f"in {folder.name}"
            run.log(f"{folder.name} of {len(folders)} folds{', done before' if is_done else ''}")
            if not is_done:
                cache = config.cache or config.output / "cache"
                own = {"output": folder, "cache": cache, "data": mine.data}
                fold = config.model_copy(update=own)
                finetune(fold, cases=mine, progress=progress, resume=resumed, **options)
            elif group.is_main and config.write.report and not (folder / REPORT_FILE).exists():
                report_at_end(folder, run.log)  # there was no room for it
        found = group.on_main(lambda: _end(run))
    return CrossValidation(
        output=config.output,
        structures=found.classes,
        cases={n: dict(zip(found.classes, row, strict=True)) for n, row in found.dice.items()},
        splits=splits,
    )


def _claim(
    run: Session,
    splits: list[Split],
    cases: Cases,
    resume: bool,
    resumed: dict[str, Any] | None,
) -> None:
    claimed = claimed_output(run.config, run.log, resume=resume, resumed=resumed)
    run.held.enter_context(claimed)
    write_json(run.config.output / SPLITS_FILE, [split.model_dump() for split in splits])
    for note in not_validated(splits, [case.name for case in cases.train]):
        run.log.warn(note)


def _end(run: Session) -> RunFiles:
    """The joint result of the folds; writes dice.csv and the report."""
    output = run.config.output
    found = read_run(output)
    title = f"Dice of {len(found.dice)} cases, each validated once"
    run.log.table(dice_table(found.dice, found.classes, title))
    make_report(run)
    # Last: it tells that the whole is finished.
    write_dice(output / "dice.csv", found.dice, found.classes, found.fold_of)
    tell_end(run, output, "Done")
    return found

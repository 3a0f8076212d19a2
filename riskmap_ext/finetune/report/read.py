"""Reads the folder of a run for its report."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, model_validator

from riskmap_ext.finetune.base.errors import ConfigError, DataError, one_line
from riskmap_ext.finetune.base.files import read_json, read_text
from riskmap_ext.finetune.config.load import parse_config
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.config.yaml_text import read_yaml
from riskmap_ext.finetune.folder.loss_curve import HEADER as LOSS_HEADER
from riskmap_ext.finetune.folder.records import ENVIRONMENT_FILE, LEEP_FILE, ended
from riskmap_ext.finetune.folder.workspace import RESUME_FILE, finished, fold_folders
from riskmap_ext.finetune.metrics.dice import mean_without_nan, structure_means

# A configuration alone is not a run.
_SIGNS = ("log.txt", "metrics.csv", "dice.csv", "leep.json")
_METRICS = ("step", "train_loss", "mean_dice", "lr", "seconds")


class Leep(BaseModel):
    """leep.json; C classes, Z source classes, conditional [C][Z]."""

    score: float
    label_entropy: float
    tells_nothing: bool
    remark: str | None
    hardness_range: tuple[float, float]
    voxels: int
    classes: list[str]
    source_classes: list[str]
    class_frequencies: list[float]
    source_frequencies: list[float]
    conditional: list[list[float]]

    @model_validator(mode="after")
    def _fits(self) -> Leep:
        rows, columns = len(self.classes), len(self.source_classes)
        found = len(self.class_frequencies), len(self.source_frequencies), len(self.conditional)
        if found != (rows, columns, rows) or {*map(len, self.conditional)} - {columns}:
            raise ValueError(f"expected a table of {rows} x {columns}")
        return self


@dataclass(frozen=True)
class RunFiles:
    """A run as its files describe it; None (or empty) if there is no such file.

    config: None if this version cannot use config.yaml, with the reason in config_problem. dice:
    case -> Dice of each class except the background, NaN if the label lacks it. losses: (step,
    loss, lr). starts: of environment.json. folds: those that a cross-validation has started, by
    name; `dice` is then that of all of them.
    """

    folder: Path
    is_finished: bool
    can_resume: bool
    config_text: str
    config: Config | None
    config_problem: str | None
    classes: list[str]
    metrics: list[dict[str, float]]
    losses: list[list[float]]
    dice: dict[str, list[float]]
    leep: Leep | None
    keys: dict[str, list[str]] | None
    starts: list[dict[str, Any]]
    log: list[str] | None
    folds: dict[str, RunFiles]

    @property
    def fold_of(self) -> dict[str, str]:
        return {case: name for name, fold in self.folds.items() for case in fold.dice}

    @property
    def steps_done(self) -> int:
        """As far as the files say."""
        rows = [row["step"] for row in self.metrics[-1:]] + [row[0] for row in self.losses[-1:]]
        return int(max(rows, default=0))

    @property
    def case_means(self) -> dict[str, float]:
        return {name: mean_without_nan(row) for name, row in self.dice.items()}

    @property
    def class_means(self) -> list[float]:
        return structure_means(self.dice, len(self.classes))

    @property
    def warnings(self) -> list[str]:
        lines = (line for run in (*self.folds.values(), self) for line in run.log or [])
        found = (line.partition(" Warning: ")[2] for line in lines)
        return list(dict.fromkeys(text for text in found if text))


def read_run(folder: Path) -> RunFiles:
    """Raises: InputError naming the folder that holds no run, or the damaged file."""
    if not folder.is_dir():
        why = "is a file; expected the folder of a run" if folder.exists() else "no such folder"
        raise ConfigError(f"{folder}: {why}")
    if (config_text := _text(folder / "config.yaml")) is None:
        raise ConfigError(f"{folder}: holds no run (there is no config.yaml)")
    if not any((folder / name).exists() for name in _SIGNS):
        raise ConfigError(f"{folder}: holds no run (there is none of {', '.join(_SIGNS)})")
    config, problem = _config(folder / "config.yaml", config_text)
    begun = [each for each in fold_folders(folder) if (each / "log.txt").exists()]
    folds = {each.name: read_run(each) for each in begun}
    header, metrics = _table(folder / "metrics.csv", _METRICS)
    classes = [name.removeprefix("dice_") for name in header if name.startswith("dice_")]
    dice = {name: row for fold in folds.values() for name, row in fold.dice.items()}
    if folds:
        classes = next((fold.classes for fold in folds.values() if fold.dice), [])
    elif (path := folder / "dice.csv").exists():
        (_, *found, _), rows = _table(path, ("case", "mean"), names=1)
        if len(rows) < 3:
            raise _damaged(path, "expected cases, their mean and their number")
        if classes and found != classes:
            raise _damaged(path, f"other classes than metrics.csv: {', '.join(classes)}")
        classes, dice = found, {name: row[:-1] for name, *row in rows[:-2]}
    environment = _json(folder / ENVIRONMENT_FILE, dict[str, list[dict[str, Any]]]) or {}
    log = _text(folder / "log.txt")
    is_finished = _is_finished(folder)
    return RunFiles(
        folder=folder,
        is_finished=is_finished,
        can_resume=not is_finished and (bool(folds) or (folder / RESUME_FILE).exists()),
        config_text=config_text,
        config=config,
        config_problem=problem,
        classes=classes,
        metrics=[dict(zip(header, row, strict=True)) for row in metrics],
        losses=_table(folder / "losses.csv", LOSS_HEADER)[1],
        dice=dice,
        leep=_json(folder / LEEP_FILE, Leep),
        keys=_json(folder / "keys.json", dict[str, list[str]]),
        starts=environment.get("starts", []),
        log=None if log is None else log.splitlines(),
        folds=folds,
    )


def _is_finished(folder: Path) -> bool:
    """Also of a run that is writing its report."""
    folds = fold_folders(folder)
    return finished(folder) or ended(folder) or (bool(folds) and all(map(finished, folds)))


def _damaged(path: Path, why: object) -> DataError:
    return DataError([f"{path}: is damaged ({why})"])


def _text(path: Path) -> str | None:
    return read_text(path) if path.exists() else None


def _config(path: Path, text: str) -> tuple[Config | None, str | None]:
    try:
        content, _ = read_yaml(text)
    except yaml.YAMLError:
        content = None
    if not isinstance(content, dict):
        raise _damaged(path, "expected YAML with keys such as output, data")
    try:
        return parse_config(content, base=path.parent, origin=str(path)), None
    except ConfigError as error:
        return None, one_line(error)


def _table(path: Path, columns: tuple[str, ...], names: int = 0) -> tuple[list[str], list[Any]]:
    """Header and rows, numbers except for the first `names` columns; empty without a file."""
    if (text := _text(path)) is None:
        return [], []
    try:
        header, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
    except csv.Error as error:
        raise _damaged(path, error) from None
    if missing := [name for name in columns if name not in header]:
        raise _damaged(path, f"expected the columns {', '.join(columns)}; no {missing[0]}")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise _damaged(path, f"row {number}: expected {len(header)} columns, got {len(row)}")
    values: list[list[Any]]
    try:
        values = [[*row[:names], *map(float, row[names:])] for row in rows]
    except ValueError as error:
        raise _damaged(path, error) from None
    if "step" in columns and not all(0 <= row[header.index("step")] < 2**53 for row in values):
        raise _damaged(path, "expected steps from 0 on")
    return header, values


def _json(path: Path, kind: Any) -> Any:
    return read_json(path, kind) if path.exists() else None

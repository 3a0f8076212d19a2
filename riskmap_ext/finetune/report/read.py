"""What the folder of a run holds, read back for its report."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from riskmap_ext.finetune.base.errors import ConfigError, DataError
from riskmap_ext.finetune.base.structures import structures_of
from riskmap_ext.finetune.config.load import parse_config
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.folder.loss_curve import HEADER as LOSS_HEADER
from riskmap_ext.finetune.folder.records import ENVIRONMENT_FILE, LEEP_FILE
from riskmap_ext.finetune.folder.workspace import RESUME_FILE, finished

# A configuration alone is no run.
_SIGNS = ("log.txt", "metrics.csv", "dice.csv", "leep.json")
# Further source classes are counted.
_MOST_COLUMNS = 30
_METRICS = ("step", "train_loss", "mean_dice", "lr", "seconds")


@dataclass(frozen=True)
class Leep:
    """leep.json; arrays are [C], [Z] and [C, Z]."""

    score: float
    label_entropy: float
    tells_nothing: bool
    remark: str | None
    hardness_range: tuple[float, float]
    voxels: int
    classes: list[str]
    source_classes: list[str]
    class_frequencies: np.ndarray
    source_frequencies: np.ndarray
    conditional: np.ndarray

    @property
    def shown(self) -> list[int]:
        """Source classes for a table: those with most of the mass, in their order."""
        order = np.argsort(-self.source_frequencies, kind="stable")
        return sorted(order[:_MOST_COLUMNS].tolist())

    @property
    def mass_left_out(self) -> float:
        return max(0.0, 1 - float(self.source_frequencies[self.shown].sum()))


@dataclass(frozen=True)
class RunFiles:
    """A run as its files tell it; None (or nothing) where there is no such file.

    config: None where config.yaml is not one that this version can use, with the reason in
    config_problem. dice: case -> Dice of each class but the background, NaN where the label lacks
    it. losses: (step, loss, lr). starts: of environment.json.
    """

    folder: Path
    is_finished: bool
    can_resume: bool
    config_text: str
    config: Config | None
    config_problem: str | None
    classes: list[str]
    metrics: list[dict[str, float]] | None
    losses: list[tuple[float, float, float]] | None
    dice: dict[str, list[float]] | None
    leep: Leep | None
    keys: dict[str, list[str]] | None
    starts: list[dict[str, Any]]
    log: list[str] | None

    @property
    def steps(self) -> int | None:
        return None if self.config is None else self.config.train.steps

    @property
    def steps_done(self) -> int:
        """As far as the files tell."""
        rows = [int(row["step"]) for row in (self.metrics or [])[-1:]]
        return max([0, *rows, *(int(row[0]) for row in (self.losses or [])[-1:])])

    @property
    def warnings(self) -> list[str]:
        found = (line.partition(" Warning: ")[2] for line in self.log or [])
        return list(dict.fromkeys(text for text in found if text))


def read_run(folder: Path) -> RunFiles:
    """Raises: InputError naming the folder that is none of a run, or the damaged file."""
    if not folder.is_dir():
        why = "is a file; expected the folder of a run" if folder.exists() else "no such folder"
        raise ConfigError(f"{folder}: {why}")
    config_text = _text(folder / "config.yaml")
    if config_text is None:
        raise ConfigError(f"{folder}: holds no run (there is no config.yaml)")
    if not any((folder / name).exists() for name in _SIGNS):
        raise ConfigError(f"{folder}: holds no run (there is none of {', '.join(_SIGNS)})")
    config, problem = _config(folder / "config.yaml", config_text)
    metrics_classes, metrics = _metrics(folder / "metrics.csv")
    dice_classes, dice = _dice(folder / "dice.csv")
    stored: list[str] = []
    if config is not None and config.data.classes:
        regions = config.data.regions, config.data.region_classes
        stored = list(structures_of(config.data.classes, *regions).scored)
    starts = _starts(folder / ENVIRONMENT_FILE)
    log = _text(folder / "log.txt")
    can_resume = (folder / RESUME_FILE).exists()
    return RunFiles(
        folder=folder,
        is_finished=finished(folder),
        can_resume=can_resume,
        config_text=config_text,
        config=config,
        config_problem=problem,
        classes=dice_classes or metrics_classes or stored,
        metrics=metrics,
        losses=_losses(folder / "losses.csv"),
        dice=dice,
        leep=_leep(folder / LEEP_FILE),
        keys=_keys(folder / "keys.json"),
        starts=starts,
        log=None if log is None else log.splitlines(),
    )


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError([f"{path}: cannot be read ({error.strerror or error})"]) from None
    except UnicodeDecodeError:
        raise DataError([f"{path}: is damaged (no text in UTF-8)"]) from None


def _config(path: Path, text: str) -> tuple[Config | None, str | None]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        raise DataError([f"{path}: is damaged (no valid YAML)"]) from None
    if not isinstance(content, dict):
        raise DataError([f"{path}: is damaged (expected keys such as output, data)"])
    try:
        return parse_config(content, base=path.parent, origin=str(path)), None
    except ConfigError as error:
        return None, " ".join(str(error).split())


def _table(path: Path) -> tuple[list[str], list[list[str]]] | None:
    text = _text(path)
    if text is None:
        return None
    rows = list(csv.reader(text.splitlines()))
    if not rows:
        raise DataError([f"{path}: is damaged (empty)"])
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(rows[0]):
            raise DataError(
                [f"{path}: is damaged (row {number}: {len(row)} columns of {len(rows[0])})"]
            )
    return rows[0], rows[1:]


def _numbers(path: Path, row: Sequence[str]) -> list[float]:
    try:
        return [float(cell) for cell in row]
    except ValueError as error:
        raise DataError([f"{path}: is damaged ({error})"]) from None


def _metrics(path: Path) -> tuple[list[str], list[dict[str, float]] | None]:
    """Class names and rows."""
    table = _table(path)
    if table is None:
        return [], None
    header, rows = table
    if missing := [name for name in _METRICS if name not in header]:
        raise DataError([f"{path}: is damaged (no column {missing[0]})"])
    classes = [name.removeprefix("dice_") for name in header if name.startswith("dice_")]
    return classes, [dict(zip(header, _numbers(path, row), strict=True)) for row in rows]


def _losses(path: Path) -> list[tuple[float, float, float]] | None:
    table = _table(path)
    if table is None:
        return None
    header, rows = table
    if tuple(header) != LOSS_HEADER:
        raise DataError([f"{path}: is damaged (expected the columns {', '.join(LOSS_HEADER)})"])
    return [(step, loss, lr) for step, loss, lr in (_numbers(path, row) for row in rows)]


def _dice(path: Path) -> tuple[list[str], dict[str, list[float]] | None]:
    """Class names, and rows without the two of means and counts."""
    table = _table(path)
    if table is None:
        return [], None
    header, rows = table
    if len(rows) < 3 or header[:1] + header[-1:] != ["case", "mean"]:
        raise DataError([f"{path}: is damaged (expected cases, their mean and their number)"])
    return header[1:-1], {name: _numbers(path, row)[:-1] for name, *row in rows[:-2]}


def _json(path: Path) -> Any:
    text = _text(path)
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError:
        raise DataError([f"{path}: is damaged (no valid JSON)"]) from None


def _leep(path: Path) -> Leep | None:
    content = _json(path)
    if content is None:
        return None
    try:
        low, high = map(float, content["hardness_range"])
        leep = Leep(
            score=float(content["score"]),
            label_entropy=float(content["label_entropy"]),
            tells_nothing=bool(content["tells_nothing"]),
            remark=None if content["remark"] is None else str(content["remark"]),
            hardness_range=(low, high),
            voxels=int(content["voxels"]),
            classes=[str(name) for name in content["classes"]],
            source_classes=[str(name) for name in content["source_classes"]],
            class_frequencies=np.asarray(content["class_frequencies"], dtype=np.float64),
            source_frequencies=np.asarray(content["source_frequencies"], dtype=np.float64),
            conditional=np.asarray(content["conditional"], dtype=np.float64),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError([f"{path}: is damaged ({type(error).__name__}: {error})"]) from None
    shape = len(leep.classes), len(leep.source_classes)
    found = leep.class_frequencies.shape + leep.source_frequencies.shape
    if leep.conditional.shape != shape or found != shape:
        raise DataError([f"{path}: is damaged (expected a table of {shape[0]} x {shape[1]})"])
    return leep


def _keys(path: Path) -> dict[str, list[str]] | None:
    content = _json(path)
    if content is None:
        return None
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise DataError([f"{path}: is damaged (expected lists of keys)"])
    return {str(name): [str(key) for key in keys] for name, keys in content.items()}


def _starts(path: Path) -> list[dict[str, Any]]:
    content = _json(path)
    if content is None:
        return []
    starts = content.get("starts") if isinstance(content, dict) else None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise DataError([f"{path}: is damaged (expected the starts of the run)"])
    return starts

"""metrics.csv and dice.csv of a run, and its TensorBoard events."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from riskmap_ext.finetune.base.errors import unwritten
from riskmap_ext.finetune.base.files import write_csv
from riskmap_ext.finetune.base.log import number
from riskmap_ext.finetune.metrics.dice import known_dice, mean_without_nan


class Metrics:
    """metrics.csv, one row per validation, and the same as TensorBoard events."""

    def __init__(
        self,
        path: Path,
        structures: Sequence[str],
        tensorboard: Path | None,
        rows: Sequence[dict[str, float]] = (),
        *,
        writes: bool = True,
    ) -> None:
        """rows: those of the run that is resumed; later ones are dropped.

        writes: false for all processes except one.
        """
        self._path = path if writes else None
        dice = [f"dice_{name}" for name in structures]
        self._header = ["step", "train_loss", *dice, "mean_dice", "lr", "seconds"]
        self.rows = list(rows)
        if any([*row] != self._header for row in self.rows):
            raise ValueError(f"rows: expected the columns {', '.join(self._header)}")
        self._writer: Any = None
        self._folder = tensorboard or path.parent
        if tensorboard is not None and writes:
            # Slow to import, and not every run needs it.
            from torch.utils.tensorboard import SummaryWriter

            purge = int(self.rows[-1]["step"]) + 1 if self.rows else None
            with self._told():
                self._writer = SummaryWriter(str(tensorboard), purge_step=purge)

    def add(
        self, step: int, loss: float, dice: Sequence[float], lr: float, seconds: float
    ) -> dict[str, float]:
        values = [step, loss, *dice, mean_without_nan(dice), lr, seconds]
        row = dict(zip(self._header, values, strict=True))
        self.rows.append(row)
        if self._path is not None:
            write_csv(self._path, self._header, [map(_plain, r.values()) for r in self.rows])
        if self._writer is not None:
            with self._told():
                for name, value in row.items():
                    if name not in ("step", "seconds") and not math.isnan(value):
                        self._writer.add_scalar(name, value, step)
                self._writer.flush()
        return row

    @property
    def has_pictures(self) -> bool:
        return self._writer is not None

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """picture: [H, W, 3] uint8."""
        with self._told():
            self._writer.add_image(name, picture, step, dataformats="HWC")
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with suppress(OSError):  # everything was flushed, or the error is on its way
                self._writer.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raises: InputError naming the folder of the events."""
        try:
            yield
        except OSError as error:
            raise unwritten(self._folder, error) from None


def write_dice(
    path: Path,
    table: Mapping[str, Sequence[float]],
    names: Sequence[str],
    folds: Mapping[str, str] | None = None,
) -> None:
    """dice.csv: a row per case, then the mean over those that have the structure, and how many.

    folds: case -> its fold, for an extra column.
    """
    columns = known_dice(table, len(names))
    means = list(map(mean_without_nan, columns))
    rows: list[list[Any]] = [[n, *row, mean_without_nan(row)] for n, row in table.items()]
    rows.append(["mean", *means, mean_without_nan(means)])
    rows.append(["cases_with_class", *map(len, columns), sum(map(bool, columns))])
    header = ["case", *names, "mean"]
    if folds is not None:
        header.append("fold")
        rows = [[*row, folds.get(row[0])] for row in rows]
    write_csv(path, header, [map(_plain, row) for row in rows])


def dice_table(table: Mapping[str, Sequence[float]], names: Sequence[str], title: str) -> Table:
    """Dice per class or region over all cases, for the terminal and the log."""
    columns = known_dice(table, len(names))
    shown = Table(title=title)
    for column in ("class", "mean Dice", "lowest", "highest", "cases with the class"):
        shown.add_column(column, justify="left" if column == "class" else "right")
    for name, dice in zip(names, columns, strict=True):
        lowest, highest = min(dice, default=math.nan), max(dice, default=math.nan)
        cells = [number(value) for value in (mean_without_nan(dice), lowest, highest)]
        shown.add_row(Text(name), *cells, f"{len(dice)} of {len(table)}")
    shown.add_section()
    overall = number(mean_without_nan([mean_without_nan(dice) for dice in columns]))
    scored = f"{sum(map(bool, columns))} of {len(names)} classes"
    shown.add_row("mean", overall, "", "", scored)
    return shown


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value

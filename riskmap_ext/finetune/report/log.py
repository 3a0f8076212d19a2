"""What a run tells its user: log, progress bars, tables, TensorBoard."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from torch import Tensor

from riskmap_ext.finetune.base.files import write_csv
from riskmap_ext.finetune.data.memory import gib, process_memory
from riskmap_ext.finetune.data.prepare import Case
from riskmap_ext.finetune.metrics.dice import mean_without_nan, structure_counts, structure_means

# Tried for letters that matplotlib's own font lacks.
_WIDE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "WenQuanYi Zen Hei",
    "Source Han Sans SC",
    "IPAexGothic",
    "Microsoft YaHei",
    "Hiragino Sans",
    "Malgun Gothic",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
)
MISSING = "\N{EN DASH}"


class Log:
    """Messages to the terminal (unless quiet) and, once a folder is known, to its log.txt."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._path: Path | None = None
        self._early: list[str] = []
        # How far the run is, for the message when it is stopped.
        self.stage = "before training"

    @property
    def is_open(self) -> bool:
        """Whether there is an output folder yet."""
        return self._path is not None

    def open(self, path: Path, *, append: bool = False) -> None:
        if not append:
            path.unlink(missing_ok=True)
        self._path = path
        early, self._early = self._early, []
        for line in early:
            self._write(line)

    def __call__(self, message: str) -> None:
        self.console.print(message, markup=False)
        self._append(message)

    def note(self, message: str) -> None:
        """Into log.txt alone."""
        self._append(message)

    def warn(self, message: str) -> None:
        self.console.print(Text(f"Warning: {message}", style="yellow"))
        self._append(f"Warning: {message}")

    def table(self, table: Table) -> None:
        self.console.print(table)
        plain = Console(width=120, no_color=True, highlight=False)
        with plain.capture() as captured:
            plain.print(table)
        self._append(captured.get().rstrip())

    def _append(self, message: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}"
        if self._path is None:
            self._early.append(line)
            return
        self._write(line)

    def _write(self, line: str) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def progress(self, unit: str = "it") -> Progress:
        """A bar with count, rate and time left; it goes away when done."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            _Memory(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            transient=True,
            # Where there is no terminal, the log's lines tell how far it is.
            disable=not self.console.is_terminal,
        )


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self._unit}/s" if speed else f"{MISSING} {self._unit}/s")


class _Memory(ProgressColumn):
    """What the process holds, and the most that a GPU has held for it."""

    max_refresh = 1.0

    def render(self, task: Task) -> Text:
        parts = []
        if (held := process_memory()) is not None:
            parts.append(gib(held))
        if torch.cuda.is_initialized():
            parts.append(f"GPU {gib(torch.cuda.max_memory_allocated())}")
        return Text(", ".join(parts))


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
        """rows: those of the run that is gone on with; what came after them is dropped.

        writes: false for all processes but one.
        """
        self._path = path if writes else None
        self._names = [f"dice_{name}" for name in structures]
        self.header = ["step", "train_loss", *self._names, "mean_dice", "lr", "seconds"]
        self.rows = list(rows)
        self._writer: Any = None
        if tensorboard is not None and writes:
            # Slow to import, and not wanted by every run.
            from torch.utils.tensorboard import SummaryWriter

            purge = int(self.rows[-1]["step"]) + 1 if self.rows else None
            self._writer = SummaryWriter(str(tensorboard), purge_step=purge)

    def add(
        self, step: int, loss: float, dice: Sequence[float], lr: float, seconds: float
    ) -> dict[str, float]:
        mean = mean_without_nan(dice)
        values = [step, loss, *dice, mean, lr, seconds]
        row = dict(zip(self.header, values, strict=True))
        self.rows.append(row)
        if self._path is not None:
            write_csv(self._path, self.header, [map(_plain, r.values()) for r in self.rows])
        if self._writer is not None:
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
        self._writer.add_image(name, picture, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def write_dice(path: Path, table: Mapping[str, Sequence[float]], names: Sequence[str]) -> None:
    """dice.csv: a row per case, then the mean over those that have the structure, and how many."""
    count = len(names)
    means = structure_means(table, count)
    rows = [[name, *row, mean_without_nan(row)] for name, row in table.items()]
    rows.append(["mean", *means, mean_without_nan(means)])
    counts = structure_counts(table, count)
    rows.append(["cases_with_class", *counts, sum(value > 0 for value in counts)])
    write_csv(path, ["case", *names, "mean"], [map(_plain, row) for row in rows])


def dice_table(table: Mapping[str, Sequence[float]], names: Sequence[str], title: str) -> Table:
    """Dice per class or region over all cases, for the terminal and the log."""
    count = len(names)
    shown = Table(title=title)
    for column in ("class", "mean Dice", "lowest", "highest", "cases with the class"):
        shown.add_column(column, justify="left" if column == "class" else "right")
    means, counts = structure_means(table, count), structure_counts(table, count)
    for i, name in enumerate(names):
        known = [row[i] for row in table.values() if not math.isnan(row[i])] or [math.nan]
        cells = [number(v) for v in (means[i], min(known), max(known))]
        shown.add_row(Text(name), *cells, f"{counts[i]} of {len(table)}")
    scored = sum(value > 0 for value in counts)
    shown.add_section()
    overall = number(mean_without_nan(means))
    shown.add_row("mean", overall, "", "", f"{scored} of {count} classes")
    return shown


def write_overlay(
    folder: Path,
    case: Case,
    classes: Sequence[str],
    prediction: Tensor | None,
    risk: Tensor | None,
) -> None:
    """overlays/<case>.png; all volumes on the prepared grid."""
    # matplotlib is slow to import, and not wanted by every run.
    from riskmap_ext.finetune.pictures.figures import overlay

    def ras(volume: Tensor | None) -> Any:
        return None if volume is None else case.grid.to_ras(volume)

    with _any_letters():
        overlay(
            folder / f"{case.name}.png",
            ras(case.image[0]),
            labels=ras(case.label),
            prediction=ras(prediction),
            risk=ras(risk),
            class_names=classes,
            title=case.name,
            zooms=case.grid.ras_spacing(),
        )


def segmentation_picture(case: Case, prediction: Tensor) -> np.ndarray:
    """Image, labels and prediction side by side, [H, 3 W, 3] uint8: the slice with most label."""
    # matplotlib is slow to import, and not wanted by every run.
    from riskmap_ext.finetune.pictures.figures import class_colours, grey_window

    label = case.grid.to_ras(case.label)
    z = int((label > 0).sum(axis=(0, 1)).argmax())
    image = case.grid.to_ras(case.image[0])[..., z]
    low, high = grey_window(image)
    grey = np.clip((image - low) / (high - low), 0, 1)[..., None]
    panels = [np.broadcast_to(grey, (*grey.shape[:2], 3))]
    shown = [label[..., z], case.grid.to_ras(prediction)[..., z]]
    colours = class_colours(max(int(classes.max()) for classes in shown) + 1)
    for classes in shown:
        colour = colours[np.maximum(classes, 0)]
        panels.append(np.where(classes[..., None] > 0, 0.5 * grey + 0.5 * colour, grey))
    rotated = [np.rot90(panel) for panel in panels]
    return (255 * np.concatenate(rotated, axis=1)).astype(np.uint8)


@contextmanager
def _any_letters() -> Iterator[None]:
    """Names in any script, and with any signs: $ is no formula.

    By a font that has their letters, else as boxes, without a word.
    """
    import matplotlib
    from matplotlib import font_manager

    present = set(font_manager.get_font_names())
    family = [*matplotlib.rcParams["font.family"], *(n for n in _WIDE_FONTS if n in present)]
    with (
        warnings.catch_warnings(),
        matplotlib.rc_context({"font.family": family, "text.parse_math": False}),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def number(value: float) -> str:
    """Three digits, or a dash for NaN."""
    return MISSING if math.isnan(value) else f"{value:.3f}"


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value

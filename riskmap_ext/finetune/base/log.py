"""What a run tells its user: messages, progress bars, numbers in words."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

MISSING = "\N{EN DASH}"


# For the handlers of a program that calls the driver; silent without them.
_LOGGER = logging.getLogger("riskmap_ext.finetune")
_LOGGER.addHandler(logging.NullHandler())


class Log:
    """Messages to the terminal (unless quiet) and, once a folder is known, to its log.txt.

    They also go to Python's logger `riskmap_ext.finetune`.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._path: Path | None = None
        self._unwritten: list[str] = []
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
        self._write()

    def __call__(self, message: str) -> None:
        self.console.print(message, markup=False)
        self.note(message)

    def note(self, message: str, level: int = logging.INFO) -> None:
        """Into log.txt, and not to the terminal."""
        _LOGGER.log(level, message)
        self._unwritten.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
        self._write()

    def warn(self, message: str) -> None:
        self.console.print(Text(f"Warning: {message}", style="yellow"))
        self.note(f"Warning: {message}", logging.WARNING)

    def table(self, table: Table) -> None:
        self.console.print(table)
        title, table.title = table.title, None
        plain = Console(width=120, no_color=True, highlight=False)
        with plain.capture() as captured:
            plain.print(table)
        self.note(f"{title}\n{captured.get().rstrip()}")

    def _write(self) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(self._unwritten)
            self._unwritten.clear()

    @contextmanager
    def counting(
        self, title: str, total: int, unit: str = "cases", done: int = 0
    ) -> Iterator[Callable[[str], None]]:
        """A bar with count, rate and time left; it goes away when done.

        Gives a function that counts one and shows a note.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        # Where there is no terminal, the log's lines tell how far it is.
        hidden = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as bar:
            task = bar.add_task(title, total=total, completed=done, note="", rate="")

            def advance(note: str) -> None:
                speed = bar.tasks[0].speed
                rate = f"{speed:.1f} {unit}/s" if speed else ""
                bar.update(
                    task, advance=1, rate=rate, note=", ".join(filter(None, (_held(), note)))
                )

            yield advance


def _held() -> str:
    """Memory that the process holds, and the most that a GPU has held for it."""
    found = gib(psutil.Process().memory_info().rss)
    if torch.cuda.is_initialized():
        found += f", GPU {gib(torch.cuda.max_memory_allocated())}"
    return found


def number(value: float) -> str:
    """Three digits, or a dash for NaN."""
    return MISSING if math.isnan(value) else f"{value:.3f}"


def gib(count: float) -> str:
    return f"{count / 2**30:.2g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def some(names: Sequence[object], most: int = 5) -> str:
    """The first ones, and whether there are more."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")

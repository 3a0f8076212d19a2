"""What a run reports to its user: messages, progress bars, formatted numbers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

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

from riskmap_ext.finetune.base.errors import InputError, unwritten, visible

MISSING = "\N{EN DASH}"


# For handlers of a program that calls the driver; silent without them.
_LOGGER = logging.getLogger("riskmap_ext.finetune")
_LOGGER.addHandler(logging.NullHandler())


class Log:
    """Messages to the terminal (unless quiet) and, once a folder is known, to its log.txt.

    They also go to Python's logger `riskmap_ext.finetune`.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True, emoji=False)
        self._path: Path | None = None
        self._unwritten: list[str] = []
        # The progress, for the message if the run is stopped.
        self.stage = "before training"

    @property
    def is_open(self) -> bool:
        """Whether there is an output folder yet."""
        return self._path is not None

    def open(self, path: Path, *, append: bool = False) -> None:
        """Raises: InputError naming the file, as all that write to it do."""
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise InputError(f"{path}: expected a file to write to, not a folder, pipe or device")
        self._path = path
        self._write("".join(self._unwritten), "a" if append else "w")

    def __call__(self, message: str) -> None:
        self.console.print(visible(message), markup=False)
        self.note(message)

    def note(self, message: str, level: int = logging.INFO) -> None:
        """Writes to log.txt only, not to the terminal."""
        _LOGGER.log(level, message)
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {visible(message)}\n"
        if self._path is None:
            self._unwritten.append(line)
        else:
            self._write(line)

    def _write(self, text: str, mode: str = "a") -> None:
        assert self._path is not None
        try:
            with self._path.open(mode, encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as error:
            raise unwritten(self._path, error) from None

    def warn(self, message: str) -> None:
        self.console.print(Text(f"Warning: {visible(message)}", style="yellow"))
        self.note(f"Warning: {message}", logging.WARNING)

    def table(self, table: Table) -> None:
        self.console.print(table)
        title, table.title = table.title, None
        plain = Console(width=120, no_color=True, highlight=False)
        with plain.capture() as captured:
            plain.print(table)
        self.note(f"{title}\n{captured.get().rstrip()}")

    @contextmanager
    def counting(self, title: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
        """A bar with count and time left; it disappears when done.

        Yields a function that counts one and shows a note.
        """
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
            *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
            TextColumn("{task.fields[note]}", markup=False),
        )
        # Without a terminal, the log's lines show the progress.
        hidden = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as bar:
            task = bar.add_task(title, total=total, completed=done, note="")
            yield lambda note: bar.update(task, advance=1, note=note)


def number(value: float) -> str:
    """Three digits, or a dash for NaN."""
    return MISSING if math.isnan(value) else f"{value:.3f}"


def gib(count: float) -> str:
    return f"{count / 2**30:.2g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def some(names: Sequence[object], most: int = 5) -> str:
    """The first ones, and an ellipsis if there are more."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")

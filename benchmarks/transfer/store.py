"""Rows of runs, appended so that a run is either there or not, whoever is killed when.

runs.csv has a line for each run, scores.csv one for each of its subjects and classes, curves.csv
one for each validation. The line in runs.csv is written last and says how many scores belong to
it: a run without all of them was cut and is not counted.

Lines are appended as they are, since who writes may be killed; when a command ends, `pack` moves
them into compressed files (runs.csv.xz), which are what the repository keeps.
"""

from __future__ import annotations

import csv
import io
import lzma
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from riskmap_ext._files import written_beside

Row = dict[str, str]

RUN_FIELDS = (
    *("run", "kind", "scenario", "length", "steps", "arm", "lr", "seed", "setup", "pair"),
    *("train_cases", "test_cases", "scores", "mean_dice", "leep", "entropy", "step_ms", "seconds"),
    *("device", "cpu", "python", "torch", "monai", "riskmap_ext", "date"),
)
_FIRST_SCORE_FIELDS = ("run", "subject", "class", "dice", "hd95")  # of the first rows
SCORE_FIELDS = (*_FIRST_SCORE_FIELDS, "precision", "recall", "clean_dice", "clean_hd95")
CURVE_FIELDS = ("run", "step", "train_loss", "mean_dice")
KEY = ("scenario", "length", "arm", "lr", "seed", "kind", "setup")  # of runs that are the same
_SHARES = {"dice", "mean_dice", "precision", "recall", "clean_dice"}
_NUMBERS = {"steps", "lr", "seed", "scores", "leep", "entropy", "step", *_SHARES}
_FILES = {"runs": RUN_FIELDS, "scores": SCORE_FIELDS, "curves": CURVE_FIELDS}


@dataclass(frozen=True)
class Rows:
    """Whole runs only; scores and curves by the run's identifier."""

    runs: list[Row]
    scores: dict[str, list[Row]] = field(repr=False)
    curves: dict[str, list[Row]] = field(repr=False)
    cut: int = 0  # lines that belong to no whole run


def keys(runs: Iterable[Row]) -> set[tuple[str, ...]]:
    return {tuple(row[each] for each in KEY) for row in runs}


class Store:
    """A folder of rows. part: keeps apart what several machines write, such as 1of4."""

    def __init__(self, folder: Path, part: str = "") -> None:
        self.folder = folder
        self._ending = f".{part}.csv" if part else ".csv"

    def append(
        self,
        run: Mapping[str, Any],
        scores: Sequence[Mapping[str, Any]],
        curve: Sequence[Mapping[str, Any]],
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with claimed(self.folder / ".lock", wait=True):
            for kind, rows in (("scores", scores), ("curves", curve), ("runs", [run])):
                _append(self.folder / f"{kind}{self._ending}", _FILES[kind], rows)

    def pack(self) -> None:
        """Compresses the files of all parts.

        Whoever is killed in between leaves lines in both files, which count once.
        """
        if not any(self.folder.glob("*.csv")):
            return
        with claimed(self.folder / ".lock", wait=True):
            for kind, fields in _FILES.items():
                for path in sorted(self.folder.glob(f"{kind}*.csv")):
                    packed = path.with_name(f"{path.name}.xz")
                    old = _lines(packed, packed.read_bytes(), fields) if packed.exists() else []
                    lines = dict.fromkeys([*old, *_lines(path, path.read_bytes(), fields)])
                    text = io.StringIO()
                    csv.writer(text, lineterminator="\n").writerows([fields, *lines])
                    with written_beside(packed) as beside:
                        beside.write_bytes(lzma.compress(text.getvalue().encode()))
                    path.unlink()

    def read(self) -> Rows:
        """Of all parts. Raises: ValueError naming a file with other columns."""
        read = {kind: self._rows(kind) for kind in _FILES}
        by_run: dict[str, dict[str, list[Row]]] = {"scores": {}, "curves": {}}
        for kind, found in by_run.items():
            for row in read[kind]:
                found.setdefault(row["run"], []).append(row)
        scores = by_run["scores"]
        whole = {
            row["run"]: row
            for row in read["runs"]
            if len(scores.get(row["run"], ())) == int(row["scores"])
        }
        kept = sum(len(scores.get(run, ())) for run in whole)
        cut = len(read["runs"]) - len(whole) + len(read["scores"]) - kept
        return Rows(
            list(whole.values()),
            {run: scores.get(run, []) for run in whole},
            {run: by_run["curves"].get(run, []) for run in whole},
            cut,
        )

    def _rows(self, kind: str) -> list[Row]:
        fields = _FILES[kind]
        # What another process packs meanwhile is met twice, never missed.
        growing = _contents(self.folder.glob(f"{kind}*.csv"))
        packed = _contents(self.folder.glob(f"{kind}*.csv.xz"))
        found: dict[tuple[str, ...], Row] = {}
        for path, content in {**packed, **growing}.items():
            for number, line in enumerate(_lines(path, content, fields), start=2):
                if len(line) == len(fields) and line not in found:
                    found[line] = dict(zip(fields, line, strict=True))
                    _check(path, number, found[line])
        return list(found.values())


def _contents(paths: Iterable[Path]) -> dict[Path, bytes]:
    found = {}
    for path in sorted(paths):
        with suppress(FileNotFoundError):  # packed since it was listed
            found[path] = path.read_bytes()
    return found


def _lines(path: Path, content: bytes, fields: Sequence[str]) -> list[tuple[str, ...]]:
    """Those below the header; what columns a file lacks at the end are empty.

    Raises: ValueError naming a file that holds no rows or has other columns.
    """
    try:
        text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode()
    except (UnicodeError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: not a file of rows: {error}") from None
    text = text[: text.rfind("\n") + 1]  # what was cut while it was written
    if not text:
        return []
    header, *lines = map(tuple, csv.reader(io.StringIO(text)))
    if header not in (tuple(fields), _FIRST_SCORE_FIELDS):
        raise ValueError(f"{path}: expected the columns {', '.join(fields)}")
    return [(*line, *[""] * (len(fields) - len(header))) for line in lines]


def _check(path: Path, number: int, row: Row) -> None:
    for key in _NUMBERS & row.keys():
        if key in SCORE_FIELDS and key not in _FIRST_SCORE_FIELDS and not row[key]:
            continue
        try:
            value = float(row[key])
        except ValueError:
            value = math.inf
        if value == math.inf or (key in _SHARES and (value < 0 or value > 1)):
            raise ValueError(f"{path}: line {number}: {key}: {row[key]!r} is no such number")


def _append(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    with path.open("ab+") as file:
        content_end = _end_of_lines(file)
        file.truncate(content_end)
        if content_end == 0:
            writer.writeheader()
        writer.writerows(rows)
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def _end_of_lines(file: Any) -> int:
    """Where the last whole line ends; what follows is of a writer that was killed."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return 0
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1


@contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds `path` for this process; False where another holds it and `wait` is false.

    The system lets go of it however the process ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        got = True
        try:
            held.enter_context(FileLock(path, blocking=wait))
        except Timeout:
            got = False
        yield got

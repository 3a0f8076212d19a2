"""``make fuzz-files``: spoilt files for every command of the driver.

Call number n depends on n alone, so ``python python_tests/malformed.py --only N`` repeats a
failure. Each call takes a small data set with its models and runs, spoils one file, and starts a
command that reads it. The command must end in time with one message that names the file, or
work; it leaves nothing half-written, runs no code of the file, and works again once the file is
whole. A run continues where the last one ended (build/fuzz).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import mutations
import nibabel as nib
import numpy as np
import torch
from html_page import Page
from malformed_place import Place
from malformed_targets import ANEW, WRITE_AS_THEY_GO, Target, commands, targets_of
from mutations import Mutation

from riskmap_ext._files import half_written
from riskmap_ext.finetune import cli
from riskmap_ext.finetune.base.errors import visible
from riskmap_ext.finetune.base.files import stem

ROOT = Path(__file__).parents[1]
SECONDS = 20
# More than any call needs.
BYTES = 6 * 2**30


class Hang(BaseException):
    """A command that has not ended in time."""


@dataclass
class Answer:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Spoilt:
    """What is done to which file, and the command that reads it."""

    target: Target
    path: str
    mutation: Mutation
    command: str
    while_read: bool = False

    def __str__(self) -> str:
        how = "changed while read" if self.while_read else self.mutation.__name__
        return f"{self.target.kind}: {self.path}: {how}: {self.command}"


def riskmap(*arguments: object) -> Answer:
    """The command in this process, stopped when it hangs."""

    def stop(*_: Any) -> None:
        raise Hang(f"has not ended after {SECONDS} s")

    # As of a terminal in UTF-8.
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    code = 0
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with (
            mock.patch.object(sys, "argv", ["riskmap", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            cli.main()
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    out.flush()
    return Answer(code, out.buffer.getvalue().decode(), err.getvalue())


def some_call(number: int, place: Place) -> Spoilt:
    pick = random.Random(number)
    targets = targets_of(place.whole, place.marker)
    kind = pick.choice(sorted({target.kind for target in targets}))
    target = pick.choice([each for each in targets if each.kind == kind])
    path, command = pick.choice(target.paths), pick.choice(target.commands)
    while_read = pick.random() < 0.06
    mutation = pick.choice(target.mutations)
    return Spoilt(target, path, mutation, command, while_read)


def check(number: int, place: Place) -> str:
    """Makes the call. Returns: what became of it. Raises: AssertionError."""
    pick, spoilt = random.Random(-number - 1), some_call(number, place)
    place.renew()
    path = place.folder / spoilt.path
    path = place.in_format(pick, path, spoilt.target.formats)
    changing: Any = nullcontext()
    if spoilt.while_read:
        changing = mutations.changes_while_read(pick, path)
    else:
        path = spoilt.mutation(pick, path) or path
    before = place.inputs()
    arguments = commands()[spoilt.command](place.folder, path)
    with changing:
        answer = riskmap(*arguments)
    assert not place.marker.exists(), "code of the file was run"
    assert_one_message(answer, path)
    assert_nothing_left(place, answer, spoilt, before)
    if answer.code == 0:
        assert_sane(place, spoilt)
        return "accepted"
    if pick.random() < 0.1:
        works_again(place, spoilt)
    return "refused"


def assert_one_message(answer: Answer, path: Path) -> None:
    assert answer.code in (0, 2), f"exit code {answer.code}: {answer.err}"
    assert "Traceback" not in answer.err, answer.err
    errors = [line for line in answer.err.splitlines() if line.startswith("riskmap: error: ")]
    if answer.code == 0:
        assert not errors, answer.err
        return
    assert len(errors) == 1, answer.err
    told = answer.err.split("riskmap: error: ", 1)[1]
    # A case is named without the ending; a bundle is its folder.
    names = {stem(path), path.stem, path.readlink().name if path.is_symlink() else path.stem}
    names |= {
        f"/{name}"
        for name in ("bundle", "fold_1", "listed/", "dec/")
        if name.strip("/") in path.parts
    }
    if path.name == "dataset.json":  # what it does not say must be configured
        names |= {"data.classes: missing", "one for each channel", "no such file"}
    if path.name in ("dataset.json", "run.yaml"):  # classes that the labels do not fit
        names.add("label values")
    if path.name == "run.yaml":  # the folder that it names then
        names |= {"/: expected", "(data.root)"}
    if path.name == "splits_final.json":  # without it, the folder is that of an ordinary run
        names |= {"dice.csv: is damaged", "is a folder of folds"}
    if not os.path.lexists(path) and path.parent.is_dir():
        names.add("missing")  # by the message of what is then read in its place
    assert any(visible(name) in told for name in names), f"does not name {path}: {answer.err}"
    assert len(told) < 20_000, f"a message of {len(told)} characters: {told[:500]}"


def assert_nothing_left(
    place: Place, answer: Answer, spoilt: Spoilt, before: dict[str, int]
) -> None:
    folders = [place.folder, *(p for p in place.folder.rglob("*") if p.is_dir())]
    halves = [left for folder in folders for left in half_written(folder)]
    locks = [each for each in place.folder.rglob(".lock") if each.is_file()]
    assert not halves, f"half-written: {halves}"
    assert not locks, f"locked: {locks}"
    if answer.code != 0 and spoilt.command not in WRITE_AS_THEY_GO:
        made = [p for p in place.output.rglob("*") if p.is_file()]
        assert not made, f"left behind: {made}"
    if spoilt.while_read:
        return
    changed = {name for name, size in place.inputs().items() if before.get(name) != size}
    changed |= before.keys() - place.inputs().keys()
    assert not changed, f"inputs were changed: {sorted(changed)}"


def assert_sane(place: Place, spoilt: Spoilt) -> None:
    """The results of a command that took the file, such as one with another voxel."""
    for path in place.written("losses.csv"):
        losses = [float(row["loss"]) for row in csv.DictReader(path.open())]
        assert all(map(math.isfinite, losses)), f"{path}: {losses}"
    for path in place.written("*.nii.gz"):
        values = np.asarray(nib.load(path).dataobj)
        assert np.isfinite(values).all(), path
    for path in place.written("report.html"):
        page = Page(path.read_text(encoding="utf-8"))
        assert "script" not in page.tags, path
        assert not page.open, path
    for path in place.written("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = [*csv.reader(file)]
        assert len({len(row) for row in rows}) == 1, path


def works_again(place: Place, spoilt: Spoilt) -> None:
    """With the file as it was, in the folder that the failure has left."""
    if spoilt.path.startswith("headers/"):
        return  # one of nibabel's own has NaN voxels
    place.restore("out", *(["stopped"] if spoilt.command == "resume" else []))
    command = {"resume": "anew STOPPED"}.get(spoilt.command, spoilt.command)
    arguments = commands()[command](place.folder, place.folder / spoilt.path)
    again = riskmap(*arguments, *ANEW.get(spoilt.command, ()))
    assert again.code == 0, f"does not work any more: {again.err}"


def run(
    numbers: Iterator[int], place: Place, until: float, failed: Callable[[str], None]
) -> Counter[str]:
    counts: Counter[str] = Counter()
    for number in numbers:
        if time.monotonic() > until:
            break
        spoilt = some_call(number, place)
        try:
            with warnings.catch_warnings(), limited_memory():
                warnings.simplefilter("ignore")
                result = check(number, place)
            counts[f"{spoilt.target.kind} {result}"] += 1
            name = "while_read" if spoilt.while_read else spoilt.mutation.__name__
            counts[f"by {name}"] += 1
        except (Exception, Hang) as error:
            counts["failed"] += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            failed(f"{number}: {spoilt}: {type(error).__name__} at {where}: {str(error)[:600]}")
        counts["last"] = number
    return counts


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """An allocation beyond what a call may need fails, as on a small machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--only", type=int, help="this call, with its traceback")
    parser.add_argument("--start", type=int, help="first number; else where the last run ended")
    parser.add_argument("--keep", type=Path, help="folder of the files; it must not exist")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    work = options.keep or Path(tempfile.mkdtemp(prefix="malformed-"))
    try:
        place = Place(work)
        if options.only is not None:
            print(some_call(options.only, place), flush=True)
            with limited_memory():
                print(check(options.only, place))
            return 0
        return campaign(place, options)
    finally:
        if options.keep is None:
            shutil.rmtree(work, ignore_errors=True)


def campaign(place: Place, options: argparse.Namespace) -> int:
    folder = ROOT / "build" / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "files.json"
    known = json.loads(state.read_text()) if state.exists() else {}
    first = known.get("next", 0) if options.start is None else options.start
    begun, total = time.monotonic(), Counter[str]()

    def failed(text: str) -> None:
        print(text, flush=True)
        with (folder / "files_failures.txt").open("a", encoding="utf-8", errors="replace") as file:
            file.write(text + "\n")

    until, end, here = begun + options.seconds, first + options.calls, first
    while here < end and time.monotonic() < until:
        # So that a crash costs little, and its number is known to lie in this part.
        state.write_text(json.dumps({"next": here}))
        counts = run(iter(range(here, min(here + 100, end))), place, until, failed)
        here = counts.pop("last", here - 1) + 1
        total += counts
    state.write_text(json.dumps({"next": here}))
    seconds = time.monotonic() - begun
    print(f"files: calls {first} to {here - 1}, {total['failed']} failed, {seconds:.0f} s")
    print(summary(total))
    print("  python python_tests/malformed.py --only N repeats one")
    return 1 if total["failed"] else 0


def summary(counts: Counter[str]) -> str:
    kinds = sorted({key.rpartition(" ")[0] for key in counts if key.endswith(("ed",))} - {""})
    lines = [
        f"  {kind}: {counts[f'{kind} refused']} refused, {counts[f'{kind} accepted']} accepted"
        for kind in kinds
    ]
    ways = sorted(key.removeprefix("by ") for key in counts if key.startswith("by "))
    lines.append("  by " + ", ".join(f"{way} {counts[f'by {way}']}" for way in ways))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

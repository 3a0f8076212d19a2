"""``make disk-faults``: every change of a file fails, and disks of many sizes fill up.

The errors of ``CODES`` take turns from change to change; ``--code`` tries one of them at all. The
command must end with one message that names the file, leave nothing half-written and, once the
disk works again, end in the same bits with ``--resume``. Disks of a size need root (tmpfs).
"""

from __future__ import annotations

import argparse
import errno
import functools
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from broken_runs import Fault, Started, left_behind
from kills import KINDS, Kind, changes, end, kinds, told_at_once

CODES = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "ESTALE", "EMFILE", "EFBIG")


@dataclass(frozen=True)
class FailingSync:
    """os.fsync fails from its `at`-th call on."""

    at: int
    code: str

    def install(self) -> None:
        count = -1
        sync = os.fsync

        def fsync(file: int) -> None:
            nonlocal count
            count += 1
            if count >= self.at:
                code = getattr(errno, self.code)
                raise OSError(code, os.strerror(code))
            sync(file)

        os.fsync = fsync  # type: ignore[assignment]


@dataclass(frozen=True)
class JumpingClock:
    """The wall clock jumps by years, back and forth, with each look at it."""

    def install(self) -> None:
        looks = 0
        now, text = time.time, time.strftime

        def jumped() -> float:
            nonlocal looks
            looks += 1
            return now() + (-1) ** looks * 20 * 365 * 86400

        time.time = jumped
        time.strftime = lambda form, *given: text(form, *(given or [time.localtime(jumped())]))


@dataclass(frozen=True)
class Limit:
    """Of the process, for the rest of its life."""

    name: str
    value: int

    def install(self) -> None:
        resource.setrlimit(getattr(resource, self.name), (self.value, self.value))


@dataclass(frozen=True)
class MemoryToSpare:
    """So many MiB of address space beside what the process has.

    Without oneDNN: its convolutions can crash where an allocation fails.
    """

    count: int

    def install(self) -> None:
        torch.backends.mkldnn.set_flags(False)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        Limit("RLIMIT_AS", pages * resource.getpagesize() + self.count * 2**20).install()


@dataclass(frozen=True)
class Output:
    """Standard output is this file, or a pipe that nobody reads."""

    path: str | None

    def install(self) -> None:
        if self.path is None:
            reader, writer = os.pipe()
            os.close(reader)
        else:
            writer = os.open(self.path, os.O_WRONLY)
        os.dup2(writer, 1)


def check_told(started: Started, output: Path) -> None:
    """One message with the reason, and nothing half-written; or none if it went on without."""
    (code,) = started.codes
    told = started.told
    assert "Traceback" not in told, told[-3000:]
    assert "Exception ignored" not in told, told[-3000:]
    errors = [line for line in told.splitlines() if line.startswith("riskmap: error: ")]
    if code == 0:
        assert not errors, errors
    else:
        assert (code, len(errors)) == (2, 1), (code, told[-3000:])
        assert str(output.parent) in errors[0], errors
    assert not left_behind(output.parent), left_behind(output.parent)


def fail(kind: Kind, fault: Callable[[], None]) -> None:
    output = kind.folder / "killed" / "run"
    kind.begin(output)
    started = kind.runner.run(kind.arguments(output, again=False), fault)
    check_told(started, output)
    end(kind, output)


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs there. Raises: PermissionError where none may be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise PermissionError("no tmpfs can be mounted")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(kind: Kind, options: str) -> None:
    """Runs on a disk of that size, makes it larger, and resumes."""
    output = kind.folder / "disk" / "run"
    with small_disk(output.parent, options):
        started = kind.runner.run(kind.arguments(output, again=False))
        check_told(started, output)
        larger = ["mount", "-o", "remount,size=64m,nr_inodes=10000", str(output.parent)]
        subprocess.run(larger, check=True)
        end(kind, output)


def sweep(kind: Kind, step: int, codes: list[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is tried, in words, and how."""
    places, killed = changes(kind), kind.folder / "killed"
    in_cache = [place for place in places if place.split()[1].startswith("run/cache/")]
    for what, folder, found in (
        ("change", killed, places),
        ("change of the cache alone", killed / "run" / "cache", in_cache),
    ):
        for at in range(0, len(found), step):
            code = codes[at // step % len(codes)]
            fault = Fault(code, folder, at)
            yield (
                f"{code} at {what} {at} ({found[at]})",
                functools.partial(fail, kind, fault.install),
            )
    for at in range(0, 12, 3):
        sync = FailingSync(at, "EIO")
        yield f"EIO at fsync {at}", functools.partial(fail, kind, sync.install)
    yield "the clock jumps", functools.partial(fail, kind, JumpingClock().install)
    slow = Fault("slow", killed)
    yield "a slow disk", functools.partial(fail, kind, slow.install)
    for inodes in range(2, 42, 4):
        told = f"size=64m,nr_inodes={inodes}"
        yield told, functools.partial(fill, kind, told)
    used = sum(path.stat().st_size for path in kind.expected.rglob("*") if path.is_file())
    for part in range(20):
        told = f"size={4 + int(used * (part / 20) ** 2 / 1024)}k"
        yield told, functools.partial(fill, kind, told)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="several: repeat it")
    parser.add_argument("--code", action="append", choices=CODES, help="several: repeat it")
    parser.add_argument("--step", type=int, default=1, help="only every so-many-th change")
    options = parser.parse_args()
    folder, begun = Path(tempfile.mkdtemp(prefix="disks")), time.monotonic()
    counts: Counter[str] = Counter()
    try:
        for kind in kinds(folder, options.kind or ["plain", "disk", "folds", "predict"]).values():
            for what, work in sweep(kind, options.step, options.code or [*CODES]):
                try:
                    work()
                    counts[f"{kind.name} right"] += 1
                except PermissionError as error:
                    counts[f"{kind.name} left out ({error})"] += 1
                except AssertionError as error:
                    counts[f"{kind.name} wrong"] += 1
                    told_at_once(f"{kind.name}: {what}: {str(error)[:1500]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    told_at_once(
        f"{', '.join(f'{k} {n}' for k, n in counts.items())}, {time.monotonic() - begun:.0f} s"
    )
    return 1 if any(key.endswith("wrong") for key in counts) else 0


if __name__ == "__main__":
    sys.exit(main())

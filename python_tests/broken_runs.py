"""Commands of the driver that are killed, or whose disk fails, at a chosen moment.

They run in processes forked from a server that has imported everything, since most of a small
command's time is imports; `fresh` ones start an interpreter of their own.
"""

from __future__ import annotations

import csv
import errno
import io
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

_PRELOADED = ("pytest", "disks", "riskmap_ext.finetune.commands", "torch.utils.tensorboard")
_CODE = "from riskmap_ext.finetune.cli import main; main()"
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HALF_WRITTEN = re.compile(r"\.\d+-\d+-")


@dataclass(frozen=True)
class Fault:
    """What happens to a command at its `at`-th change of files below `folder` (from 0 on).

    kind: "count" only lists the changes in the file `listed`; "kill" ends the process before it;
    "halve" does so, too, and leaves half of a file that has just been written; else the name of an
    errno, which this and all later changes but removals raise. "slow" waits before each change.
    """

    kind: str
    folder: Path
    at: int = -1
    listed: Path | None = None

    def install(self) -> None:
        count = -1

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            change = _change(event, args, self.folder)
            if change is None:
                return
            count += 1
            if self.listed is not None:
                with self.listed.open("a") as file:
                    file.write(change + "\n")
            if count == self.at and self.kind in ("kill", "halve"):
                path = Path(os.fspath(args[0]))
                if self.kind == "halve" and path.is_file():
                    os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.kind == "slow":
                time.sleep(0.03)
            elif self.kind in vars(errno) and count >= self.at and not change.startswith("rem"):
                code = getattr(errno, self.kind)
                raise OSError(code, os.strerror(code), str(args[0]))

        sys.addaudithook(hook)


def _change(event: str, args: tuple[Any, ...], folder: Path) -> str | None:
    """What an audit event changes below the folder, in words."""
    if event == "open":
        if not isinstance(args[0], (str, os.PathLike)) or not args[2] & _WRITES:
            return None
    elif event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
        return None
    path = Path(os.fsdecode(args[0]))
    there = path.exists()
    if (event == "os.mkdir" and there) or (event == "os.remove" and not there):
        return None
    if not path.is_relative_to(folder):
        return None
    name = HALF_WRITTEN.sub(".N-", str(path.relative_to(folder)))
    return f"{event.removeprefix('os.')} {name}"


def _command(
    arguments: Sequence[str], printed: Path, faults: Sequence[Callable[[], None]], ranks: Any
) -> None:
    """The work of a forked process."""
    from riskmap_ext.finetune import cli

    torch.set_num_threads(1)
    with printed.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), line_buffering=True)
    os.environ.update(ranks or {})
    for fault in faults:
        fault()
    sys.argv = ["riskmap", *arguments]
    cli.main()


@dataclass
class Started:
    """A command that runs, in one process or two."""

    parts: list[Any]
    printed: Path

    def wait(self, seconds: float) -> bool:
        """Whether all of it has ended after so many seconds."""
        until = time.monotonic() + seconds
        for part in self.parts:
            left = max(0.0, until - time.monotonic())
            if isinstance(part, BaseProcess):
                part.join(left)
            else:
                try:
                    part.wait(left)
                except subprocess.TimeoutExpired:
                    return False
        return all(code is not None for code in self.codes)

    @property
    def codes(self) -> list[int | None]:
        parts = (p.exitcode if isinstance(p, BaseProcess) else p.poll() for p in self.parts)
        return list(parts)

    @property
    def told(self) -> str:
        return self.printed.read_text(errors="replace") if self.printed.exists() else ""

    def send(self, number: int, only: int | None = None) -> None:
        """only: to one of the two processes."""
        for part in self.parts if only is None else [self.parts[only]]:
            if isinstance(part, BaseProcess):
                if part.exitcode is None and part.pid is not None:
                    os.kill(part.pid, number)
            elif part.poll() is None:
                os.killpg(part.pid, number)


@dataclass
class Runner:
    """Starts commands; what each prints goes to a file in `folder`."""

    folder: Path
    count: int = 0
    _context: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        os.environ["OMP_NUM_THREADS"] = "1"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOADED))

    def start(
        self,
        arguments: Sequence[object],
        *faults: Callable[[], None],
        processes: int = 1,
        fresh: bool = False,
    ) -> Started:
        """fresh: in a new interpreter (of several processes by torchrun)."""
        self.count += 1
        printed = self.folder / f"printed_{self.count}.txt"
        given = [str(each) for each in arguments]
        if fresh:
            command = [sys.executable, "-c", _CODE, *given]
            if processes > 1:
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                command += [f"--nproc-per-node={processes}", "-m", "riskmap_ext.finetune", *given]
            with printed.open("wb") as file:
                process = subprocess.Popen(
                    command, stdout=file, stderr=file, start_new_session=True
                )
            return Started([process], printed)
        parts = []
        port = str(_free_port())
        for rank in range(processes):
            ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank)}
            ranks |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
            ranks |= {"WORLD_SIZE": str(processes)}
            given_to = (given, printed, faults, ranks if processes > 1 else None)
            part = self._context.Process(target=_command, args=given_to, daemon=True)
            part.start()
            parts.append(part)
        return Started(parts, printed)

    def run(self, arguments: Sequence[object], *faults: Callable[[], None], **how: Any) -> Started:
        """To its end."""
        started = self.start(arguments, *faults, **how)
        if not started.wait(300):
            started.send(signal.SIGKILL)
            raise AssertionError(f"does not end: {arguments}: {started.told[-2000:]}")
        return started


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def left_behind(folder: Path) -> list[Path]:
    """Temporary files and locks below the folder."""
    hidden = folder.rglob(".*")
    return [path for path in hidden if HALF_WRITTEN.match(path.name) or path.name == ".lock"]


def differences(found: Path, expected: Path) -> list[str]:
    """Files of two runs whose content is not the same but for paths, times and temporary names."""
    names = {each: _content_files(each) for each in (found, expected)}
    problems = [f"{name}: only in one" for name in sorted(names[found] ^ names[expected])]
    for name in sorted(names[found] & names[expected]):
        one, other = (_content(run / name, run) for run in (found, expected))
        if not _same(one, other):
            problems.append(f"{name}: differs")
    return problems + [f"{path}: left behind" for path in left_behind(found)]


def _content_files(run: Path) -> set[str]:
    files = (path for path in run.rglob("*") if path.is_file())
    names = {str(path.relative_to(run)) for path in files}
    return {name for name in names if not name.startswith("tb/") and not left_name(name)}


def left_name(name: str) -> bool:
    return bool(HALF_WRITTEN.match(Path(name).name)) or Path(name).name == ".lock"


def _content(path: Path, run: Path) -> Any:
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    if path.name in ("log.txt", "environment.json"):
        return None
    if path.name == "metrics.csv":
        rows = list(csv.DictReader(path.open()))
        return [{**row, "seconds": None} for row in rows]
    if path.suffix in (".yaml", ".json"):
        return path.read_text().replace(str(run), "RUN")
    if path.suffix == ".html":
        return _page(path.read_text(), run)
    return path.read_bytes()


def _page(text: str, run: Path) -> Any:
    """A report's pictures, drawings and numbers, without times."""
    assert text.rstrip().endswith("</html>"), "the report is cut off"
    return re.findall(r'src="data:[^"]*"|<path[^>]*>', text)


def _same(one: Any, other: Any) -> bool:
    if isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and torch.equal(one, other)
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in other)
    if isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) or (one != one and other != other)

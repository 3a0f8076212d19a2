"""Calls of ops whose kernels the interpreter executes, instead of g++'s code for the CPU."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import interpreter
from listing import Kernel, SassError
from memory import ProcessMemory
from names import readable
from state import Launch

sys.path.append(str(Path(__file__).parents[3] / "python_tests"))
import cuda_on_host

BLOCKS = "RISKMAP_CUDA_ON_HOST_BLOCKS"  # environment: blocks of a launch; 0: as on a GPU
RECORD = "riskmap_cuda_on_host_record"
Three = ctypes.c_uint * 3


class LaunchStruct(ctypes.Structure):  # csrc/cuda_on_host/runner.h
    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("grid", Three),
        ("block", Three),
        ("shared_bytes", ctypes.c_size_t),
        ("argument", ctypes.c_void_p),
        ("argument_size", ctypes.c_size_t),
    )


Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(LaunchStruct))
Listener = Callable[[Launch], bool]


class HostLibrary:
    """The library of csrc/cuda_on_host, which tells what it launches."""

    def __init__(self, path: Path) -> None:
        cuda_on_host.load(path)
        self.library = ctypes.CDLL(str(path))
        symbols = self.symbols_of(path)
        record = ctypes.cast(getattr(self.library, RECORD), ctypes.c_void_p).value or 0
        base = record - next(at for at, (_, name) in symbols.items() if name == RECORD)
        files = {base + at: file for at, (file, _) in symbols.items()}
        names = readable([name for _, name in symbols.values()])
        self.kernels = {
            at: f"{file}: {name}" for (at, file), name in zip(files.items(), names, strict=True)
        }

    @staticmethod
    def symbols_of(path: Path) -> dict[int, tuple[str, str]]:
        """File and name of every function by its address: kernels are local to their file."""
        listed = subprocess.run(
            ["readelf", "-sW", str(path)], capture_output=True, text=True, check=True
        ).stdout
        found, file = {}, ""
        for words in map(str.split, listed.splitlines()):
            if len(words) == 8 and words[3] == "FILE":
                file = words[7].split(".")[0]
            elif len(words) == 8 and words[3] == "FUNC":
                found[int(words[1], 16)] = file, words[7]
        return found

    @contextmanager
    def told(self, listener: Listener) -> Iterator[None]:
        """Within the context the listener gets every launch, and says whether g++'s code for it
        shall run; ops on CPU tensors launch the CUDA kernels."""
        failures = list[BaseException]()

        def callback(pointer: Any) -> int:
            struct = pointer.contents
            argument = ctypes.string_at(struct.argument, struct.argument_size)
            try:
                name = self.kernels[struct.kernel]
                grid, block = tuple(struct.grid), tuple(struct.block)
                launch = Launch(name, grid, block, struct.shared_bytes, argument)
                return 0 if failures else int(listener(launch))
            except BaseException as failure:  # cannot pass through the host code
                failures.append(failure)
                return 0

        record = getattr(self.library, RECORD)
        keep = Callback(callback)
        record(keep)
        try:
            with cuda_on_host.in_place_of_the_cpu_kernels():
                yield
        finally:
            record(None)
        if failures:
            raise failures[0]


def host_library() -> Path:
    """Where it lies; built where it is not up to date."""
    return Path(cuda_on_host.library())


@contextmanager
def blocks(count: int) -> Iterator[None]:
    """How many blocks a launch is cut into; 0: as many as on a GPU."""
    before = os.environ.get(BLOCKS)
    os.environ[BLOCKS] = str(count)
    try:
        yield
    finally:
        os.environ.pop(BLOCKS)
        if before is not None:
            os.environ[BLOCKS] = before


class Machine:
    """Executes launches from the machine code of a build."""

    def __init__(self, kernels: dict[str, Kernel], counting: bool = False) -> None:
        self.kernels, self.counting = kernels, counting
        self.memory = ProcessMemory()
        self.done: list[tuple[Launch, list[interpreter.Grid]]] = []

    def __call__(self, launch: Launch) -> bool:
        if launch.kernel not in self.kernels:
            raise SassError(f"the build has no kernel {launch.kernel}")
        kernel = self.kernels[launch.kernel]
        grids = interpreter.run(kernel, launch, self.memory, self.counting)
        self.done.append((launch, grids if self.counting else []))
        return False

"""The CUDA kernels on CPU tensors: builds their library (csrc/cuda_on_host) and puts them to work.

``python python_tests/cuda_on_host.py [address|thread]`` builds it, with sanitizers where asked for,
and prints where it lies. ``pytest --cuda-on-host`` runs tests with it in the place of the CPU
kernels: ``device("cpu")`` then means the CUDA kernels.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from riskmap_ext import _library
from riskmap_ext.ops import head_on_cuda

ROOT = Path(__file__).parents[1]
NAMESPACE = "riskmap_cuda_on_host"
LIBRARY = "RISKMAP_CUDA_ON_HOST_LIBRARY"  # environment: one that was built already
ORDER = "RISKMAP_CUDA_ON_HOST_ORDER"
ORDERS = ("forward", "reverse", "random:1", "random:2")
SANITIZERS = {"": "", "address": "address,undefined", "thread": "thread"}


class BuildError(RuntimeError):
    pass


def build_folder(sanitizer: str = "") -> Path:
    return ROOT / "build" / ("cuda_on_host" + (f"_{sanitizer}" if sanitizer else ""))


def build(*targets: str, sanitizer: str = "") -> Path:
    """Build the targets (or find them up to date) and return their folder."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None or _tool(os.environ.get("CXX", "g++")) is None:
        raise BuildError("cmake or g++ is not installed")
    folder = build_folder(sanitizer)
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DRISKMAP_CUDA=OFF", "-DRISKMAP_CUDA_ON_HOST=ON"),
        f"-DRISKMAP_SANITIZE={SANITIZERS[sanitizer]}",
        *(("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}") if ninja else ()),
    ]
    if not (folder / "CMakeCache.txt").exists():
        _run(configure)
    _run([cmake, "--build", str(folder), "--parallel", "--target", *targets])
    return folder


def library(sanitizer: str = "") -> Path:
    """The library of all ops, built where the environment does not name one."""
    given = os.environ.get(LIBRARY)
    return Path(given) if given else build(NAMESPACE, sanitizer=sanitizer) / f"lib{NAMESPACE}.so"


def load(path: Path) -> None:
    torch.ops.load_library(str(path))


def operators() -> dict[str, torch._ops.OpOverloadPacket]:
    """The ops of the loaded library by their name in ``torch.ops.riskmap_ext``."""
    namespace = getattr(torch.ops, NAMESPACE)
    return {name: getattr(namespace, name) for name in _library.ops(NAMESPACE)}


@contextmanager
def in_place_of_the_cpu_kernels() -> Iterator[None]:
    """Within the context the CUDA kernels compute what ``torch.ops.riskmap_ext`` gets on CPU."""
    override = torch.library.Library("riskmap_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, operator in operators().items():
            override.impl(name, operator.default, "CPU", allow_override=True)
        head_on_cuda.register(override, "CPU")
    try:
        yield
    finally:
        override._destroy()


def _tool(name: str) -> str | None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which(name, path=path)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        output = (done.stdout + done.stderr)[-3000:]
        raise BuildError(f"{' '.join(command)} failed:\n{output}")


if __name__ == "__main__":
    print(library(sys.argv[1] if len(sys.argv) > 1 else ""))

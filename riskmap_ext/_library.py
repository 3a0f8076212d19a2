"""Loads the native libraries; a failure says what they were built for and what was found."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

_HERE = Path(__file__).parent
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"

_no_cuda: str | None = None  # why there are no CUDA kernels, set by load()
_refusals: torch.library.Library | None = None


def _found() -> str:
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}), {python}"


def _load(path: Path) -> None:
    if not path.exists():
        raise ImportError(
            f"riskmap_ext: {path} is missing. In the folder of the sources, build it with "
            "`pip install --no-build-isolation -e .`; to import an installed riskmap_ext, start "
            f"Python in another folder. Found: {_found()}."
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = error.__cause__ or error  # torch wraps the loader's message
        raise ImportError(
            f"riskmap_ext: cannot load {path}: {reason}. Built for: {built_for()}. "
            f"Found: {_found()}."
        ) from error


def _cpu_library() -> Path:
    return _HERE / f"libriskmap_cpu{_SUFFIX}"


@dataclass(frozen=True)
class CudaLibrary:
    """path: the CUDA kernels. toolkit, architectures: built for these, such as "13.0.88", "80 90".

    version: the riskmap_ext that they belong to.
    """

    path: Path
    toolkit: str
    architectures: str
    version: str


def cuda_library() -> CudaLibrary | None:
    """Built with this package, or the wheel riskmap-ext-cu12 or -cu13 for torch's CUDA, or None."""
    name, facts = f"libriskmap_cuda{_SUFFIX}", build_facts() or {}
    if (_HERE / name).exists():
        toolkit, architectures = facts.get("cuda_toolkit"), facts.get("cuda_architectures")
        known = (toolkit or "unknown", architectures or "")
        return CudaLibrary(_HERE / name, *known, facts.get("version", "unknown"))
    try:
        wheel = importlib.import_module(_cuda_package())
    except ModuleNotFoundError:
        return None
    path = Path(str(wheel.__file__)).parent / name
    return CudaLibrary(path, wheel.TOOLKIT, wheel.ARCHITECTURES, wheel.VERSION)


def _cuda_package() -> str:
    return f"riskmap_ext_cu{_major(torch.version.cuda or 'none')}"


def _major(version: str) -> str:
    return version.split(".")[0]


def _load_cuda() -> str | None:
    """Loads the CUDA library if torch can use it, or returns the reason why not.

    Never an error: the CPU ops work without it. Another major version is not even tried: the
    loader could load a second CUDA runtime beside torch's.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    library, facts = cuda_library(), build_facts()
    wheel = _cuda_package().replace("_", "-")
    if library is None:
        reason = facts["cuda_reason"] if facts else "the module of build facts is missing"
        return f"{wheel} is not installed, and riskmap_ext was built without CUDA ({reason})"
    if _major(library.toolkit) != _major(torch.version.cuda):
        return (
            f"its CUDA kernels were built for CUDA {library.toolkit}, and torch "
            f"{torch.__version__} is for CUDA {torch.version.cuda}: the major versions must agree"
        )
    if facts is not None and facts["version"] != library.version:
        version = facts["version"]
        return f"{wheel} {library.version} is installed; this is riskmap_ext {version}"
    try:
        _load(library.path)
    except ImportError as error:
        return str(error)
    return None


def _refuse_cuda(reason: str) -> torch.library.Library:
    """Makes the ops raise a descriptive error for CUDA tensors."""
    library = torch.library.Library("riskmap_ext", "IMPL")

    def refusal(name: str) -> Callable[..., NoReturn]:
        def refuse(*_: Any) -> NoReturn:
            raise RuntimeError(
                f"riskmap_ext.{name.strip('_')}: got CUDA tensors, but {reason}. "
                "`python -m riskmap_ext.info` shows what was found; move the tensors to the CPU, "
                "or install CUDA kernels for this torch (docs/install.md)."
            )

        return refuse

    for name in ops():
        library.impl(name, refusal(name), "CUDA")
    return library


def ops(namespace: str = "riskmap_ext") -> list[str]:
    """Names of the ops that have a kernel: every op has one for the CPU."""
    prefix = f"{namespace}::"
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def no_cuda_reason() -> str | None:
    """Why there are no CUDA kernels, or None if there are."""
    return _no_cuda


def built_for() -> str:
    """The torch that the native libraries were built with, and the oldest one they run with."""
    facts = build_facts()
    if facts is None:
        return "an unknown torch (the module of build facts is missing or unloadable)"
    return f"torch >= {facts['torch_abi_target']}, built with torch {facts['torch_built_with']}"


def build_facts() -> dict[str, str] | None:
    """The build facts in ``_C``, or None if it cannot be imported."""
    try:
        from riskmap_ext import _C  # type: ignore[attr-defined]
    except ImportError:
        return None
    names = (
        *("version", "torch_built_with", "torch_abi_target", "compiler"),
        *("cuda_reason", "cuda_toolkit", "cuda_architectures"),
    )
    return {name: str(getattr(_C, name, "")) for name in names}


def load() -> None:
    """Loads the CPU library (schemas and CPU kernels), and the CUDA library if torch can use it.

    Called once, on import.
    """
    global _no_cuda, _refusals
    if not hasattr(torch.library, "register_autograd"):
        raise ImportError(f"riskmap_ext: needs torch >= 2.10. Found: {_found()}.")
    _load(_cpu_library())
    try:
        torch.ops.riskmap_ext._cpu_capability()
    except ValueError as error:
        raise ImportError(f"riskmap_ext: {error}") from None
    _no_cuda = _load_cuda()
    if _no_cuda is not None:
        _refusals = _refuse_cuda(_no_cuda)


__all__ = [
    "CudaLibrary",
    "build_facts",
    "built_for",
    "cuda_library",
    "load",
    "no_cuda_reason",
    "ops",
]

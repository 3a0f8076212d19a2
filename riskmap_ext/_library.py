"""Loads the native libraries; a failure says what they were built for and what was found."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


def _found() -> str:
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}), {python}"


def _load(name: str) -> None:
    path = _HERE / f"{name}{_SUFFIX}"
    if not path.exists():
        raise ImportError(
            f"riskmap_ext: {path} is missing; build it with "
            "`pip install --no-build-isolation .` from the source folder. "
            f"Found: {_found()}."
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = error.__cause__ or error  # torch wraps the loader's own words
        raise ImportError(
            f"riskmap_ext: cannot load {path}: {reason}. Built for: {built_for()}. "
            f"Found: {_found()}."
        ) from error


def built_for() -> str:
    """The torch that the native libraries were built with, and the oldest they run with."""
    facts = build_facts()
    if facts is None:
        return "an unknown torch (the module of build facts is missing or unloadable)"
    return f"torch >= {facts['torch_abi_target']}, built with torch {facts['torch_built_with']}"


def build_facts() -> dict[str, str] | None:
    """What ``_C`` knows about the build, or None where it cannot be imported."""
    try:
        from riskmap_ext import _C  # type: ignore[attr-defined]
    except ImportError:
        return None
    names = ("version", "torch_built_with", "torch_abi_target", "compiler", "cuda_reason")
    return {name: str(getattr(_C, name)) for name in names}


def load() -> None:
    """Loads the CPU library (schemas and CPU kernels). Called once, on import."""
    if not hasattr(torch.library, "register_autograd"):
        raise ImportError(f"riskmap_ext: needs torch >= 2.10. Found: {_found()}.")
    _load("libriskmap_cpu")
    try:
        torch.ops.riskmap_ext._cpu_capability()
    except ValueError as error:
        raise ImportError(f"riskmap_ext: {error}") from None


def loaded_path(name: str) -> Path | None:
    """Where the library lies, or None where it was not built."""
    path = _HERE / f"{name}{_SUFFIX}"
    return path if path.exists() else None


__all__ = ["build_facts", "built_for", "load", "loaded_path"]

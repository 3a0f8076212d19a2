"""``python -m riskmap_ext.info``: what was built, what was found, what runs."""

from __future__ import annotations

import os
import platform
import sys

import torch

import riskmap_ext
from riskmap_ext import _library


def facts() -> dict[str, str]:
    """One line each; the values are for people, not for programs to parse."""
    built = _library.build_facts() or {}
    unknown = "unknown (the module of build facts is missing)"
    forced = os.environ.get("RISKMAP_CPU_CAPABILITY")
    capability = torch.ops.riskmap_ext._cpu_capability()
    return {
        "riskmap_ext": riskmap_ext.__version__,
        "built for torch": _library.built_for() if built else unknown,
        "torch found": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "compiler": built.get("compiler", unknown),
        "CPU instruction set": capability
        + (" (forced by RISKMAP_CPU_CAPABILITY)" if forced else " (best of this machine)"),
        "CPU threads": str(torch.get_num_threads()),
        "CUDA": _cuda(),
        "installed in": os.path.dirname(riskmap_ext.__file__),
    }


def _cuda() -> str:
    reason, library = _library.no_cuda_reason(), _library.cuda_library()
    if library is None:
        return f"no: {reason}"
    kernels = f"CUDA {library.toolkit}, architectures {library.architectures}"
    if reason is not None:
        return f"no: {reason} (built: {kernels})"
    return kernels + "".join(f"; {gpu}" for gpu in _gpus(library.architectures))


def _gpus(architectures: str) -> list[str]:
    """The GPUs of this machine, and whether the kernels run on them."""
    built = [int(each) for each in architectures.split()]
    gpus = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        capability = 10 * major + minor
        same_major = any(each // 10 == major and each <= capability for each in built)
        runs = same_major or capability > max(built, default=capability)  # later ones by PTX
        verdict = "" if runs else ", which the kernels were not built for"
        gpus.append(f"{torch.cuda.get_device_name(index)} (architecture {capability}{verdict})")
    return gpus or ["no GPU found"]


def report() -> str:
    """The facts as aligned lines."""
    lines = facts()
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


if __name__ == "__main__":
    print(report())
    sys.exit(0)

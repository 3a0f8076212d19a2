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
    cuda_library = _library.loaded_path("libriskmap_cuda")
    return {
        "riskmap_ext": riskmap_ext.__version__,
        "built for torch": _library.built_for() if built else unknown,
        "torch found": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "compiler": built.get("compiler", unknown),
        "CPU instruction set": capability
        + (" (forced by RISKMAP_CPU_CAPABILITY)" if forced else " (best of this machine)"),
        "CPU threads": str(torch.get_num_threads()),
        "CUDA": str(cuda_library) if cuda_library else f"no: {built.get('cuda_reason', unknown)}",
        "installed in": os.path.dirname(riskmap_ext.__file__),
    }


def report() -> str:
    """The facts as aligned lines."""
    lines = facts()
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


if __name__ == "__main__":
    print(report())
    sys.exit(0)

"""environment.json: when a run started and ended, and on what."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import monai
import torch

import riskmap_ext
from riskmap_ext.finetune.base.errors import DataError
from riskmap_ext.finetune.base.files import read_json, write_json

LEEP_FILE, ENVIRONMENT_FILE = "leep.json", "environment.json"


def note_start(
    folder: Path, device: torch.device, cases: dict[str, int], loss: str, *, resumed: bool
) -> None:
    """Adds a start of the run to environment.json: its loss in words, versions and machine."""
    starts = _starts(folder / ENVIRONMENT_FILE) if resumed else []
    start: dict[str, Any] = {
        "begun": _now(),
        "ended": None,
        "seconds": None,
        "peak_memory_bytes": None,
        "peak_gpu_memory_bytes": None,
        "cases": cases,
        "loss": loss,
        "riskmap_ext": riskmap_ext.__version__,
        "torch": torch.__version__,
        "monai": monai.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }
    write_json(folder / ENVIRONMENT_FILE, {"starts": [*starts, start]})


def note_end(folder: Path, device: torch.device, seconds: float) -> None:
    """Completes the last start: seconds, and the peak memory of this process."""
    starts = _starts(folder / ENVIRONMENT_FILE) or [{}]
    cuda = device.type == "cuda"
    starts[-1] |= {
        "ended": _now(),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": _peak_memory(),
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
    }
    write_json(folder / ENVIRONMENT_FILE, {"starts": starts})


def ended(folder: Path) -> bool:
    """Whether the last start of the run ended normally."""
    starts = _starts(folder / ENVIRONMENT_FILE)
    return bool(starts) and starts[-1].get("ended") is not None


def _starts(path: Path) -> list[dict[str, Any]]:
    """Those of earlier processes; none if the file cannot be used."""
    with suppress(DataError):
        return read_json(path, dict[str, list[dict[str, Any]]]).get("starts", [])
    return []


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _cpu() -> str:
    names: list[str] = []
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        names = re.findall(r"(?m)^model name\s*: (.+)$", text)
    return names[0] if names else platform.processor() or platform.machine()


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""What ran where: the columns that every row of results carries."""

from __future__ import annotations

import datetime
import os
import platform
import re

import torch

import riskmap_ext
from benchmarks import peers


def facts() -> dict[str, str]:
    """CPU, instruction set, versions, date and the load of the machine when the run began."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "instruction_set": torch.ops.riskmap_ext._cpu_capability(),
        "load": f"{load():.2f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": peers.version("monai"),
        "nnunetv2": peers.version("nnunetv2"),
        "riskmap_ext": riskmap_ext.__version__,
    }


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            text = file.read()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    number = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{name} ({number})"


def load() -> float:
    """Processes that ran or waited during the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def slug() -> str:
    """The CPU as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")

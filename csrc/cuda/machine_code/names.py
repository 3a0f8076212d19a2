"""How kernels are called in tables."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence


def readable(mangled: Sequence[str]) -> list[str]:
    """`few_forward<float, 4, LossKind 1>`: without namespaces and parameters."""
    names = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout
    names = re.sub(
        r"riskmap::(?:cuda|math)::|\(anonymous namespace\)::|_GLOBAL__N_\w*::", "", names
    )
    names = re.sub(r"\((\w+)\)(\d+)", r"\1 \2", names)
    return [re.sub(r"^void |\(.*", "", name).strip() for name in names.splitlines()]

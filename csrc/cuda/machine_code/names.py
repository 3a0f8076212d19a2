"""How kernels are called in tables."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence


def readable(mangled: Sequence[str]) -> list[str]:
    """`forward<RegisterColumn<float, 4>, 4>`: without namespaces and parameters."""
    names = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout
    names = re.sub(r"riskmap::cuda::|\(anonymous namespace\)::|_GLOBAL__N_\w*::", "", names)
    return [re.sub(r"^void |\(.*", "", name).strip() for name in names.splitlines()]

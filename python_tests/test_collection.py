"""What pytest collects where there is no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tests_that_need_a_gpu_are_counted_and_not_collected() -> None:
    """What -k leaves out is not among those that are counted."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "-vv"]
    found = subprocess.run(
        [*command, "-k", "float32", "python_tests/test_leep.py"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    on_cpu = re.findall(r"<Function .*\[cpu", found)
    assert on_cpu
    assert not re.findall(r"<Function .*\[cuda", found)
    line = f"{len(on_cpu)} left out: they need a GPU, and torch sees none"
    assert line in found.splitlines()

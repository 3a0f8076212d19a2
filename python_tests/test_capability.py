"""Every CPU instruction set gives the results of the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import op_tests
import pytest

TESTS = Path(__file__).parent
VARIABLE = "RISKMAP_CPU_CAPABILITY"


def _python(capability: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, VARIABLE: capability}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_matches_reference(capability: str) -> None:
    report = "import torch, riskmap_ext; print(torch.ops.riskmap_ext._cpu_capability())"
    loaded = _python(capability, "-c", report)
    if "this machine has no" in loaded.stderr:
        pytest.skip(f"this machine has no {capability}")
    assert loaded.stdout.strip() == capability, loaded.stderr

    options = ["-q", "-p", "no:cacheprovider", "-x", "-k", "cpu and matches_reference"]
    run = _python(capability, "-m", "pytest", *options, *op_tests.files())
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


def test_unknown_instruction_set_is_refused() -> None:
    loaded = _python("sse9", "-c", "import riskmap_ext")
    assert loaded.returncode != 0
    assert "ImportError" in loaded.stderr
    assert VARIABLE in loaded.stderr
    assert "sse9" in loaded.stderr
    assert "avx2" in loaded.stderr

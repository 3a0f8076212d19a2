"""Every CPU instruction set gives the results of the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import op_tests
import pytest
import torch

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


SAVE_RESULTS = """
import sys
sys.path.insert(0, "python_tests")
import torch, every_op
from test_determinism import CASES, LOSSES
torch.set_num_threads(1)
found = {case.name: every_op.results(case, torch.device("cpu"), LOSSES) for case in CASES}
torch.save(found, sys.argv[1])
"""


def test_instruction_sets_differ_by_rounding_alone(tmp_path: Path) -> None:
    """Relative L2 below 5e-7; below 1e-14 for logits and results in float64."""
    results = {}
    for capability in ("baseline", "avx2", "avx512"):
        file = tmp_path / f"{capability}.pt"
        saved = _python(capability, "-c", SAVE_RESULTS, str(file))
        if "this machine has no" not in saved.stderr:
            assert saved.returncode == 0, saved.stderr
            results[capability] = torch.load(file, weights_only=True)
    expected = results["baseline"]
    for capability, found in results.items():
        for case, ops in found.items():
            for name, outputs in ops.items():
                for one, other in zip(outputs, expected[case][name], strict=True):
                    exact = case == "float64" and one.dtype == torch.float64
                    limit = 1e-14 if exact else 5e-7
                    distance = torch.linalg.vector_norm(one.double() - other.double())
                    size = torch.linalg.vector_norm(other.double())
                    assert distance <= limit * size, f"{capability}: {name} of {case}"


def test_unknown_instruction_set_is_refused() -> None:
    loaded = _python("sse9", "-c", "import riskmap_ext")
    assert loaded.returncode != 0
    assert "ImportError" in loaded.stderr
    assert VARIABLE in loaded.stderr
    assert "sse9" in loaded.stderr
    assert "avx2" in loaded.stderr

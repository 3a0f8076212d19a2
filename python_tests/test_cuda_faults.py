"""What the host build of CUDA kernels catches: kernels with a fault, and their right twins."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import cuda_on_host
import pytest

# Name of the fault, build of the programs (its sanitizer), thread order, what must be said.
CAUGHT = [
    ("missing_barrier", "none", "forward", "wrong result"),
    ("missing_barrier", "thread", "forward", "data race"),
    ("missing_syncwarp", "none", "forward", "wrong result"),
    ("missing_syncwarp", "thread", "forward", "data race"),
    ("left_neighbour", "none", "reverse", "wrong result"),
    ("left_neighbour", "none", "random:1", "wrong result"),
    ("left_neighbour", "thread", "forward", "data race"),
    ("plain_add", "thread", "forward", "data race"),
    ("missing_fence", "thread", "forward", "data race"),
    ("unset_shared", "none", "forward", "wrong result"),
    ("unset_dynamic_shared", "none", "forward", "wrong result"),
    ("out_of_bounds", "address", "forward", "heap-buffer-overflow"),
    ("out_of_bounds_shared", "address", "forward", "insufficient space for an object"),
    ("out_of_bounds_dynamic_shared", "address", "forward", "heap-buffer-overflow"),
    ("misaligned_load", "address", "forward", "misaligned address"),
    ("divergent_barrier", "none", "forward", "14 of 64 threads (the first is 50) have left"),
    ("partial_warp", "none", "forward", "12 of 32 threads (the first is 20) have left"),
]
# These give the right result where nothing watches.
NEED_A_SANITIZER = ("plain_add", "missing_fence", "out_of_bounds", "misaligned_load")
BUILDS = ("none", "address", "thread")


@pytest.fixture(scope="module")
def programs() -> Path:
    if cuda_on_host.LIBRARY not in os.environ:
        pytest.skip("takes minutes to compile: make cuda-on-host builds and runs it")
    return cuda_on_host.build(*(f"faults_{build}" for build in BUILDS))


def _run(folder: Path, build: str, fault: str, kind: str, order: str) -> tuple[int, str]:
    command = [str(folder / f"faults_{build}"), fault, kind]
    environment = os.environ | {cuda_on_host.ORDER: order}
    environment.pop("LD_PRELOAD", None)

    def run(*before: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*before, *command], capture_output=True, text=True, timeout=60, env=environment
        )

    done = run()
    setarch = shutil.which("setarch")
    if "unexpected memory mapping" in done.stderr:  # addresses too random for ThreadSanitizer
        if setarch is None:
            pytest.skip("ThreadSanitizer does not run on this kernel without setarch")
        done = run(setarch, "-R")
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("fault", "build", "order", "words"), CAUGHT)
def test_is_caught(fault: str, build: str, order: str, words: str, programs: Path) -> None:
    status, output = _run(programs, build, fault, "wrong", order)
    assert status != 0
    assert words in output


@pytest.mark.parametrize("fault", sorted({each[0] for each in CAUGHT if each[1] == "none"}))
def test_the_order_of_the_tests_of_ops_catches_it(fault: str, programs: Path) -> None:
    """run_cuda_on_host.sh runs them in this order alone."""
    assert _run(programs, "none", fault, "wrong", "random:3")[0] != 0


@pytest.mark.parametrize("order", cuda_on_host.ORDERS)
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("fault", sorted({each[0] for each in CAUGHT}))
def test_right_twin_passes(fault: str, build: str, order: str, programs: Path) -> None:
    assert _run(programs, build, fault, "right", order) == (0, "right result\n")


@pytest.mark.parametrize("fault", NEED_A_SANITIZER)
def test_result_alone_does_not_show_it(fault: str, programs: Path) -> None:
    for order in cuda_on_host.ORDERS:
        assert _run(programs, "none", fault, "wrong", order) == (0, "right result\n")


def test_luck_of_the_forward_order(programs: Path) -> None:
    assert _run(programs, "none", "left_neighbour", "wrong", "forward")[0] == 0


def test_unknown_order_is_refused(programs: Path) -> None:
    for order in ("backward", "random", "random:", "random:x"):
        status, output = _run(programs, "none", "plain_add", "right", order)
        assert status != 0
        assert f"must be forward, reverse or random:SEED, got '{order}'" in output

"""``python python_tests/op_tests.py`` prints the files of tests that hold for every build of the
kernels (sanitized, other instruction sets, on the CPU, on a GPU): those marked as ``ops``."""

from __future__ import annotations

from pathlib import Path

MARK = "pytestmark = pytest.mark.ops"


def files() -> list[str]:
    # The loss first: it has the most cases, and not every run has the time for all.
    found = sorted(Path(__file__).parent.glob("test_*.py"), reverse=True)
    return [str(file) for file in found if MARK in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    print(*files())

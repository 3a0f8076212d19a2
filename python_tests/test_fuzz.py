"""A short form of `make fuzz`, on calls that every run repeats."""

from __future__ import annotations

import time
from collections.abc import Callable

import fuzz
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


def test_generated_calls() -> None:
    failures: list[str] = []
    counts = fuzz.run(iter(range(1500)), time.monotonic() + 600, failures.append)
    assert failures == []
    assert counts["last"] == 1499
    assert all(counts[kind] > 50 for kind in ("loss", "head", "regions", "leep", "map", "risk"))


def test_a_failure_is_reported_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: fuzz.Case) -> None:
        raise AssertionError("off by one")

    monkeypatch.setattr(fuzz, "leep_matches", broken)
    failures: list[str] = []
    counts = fuzz.run(iter(range(60)), time.monotonic() + 600, failures.append)
    assert counts["failed"] == len(failures) > 0
    number = int(failures[0].split(":")[0])
    check: Callable[[], None] = fuzz.call(number)[2]
    with pytest.raises(AssertionError, match="off by one"):
        check()

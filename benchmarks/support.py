"""What the pytest-benchmark files share: ids of contenders, and one checked problem at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from benchmarks.problem import Case, Problem

Cases = Callable[[str], list[Case]]


def contender_ids(cases: Cases) -> list:
    """Parameters (case, contender) of every problem; built tiny, so that collecting is cheap."""
    return [
        pytest.param(case.name, each.key, id=f"{case.name}-{each.key}")
        for case in cases("tiny")
        for each in case.build().contenders
    ]


def run_benchmark(benchmark, cases: Cases, case: str, contender: str) -> None:
    """Checks that all contenders agree, then times one (only checks, tiny, when disabled)."""
    problem = _checked(cases, case, "short" if benchmark.enabled else "tiny")
    chosen = problem.contender(contender)
    benchmark.group = f"{problem}: {chosen.work}"
    benchmark.extra_info["moved_bytes"] = chosen.moved_bytes
    benchmark.pedantic(chosen.run, rounds=5, warmup_rounds=2)


@lru_cache(maxsize=1)
def _checked(cases: Cases, name: str, size: str) -> Problem:
    torch.compiler.reset()
    problem = next(case for case in cases(size) if case.name == name).build()
    problem.check()
    return problem

"""All cases of all ops, in the order of reports."""

from __future__ import annotations

from benchmarks import (
    bench_leep_statistics,
    bench_risk_map,
    bench_transferability_map,
    bench_weighted_loss,
)
from benchmarks.problem import Case

MODULES = (
    bench_weighted_loss,
    bench_leep_statistics,
    bench_transferability_map,
    bench_risk_map,
)


def cases(size: str) -> list[Case]:
    return [case for module in MODULES for case in module.cases(size)]


def case(name: str, size: str) -> Case:
    return next(case for case in cases(size) if case.name == name)

"""All cases of all ops, in the order of reports: those of every bench_*.py that has some."""

from __future__ import annotations

import importlib
import pkgutil

import benchmarks
from benchmarks.problem import Case

_NAMES = sorted(found.name for found in pkgutil.iter_modules(benchmarks.__path__, "benchmarks."))
_MODULES = [importlib.import_module(name) for name in _NAMES if ".bench_" in name]


def cases(size: str) -> list[Case]:
    return [case for module in _MODULES if hasattr(module, "cases") for case in module.cases(size)]


def case(name: str, size: str) -> Case:
    return next(case for case in cases(size) if case.name == name)

"""``python -m benchmarks.run [--full]``: check, time, print the table of ratios, write the rows.

Every contender is first shown to compute what ours computes. Times are medians of rounds in which
every contender runs once, in one process; the copy bandwidth comes from the same rounds. The
warm-up, and with it the seconds that torch.compile takes, is not counted.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import chart, machine, registry, report, results, sweep, timing, worker
from benchmarks.problem import Case, Problem
from benchmarks.results import CAPABILITY_SWEEP, Row
from benchmarks.shapes import SIZES

SECONDS = {"tiny": 0.1, "short": 4.0, "full": 20.0}  # of rounds for each problem
MIN_ROUNDS = {"tiny": 2, "short": 5, "full": 7}
SWEEPS = "sweeps"
CAPABILITIES = "instruction-sets"
CAPABILITY_CASES = (
    *("weighted_loss-a", "weighted_loss-b", "weighted_loss-e", "weighted_loss-r"),
    *("leep_statistics-a", "leep_statistics-b", "risk_map-a", "risk_map-b"),
)


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    size = options.size
    torch.set_num_threads(options.threads)
    facts = machine.facts()
    common = {**facts, "kind": size, "threads": str(options.threads)}
    print(report.heading(common))
    if float(facts["load"]) > 0.5 * (os.cpu_count() or 1):
        print(
            f"warning: the machine is busy (load {facts['load']}); ratios will be noisy",
            file=sys.stderr,
        )

    cases = [case for case in registry.cases(size) if options.wants(case.name)]
    rows = [row for case in cases for row in _time_case(case, size, common)]
    if cases:
        _progress("peak memory")
        names = [case.name for case in cases]
        extra = worker.peak_memory(names, size, options.threads, peers=size == "full")
        results.add_memory(rows, extra)
    if options.wants(SWEEPS):
        points = sweep.run(size, options.threads, _progress)
        rows += [results.point_row(point, common) for point in points]
    if options.wants(CAPABILITIES):
        rows += _capabilities(size, common)

    path = options.output / f"{machine.slug()}-{size}.csv"
    results.write(rows, path)
    picture = chart.draw(rows, path.with_suffix(".png"))
    print(report.table(rows))
    print(f"\n{time.perf_counter() - _START:.0f} s; rows: {path}; chart: {picture}")
    return 0


def _time_case(case: Case, size: str, common: Row) -> list[Row]:
    _progress(case.name)
    torch.compiler.reset()
    problem = case.build()
    problem.check()
    measured = timing.time_problem(problem, seconds=SECONDS[size], min_rounds=MIN_ROUNDS[size])
    rows = results.problem_rows(case.name, problem, measured, common)
    del problem
    gc.collect()
    return rows


def _capabilities(size: str, common: Row) -> Iterator[Row]:
    """Ours under every instruction set this machine has, each in a process of its own."""
    threads = int(common["threads"])
    measured = {}
    wanted = ("avx512", "avx2", "baseline") if size == "full" else ("avx512", "avx2")
    for capability in wanted:
        _progress(f"instruction set {capability}")
        measured[capability] = worker.time_ours(CAPABILITY_CASES, size, threads, capability) or {}
    for name in CAPABILITY_CASES:
        problem: Problem = registry.case(name, size).build()
        for capability, by_case in measured.items():
            for key, values in by_case.get(name, {}).items():
                contender, found = problem.contender(key), timing.Timing(*values)
                row = results.timing_row(name, problem, contender, found, common)
                yield {**row, "sweep": CAPABILITY_SWEEP, "instruction_set": capability}


_START = time.perf_counter()


def _progress(text: str) -> None:
    print(f"{time.perf_counter() - _START:6.0f} s  {text}", file=sys.stderr, flush=True)


class _Options(argparse.Namespace):
    size: str
    threads: int
    output: Path
    only: list[str]

    def wants(self, name: str) -> bool:
        return not self.only or any(part in name for part in self.only)


def _options(arguments: list[str] | None) -> _Options:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "--full", action="store_const", const="full", dest="size", help="all shapes, more rounds"
    )
    parser.add_argument("--size", choices=SIZES, help="tiny: a smoke test of the benchmarks")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PART",
        help=f"only cases with this in their name (weighted_loss-a), {SWEEPS} or {CAPABILITIES}",
    )
    parser.set_defaults(size="short")
    return parser.parse_args(arguments, namespace=_Options())


if __name__ == "__main__":
    sys.exit(main())

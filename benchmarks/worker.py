"""Measurements that need a process of their own: peak memory, another instruction set.

``python -m benchmarks.worker memory|time SIZE THREADS PEERS CASE...`` prints JSON.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks import registry, timing
from benchmarks.problem import Problem

# Freed memory goes back to the system at once, so that the next peak starts from the bottom.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}

ByCase = dict[str, dict]


def peak_memory(cases: Sequence[str], size: str, threads: int, peers: bool) -> ByCase:
    """Bytes beyond the inputs and the gradient (or None), by case and key of the contender."""
    return _call("memory", cases, size, threads, peers, _MALLOC)


def time_ours(cases: Sequence[str], size: str, threads: int, capability: str) -> ByCase | None:
    """Timings of ours under an instruction set; None where the machine does not have it."""
    try:
        environment = {"RISKMAP_CPU_CAPABILITY": capability}
        return _call("time", cases, size, threads, False, environment)
    except RuntimeError as error:
        if "this machine has no" in str(error):
            return None
        raise


def _call(
    task: str,
    cases: Sequence[str],
    size: str,
    threads: int,
    peers: bool,
    environment: dict[str, str],
) -> ByCase:
    arguments = [task, size, str(threads), str(int(peers)), *cases]
    command = [sys.executable, "-m", "benchmarks.worker", *arguments]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"benchmarks.worker {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(task: str, size: str, threads: str, peers: str, *cases: str) -> None:
    torch.set_num_threads(int(threads))
    measured = {}
    for name in cases:
        torch.compiler.reset()
        problem = registry.case(name, size).build()
        measured[name] = _times(problem) if task == "time" else _peaks(problem, peers == "1")
        del problem
    print(json.dumps(measured))


def _times(problem: Problem) -> dict[str, timing.Timing]:
    ours = {each.key: each.run for each in problem.contenders if each.ours}
    return timing.interleaved(ours, seconds=1.0, min_rounds=9)


def _peaks(problem: Problem, peers: bool) -> dict[str, int | None]:
    extra = {}
    for each in problem.contenders:
        if each.ours or peers:
            gc.collect()
            peak = timing.peak_extra_bytes(each.run)
            extra[each.key] = None if peak is None else max(0, peak - each.gradient_bytes)
    return extra


if __name__ == "__main__":
    main(*sys.argv[1:])

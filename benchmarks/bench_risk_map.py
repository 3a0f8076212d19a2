"""risk_map, from source logits to weights in one pass, against the chain of PyTorch calls."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import riskmap_ext
from benchmarks import peers, shapes
from benchmarks.problem import COMPILE, EAGER, OURS, Case, Contender, Outputs, Problem
from benchmarks.support import contender_ids, run_benchmark

OP = "risk_map"
WORK = "risk map"
WORK_BF16 = "risk map, bf16"
RANGE = (0.5, 3.0)


def cases(size: str) -> list[Case]:
    keys = "abcde" if size == "full" else "abc"
    return [Case(f"{OP}-{key}", partial(build, key, size)) for key in keys]


def build(key: str, size: str) -> Problem:
    shape = shapes.shape(key, size)
    logits, target, _ = shapes.make_inputs(shape)
    conditional = shapes.make_conditional(shape.classes, shape.classes)
    problem = Problem(OP, shape)
    low, high = RANGE
    for work, source in ((WORK, logits), (WORK_BF16, logits.bfloat16())):

        def run(function, *limits, source=source, **options) -> Outputs:
            return (function(source, target, conditional, *limits, **options),)

        moved = source.nbytes + target.nbytes + 4 * shape.voxels
        make = partial(Contender, work, moved_bytes=moved, dtype=source.dtype)
        ours = partial(run, riskmap_ext.risk_map, scheme="exponential", range=RANGE)
        problem.contenders.append(make(OURS, ours))
        problem.contenders.append(make(f"{EAGER}, gather", partial(run, peers.risk_map, low, high)))
        if work == WORK:
            compiled = torch.compile(peers.risk_map, dynamic=False)
            problem.contenders += [
                make(f"{EAGER}, matmul", partial(run, peers.risk_map_matmul, low, high)),
                make(COMPILE, partial(run, compiled, low, high)),
            ]
    return problem


@pytest.mark.parametrize(("case", "contender"), contender_ids(cases))
def test_risk_map(benchmark, case: str, contender: str) -> None:
    run_benchmark(benchmark, cases, case, contender)

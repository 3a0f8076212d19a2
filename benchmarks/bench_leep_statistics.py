"""leep_statistics against softmax with index_add, and softmax with a matrix product."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import riskmap_ext
from benchmarks import peers, shapes
from benchmarks.problem import COMPILE, EAGER, OURS, Case, Contender, Outputs, Problem
from benchmarks.support import contender_ids, run_benchmark

OP = "leep_statistics"
WORK = "LEEP statistics"
WORK_BF16 = "LEEP statistics, bf16"


def cases(size: str) -> list[Case]:
    keys = "abcde" if size == "full" else "ab"
    return [Case(f"{OP}-{key}", partial(build, key, size)) for key in keys]


def build(key: str, size: str) -> Problem:
    shape = shapes.shape(key, size)
    logits, target, _ = shapes.make_inputs(shape)
    problem = Problem(OP, shape)
    for work, source in ((WORK, logits), (WORK_BF16, logits.bfloat16())):

        def run(statistics, source=source) -> Outputs:
            return (statistics(source, target, shape.classes),)

        make = partial(
            Contender, work, moved_bytes=source.nbytes + target.nbytes, dtype=source.dtype
        )
        problem.contenders.append(make(OURS, partial(run, riskmap_ext.leep_statistics)))
        if work == WORK:
            matmul = torch.compile(peers.leep_statistics_matmul, dynamic=False)
            problem.contenders += [
                make(f"{EAGER}, index_add", partial(run, peers.leep_statistics_index_add)),
                make(f"{EAGER}, matmul", partial(run, peers.leep_statistics_matmul)),
                make(f"{COMPILE}, matmul", partial(run, matmul)),
            ]
        else:
            problem.contenders.append(
                make(f"{EAGER}, index_add", partial(run, peers.leep_statistics_index_add))
            )
    return problem


@pytest.mark.parametrize(("case", "contender"), contender_ids(cases))
def test_leep_statistics(benchmark, case: str, contender: str) -> None:
    run_benchmark(benchmark, cases, case, contender)

"""transferability_map against softmax, a gathered row of P(y|z) and a sum."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import riskmap_ext
from benchmarks import peers, shapes
from benchmarks.problem import COMPILE, EAGER, OURS, Case, Contender, Outputs, Problem
from benchmarks.support import contender_ids, run_benchmark

OP = "transferability_map"
WORK = "transferability map"


def cases(size: str) -> list[Case]:
    keys = "abcde" if size == "full" else "abc"
    return [Case(f"{OP}-{key}", partial(build, key, size)) for key in keys]


def build(key: str, size: str) -> Problem:
    shape = shapes.shape(key, size)
    source, target, _ = shapes.make_inputs(shape)
    conditional = shapes.make_conditional(shape.classes, shape.classes)

    def run(function) -> Outputs:
        return (function(source, target, conditional),)

    moved = source.nbytes + target.nbytes + 4 * shape.voxels
    make = partial(Contender, WORK, moved_bytes=moved)
    return Problem(
        OP,
        shape,
        [
            make(OURS, partial(run, riskmap_ext.transferability_map)),
            make(f"{EAGER}, gather", partial(run, peers.transferability_map)),
            make(f"{EAGER}, matmul", partial(run, peers.transferability_map_matmul)),
            make(COMPILE, partial(run, torch.compile(peers.transferability_map, dynamic=False))),
        ],
    )


@pytest.mark.parametrize(("case", "contender"), contender_ids(cases))
def test_transferability_map(benchmark, case: str, contender: str) -> None:
    run_benchmark(benchmark, cases, case, contender)

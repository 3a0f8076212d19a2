"""linear_weighted_loss, forward and backward, against a head and a loss; see benchmarks/head.py."""

from __future__ import annotations

import pytest

from benchmarks import head


@pytest.mark.parametrize("work", [head.CE, head.CE_DICE])
@pytest.mark.parametrize(
    "name",
    [
        head.OURS,
        f"{head.PRODUCT} + weighted_loss",
        f"{head.CONVOLUTION} + weighted_loss",
    ],
)
def test_linear_weighted_loss(benchmark, work: str, name: str) -> None:
    size = (head.SHORT if benchmark.enabled else head.TINY)[0]
    runs = head.contenders(head.make_inputs(size), work, others=False)
    head.check(runs)
    benchmark.group = f"{size}: {work}"
    benchmark.pedantic(runs[name], rounds=5, warmup_rounds=2)

"""What is added to the logits of the network that is trained: where the source sees a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.transfer.location import class_sums
from riskmap_ext.finetune.source.network import first_output
from riskmap_ext.finetune.train.maps import SourceMaps
from riskmap_ext.finetune.train.plan import Plan

FLOOR = 0.01
FADED = 0.8  # share of the steps after which a fading offset is gone


@dataclass(frozen=True)
class TransferPrior:
    """tau log((q + FLOOR) / (f + FLOOR)), q = P(y|z) theta by the frozen source, f the frequencies.

    In training and in prediction. fades: falls linearly to 0, so that the trained network stands
    alone. To be called as `prepare` of a run.
    """

    tau: float
    fades: bool = False

    def __call__(self, plan: Plan, maps: SourceMaps | None) -> None:
        assert maps is not None
        assert plan.models.source is not None
        source = plan.models.source.network
        conditional = maps.statistics.conditional.float()
        frequency = (maps.statistics.class_frequencies.float() + FLOOR).log()
        last = FADED * plan.config.train.steps
        done = 0

        def add(network: Any, given: tuple[Tensor, ...], output: Any) -> Tensor:
            nonlocal done
            left = max(0.0, 1 - done / last) if self.fades else 1.0
            done += network.training
            logits = first_output(output, given[0])
            assert isinstance(logits, Tensor)
            if left == 0:
                return logits
            with torch.no_grad():
                theta = first_output(source(given[0]), given[0]).softmax(dim=1)
                chance = torch.einsum("cz,bz...->bc...", conditional, theta)
                offset = (chance + FLOOR).log_().transpose(1, -1).sub_(frequency).transpose(1, -1)
            return logits + self.tau * left * offset

        plan.models.network.register_forward_hook(add)


def shifted(plan: Plan, maps: SourceMaps | None) -> None:
    """A control: at prediction alone, each class gets the log of its mean weight in the linear map.

    That is where cross-entropy with these weights has its optimum. `prepare` of a run.
    """
    assert maps is not None
    low, high = maps.hardness_range
    total, count = torch.zeros(2, len(plan.cases.classes), dtype=torch.float64)
    for case in plan.cases.train:
        hardness = (-maps.transferability[case.name] - low) / max(high - low, 1e-9)
        weight = 1 + 9 * hardness.clamp(0, 1)
        sums = class_sums(weight, case.label, len(total))
        total, count = total + sums[0], count + sums[1]
    mean = (total / count.clamp(min=1)).clamp(min=1)
    shift = (mean / mean[0]).log().float()

    def add(network: Any, given: tuple[Tensor, ...], output: Any) -> Any:
        if network.training:
            return output
        logits = first_output(output, given[0])
        return logits + shift.view(1, -1, *[1] * (given[0].dim() - 2))

    plan.models.network.register_forward_hook(add)


CONSTANTS = [FLOOR, FADED]

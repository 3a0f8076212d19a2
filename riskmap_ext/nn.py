"""Thin modules over the functional API."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from riskmap_ext._arguments import loss_options, plain_tensor
from riskmap_ext.ops import weighted_loss


class RiskWeightedLoss(torch.nn.Module):
    """:func:`riskmap_ext.weighted_loss` with its options fixed.

    Args:
        weight: class weights [C] or a sequence of numbers; kept as a buffer that moves with the
            module and is not part of its state_dict.
        options: the other keyword arguments of :func:`riskmap_ext.weighted_loss`, checked here.

    Shapes: input [B, C, *S] logits, target [B, *S] or [B, 1, *S], risk and foreground like target.
    """

    weight: Tensor | None

    def __init__(self, weight: Any = None, **options: Any) -> None:
        super().__init__()
        if weight is not None:
            weight = (
                plain_tensor("weight", weight).detach().clone()
                if isinstance(weight, torch.Tensor)
                else torch.tensor(weight, dtype=torch.float32)
            )
        self.register_buffer("weight", weight, persistent=False)
        defaults = {
            name: value
            for name, value in (weighted_loss.__kwdefaults__ or {}).items()
            if name not in ("weight", "foreground")
        }
        unknown = sorted(set(options) - set(defaults))
        if unknown:
            raise TypeError(
                f"RiskWeightedLoss: unknown option {unknown[0]!r}; expected {', '.join(defaults)}"
            )
        # The number of classes is not known yet: checked as if there were enough of them.
        loss_options(2**31 - 1 if weight is None else len(weight), **{**defaults, **options})
        self.options = options

    def forward(
        self,
        input: Tensor,  # torch's name for it
        target: Tensor,
        risk: Tensor | None = None,
        foreground: Tensor | None = None,
    ) -> Tensor:
        return weighted_loss(
            input, target, risk, weight=self.weight, foreground=foreground, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

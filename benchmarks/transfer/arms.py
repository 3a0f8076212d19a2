"""The ways to train that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.transfer import losses

_CE = {"ce_weight": 1.0, "dice_weight": 0.0}
_CE_DICE = {"ce_weight": 1.0, "dice_weight": 1.0}


@dataclass(frozen=True)
class Arm:
    """`risk` and `loss` are sections of the driver's configuration; risk None is no risk map.

    own_loss and weights stand in the place of the loss section and of the risk maps.
    """

    key: str
    name: str
    what: str
    loss: dict[str, Any] = field(default_factory=lambda: _CE_DICE)
    risk: dict[str, Any] | None = None
    from_source: bool = True
    own_loss: Callable[..., Any] | None = None
    weights: Callable[..., Any] | None = None

    @property
    def definition(self) -> list[Any]:
        """What a run depends on, as plain values."""
        hooks = [f.__name__ if f else None for f in (self.own_loss, self.weights)]
        return [self.loss, self.risk, self.from_source, *hooks]


REFERENCE, CONTROL, OURS = "ce_dice", "class_dice", "risk_dice"

_EVERY = (
    Arm(
        "scratch",
        "CE + Dice from scratch",
        "random weights in the place of the source's",
        from_source=False,
    ),
    Arm("ce", "CE", "plain fine-tuning with cross-entropy", loss=_CE),
    Arm("ce_dice", "CE + Dice", "plain fine-tuning, the usual sum"),
    Arm("risk_ce", "risk CE", "risk-weighted cross-entropy, as in the paper", loss=_CE, risk={}),
    Arm("risk_dice", "risk + Dice", "the driver's default", risk={}),
    Arm("power_dice", "power + Dice", "scheme power with exponent 0.5", risk={"scheme": "power"}),
    Arm(
        "class_dice",
        "class weights + Dice",
        "√(1/f) as class weights; needs no source's map",
        loss={**_CE_DICE, "class_weights": "sqrt_inverse_frequency"},
    ),
    Arm(
        "class_mean_dice",
        "class means + Dice",
        "control: the risk map averaged within each class",
        risk={},
        weights=losses.class_means,
    ),
    Arm("focal", "focal", "focal loss, exponent 2", own_loss=losses.focal),
    Arm("top_k", "top-k CE", "cross-entropy of the hardest tenth", own_loss=losses.top_k),
    Arm("focal_dice", "focal + Dice", "focal loss and Dice", own_loss=losses.focal_dice),
    Arm("top_k_dice", "top-k CE + Dice", "top-k CE and Dice", own_loss=losses.top_k_dice),
)
ARMS = {arm.key: arm for arm in _EVERY}
EXTRA = ("focal_dice", "top_k_dice")  # on request: beside CE + Dice arms they are a fairer peer
DEFAULT = tuple(key for key in ARMS if key not in EXTRA)

"""Calls of the ops: what they are given, what they return, and what float64 says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import riskmap_ext
from riskmap_ext import reference

PLANAR, CHANNELS_LAST = "planar", "channels-last"
IGNORED = -100
# Of a result by its dtype, relative to its largest number.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.float16: 4e-3, torch.bfloat16: 4e-3}
LOSSES: dict[str, dict[str, Any]] = {
    "gradient": {},  # with the loss, from one pass over the logits
    "dice": {"dice_weight": 1.0},
    "squared": {"dice_weight": 0.7, "squared_pred": True, "label_smoothing": 0.1},
    "smooth": {"label_smoothing": 0.1, "normalization": "foreground"},
    "batch": {"dice_weight": 0.5, "batch_dice": True, "include_background": True},
    "none": {"reduction": "none"},
    "regions": {"dice_weight": 1.0},
    "overwritten": {"overwrite_logits": True},
    "overwritten dice": {"dice_weight": 1.0, "overwrite_logits": True},
}
WITH_CLASS_WEIGHTS = ("squared", "smooth")
WITH_MASK = ("squared", "smooth")


@dataclass(frozen=True)
class Call:
    """An op on a shape: a loss with the gradient of its logits, or a function of a source."""

    op: str
    classes: int
    spatial: tuple[int, ...]
    batch: int = 1
    dtype: torch.dtype = torch.float32
    layout: str = PLANAR

    @property
    def name(self) -> str:
        shape = "x".join(map(str, (self.batch, self.classes, *self.spatial)))
        last = f" {self.layout}" if self.layout != PLANAR else ""
        return f"{self.op} {str(self.dtype)[6:]} {shape}{last}"

    @property
    def voxels(self) -> int:
        return self.batch * int(torch.Size(self.spatial).numel())

    def inputs(self, real: bool = True, runs: int = 1) -> dict[str, Any]:
        """The arguments, with runs of so many equal labels; not `real`: large tensors are memory
        that nobody has touched."""
        shape = (self.batch, *self.spatial)
        scores = self._scores(real)
        if not real:
            target = torch.empty(shape, dtype=torch.int64)
            weights = torch.empty(shape)
        else:
            generator = torch.Generator().manual_seed(self.classes)
            labels = self.classes + (self.op == "regions")
            count = -(-self.voxels // runs)
            target = torch.randint(labels, (count,), generator=generator)
            target = target.repeat_interleave(runs)[: self.voxels].reshape(shape)
            target[torch.rand(shape, generator=generator) < 0.05] = IGNORED
            weights = 0.5 + torch.rand(shape, generator=generator)
        if self.op not in LOSSES:
            given: dict[str, Any] = {"source": scores, "target": target}
            if self.op == "leep":
                return {**given, "num_classes": self.classes}
            table = torch.rand((self.classes, self.classes), dtype=torch.float64)
            return {**given, "conditional": table / table.sum(dim=0)}
        given = {"logits": scores, "target": target, "risk": weights, **LOSSES[self.op]}
        if self.op in WITH_CLASS_WEIGHTS:
            class_weights = torch.linspace(0.5, 1.5, self.classes)
            given |= {"weight": class_weights}
            if "dice_weight" in given:
                given |= {"dice_class_weight": class_weights.flip(0)}
        if self.op in WITH_MASK:
            given["foreground"] = target % 2 == 1 if real else torch.empty(shape, dtype=torch.bool)
        if self.op == "regions":  # label 0 in no region, then one more label each, as in BraTS
            rows = torch.arange(self.classes)[:, None]
            given["regions"] = torch.arange(self.classes + 1)[None] > rows
        return given

    def _scores(self, real: bool) -> Tensor:
        shape = (self.batch, self.classes, *self.spatial)
        last = self.layout == CHANNELS_LAST
        if last:
            shape = (self.batch, *self.spatial, self.classes)
        if real:
            generator = torch.Generator().manual_seed(sum(shape))
            scores = (2 * torch.randn(shape, generator=generator)).to(self.dtype)
        else:
            scores = torch.empty(shape, dtype=self.dtype)
        return scores.movedim(-1, 1) if last else scores

    def results(self, inputs: dict[str, Any], package: ModuleType = riskmap_ext) -> list[Tensor]:
        """The value and, of a loss, the gradient of its logits."""
        if self.op == "leep":
            return [package.leep_statistics(**inputs)]
        if self.op == "map":
            return [package.transferability_map(**inputs)]
        if self.op == "risk":  # one pass
            middle = math.log(self.classes)  # about what is found in random numbers
            scope = (middle - 0.7, middle + 0.7)
            return [package.risk_map(**inputs, scheme="exponential", range=scope)]
        if self.op == "risk_image":  # the range is that of the image
            return [package.risk_map(**inputs)]
        logits = inputs["logits"].detach().requires_grad_()
        given = logits.clone() if "overwrite_logits" in inputs else logits
        loss = package.weighted_loss(**{**inputs, "logits": given})
        (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
        return [loss.detach(), gradient]

    def launch_only(self, inputs: dict[str, Any]) -> None:
        """For its launches: nothing runs, and LEEP may find the numbers wrong that were there."""
        with suppress(ValueError) if self.op == "leep" else nullcontext():
            self.results(inputs)

    def error(self, found: Sequence[Tensor], inputs: dict[str, Any]) -> tuple[float, float]:
        """Against float64: the largest error, and the largest share of what is allowed."""
        exact = {
            name: value.double()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in inputs.items()
        }
        worst, share = 0.0, 0.0
        for mine, other in zip(found, self.results(exact, reference), strict=True):
            largest = other.abs().max().item() or 1.0
            error = (mine.double() - other).abs().max().item() / largest
            error = error if error == error else float("inf")
            # Statistics of float32 are float64.
            of_float = mine.dtype == F64 and self.dtype != F64
            tolerance = TOLERANCE[F32 if of_float else mine.dtype]
            worst, share = max(worst, error), max(share, error / tolerance)
        return worst, share

    def least_bytes(self) -> int:
        """What the op must read and write; a Dice is a sum over all before there is a gradient."""
        logits = self.classes * self.dtype.itemsize
        if self.op not in LOSSES:
            return self.voxels * (logits + 8 + (4 if self.op != "leep" else 0))
        maps = 8 + 4 + (self.op in WITH_MASK)
        passes = 2 if "dice_weight" in LOSSES[self.op] else 1
        return self.voxels * (passes * (logits + maps) + logits)


F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
SOURCE_OPS = ("leep", "map", "risk", "risk_image")
LOSS_OPS = ("gradient", "smooth", "dice", "squared")


def _odd(classes: int) -> tuple[int, ...]:
    """So many voxels that kernels have a few blocks, and the last one is not full."""
    return (17, 13, 19) if classes <= 8 else (37, 19) if classes <= 105 else (401,)


def correctness_calls() -> list[Call]:
    calls = []
    for classes in (3, 4, 8, 16, 87, 105, 133, 300):
        for dtype in (F32, BF16):
            for op in (*LOSS_OPS, *SOURCE_OPS):
                for layout in (PLANAR, CHANNELS_LAST):
                    wide = classes > 105 and op in ("smooth", "map", "risk")
                    few = op in ("smooth", "map") or (dtype == BF16 and classes in (8, 105))
                    if wide or ((few or classes == 300) and layout == CHANNELS_LAST):
                        continue
                    calls.append(Call(op, classes, _odd(classes), 2, dtype, layout))
    for op in ("gradient", "dice", "leep", "risk_image"):
        calls += [Call(op, classes, _odd(classes), 2, F16) for classes in (3, 4, 16)]
        calls += [Call(op, classes, (401,), 2, F64) for classes in (3, 16)]
    for layout in (PLANAR, CHANNELS_LAST):
        for dtype in (F32, BF16, F64):
            calls += [Call("regions", c, _odd(c), 2, dtype, layout) for c in (3, 7)]
    for op in (*LOSS_OPS, *SOURCE_OPS, "regions", "batch", "none"):
        calls.append(Call(op, 4, (16, 16, 24), 2))  # whole vectors
    for op in ("overwritten", "overwritten dice"):
        for classes in (4, 5, 87, 300):
            for layout in (PLANAR, CHANNELS_LAST):
                calls.append(Call(op, classes, _odd(classes), 2, F32, layout))
            calls.append(Call(op, classes, _odd(classes), 2, BF16))
        calls.append(Call(op, 4, (16, 16, 24), 2))
    calls += [Call(op, 2, _odd(2), 3) for op in (*LOSS_OPS, *SOURCE_OPS)]
    calls += [Call(op, 5, _odd(5), 1, BF16) for op in (*LOSS_OPS, *SOURCE_OPS)]
    return calls


def budget_calls() -> list[Call]:
    """At the shapes that count."""
    large, small, wide = (96,) * 3, (64,) * 3, (128,) * 3
    calls = []
    for dtype in (F32, BF16):
        for classes in (2, 3, 4, 8):
            calls.append(Call("gradient", classes, large, 2, dtype))
        calls.append(Call("gradient", 4, (256, 256), 16, dtype))
        calls.append(Call("gradient", 5, wide, 1, dtype))
        calls += [Call("gradient", c, small, 1, dtype) for c in (16, 87, 133, 256)]
        calls.append(Call("gradient", 105, large, 1, dtype))
        for op in ("dice", "leep"):
            calls.append(Call(op, 4, large, 2, dtype))
            calls.append(Call(op, 87, small, 1, dtype))
            calls.append(Call(op, 105, large, 1, dtype))
        calls.append(Call("regions", 3, large, 2, dtype))
        for op in ("risk", "risk_image"):
            calls.append(Call(op, 4, large, 2, dtype))
            calls.append(Call(op, 87, small, 1, dtype))
    for op in ("gradient", "dice", "leep", "risk"):  # 0.5 GB of logits
        calls += [Call(op, 4, (320,) * 3), Call(op, 105, (108,) * 3)]
    for classes in (3, 4, 5, 16, 87):
        shape = large if classes <= 8 else small
        calls.append(Call("gradient", classes, shape, 1, F32, CHANNELS_LAST))
    return calls

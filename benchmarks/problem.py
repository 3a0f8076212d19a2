"""A piece of work and who does it: contenders on the same inputs, checked against each other."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.shapes import Shape

OURS = "riskmap_ext"
RECOMPUTE = "riskmap_ext, recompute"
OVERWRITE = "riskmap_ext, overwrite_logits"
EAGER = "eager"
COMPILE = "torch.compile"
MONAI = "MONAI DiceCELoss"
NNUNET = "nnU-Net DC_and_CE"

Outputs = tuple[Tensor, ...]


class Disagreement(AssertionError):
    """A contender computes something else than ours: its time would mean nothing."""


@dataclass(frozen=True)
class Contender:
    """``run`` gives (loss, gradient) or (map,); contenders of the same ``work`` must agree."""

    work: str
    name: str
    run: Callable[[], Outputs]
    moved_bytes: int  # the fewest that must be read and written
    gradient_bytes: int = 0  # written for the caller, so no extra memory
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-4  # relative

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)

    @property
    def key(self) -> str:
        return f"{self.work} | {self.name}"


@dataclass
class Problem:
    op: str
    shape: Shape
    contenders: list[Contender] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.op} {self.shape.key} ({self.shape})"

    def check(self) -> None:
        """Raise Disagreement unless all contenders of a work give the same outputs."""
        for work in dict.fromkeys(contender.work for contender in self.contenders):
            same = [contender for contender in self.contenders if contender.work == work]
            expected = next(each for each in same if each.ours).run()
            for contender in same:
                for index, (found, wanted) in enumerate(
                    zip(contender.run(), expected, strict=True)
                ):
                    error = relative_error(found, wanted)
                    if not error <= contender.tolerance:
                        raise Disagreement(
                            f"{self}: {contender.key}: output {index} is off by {error:.2e} "
                            f"(relative), allowed {contender.tolerance:.0e}"
                        )
            del expected
            gc.collect()

    def contender(self, key: str) -> Contender:
        return next(each for each in self.contenders if each.key == key)


@dataclass(frozen=True)
class Case:
    """A problem that has not been built yet: it may take gigabytes."""

    name: str
    build: Callable[[], Problem]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in L2; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    expected = expected.detach().float()
    difference = torch.linalg.vector_norm(found.detach().float() - expected)
    size = torch.linalg.vector_norm(expected)
    return (difference / size).item() if size > 0 else difference.item()

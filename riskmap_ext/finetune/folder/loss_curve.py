"""losses.csv: the training loss in fine steps, kept on the device until it is written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from riskmap_ext.finetune.base.errors import InputError
from riskmap_ext.finetune.base.files import write_csv
from riskmap_ext.finetune.base.processes import Processes

HEADER = ("step", "loss", "lr")
_POINTS = 500


class LossCurve:
    """Mean losses of blocks of equally many steps: 500 to 999 rows, or one for each step.

    A row is (last step of its mean, loss, learning rate there). Nothing waits for the device until
    `write`.
    """

    def __init__(
        self,
        path: Path,
        steps: int,
        device: torch.device,
        group: Processes | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """state: the `state_dict` saved with the run that is resumed."""
        self._path = path
        self._group = group or Processes()
        self._every = max(1, steps // _POINTS)
        self._last = steps
        kept = state or {"rows": [], "sum": torch.zeros((), dtype=torch.float64), "count": 0}
        self._rows = [[step, float(loss), float(lr)] for step, loss, lr in kept["rows"]]
        self._sum, self._count = kept["sum"].to(device), kept["count"]
        self._waiting: list[tuple[int, Tensor, float]] = []

    def add(self, step: int, loss: Tensor, lr: float) -> None:
        self._sum = self._sum + loss
        self._count += 1
        if step % self._every == 0 or step == self._last:
            self._waiting.append((step, self._sum / self._count, lr))
            self._sum, self._count = torch.zeros_like(self._sum), 0

    def write(self) -> None:
        """Raises: InputError naming the file."""
        if self._waiting:
            steps, means, lrs = zip(*self._waiting, strict=True)
            losses = self._group.mean(torch.stack(means)).tolist()
            self._rows += map(list, zip(steps, losses, lrs, strict=True))
            self._waiting = []
        rows = ([int(step), f"{loss:.6g}", f"{lr:.6g}"] for step, loss, lr in self._rows)
        if self._group.is_main:
            write_csv(self._path, HEADER, rows)

    def close(self) -> None:
        """Writes what came after the last validation, for a run that ends early."""
        if self._group.size > 1:  # the other processes may have ended
            return
        with suppress(InputError):  # the reason for the early end is the one to report
            self.write()

    def state_dict(self) -> dict[str, Any]:
        """State of what was written."""
        return {"rows": self._rows, "sum": self._sum.cpu(), "count": self._count}

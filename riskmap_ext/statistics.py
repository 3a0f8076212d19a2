"""LEEP statistics of a whole training set: streamed, mergeable, distributed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from riskmap_ext._arguments import (
    MAX_CLASSES,
    MAX_WEIGHT,
    integer,
    number_sequence,
    plain_tensor,
    region_table,
)
from riskmap_ext._deferred import DeferredLogits
from riskmap_ext.ops.deferred import as_checked
from riskmap_ext.ops.leep_statistics import NOT_FINITE, conditional, leep_statistics
from riskmap_ext.ops.transferability_map import transferability_map

# A score this close to that of the class frequencies alone: the source tells nothing.
_UNINFORMATIVE = 0.01
# The plain values of a state, and their types.
_PLAIN = {
    **dict.fromkeys(("voxels", "range_voxels"), int),
    **dict.fromkeys(("log_likelihood", "low", "high"), float),
    **dict.fromkeys(("joint_is_global", "range_is_global"), bool),
}


class TransferStatistics:
    r"""LEEP statistics of a source model on a target training set, in two passes.

    First pass, :meth:`update`: the joint mass J [C, Z] of labels and source classes, which gives
    :attr:`conditional`, P(y|z). Second pass, :meth:`update_range`, with P(y|z) fixed: the LEEP
    :attr:`score` (mean log-likelihood of a voxel, in nats, <= 0) and the :attr:`hardness_range`
    (smallest and largest -T over all valid voxels), which the risk map's data-set scope needs.

    >>> statistics = TransferStatistics(num_classes=3)
    >>> for image, label in loader:                      # doctest: +SKIP
    ...     statistics.update(source(image), label)
    >>> for image, label in loader:                      # doctest: +SKIP
    ...     statistics.update_range(source(image), label)
    >>> risk = riskmap_ext.risk_map(                     # doctest: +SKIP
    ...     source(image), label, statistics.conditional, range=statistics.hardness_range)

    Args:
        num_classes: number of target classes C.
        ignore_index: label of voxels to ignore.
        regions: table [R, Z] for a source of overlapping regions, see
            :func:`riskmap_ext.leep_statistics`.

    Source: C. V. Nguyen et al., ICML 2020 (LEEP).
    """

    def __init__(
        self, num_classes: int, *, ignore_index: int = -100, regions: Tensor | None = None
    ) -> None:
        self.num_classes = integer("num_classes", num_classes, 1, MAX_CLASSES)
        self.ignore_index = integer("ignore_index", ignore_index)
        self.regions = None if regions is None else region_table(regions)
        self._joint: Tensor | None = None
        self._voxels = 0
        self._log_likelihood = 0.0
        self._range_voxels = 0
        self._low = math.inf
        self._high = -math.inf
        self._joint_is_global = False
        self._range_is_global = False

    def update(self, source: Tensor | DeferredLogits, target: Tensor) -> None:
        """First pass: adds a batch of source logits [B, Z, *S] and labels [B, *S].

        The logits may be :class:`riskmap_ext.nn.DeferredLogits`: they are computed in chunks and
        never kept.

        Raises ValueError for non-finite logits and for labels out of range, on any device; the
        statistics collected before do not change. The same holds for :meth:`update_range`.
        """
        if self._joint_is_global or self._range_voxels:
            raise RuntimeError(
                "TransferStatistics.update: the first pass is closed (all_reduce or update_range "
                "was called); start a new TransferStatistics"
            )
        joint = leep_statistics(
            source,
            target,
            self.num_classes,
            ignore_index=self.ignore_index,
            regions=self.regions,
        )
        if not bool(torch.isfinite(joint).all()):
            raise ValueError(self._not_finite(source))
        self._joint = joint if self._joint is None else self._add_joint(joint, "source")
        self._voxels += int(self._valid(plain_tensor("target", target)).sum())

    def update_range(self, source: Tensor | DeferredLogits, target: Tensor) -> None:
        """Second pass over the same data: adds to the score and to the hardness range."""
        self._require_first_pass("update_range")
        target = plain_tensor("target", target)
        transferability = transferability_map(
            source,
            target,
            self.conditional.to(plain_tensor("source", as_checked(source)).device),
            ignore_index=self.ignore_index,
            regions=self.regions,
        )
        valid = self._valid(target).reshape(transferability.shape)
        voxels = int(valid.sum())
        if voxels == 0:
            return
        log_likelihood = float(transferability.sum(dtype=torch.float64))  # 0 where ignored
        if not math.isfinite(log_likelihood):
            raise ValueError(self._not_finite(source))
        self._range_voxels += voxels
        self._log_likelihood += log_likelihood
        hardness = -transferability[valid]
        self._low = min(self._low, float(hardness.min()))
        self._high = max(self._high, float(hardness.max()))

    @property
    def joint(self) -> Tensor:
        """J [C, Z] float64; its sum is the number of valid voxels."""
        return self._require_first_pass("joint")

    @property
    def conditional(self) -> Tensor:
        """P(y|z) [C, Z] float64; the column of a source class without mass is zero."""
        return conditional(self._require_first_pass("conditional"))

    @property
    def num_voxels(self) -> int:
        """Valid voxels of the first pass, counted exactly."""
        return self._voxels

    @property
    def class_frequencies(self) -> Tensor:
        """Share of each target class among the valid voxels, [C] float64; 0 without voxels."""
        counts = self._require_first_pass("class_frequencies").sum(dim=1)
        return counts / counts.sum().clamp(min=1)

    @property
    def score(self) -> float:
        """LEEP: the mean over valid voxels of log sum_z P(y|z) theta[z], in nats, <= 0.

        Warns (UserWarning) if it is within 1 % of -H(Y), the score that the class frequencies
        alone give: then the source tells nothing about the target.
        """
        self._require_second_pass("score")
        if self._range_voxels != self.num_voxels:
            raise RuntimeError(
                f"TransferStatistics.score: the second pass saw {self._range_voxels} valid voxels, "
                f"the first {self.num_voxels}; feed both passes the same data"
            )
        score = self._log_likelihood / self._range_voxels
        if self.tells_nothing(score):
            warnings.warn(
                f"LEEP score {score:.4f} is within 1 % of {-self.label_entropy:.4f}, what the "
                "class frequencies alone give: this source tells nothing about the target labels",
                UserWarning,
                stacklevel=2,
            )
        return score

    @property
    def label_entropy(self) -> float:
        """H(Y) of the label frequencies, in nats."""
        frequencies = self.class_frequencies
        return -float(torch.special.xlogy(frequencies, frequencies).sum())

    def tells_nothing(self, score: float) -> bool:
        """Whether ``score`` is within 1 % of -H(Y), or below it."""
        return score <= -(1 - _UNINFORMATIVE) * self.label_entropy

    @property
    def hardness_range(self) -> tuple[float, float]:
        """Smallest and largest hardness -T over the valid voxels of the second pass, in nats."""
        self._require_second_pass("hardness_range")
        return self._low, self._high

    def merge(self, other: TransferStatistics) -> None:
        """Adds the statistics of another object (another file, another process).

        After the first pass, the joint masses are added. The second pass needs P(y|z) of all
        the data: merge the first passes, give every worker the result (``state_dict``), and merge
        again after ``update_range``; then the joint mass must be the same in both.
        """
        if not isinstance(other, TransferStatistics):
            raise TypeError(f"other: expected TransferStatistics, got {type(other).__name__}")
        if (other.num_classes, other.ignore_index) != (self.num_classes, self.ignore_index):
            raise ValueError(
                f"other: expected num_classes {self.num_classes} and ignore_index "
                f"{self.ignore_index}, got {other.num_classes} and {other.ignore_index}"
            )
        if not _equal(self.regions, other.regions):
            raise ValueError("other: expected the same table of regions")
        if self._range_voxels or other._range_voxels:
            if self._joint is None or not _equal(self._joint, other._joint):
                raise ValueError(
                    "other: its second pass was made with another P(y|z); merge the first passes, "
                    "then run update_range with the merged statistics, then merge again"
                )
        elif other._joint is not None:
            joint = other._joint
            self._joint = joint.clone() if self._joint is None else self._add_joint(joint, "other")
            self._voxels += other._voxels
        self._log_likelihood += other._log_likelihood
        self._range_voxels += other._range_voxels
        self._low = min(self._low, other._low)
        self._high = max(self._high, other._high)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Sums over the processes of ``group``: call it once after each pass.

        Each pass is reduced once; a process without data must also call it. Does nothing if
        torch.distributed is not initialised.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        device = torch.device("cuda" if "nccl" in str(dist.get_backend(group)) else "cpu")
        if not self._joint_is_global:
            width = 0 if self._joint is None else self._joint.size(1)
            widths = torch.tensor([width, -width if width else -(2**31)], device=device)
            dist.all_reduce(widths, dist.ReduceOp.MAX, group=group)
            most, least = int(widths[0]), -int(widths[1])
            if most == 0:
                raise RuntimeError("TransferStatistics.all_reduce: no process has seen any data")
            if least != most:
                raise ValueError(
                    f"source: processes disagree on the number of source classes, {least} to {most}"
                )
            joint = torch.zeros(self.num_classes, most, dtype=torch.float64, device=device)
            home = device if self._joint is None else self._joint.device
            if self._joint is not None:
                joint += self._joint.to(device)
            dist.all_reduce(joint, group=group)
            self._joint = joint.to(home)
            voxels = torch.tensor([self._voxels], device=device)
            dist.all_reduce(voxels, group=group)
            self._voxels = int(voxels)
            self._joint_is_global = True
        seen = torch.tensor([self._range_voxels], device=device)
        dist.all_reduce(seen, group=group)
        if int(seen) and not self._range_is_global:
            sums = torch.tensor([self._log_likelihood], dtype=torch.float64, device=device)
            ends = torch.tensor([-self._low, self._high], dtype=torch.float64, device=device)
            dist.all_reduce(sums, group=group)
            dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
            self._range_voxels, self._log_likelihood = int(seen), float(sums)
            self._low, self._high = -float(ends[0]), float(ends[1])
            self._range_is_global = True

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only: ``torch.load(..., weights_only=True)`` reads it back."""
        return {
            "num_classes": self.num_classes,
            "ignore_index": self.ignore_index,
            "regions": None if self.regions is None else self.regions.cpu().clone(),
            "joint": None if self._joint is None else self._joint.cpu().clone(),
            "voxels": self._voxels,
            "log_likelihood": self._log_likelihood,
            "range_voxels": self._range_voxels,
            "low": self._low,
            "high": self._high,
            "joint_is_global": self._joint_is_global,
            "range_is_global": self._range_is_global,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned.

        Raises: TypeError, ValueError naming what is missing, of another type, shape or range.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state: expected a dict, got {type(state).__name__}")
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise ValueError(f"state: expected the keys of state_dict(), missing {missing}")
        for name in ("num_classes", "ignore_index"):
            if state[name] != getattr(self, name):
                raise ValueError(f"state: expected {name} {getattr(self, name)}, got {state[name]}")
        if not _equal(state["regions"], self.regions):
            raise ValueError("state: expected the same table of regions")
        joint = state["joint"]
        if joint is not None:
            joint = plain_tensor("state: joint", joint)
            columns = joint.shape[-1:] if self.regions is None else self.regions.shape[1:]
            shape, got = [self.num_classes, *columns], f"{joint.dtype} {list(joint.shape)}"
            if list(joint.shape) != shape or joint.dtype != torch.float64:
                raise ValueError(f"state: joint: expected torch.float64 {shape}, got {got}")
            if not bool((torch.isfinite(joint) & (joint >= 0)).all()):
                raise ValueError("state: joint: expected finite values >= 0")
        for name, kind in _PLAIN.items():
            if type(state[name]) is not kind:
                got = type(state[name]).__name__
                raise TypeError(f"state: {name}: expected {kind.__name__}, got {got}")
        self._joint = None if joint is None else joint.clone()
        for name in _PLAIN:
            setattr(self, f"_{name}", state[name])

    def _not_finite(self, source: Tensor | DeferredLogits) -> str:
        if source.device.type == "cpu":
            return NOT_FINITE
        return f"{NOT_FINITE}; or target: a label outside 0 .. {self.num_classes - 1}"

    def _valid(self, target: Tensor) -> Tensor:
        return target.to(torch.int64) != self.ignore_index  # in uint8, -100 would be 156

    def _add_joint(self, joint: Tensor, name: str) -> Tensor:
        assert self._joint is not None
        if joint.shape != self._joint.shape:
            raise ValueError(
                f"{name}: expected {self._joint.size(1)} source classes as before, "
                f"got {joint.size(1)}"
            )
        return self._joint + joint.to(self._joint.device)

    def _require_first_pass(self, what: str, calls: str = "update, the first pass") -> Tensor:
        if self._joint is None:
            raise RuntimeError(f"TransferStatistics.{what}: nothing seen yet; call {calls}")
        return self._joint

    def _require_second_pass(self, what: str) -> None:
        self._require_first_pass(what, "update on all the data, then update_range on all of it")
        if self._voxels == 0:
            raise RuntimeError(
                f"TransferStatistics.{what}: update saw no valid voxel; every label was "
                f"ignore_index {self.ignore_index}"
            )
        if self._range_voxels == 0:
            raise RuntimeError(
                f"TransferStatistics.{what}: needs the second pass; call update_range on the data "
                "that update has seen"
            )

    def __repr__(self) -> str:
        return (
            f"TransferStatistics(num_classes={self.num_classes}, "
            f"ignore_index={self.ignore_index}, num_voxels={self.num_voxels})"
        )


def sqrt_inverse_frequency(counts: Tensor | Sequence[float]) -> Tensor:
    r"""Class weights √(1/f), scaled to a mean of 1 over the voxels.

    Args:
        counts: voxels of each class, or their shares f, [C]; a tensor or a sequence of numbers,
            finite and >= 0. ``TransferStatistics.class_frequencies`` are those of a training set.

    Returns:
        [C] float32 on the device of ``counts``, for ``weight`` of
        :func:`riskmap_ext.weighted_loss`; 0 for a class without voxels.

    Raises:
        TypeError, ValueError: ``counts`` of another type, shape or range, or shares so far apart
            that a weight is beyond float32.
    """
    home = None
    if isinstance(counts, torch.Tensor):
        given = plain_tensor("counts", counts)
        if given.is_complex():
            raise TypeError(f"counts: expected real numbers, got {given.dtype}")
        if given.dim() != 1 or given.size(0) == 0:
            raise ValueError(f"counts: expected [C], got shape {list(given.shape)}")
        home, counts = given.device, given.tolist()
    voxels = torch.tensor(number_sequence("counts", counts, 0.0), dtype=torch.float64, device="cpu")
    if voxels.size(0) == 0:
        raise ValueError("counts: expected [C], got no classes")
    smallest = torch.finfo(torch.float64).tiny
    voxels /= voxels.max().clamp(min=smallest)  # their sum may be beyond float64
    frequencies = voxels / voxels.sum().clamp(min=smallest)
    weights = torch.where(frequencies > 0, frequencies.clamp(min=smallest).rsqrt(), 0.0)
    weights /= (weights * frequencies).sum().clamp(min=smallest)
    if weights.max() > MAX_WEIGHT:
        raise ValueError(f"counts: expected weights up to {MAX_WEIGHT:g}, got {weights.max():g}")
    return weights.float().to(home)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both tables are the same, on any device."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.cpu(), other.cpu())

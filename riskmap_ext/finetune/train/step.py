"""One step of the optimiser: loss, gradient over batches and processes, update."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from riskmap_ext.finetune.base.log import Log
from riskmap_ext.finetune.base.structures import IGNORE_INDEX
from riskmap_ext.finetune.config.schema import Config, TrainConfig
from riskmap_ext.finetune.data.prepare import Cases
from riskmap_ext.finetune.data.sampling import Batch
from riskmap_ext.finetune.source.network import first_output
from riskmap_ext.finetune.train.plan import LossFunction, Plan
from riskmap_ext.nn import DeferredLogits, RiskWeightedLoss
from riskmap_ext.statistics import sqrt_inverse_frequency

# About that of one voxel in ten thousand, if the others are background.
_LARGE_WEIGHT = 100.0


class Stepper:
    """One optimiser step per call; returns the loss of this process's part, detached."""

    def __init__(self, plan: Plan, loss: LossFunction | None = None) -> None:
        """loss: instead of the configuration's."""
        config, device, network = plan.config, plan.device, plan.models.network
        train = config.train
        self._network = network
        self._memory = torch.contiguous_format
        if train.channels_last:
            slices = len(plan.models.patch) == 2
            self._memory = torch.channels_last if slices else torch.channels_last_3d
            network.to(memory_format=self._memory)  # type: ignore[call-overload]
        model = _distributed(plan)
        self._without_sync = getattr(model, "no_sync", contextlib.nullcontext)
        self._forward: Any = torch.compile(model) if train.compile else model
        self._loss = loss or _loss(plan)
        self._optimizer = _optimizer(network, train)
        self._schedule = _schedule(self._optimizer, train)
        dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[train.amp]
        self._autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._clip = train.grad_clip
        self._parts: dict[str, Any] = {
            "optimizer": self._optimizer,
            "schedule": self._schedule,
            "scaler": self._scaler,
        }

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError for a state that steps could not be taken with."""
        for name, part in self._parts.items():
            mine, theirs = part.state_dict(), state[name]
            if name == "optimizer":
                mine, theirs = mine["param_groups"], theirs["param_groups"]
            if not _alike(mine, theirs):
                raise ValueError(f"{name}: expected the keys and types of its own state")
            part.load_state_dict(state[name])
        is_sgd = isinstance(self._optimizer, torch.optim.SGD)
        names = {"momentum_buffer"} if is_sgd else {"step", "exp_avg", "exp_avg_sq"}
        for parameter, kept in self._optimizer.state.items():
            if kept.keys() != names:
                raise ValueError(f"optimizer: expected {', '.join(sorted(names))}")
            for name, value in kept.items():
                if not isinstance(value, Tensor) or value.shape not in ((), parameter.shape):
                    raise ValueError(f"optimizer: {name}: expected a tensor as its weights")

    @property
    def lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        total: Tensor | float = 0.0
        for index, batch in enumerate(batches):
            # The processes average their gradients once, with the last batch.
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self._without_sync():
                with self._autocast:
                    image = batch.image.contiguous(memory_format=self._memory)
                    logits = first_output(self._forward(image), image)
                    loss = self._loss(logits, batch.label, batch.risk, batch.foreground)
                    loss = loss / len(batches)
                self._scaler.scale(loss).backward()
            total = total + loss.detach()
        if self._clip is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._network.parameters(), self._clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        assert isinstance(total, Tensor)
        return total


def _distributed(plan: Plan) -> nn.Module:
    network, device, group = plan.models.network, plan.device, plan.processes
    if group.size == 1:
        return network
    blank = torch.zeros(2, len(plan.cases.channels), *plan.models.patch, device=device)
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network, group.gradients)
    return nn.parallel.DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        process_group=group.gradients,
        find_unused_parameters=_has_unused(network, blank),
    )


def _has_unused(network: nn.Module, image: Tensor) -> bool:
    """Whether there are layers that the loss does not reach, such as deep supervision heads."""
    tried = copy.deepcopy(network).train()
    output = first_output(tried(image), image)
    logits = output.logits() if isinstance(output, DeferredLogits) else output
    logits.sum().backward()
    return any(p.grad is None for p in tried.parameters() if p.requires_grad)


def _loss(plan: Plan) -> LossFunction:
    options = plan.config.loss.model_dump(exclude={"class_weights", "fused_head"})
    return RiskWeightedLoss(
        weight=class_weights(plan.config, plan.cases, plan.log),
        ignore_index=IGNORE_INDEX,
        regions=plan.cases.structures.table,
        sync_dice=plan.config.loss.batch_dice,
        **options,
    ).to(plan.device)


def class_weights(config: Config, cases: Cases, log: Log) -> Tensor | None:
    """Class weights of the configuration; [C] float32."""
    wanted = config.loss.class_weights
    if wanted is None:
        return None
    if isinstance(wanted, list):
        return torch.tensor(wanted, dtype=torch.float32)
    weights = sqrt_inverse_frequency(cases.class_voxels)
    log("Class weights: " + ", ".join(f"{weight:.3g}" for weight in weights))
    largest = float(weights.max())
    if largest > _LARGE_WEIGHT:
        name = cases.classes[int(weights.argmax())]
        log.warn(
            f"class {name} is so rare in the training cases that its weight is {largest:.3g}; are "
            "its labels right? Set loss.class_weights to null, or to your own numbers"
        )
    return weights


def _optimizer(network: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    shared: dict[str, Any] = {"lr": train.lr, "weight_decay": train.weight_decay}
    if train.optimizer == "SGD":
        shared.update(momentum=train.momentum, nesterov=train.momentum > 0)
    return getattr(torch.optim, train.optimizer)(network.parameters(), **shared)


def _schedule(optimizer: torch.optim.Optimizer, train: TrainConfig) -> Any:
    def factor(step: int) -> float:
        done = min(step / train.steps, 1.0)
        if train.schedule == "poly":
            return (1 - done) ** 0.9
        return (1 + math.cos(math.pi * done)) / 2 if train.schedule == "cosine" else 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def loss_in_words(config: Config, loss: bool = False, weights: bool = False) -> str:
    """loss, weights: whether the caller passed a function instead."""
    factors = []
    if config.risk.use:
        factors.append("the caller's weights" if weights else f"the {config.risk.scheme} risk map")
    if loss:
        return " with ".join(["the caller's own", *factors])
    wanted = config.loss.class_weights
    if isinstance(wanted, list):
        factors.append(f"the factor of its class ({', '.join(f'{each:g}' for each in wanted)})")
    elif wanted is not None:
        factors.append("√(1/f) of its class")
    parts = []
    if config.loss.ce_weight > 0:
        by = " and ".join(factors)
        parts.append("cross-entropy, " + (f"each voxel weighted by {by}" if by else "unweighted"))
        if config.loss.label_smoothing > 0:
            parts[0] += f", label smoothing {config.loss.label_smoothing:g}"
    if config.loss.dice_weight > 0:
        parts.append("soft Dice")
    return "; ".join(parts)


def _alike(one: Any, other: Any) -> bool:
    """Whether plain values have the same keys and types; any number is one."""
    if isinstance(one, dict):
        same = isinstance(other, dict) and one.keys() == other.keys()
        return same and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        same = type(one) is type(other) and len(one) == len(other)
        return same and all(map(_alike, one, other))
    if type(one) in (int, float):
        return type(other) in (int, float) and math.isfinite(other)
    return one is None or type(one) is type(other)

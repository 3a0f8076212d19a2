"""The training loop: risk-weighted loss, optimiser, validation, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from riskmap_ext.finetune.config import IGNORE_INDEX, Config, TrainConfig
from riskmap_ext.finetune.data import Cases
from riskmap_ext.finetune.errors import InputError
from riskmap_ext.finetune.evaluate import class_means, dice_per_class, predict
from riskmap_ext.finetune.network import Predictor, first_output
from riskmap_ext.finetune.report import Log, Metrics, number
from riskmap_ext.finetune.sampling import Batch, CropSampler
from riskmap_ext.nn import RiskWeightedLoss

_CHECK_EVERY = 25


@dataclass(frozen=True)
class TrainSetup:
    """What the loop needs. `save(path, progress)` writes a checkpoint of the network."""

    config: Config
    log: Log
    device: torch.device
    cases: Cases
    network: nn.Module
    predictor: Predictor
    patch: list[int]
    risk: Mapping[str, Tensor] | None
    save: Callable[[Path, dict[str, Any]], None]


@dataclass(frozen=True)
class Trained:
    """Rows of metrics.csv and the trained network's predictions (prepared grid) by case name."""

    history: list[dict[str, float]]
    predictions: dict[str, Tensor]


def train_network(setup: TrainSetup) -> Trained:
    """Trains in place; writes metrics.csv, last.pt and best.pt.

    best.pt has the highest mean Dice of all validations (the last one's where it is undefined).

    Raises: InputError when the loss is no longer finite.
    """
    config, train, network = setup.config, setup.config.train, setup.network
    sampler = CropSampler(
        setup.cases.train,
        setup.risk,
        setup.patch,
        train,
        seed=config.seed,
        device=setup.device,
    )
    step_of = _Stepper(setup)
    output = config.output
    metrics = Metrics(
        output / "metrics.csv",
        setup.cases.classes,
        output / "tb" if config.write.tensorboard else None,
    )
    best = -math.inf
    total, since = torch.zeros((), dtype=torch.float64, device=setup.device), 0
    started = time.perf_counter()
    network.train()
    try:
        with setup.log.progress("steps") as bar:
            task = bar.add_task("Training", total=train.steps, note="")
            for step in range(1, train.steps + 1):
                setup.log.stage = f"at step {step}"
                lr = step_of.lr
                total += step_of(sampler.next_batch())
                since += 1
                bar.update(task, advance=1)
                last = step == train.steps
                due = last or bool(train.validate_every and step % train.validate_every == 0)
                if (due or step % _CHECK_EVERY == 0) and not math.isfinite(total.item()):
                    raise InputError(
                        f"train: the loss is not finite any more by step {step}; lower train.lr "
                        f"({train.lr:g}) or set train.grad_clip"
                    )
                if not due:
                    continue
                dice, predictions = _validate(setup)
                seconds = time.perf_counter() - started
                row = metrics.add(step, total.item() / since, dice, lr, seconds)
                total, since = torch.zeros_like(total), 0
                setup.log(
                    f"step {step}/{train.steps}: loss {row['train_loss']:.4f}, mean Dice "
                    f"{number(row['mean_dice'])}, lr {lr:.2e}, {step / seconds:.1f} steps/s"
                )
                bar.update(task, note=f"Dice {number(row['mean_dice'])}")
                state = {"step": step, "mean_dice": row["mean_dice"]}
                setup.save(output / "last.pt", state)
                if row["mean_dice"] > best or (best == -math.inf and last):
                    best = max(best, row["mean_dice"])
                    setup.save(output / "best.pt", state)
    finally:
        metrics.close()
    setup.log.stage = "after the last step"
    return Trained(metrics.rows, predictions)


class _Stepper:
    """One optimiser step per call; returns the loss, detached."""

    def __init__(self, setup: TrainSetup) -> None:
        train = setup.config.train
        self._network = setup.network
        options = setup.config.loss.model_dump(exclude={"class_weights"})
        weight = class_weights(setup)
        self._loss = RiskWeightedLoss(weight=weight, ignore_index=IGNORE_INDEX, **options)
        self._optimizer = _optimizer(setup.network, train)
        self._schedule = _schedule(self._optimizer, train)
        self._clip = train.grad_clip
        kind = setup.device.type
        dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[train.amp]
        self._autocast = torch.autocast(kind, dtype=dtype, enabled=dtype is not None)
        self._scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)

    @property
    def lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def __call__(self, batch: Batch) -> Tensor:
        with self._autocast:
            logits = first_output(self._network(batch.image))
            loss = self._loss(logits, batch.label, batch.risk, batch.foreground)
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        if self._clip is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._network.parameters(), self._clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        return loss.detach()


def class_weights(setup: TrainSetup) -> Tensor | None:
    """sqrt(1 / f_k), scaled so that the mean weight over the training voxels is 1; [C] float32."""
    wanted = setup.config.loss.class_weights
    if wanted is None:
        return None
    if isinstance(wanted, list):
        return torch.tensor(wanted, dtype=torch.float32, device=setup.device)
    count = len(setup.cases.classes)
    frequencies = torch.zeros(count, dtype=torch.float64)
    for case in setup.cases.train:
        valid = case.label[case.label != IGNORE_INDEX]
        frequencies += torch.bincount(valid.long(), minlength=count)
    frequencies /= frequencies.sum().clamp(min=1)
    weights = torch.where(frequencies > 0, frequencies.clamp(min=1e-12).rsqrt(), 0.0)
    weights /= (weights * frequencies).sum().clamp(min=1e-12)
    setup.log("Class weights: " + ", ".join(f"{weight:.3g}" for weight in weights))
    return weights.to(setup.device, torch.float32)


def _validate(setup: TrainSetup) -> tuple[list[float], dict[str, Tensor]]:
    """Mean Dice per class over the validation cases, and the predictions, on the prepared grid."""
    count = len(setup.cases.classes)
    cases = setup.cases.validation
    predictions = {case.name: predict(setup.predictor, case) for case in cases}
    table = {c.name: dice_per_class(predictions[c.name], c.label, count) for c in cases}
    return class_means(table, count), predictions


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

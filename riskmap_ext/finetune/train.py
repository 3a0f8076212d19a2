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

from riskmap_ext.finetune.checkpoint import RESUME_FILE, RESUME_FORMAT, write_checkpoint
from riskmap_ext.finetune.config import IGNORE_INDEX, Config, TrainConfig
from riskmap_ext.finetune.data import Cases
from riskmap_ext.finetune.errors import InputError
from riskmap_ext.finetune.evaluate import class_means, dice_per_class, predict
from riskmap_ext.finetune.losses import LossCurve
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
    inputs: str  # digest of the source and the cases
    resumed: Mapping[str, Any] | None = None  # what `resume.pt` holds, to go on from it


@dataclass(frozen=True)
class Trained:
    """Rows of metrics.csv and the trained network's predictions (prepared grid) by case name."""

    history: list[dict[str, float]]
    predictions: dict[str, Tensor]


def train_network(setup: TrainSetup) -> Trained:
    """Trains in place; writes metrics.csv, losses.csv, last.pt, best.pt and, last, resume.pt.

    resume.pt has everything that a step depends on: a run that goes on from it ends in the same
    bits, on a CPU with the same number of threads. best.pt has the highest mean Dice of all
    validations (the last one's where it is undefined).

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
    resumed = setup.resumed or {"step": 0, "best": -math.inf, "seconds": 0.0, "metrics": []}
    metrics = Metrics(
        output / "metrics.csv",
        setup.cases.classes,
        output / "tb" if config.write.tensorboard else None,
        resumed["metrics"],
    )
    losses = LossCurve(
        output / "losses.csv", train.steps, setup.device, state=resumed.get("losses")
    )
    best = resumed["best"]
    total, since = torch.zeros((), dtype=torch.float64, device=setup.device), 0
    started = time.perf_counter() - resumed["seconds"]
    if setup.resumed is not None:
        _restore(setup, step_of, sampler)
    predictions: dict[str, Tensor] | None = None
    network.train()
    try:
        with setup.log.progress("steps") as bar:
            task = bar.add_task("Training", total=train.steps, completed=resumed["step"], note="")
            for step in range(resumed["step"] + 1, train.steps + 1):
                setup.log.stage = f"at step {step}"
                lr = step_of.lr
                loss = step_of(sampler.next_batch())
                total += loss
                losses.add(step, loss, lr)
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
                losses.write()
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
                _keep(setup, step_of, sampler, metrics, losses, step, best, seconds)
    finally:
        losses.close()
        metrics.close()
    setup.log.stage = "after the last step"
    if predictions is None:  # nothing was left to train
        predictions = _validate(setup)[1]
    return Trained(metrics.rows, predictions)


def _keep(
    setup: TrainSetup,
    step_of: _Stepper,
    sampler: CropSampler,
    metrics: Metrics,
    losses: LossCurve,
    step: int,
    best: float,
    seconds: float,
) -> None:
    cuda = setup.device.type == "cuda"
    content = {
        "format": RESUME_FORMAT,
        "inputs": setup.inputs,
        "step": step,
        "best": best,
        "seconds": seconds,
        "metrics": metrics.rows,
        "losses": losses.state_dict(),
        "network": setup.network.state_dict(),
        "stepper": step_of.state_dict(),
        "sampler": sampler.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(setup.device) if cuda else None,
    }
    write_checkpoint(setup.config.output / RESUME_FILE, content)


def _restore(setup: TrainSetup, step_of: _Stepper, sampler: CropSampler) -> None:
    state = setup.resumed
    assert state is not None
    setup.network.load_state_dict(state["network"])
    step_of.load_state_dict(state["stepper"])
    sampler.load_state_dict(state["sampler"])
    torch.set_rng_state(state["rng"])
    if setup.device.type == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], setup.device)


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

    def state_dict(self) -> dict[str, Any]:
        parts = {"optimizer": self._optimizer, "schedule": self._schedule, "scaler": self._scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])

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

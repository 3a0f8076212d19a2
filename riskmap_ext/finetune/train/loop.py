"""The training loop: risk-weighted loss, optimiser, validation, checkpoints."""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from riskmap_ext.finetune.base.errors import InputError, ToldElsewhere
from riskmap_ext.finetune.base.files import write_checkpoint, write_json
from riskmap_ext.finetune.base.log import number
from riskmap_ext.finetune.data.sampling import CropSampler
from riskmap_ext.finetune.folder.loss_curve import LossCurve
from riskmap_ext.finetune.folder.metrics import Metrics
from riskmap_ext.finetune.folder.workspace import NONFINITE_FILE, RESUME_FILE, RESUME_FORMAT
from riskmap_ext.finetune.metrics.dice import dice_per_structure, structure_means
from riskmap_ext.finetune.pictures.overlay import segmentation_picture
from riskmap_ext.finetune.source.checkpoint import save_checkpoint
from riskmap_ext.finetune.source.predictor import predict
from riskmap_ext.finetune.train.plan import Plan, preprocessing
from riskmap_ext.finetune.train.step import LossFunction, Stepper

_CHECK_EVERY = 25


@dataclass(frozen=True)
class Trained:
    """Rows of metrics.csv and the trained network's predictions (prepared grid) by case name.

    Of several processes, each has the predictions of its own share of the cases. step_seconds: mean
    of the steps of this process, validations left out; NaN where there were none.
    """

    history: list[dict[str, float]]
    predictions: dict[str, Tensor]
    step_seconds: float


def train_network(
    plan: Plan, risk: Mapping[str, Tensor] | None, loss: LossFunction | None = None
) -> Trained:
    """Trains in place; writes metrics.csv, losses.csv, last.pt, best.pt and, last, resume.pt.

    resume.pt has everything that a step depends on: a run that goes on from it ends in the same
    bits, on a CPU with the same number of threads. best.pt has the highest mean Dice of all
    validations (the last one's where it is undefined).

    risk: case name -> voxel weights. loss: in the place of the configuration's.

    Raises: InputError when the loss is no longer finite.
    """
    config, train, group = plan.config, plan.config.train, plan.processes
    network = plan.models.network
    sampler = CropSampler(
        plan.cases.train,
        risk,
        plan.models.patch,
        train,
        seed=config.seed,
        device=plan.device,
        store=plan.store,
        part=(group.rank, group.size),
    )
    step_of = Stepper(
        config,
        network,
        plan.cases,
        plan.models.patch,
        plan.device,
        group,
        plan.log,
        loss,
    )
    output = config.output
    resumed = plan.resumed or {"step": 0, "best": -math.inf, "seconds": 0.0, "metrics": []}
    metrics = Metrics(
        output / "metrics.csv",
        list(plan.cases.structures.scored),
        output / "tb" if config.write.tensorboard else None,
        resumed["metrics"],
        writes=group.is_main,
    )
    losses = LossCurve(
        output / "losses.csv", train.steps, plan.device, group, state=resumed.get("losses")
    )
    best = resumed["best"]
    total, since = torch.zeros((), dtype=torch.float64, device=plan.device), 0
    started = time.perf_counter() - resumed["seconds"]
    if plan.resumed is not None:
        _restore(plan, step_of, sampler)
    if not group.is_main:  # dropout of its own
        torch.manual_seed(config.seed + 1_000_003 * group.rank + resumed["step"])
    recent: deque[_Step] = deque(maxlen=_CHECK_EVERY)
    predictions: dict[str, Tensor] | None = None
    training = 0.0  # seconds
    network.train()
    try:
        with plan.log.progress("steps") as bar:
            task = bar.add_task("Training", total=train.steps, completed=resumed["step"], note="")
            resumed_at = time.perf_counter()
            for step in range(resumed["step"] + 1, train.steps + 1):
                plan.log.stage = f"at step {step}"
                lr = step_of.lr
                batches = [sampler.next_batch() for _ in range(train.accumulate)]
                value = step_of(batches)
                recent.append(_Step(step, value, [n for batch in batches for n in batch.cases]))
                total += value
                losses.add(step, value, lr)
                since += 1
                bar.update(task, advance=1)
                last = step == train.steps
                due = last or bool(train.validate_every and step % train.validate_every == 0)
                if not (due or step % _CHECK_EVERY == 0):
                    continue
                mean = group.mean(total).item() / since
                if not math.isfinite(mean):
                    _stop_at_nonfinite(plan, recent)
                if not due:
                    continue
                training += time.perf_counter() - resumed_at
                dice, predictions = _validate(plan)
                seconds = time.perf_counter() - started
                losses.write()
                row = metrics.add(step, mean, dice, lr, seconds)
                _show_case(plan, metrics, predictions, step)
                total, since = torch.zeros_like(total), 0
                plan.log(
                    f"step {step}/{train.steps}: loss {row['train_loss']:.4f}, mean Dice "
                    f"{number(row['mean_dice'])}, lr {lr:.2e}, {step / seconds:.1f} steps/s"
                )
                bar.update(task, note=f"Dice {number(row['mean_dice'])}")
                state = {"step": step, "mean_dice": row["mean_dice"]}
                better = row["mean_dice"] > best or (best == -math.inf and last)
                best = max(best, row["mean_dice"]) if better else best
                keep = functools.partial(
                    _keep, plan, step_of, sampler, metrics, losses, state, best, better, seconds
                )
                group.on_main(keep)
                resumed_at = time.perf_counter()
    finally:
        losses.close()
        metrics.close()
    plan.log.stage = "after the last step"
    if predictions is None:  # nothing was left to train
        predictions = _validate(plan)[1]
    steps = train.steps - resumed["step"]
    return Trained(metrics.rows, predictions, training / steps if steps else math.nan)


def _keep(
    plan: Plan,
    step_of: Stepper,
    sampler: CropSampler,
    metrics: Metrics,
    losses: LossCurve,
    state: dict[str, Any],
    best: float,
    better: bool,
    seconds: float,
) -> None:
    """last.pt, best.pt where it is better, and after them what --resume goes on from."""
    output, cuda = plan.config.output, plan.device.type == "cuda"
    _save(plan, output / "last.pt", state)
    if better:
        _save(plan, output / "best.pt", state)
    content = {
        "format": RESUME_FORMAT,
        "inputs": plan.inputs,
        "step": state["step"],
        "best": best,
        "seconds": seconds,
        "metrics": metrics.rows,
        "losses": losses.state_dict(),
        "network": plan.models.network.state_dict(),
        "stepper": step_of.state_dict(),
        "sampler": sampler.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(plan.device) if cuda else None,
    }
    write_checkpoint(output / RESUME_FILE, content)


def _save(plan: Plan, path: Path, progress: dict[str, Any]) -> None:
    models, cases = plan.models, plan.cases
    save_checkpoint(
        path,
        models.network,
        models.config,
        cases.structures,
        cases.channels,
        preprocessing(plan.config, models.patch, cases),
        progress,
    )


def _restore(plan: Plan, step_of: Stepper, sampler: CropSampler) -> None:
    state = plan.resumed
    assert state is not None
    plan.models.network.load_state_dict(state["network"])
    step_of.load_state_dict(state["stepper"])
    sampler.load_state_dict(state["sampler"])
    torch.set_rng_state(state["rng"])
    if plan.device.type == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], plan.device)


@dataclass(frozen=True)
class _Step:
    number: int
    loss: Tensor
    cases: list[str]


def _stop_at_nonfinite(plan: Plan, recent: Iterable[_Step]) -> NoReturn:
    """Names the first step whose loss is not finite, and the cases of its crops."""
    mine = next((s for s in recent if not math.isfinite(s.loss.item())), None)
    steps = plan.processes.gather(None if mine is None else (mine.number, mine.cases))
    known = [each for each in steps if each is not None]
    step = min((number for number, _ in known), default=0)
    cases = [name for number, names in known if number == step for name in names]
    if not plan.processes.is_main:
        raise ToldElsewhere("the loss is not finite any more")
    path = plan.config.output / NONFINITE_FILE
    write_json(path, {"step": step, "cases": cases})
    train = plan.config.train
    raise InputError(
        f"train: the loss is not finite any more from step {step} on, with crops of "
        f"{', '.join(dict.fromkeys(cases))} ({path}); lower train.lr ({train.lr:g}) or set "
        "train.grad_clip"
    )


def _validate(plan: Plan) -> tuple[list[float], dict[str, Tensor]]:
    """Mean Dice per structure over the validation cases, and the predictions of this share."""
    structures, group = plan.cases.structures, plan.processes
    cases = plan.cases.validation
    shared = group.share(cases)
    predictions = {case.name: predict(plan.models.predictor, case, structures) for case in shared}
    mine = {c.name: dice_per_structure(predictions[c.name], c.label, structures) for c in shared}
    table = group.merged(mine, [case.name for case in cases])
    return structure_means(table, len(structures.scored)), predictions


def _show_case(plan: Plan, metrics: Metrics, predictions: dict[str, Tensor], step: int) -> None:
    """The first validation case in TensorBoard."""
    if metrics.has_pictures and plan.cases.validation:
        case = plan.cases.validation[0]
        metrics.picture(case.name, segmentation_picture(case, predictions[case.name]), step)

"""The training loop: risk-weighted loss, optimiser, validation, checkpoints."""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from riskmap_ext.finetune.checkpoint import RESUME_FILE, RESUME_FORMAT, write_checkpoint
from riskmap_ext.finetune.config import Config
from riskmap_ext.finetune.data import Cases
from riskmap_ext.finetune.errors import InputError, ToldElsewhere
from riskmap_ext.finetune.evaluate import dice_per_structure, predict, structure_means
from riskmap_ext.finetune.files import write_json
from riskmap_ext.finetune.losses import LossCurve
from riskmap_ext.finetune.network import Predictor
from riskmap_ext.finetune.processes import Processes
from riskmap_ext.finetune.report import Log, Metrics, number, segmentation_picture
from riskmap_ext.finetune.sampling import CropSampler
from riskmap_ext.finetune.stepper import LossFunction, Stepper
from riskmap_ext.finetune.storage import TensorStore
from riskmap_ext.finetune.workspace import NONFINITE_FILE

_CHECK_EVERY = 25


@dataclass(frozen=True)
class TrainSetup:
    """What the loop needs. `save(path, progress)` writes a checkpoint of the network."""

    config: Config
    log: Log
    device: torch.device
    processes: Processes
    cases: Cases
    store: TensorStore
    network: nn.Module
    predictor: Predictor
    patch: list[int]
    risk: Mapping[str, Tensor] | None
    save: Callable[[Path, dict[str, Any]], None]
    inputs: str  # digest of the source and the cases
    resumed: Mapping[str, Any] | None = None  # what `resume.pt` holds, to go on from it
    loss: LossFunction | None = None  # in the place of the configuration's


@dataclass(frozen=True)
class Trained:
    """Rows of metrics.csv and the trained network's predictions (prepared grid) by case name.

    Of several processes, each has the predictions of its own share of the cases. step_seconds: mean
    of the steps of this process, validations left out; NaN where there were none.
    """

    history: list[dict[str, float]]
    predictions: dict[str, Tensor]
    step_seconds: float


def train_network(setup: TrainSetup) -> Trained:
    """Trains in place; writes metrics.csv, losses.csv, last.pt, best.pt and, last, resume.pt.

    resume.pt has everything that a step depends on: a run that goes on from it ends in the same
    bits, on a CPU with the same number of threads. best.pt has the highest mean Dice of all
    validations (the last one's where it is undefined).

    Raises: InputError when the loss is no longer finite.
    """
    config, train, network, group = (
        setup.config,
        setup.config.train,
        setup.network,
        setup.processes,
    )
    sampler = CropSampler(
        setup.cases.train,
        setup.risk,
        setup.patch,
        train,
        seed=config.seed,
        device=setup.device,
        store=setup.store,
        part=(group.rank, group.size),
    )
    step_of = Stepper(
        config,
        network,
        setup.cases,
        setup.patch,
        setup.device,
        group,
        setup.log,
        setup.loss,
    )
    output = config.output
    resumed = setup.resumed or {"step": 0, "best": -math.inf, "seconds": 0.0, "metrics": []}
    metrics = Metrics(
        output / "metrics.csv",
        list(setup.cases.structures.scored),
        output / "tb" if config.write.tensorboard else None,
        resumed["metrics"],
        writes=group.is_main,
    )
    losses = LossCurve(
        output / "losses.csv", train.steps, setup.device, group, state=resumed.get("losses")
    )
    best = resumed["best"]
    total, since = torch.zeros((), dtype=torch.float64, device=setup.device), 0
    started = time.perf_counter() - resumed["seconds"]
    if setup.resumed is not None:
        _restore(setup, step_of, sampler)
    if not group.is_main:  # dropout of its own
        torch.manual_seed(config.seed + 1_000_003 * group.rank + resumed["step"])
    recent: deque[_Step] = deque(maxlen=_CHECK_EVERY)
    predictions: dict[str, Tensor] | None = None
    training = 0.0  # seconds
    network.train()
    try:
        with setup.log.progress("steps") as bar:
            task = bar.add_task("Training", total=train.steps, completed=resumed["step"], note="")
            resumed_at = time.perf_counter()
            for step in range(resumed["step"] + 1, train.steps + 1):
                setup.log.stage = f"at step {step}"
                lr = step_of.lr
                batches = [sampler.next_batch() for _ in range(train.accumulate)]
                loss = step_of(batches)
                recent.append(_Step(step, loss, [n for batch in batches for n in batch.cases]))
                total += loss
                losses.add(step, loss, lr)
                since += 1
                bar.update(task, advance=1)
                last = step == train.steps
                due = last or bool(train.validate_every and step % train.validate_every == 0)
                if not (due or step % _CHECK_EVERY == 0):
                    continue
                mean = group.mean(total).item() / since
                if not math.isfinite(mean):
                    _stop_at_nonfinite(setup, recent)
                if not due:
                    continue
                training += time.perf_counter() - resumed_at
                dice, predictions = _validate(setup)
                seconds = time.perf_counter() - started
                losses.write()
                row = metrics.add(step, mean, dice, lr, seconds)
                _show_case(setup, metrics, predictions, step)
                total, since = torch.zeros_like(total), 0
                setup.log(
                    f"step {step}/{train.steps}: loss {row['train_loss']:.4f}, mean Dice "
                    f"{number(row['mean_dice'])}, lr {lr:.2e}, {step / seconds:.1f} steps/s"
                )
                bar.update(task, note=f"Dice {number(row['mean_dice'])}")
                state = {"step": step, "mean_dice": row["mean_dice"]}
                better = row["mean_dice"] > best or (best == -math.inf and last)
                best = max(best, row["mean_dice"]) if better else best
                keep = functools.partial(
                    _keep, setup, step_of, sampler, metrics, losses, state, best, better, seconds
                )
                group.on_main(keep)
                resumed_at = time.perf_counter()
    finally:
        losses.close()
        metrics.close()
    setup.log.stage = "after the last step"
    if predictions is None:  # nothing was left to train
        predictions = _validate(setup)[1]
    steps = train.steps - resumed["step"]
    return Trained(metrics.rows, predictions, training / steps if steps else math.nan)


def _keep(
    setup: TrainSetup,
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
    output, cuda = setup.config.output, setup.device.type == "cuda"
    setup.save(output / "last.pt", state)
    if better:
        setup.save(output / "best.pt", state)
    content = {
        "format": RESUME_FORMAT,
        "inputs": setup.inputs,
        "step": state["step"],
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
    write_checkpoint(output / RESUME_FILE, content)


def _restore(setup: TrainSetup, step_of: Stepper, sampler: CropSampler) -> None:
    state = setup.resumed
    assert state is not None
    setup.network.load_state_dict(state["network"])
    step_of.load_state_dict(state["stepper"])
    sampler.load_state_dict(state["sampler"])
    torch.set_rng_state(state["rng"])
    if setup.device.type == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], setup.device)


@dataclass(frozen=True)
class _Step:
    number: int
    loss: Tensor
    cases: list[str]


def _stop_at_nonfinite(setup: TrainSetup, recent: Iterable[_Step]) -> NoReturn:
    """Names the first step whose loss is not finite, and the cases of its crops."""
    mine = next((s for s in recent if not math.isfinite(s.loss.item())), None)
    steps = setup.processes.gather(None if mine is None else (mine.number, mine.cases))
    known = [each for each in steps if each is not None]
    step = min((number for number, _ in known), default=0)
    cases = [name for number, names in known if number == step for name in names]
    if not setup.processes.is_main:
        raise ToldElsewhere("the loss is not finite any more")
    path = setup.config.output / NONFINITE_FILE
    write_json(path, {"step": step, "cases": cases})
    train = setup.config.train
    raise InputError(
        f"train: the loss is not finite any more from step {step} on, with crops of "
        f"{', '.join(dict.fromkeys(cases))} ({path}); lower train.lr ({train.lr:g}) or set "
        "train.grad_clip"
    )


def _validate(setup: TrainSetup) -> tuple[list[float], dict[str, Tensor]]:
    """Mean Dice per structure over the validation cases, and the predictions of this share."""
    structures, group = setup.cases.structures, setup.processes
    cases = setup.cases.validation
    shared = group.share(cases)
    predictions = {case.name: predict(setup.predictor, case, structures) for case in shared}
    mine = {c.name: dice_per_structure(predictions[c.name], c.label, structures) for c in shared}
    table = group.merged(mine, [case.name for case in cases])
    return structure_means(table, len(structures.scored)), predictions


def _show_case(
    setup: TrainSetup, metrics: Metrics, predictions: dict[str, Tensor], step: int
) -> None:
    """The first validation case in TensorBoard."""
    if metrics.has_pictures and setup.cases.validation:
        case = setup.cases.validation[0]
        metrics.picture(case.name, segmentation_picture(case, predictions[case.name]), step)

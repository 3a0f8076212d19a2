"""The training loop: steps, validations, checkpoints."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from riskmap_ext.finetune.base.errors import InputError, ToldElsewhere
from riskmap_ext.finetune.base.files import write_checkpoint, write_json
from riskmap_ext.finetune.base.log import number
from riskmap_ext.finetune.data.sampling import CropSampler
from riskmap_ext.finetune.folder.loss_curve import LossCurve
from riskmap_ext.finetune.folder.metrics import Metrics
from riskmap_ext.finetune.folder.workspace import (
    NONFINITE_FILE,
    RESUME_FILE,
    RESUME_FORMAT,
    damaged_state,
)
from riskmap_ext.finetune.metrics.dice import dice_per_structure, structure_means
from riskmap_ext.finetune.pictures.slices import segmentation_picture
from riskmap_ext.finetune.source.checkpoint import save_checkpoint
from riskmap_ext.finetune.source.model import preparation
from riskmap_ext.finetune.source.predictor import predict
from riskmap_ext.finetune.train.plan import LossFunction, Plan
from riskmap_ext.finetune.train.step import Stepper

_CHECK_EVERY = 25
# (step, numbers by name).
Callback = Callable[[int, dict[str, float]], None]


class Trainer:
    """Trains the network of a plan in place.

    Writes metrics.csv, losses.csv, resume.pt, last.pt and best.pt. resume.pt has everything that a
    step depends on: on a CPU with the same number of threads, a resumed run ends in the same
    bits. best.pt has the highest mean Dice of all validations (the last one's if it is undefined).

    predictions: of this process's share of the validation cases, on the prepared grid, by name.
    step_seconds: mean of its steps, without validations; NaN if there were none.
    """

    def __init__(
        self,
        plan: Plan,
        risk: Mapping[str, Tensor] | None,
        loss: LossFunction | None,
        callback: Callback | None,
    ) -> None:
        """risk: case name -> voxel weights. loss, callback: as for finetune()."""
        config, group, cases = plan.config, plan.processes, plan.cases
        self._plan = plan
        self._callback = callback if group.is_main else None
        self._sampler = CropSampler(
            cases.train,
            risk,
            plan.models.patch,
            config.train,
            seed=config.seed,
            device=plan.device,
            store=plan.cases.store,
            part=(group.rank, group.size),
            geometry=config.data.geometry,
        )
        self._optimize = Stepper(plan, loss)
        before = plan.resumed or {"step": 0, "best": -math.inf, "seconds": 0.0, "metrics": []}
        self._first = before["step"] + 1
        self._best = before["best"]
        self._started = time.perf_counter() - before["seconds"]
        try:
            self._metrics = Metrics(
                config.output / "metrics.csv",
                list(cases.structures.scored),
                config.output / "tb" if config.write.tensorboard else None,
                before["metrics"],
                writes=group.is_main,
            )
            self._losses = LossCurve(
                config.output / "losses.csv",
                config.train.steps,
                plan.device,
                group,
                state=before.get("losses"),
            )
            if plan.resumed is not None:
                self._restore(plan.resumed)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if plan.resumed is None:
                raise
            raise damaged_state(config.output / RESUME_FILE, error) from None
        if not group.is_main:  # with its own dropout
            torch.manual_seed(config.seed + 1_000_003 * group.rank + before["step"])
        # Since the last validation.
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=plan.device)
        self._loss_count = 0
        self._lr = math.nan
        # Step, loss, and the cases of its crops.
        self._recent: deque[tuple[int, Tensor, list[str]]] = deque(maxlen=_CHECK_EVERY)
        self.predictions: dict[str, Tensor] = {}
        self.step_seconds = math.nan

    @property
    def history(self) -> list[dict[str, float]]:
        """The rows of metrics.csv."""
        return self._metrics.rows

    def run(self) -> None:
        """Raises: InputError when the loss is no longer finite."""
        plan, train = self._plan, self._plan.config.train
        plan.models.network.train()
        note, seconds, steps = "", 0.0, range(self._first, train.steps + 1)
        try:
            with plan.log.counting("Training", train.steps, self._first - 1) as advance:
                resumed_at = time.perf_counter()
                for step in steps:
                    plan.log.stage = f"at step {step}"
                    self._take(step)
                    if step == train.steps or (
                        train.validate_every and step % train.validate_every == 0
                    ):
                        loss = self._mean_loss()
                        seconds += time.perf_counter() - resumed_at
                        row = self._validate(step, loss)
                        self._call_back(step, row)
                        note = f"Dice {number(row['mean_dice'])}"
                        resumed_at = time.perf_counter()
                    elif step % _CHECK_EVERY == 0:
                        self._call_back(step, {"train_loss": self._mean_loss(), "lr": self._lr})
                    advance(note)
        finally:
            self._losses.close()
            self._metrics.close()
        plan.log.stage = "after the last step"
        if steps:
            self.step_seconds = seconds / len(steps)
        else:
            self.predictions = self._segment()

    def _take(self, step: int) -> None:
        """One optimiser step; nothing in it waits for the device."""
        self._lr = self._optimize.lr
        count = self._plan.config.train.accumulate
        batches = [self._sampler.next_batch() for _ in range(count)]
        loss = self._optimize(batches)
        self._recent.append((step, loss, [name for batch in batches for name in batch.cases]))
        self._loss_sum += loss
        self._loss_count += 1
        self._losses.add(step, loss, self._lr)

    def _mean_loss(self) -> float:
        """Since the last validation, over all processes. Raises: InputError unless it is finite."""
        mean = self._plan.processes.mean(self._loss_sum).item() / self._loss_count
        if not math.isfinite(mean):
            self._stop_at_nonfinite()
        return mean

    def _validate(self, step: int, loss: float) -> dict[str, float]:
        """Segments, scores and saves; returns the row of metrics.csv."""
        plan = self._plan
        cases, structures = plan.cases.validation, plan.cases.structures
        self.predictions = self._segment()
        table = plan.processes.spread(
            {case.name: case for case in cases},
            lambda case: dice_per_structure(self.predictions[case.name], case.label, structures),
        )
        dice = structure_means(table, len(structures.scored))
        seconds = time.perf_counter() - self._started
        self._losses.write()
        row = self._metrics.add(step, loss, dice, self._lr, seconds)
        if self._metrics.has_pictures and cases:
            picture = segmentation_picture(cases[0], self.predictions[cases[0].name])
            self._metrics.picture(cases[0].name, picture, step)
        self._loss_sum, self._loss_count = torch.zeros_like(self._loss_sum), 0
        plan.log(
            f"step {step}/{plan.config.train.steps}: loss {loss:.4f}, mean Dice "
            f"{number(row['mean_dice'])}, lr {row['lr']:.2e}, {step / seconds:.1f} steps/s"
        )
        plan.processes.on_main(lambda: self._keep(row))
        return row

    def _call_back(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._callback is not None:
            known = {name: value for name, value in numbers.items() if not math.isnan(value)}
            self._callback(step, known)

    def _segment(self) -> dict[str, Tensor]:
        """Predictions of this process's share of the validation cases."""
        plan = self._plan
        shared = plan.processes.share(plan.cases.validation)
        structures = plan.cases.structures
        return {case.name: predict([plan.models.predictor], case, structures) for case in shared}

    def _keep(self, row: Mapping[str, float]) -> None:
        """Saves the state for --resume, and then last.pt, and best.pt if it is better.

        A resumed run writes the two again, so it is of no matter where this is cut off.
        """
        plan = self._plan
        step, dice = int(row["step"]), row["mean_dice"]
        last = step == plan.config.train.steps
        better = dice > self._best or (self._best == -math.inf and last)
        if better:
            self._best = max(self._best, dice)
        cuda = plan.device.type == "cuda"
        content = {
            "format": RESUME_FORMAT,
            "inputs": plan.inputs,
            "step": step,
            "best": self._best,
            "better": better,
            "seconds": row["seconds"],
            "metrics": self._metrics.rows,
            "losses": self._losses.state_dict(),
            "network": plan.models.network.state_dict(),
            "stepper": self._optimize.state_dict(),
            "sampler": self._sampler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(plan.device) if cuda else None,
        }
        write_checkpoint(plan.config.output / RESUME_FILE, content)
        self._save(row, better)

    def _save(self, row: Mapping[str, float], better: bool) -> None:
        plan = self._plan
        for name in ("last.pt", "best.pt") if better else ("last.pt",):
            save_checkpoint(
                plan.config.output / name,
                plan.models.network,
                plan.models.config,
                plan.cases.structures,
                plan.cases.channels,
                preparation(plan.config.data, plan.models.patch, plan.cases.listing.image_suffix),
                {"step": int(row["step"]), "mean_dice": row["mean_dice"]},
            )

    def _restore(self, state: Mapping[str, Any]) -> None:
        device = self._plan.device
        self._plan.models.network.load_state_dict(state["network"])
        self._optimize.load_state_dict(state["stepper"])
        self._sampler.load_state_dict(state["sampler"])
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        row, better = state["metrics"][-1], state.get("better", False)
        self._plan.processes.on_main(lambda: self._save(row, better))

    def _stop_at_nonfinite(self) -> NoReturn:
        """Names the first step whose loss is not finite, and the cases of its crops."""
        plan, train = self._plan, self._plan.config.train
        mine = ((n, cases) for n, loss, cases in self._recent if not math.isfinite(loss.item()))
        known = [each for each in plan.processes.gather(next(mine, None)) if each is not None]
        step = min((number for number, _ in known), default=0)
        cases = [name for number, names in known if number == step for name in names]
        if not plan.processes.is_main:
            raise ToldElsewhere("the loss is not finite any more")
        path = plan.config.output / NONFINITE_FILE
        write_json(path, {"step": step, "cases": cases})
        raise InputError(
            f"train: the loss is not finite any more from step {step} on, with crops of "
            f"{', '.join(dict.fromkeys(cases))} ({path}); lower train.lr ({train.lr:g}) or "
            f"{'set' if train.grad_clip is None else 'lower'} train.grad_clip"
        )

"""One piece of work: a source network, or a run from it, scored and stored."""

from __future__ import annotations

import json
import math
import shutil
import time
import uuid
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from scipy import ndimage

import riskmap_ext
from benchmarks import machine
from benchmarks.transfer.arms import ARMS, BASE, RANDOM, Arm
from benchmarks.transfer.noise import mislabelled
from benchmarks.transfer.scenario import Noise, Scenario, data_root, load_scenarios, split
from benchmarks.transfer.sources import Sources
from benchmarks.transfer.store import Store, claimed, keys
from riskmap_ext._files import digest
from riskmap_ext.demo.simulate import write_cohort
from riskmap_ext.finetune.base.errors import InputError
from riskmap_ext.finetune.config.load import parse_config
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.data.prepare import Case, Cases, prepare_cases
from riskmap_ext.finetune.folder.records import LEEP_FILE
from riskmap_ext.finetune.folder.workspace import NONFINITE_FILE
from riskmap_ext.finetune.metrics.surfaces import FOUND, MISSED, Score, score_masks
from riskmap_ext.finetune.train.finetune import FinetuneResult, finetune
from riskmap_ext.finetune.train.plan import LossFunction, WeightFunction

TUNING, FINAL = "tuning", "final"
BUSY = "another process is at it"


@dataclass(frozen=True)
class Place:
    """Where scenarios are read and results go. work: what can be made again."""

    scenarios: Path
    work: Path
    out: Path
    part: str = ""
    device: str = "cpu"

    def store(self) -> Store:
        return Store(self.out, self.part)


@dataclass(frozen=True)
class Task:
    """A run; arm None is the source network of the seed."""

    scenario: str
    seed: int
    arm: str | None = None
    length: str = ""
    lr: float = 0.0
    kind: str = FINAL

    def __str__(self) -> str:
        if self.arm is None:
            return f"{self.scenario} seed {self.seed}: source network"
        what = f"{self.scenario} {self.length} {self.arm} lr {self.lr:g} seed {self.seed}"
        return f"{what} ({self.kind})"


@dataclass(frozen=True)
class Done:
    """note: for the progress. seconds: None where another process has the task."""

    task: Task
    note: str
    seconds: float | None


def setup_of(scenario: Scenario, length: str, arm: Arm) -> str:
    """Of everything that the numbers of a run depend on besides its rate and seed."""
    return digest(
        scenario.definition, scenario.lengths[length], arm.definition, riskmap_ext.__version__
    )[:12]


def do(task: Task, place: Place, wait: bool = False) -> Done:
    """Does the task unless it is stored, or another process is at it; `wait` waits for that one."""
    started = time.perf_counter()
    scenario = _scenarios(place.scenarios)[task.scenario]
    if task.arm is None:
        note = "ready" if source_of(scenario, task.seed, place) else ""
        return Done(task, note, time.perf_counter() - started)
    arm = ARMS[task.arm]
    setup = setup_of(scenario, task.length, arm)
    name = digest(setup, task.scenario, task.length, task.arm, repr(task.lr), task.seed)[:16]
    with claimed(place.work / "claims" / name, wait=wait) as mine:
        if not mine:
            return Done(task, BUSY, None)
        if key_of(task, setup) in keys(place.store().read().runs):
            return Done(task, "was done by another process", None)
        row = _run(scenario, arm, setup, task, place, place.work / "runs" / name)
    dice = 100 * float(row["mean_dice"])
    return Done(task, f"Dice {dice:.1f}", time.perf_counter() - started)


_OTHER_SEEDS = 100_000


def key_of(task: Task, setup: str) -> tuple[str, ...]:
    return (
        *(task.scenario, task.length, str(task.arm)),
        *(repr(task.lr), str(task.seed), task.kind, setup),
    )


@lru_cache(maxsize=1)
def _scenarios(folder: Path) -> dict[str, Scenario]:
    return load_scenarios(folder)


def source_of(scenario: Scenario, seed: int, place: Place, other: int = 0) -> Path:
    """The source network's checkpoint, trained once for all scenarios that share it.

    other: 1, 2, ... for one of the same cases, with other first weights and crops.
    """
    source = scenario.source
    config = {
        "seed": seed + _OTHER_SEEDS * other,
        "device": place.device,
        "data": _data(scenario, "source", seed, place),
        "network": scenario.network,
        "loss": BASE["loss"],
        "train": {
            **scenario.train,
            "steps": source.steps,
            "lr": source.lr,
            "validate_every": 0,
            "head_init": RANDOM,
        },
        **_COMMON,
    }
    folder = place.work / "sources" / digest(config, riskmap_ext.__version__)[:16]
    config |= {"output": folder / "run", "cache": folder / "cache"}
    ready = folder / "ready"
    with claimed(folder / "claim", wait=True):
        if not ready.is_file():
            finetune(parse_config(_plain(config)), progress=False)
            ready.touch()
    return folder / "run" / "last.pt"


_COMMON: dict[str, Any] = {
    # Replaced: what a killed process left is of no use.
    "overwrite": True,
    "threads": 1,
    "write": {
        "maps": False,
        "predictions": False,
        "overlays": False,
        "tensorboard": False,
        "report": False,
    },
}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config, default=str))


def _data(scenario: Scenario, side: str, seed: int, place: Place) -> dict[str, Any]:
    """The driver's `data` section of the source or of the target."""
    parts = split(scenario, seed)
    given = scenario.source.data if side == "source" else scenario.target.data
    train, test = (parts.source, []) if side == "source" else (parts.train, parts.test)
    if scenario.simulated is None:
        root = data_root() / str(scenario.folder)
        # No case is validated where the list is empty.
        return {"root": str(root), "train": train, "validation": test or 0, **given}
    options = {**scenario.simulated, **given}
    numbers = [[int(name.removeprefix("case_")) for name in group] for group in (train, test)]
    folder = place.work / "cohorts" / digest(options, numbers, riskmap_ext.__version__)[:16]
    with claimed(folder / "claim", wait=True):
        if not (folder / "dataset.json").is_file():
            if "extent" in options:
                options["extent"] = tuple(options["extent"])
            write_cohort(folder, numbers[0], validation_seeds=numbers[1], **options)
    return {"root": str(folder)}


def run_config(
    scenario: Scenario, arm: Arm, task: Task, place: Place, output: Path
) -> tuple[Config, Path]:
    """The driver's configuration of a run, and its source's checkpoint."""
    checkpoint = source_of(scenario, task.seed, place)
    steps = scenario.lengths[task.length]
    curve = scenario.curve if task.kind == FINAL else 1
    config = {
        **_COMMON,
        "output": output,
        "cache": checkpoint.parents[1] / "cache",
        # The same for every arm: it fixes the new head, the crops and their order.
        "seed": task.seed,
        "device": place.device,
        "data": _data(scenario, "target", task.seed, place),
        "network": scenario.network,
        "source": {"checkpoint": checkpoint, "initialize": arm.from_source},
        "risk": {"use": arm.risk is not None, **BASE["risk"], **(arm.risk or {})},
        "loss": {**BASE["loss"], **arm.loss},
        "train": {
            **scenario.train,
            "steps": steps,
            "lr": task.lr,
            "head_init": arm.head,
            # Nothing is chosen by the test cases; the curve is only looked at.
            "validate_every": 0 if curve == 1 else math.ceil(steps / curve),
        },
    }
    config["write"] = {**_COMMON["write"], "predictions": True}
    return parse_config(_plain(config), origin=str(task)), checkpoint


@lru_cache(maxsize=2)
def _cases(data: str, noise: Noise | None, seed: int) -> Cases:
    """Read once; a process mostly stays with one seed."""
    cases = prepare_cases(parse_config(json.loads(data)))
    return cases if noise is None else mislabelled(cases, noise, seed)


def _run(
    scenario: Scenario, arm: Arm, setup: str, task: Task, place: Place, output: Path
) -> dict[str, Any]:
    """Trains, scores and stores; `output` is removed afterwards."""
    run = uuid.uuid4().hex[:12]
    config, checkpoint = run_config(scenario, arm, task, place, output)
    shared = {"output": "none", "network": scenario.network, "data": config.data}
    data = json.dumps({**shared, "data": config.data.model_dump(mode="json")})
    cases = _cases(data, scenario.noise, task.seed)
    # Trained before the run, whose own random numbers they would disturb.
    others = [source_of(scenario, task.seed, place, other) for other in range(1, arm.sources)]
    loss, weights = _hooks(arm, cases, config, [checkpoint, *others])
    hooks: dict[str, Any] = {"loss": loss, "weights": weights, "prepare": arm.prepare}
    result: FinetuneResult | None = None
    try:
        result = finetune(config, cases=cases, progress=False, **hooks)
    except InputError:
        # A rate that is too high for the arm: the run counts, with nothing found.
        if not (output / NONFINITE_FILE).is_file():
            raise
    found = [_scores(case, cases, output, result, task.kind) for case in cases.validation]
    scores = [score for rows in found for score in rows]
    leep = json.loads((output / LEEP_FILE).read_text(encoding="utf-8"))
    row = {
        "run": run,
        "kind": task.kind,
        "scenario": task.scenario,
        "length": task.length,
        "steps": config.train.steps,
        "arm": task.arm,
        "lr": repr(task.lr),
        "seed": task.seed,
        "setup": setup,
        "pair": _pair(scenario, config, cases, checkpoint),
        "train_cases": len(cases.train),
        "test_cases": len(cases.validation),
        "scores": len(scores),
        "mean_dice": f"{_mean(scores):.6f}",
        "leep": f"{leep['score']:.6f}",
        "entropy": f"{leep['label_entropy']:.6f}",
        "step_ms": f"{1000 * result.step_seconds:.3f}" if result else "",
        "seconds": f"{result.seconds:.2f}" if result else "",
        "device": place.device,
        **_facts(),
    }
    history = [] if result is None else result.history
    curve = [
        {
            "run": run,
            "step": int(each["step"]),
            "train_loss": f"{each['train_loss']:.6g}",
            "mean_dice": f"{each['mean_dice']:.6f}",
        }
        for each in history
    ]
    place.store().append(row, [{"run": run, **score} for score in scores], curve)
    shutil.rmtree(output, ignore_errors=True)
    return row


def _hooks(
    arm: Arm, cases: Cases, config: Config, checkpoints: list[Path]
) -> tuple[LossFunction | None, WeightFunction | None]:
    """What stands in the place of the loss section and of the risk maps."""
    count = len(cases.classes)
    loss = arm.own_loss
    if isinstance(loss, type):
        loss = loss(cases.train, count, config.train.steps)
    if arm.weights is None:
        return loss, None
    sources = Sources(config, checkpoints, count)
    return loss, lambda maps, train: arm.weights(maps, train, sources)


def _pair(scenario: Scenario, config: Config, cases: Cases, checkpoint: Path) -> str:
    """Equal where two arms differ in nothing but what makes the arm and its rate."""
    train = config.train.model_dump(mode="json", exclude={"lr", "validate_every", "head_init"})
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return digest(
        config.seed,
        train,
        scenario.network,
        [case.digest for case in (*cases.train, *cases.validation)],
        digest(*_tensors(weights)),
    )[:12]


def _tensors(content: Any) -> list[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return [content]
    values = content.values() if isinstance(content, dict) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _scores(
    case: Case, cases: Cases, output: Path, result: FinetuneResult | None, kind: str
) -> list[dict[str, Any]]:
    """A row for each class that the case's label has; of a tuning its Dice alone."""
    label = case.full_label.numpy()
    if result is None:
        predicted = np.zeros_like(label)
    else:
        file = nibabel.load(output / "predictions" / f"{case.name}.nii.gz")
        predicted = case.grid.from_file(np.asarray(file.dataobj))
    rows = []
    for index, name in enumerate(cases.classes[1:], start=1):
        mask, reference = predicted == index, label == index
        if kind == TUNING:
            both, total = int((mask & reference).sum()), int(mask.sum()) + int(reference.sum())
            if reference.any():
                rows.append(
                    {"subject": case.name, "class": name, "dice": f"{2 * both / total:.6f}"}
                )
            continue
        score = _score(name, mask, reference, case)
        if score.outcome not in (FOUND, MISSED):
            continue
        kept = without_islands(mask)
        clean = _score(name, kept, reference, case) if (kept != mask).any() else score
        both = int((mask & reference).sum())
        rows.append(
            {
                "subject": case.name,
                "class": name,
                "dice": f"{score.dice:.6f}",
                "hd95": _distance(score),
                "precision": f"{both / mask.sum():.6f}" if mask.any() else "",
                "recall": f"{both / reference.sum():.6f}",
                "clean_dice": f"{clean.dice:.6f}",
                "clean_hd95": _distance(clean),
            }
        )
    return rows


def _score(name: str, mask: np.ndarray, reference: np.ndarray, case: Case) -> Score:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return score_masks(case.name, name, mask, reference, case.grid.spacing, 1.0)


def _distance(score: Score) -> str:
    """Empty for a structure that was missed."""
    return "" if score.outcome == MISSED else f"{score.hd95:.3f}"


ISLAND = 0.2


def without_islands(mask: np.ndarray) -> np.ndarray:
    """Without components below ISLAND of the largest; voxels that touch at a corner are of one."""
    components, count = ndimage.label(mask, np.ones([3] * mask.ndim))
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    sizes[0] = 0
    kept: np.ndarray = (sizes >= max(1, ISLAND * sizes.max()))[components]
    return kept


def _mean(scores: list[dict[str, Any]]) -> float:
    """Over subjects of the mean over their classes."""
    subjects: dict[str, list[float]] = {}
    for score in scores:
        subjects.setdefault(score["subject"], []).append(float(score["dice"]))
    return float(np.mean([np.mean(values) for values in subjects.values()]))


@lru_cache(maxsize=1)
def _facts() -> dict[str, str]:
    facts = machine.facts()
    return {key: facts[key] for key in ("date", "cpu", "python", "torch", "monai", "riskmap_ext")}

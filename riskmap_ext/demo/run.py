"""The demo: few-shot fine-tuning on simulated brains, with different heads and loss weights.

It runs offline on the CPU. Per seed, a source network learns tissues on simulated T1
brains; networks are then fine-tuned from it to find deep structures with a few labelled subjects.
The arms of a seed share subjects, source, crops and their order, and the initial weights except for
the bias of the new output layer. They differ only in that bias and in the loss.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from riskmap_ext.demo.page import BASELINE, terminal_table, write_page
from riskmap_ext.demo.simulate import STRUCTURES, write_cohort
from riskmap_ext.demo.workers import start_worker
from riskmap_ext.finetune.base.errors import ConfigError
from riskmap_ext.finetune.base.files import write_csv
from riskmap_ext.finetune.config.load import parse_config
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.data.prepare import Cases, prepare_cases
from riskmap_ext.finetune.pictures.figures import comparison
from riskmap_ext.finetune.pictures.slices import Volumes
from riskmap_ext.finetune.train.finetune import finetune, make_maps


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    In the driver's configuration head is train.head_init, risk is risk.use, and loss a section.
    """

    key: str
    name: str
    head: str
    risk: bool
    loss: dict[str, Any]


_CE_DICE = {"ce_weight": 1.0, "dice_weight": 1.0}
ARMS = (
    Arm("random_ce_dice", "CE + Dice, random head", "random", False, _CE_DICE),
    Arm(BASELINE, "CE + Dice", "prior", False, _CE_DICE),
    Arm("risk_dice", "risk + Dice", "prior", True, _CE_DICE),
    Arm(
        "class_dice",
        "class weights + Dice",
        "prior",
        False,
        {**_CE_DICE, "class_weights": "sqrt_inverse_frequency"},
    ),
)


_FILES = ("index.html", "comparison.png", "results.csv")


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo. With the defaults it takes less than five minutes on two CPU cores."""

    source_subjects: int = 16
    source_test_subjects: int = 2
    source_steps: int = 400
    labelled_subjects: int = 4
    test_subjects: int = 8
    steps: int = 300
    resolution: float = 2.0
    extent: tuple[float, float] = (-24.0, 30.0)
    channels: tuple[int, ...] = (24, 48, 96)
    patch_size: int = 64
    batch_size: int = 6
    lr: float = 8e-3
    foreground_crops: float = 1 / 3


@dataclass(frozen=True)
class SourceResult:
    """A seed's source network: Dice per tissue on unseen subjects, and its LEEP on the target.

    label_entropy: H(Y) of the target labels in nats; a source that tells nothing scores -H(Y).
    """

    seed: int
    dice: dict[str, float]
    leep: float
    label_entropy: float
    remark: str | None


@dataclass(frozen=True)
class ArmResult:
    """Dice (0 to 1) of one arm and seed: per structure over all test subjects, and per subject."""

    seed: int
    arm: str
    dice: dict[str, float]
    subjects: dict[str, float]
    seconds: float

    @property
    def mean_dice(self) -> float:
        return float(np.mean(list(self.dice.values())))


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured and where it wrote it."""

    output: Path
    page: Path
    picture: Path
    csv: Path
    sources: list[SourceResult]
    arms: list[ArmResult]
    seconds: float = field(default=math.nan)


def run(
    output: Path,
    *,
    seeds: int = 3,
    steps: int | None = None,
    workers: int = 2,
    settings: Settings | None = None,
) -> DemoResult:
    """Runs all arms over `seeds` seeds and writes index.html, comparison.png and results.csv.

    Args:
        output: folder, created if missing; an earlier demo in it is replaced.
        seeds: number of repetitions, each with its own subjects, source network and crops.
        steps: fine-tuning steps; None takes those of the settings (300).
        workers: processes, each with one torch thread.
        settings: sizes of the problem; None is the standard demo.

    Raises:
        ValueError: seeds, steps or workers below 1.
        ConfigError: an output that is not a folder, or nilearn missing.
        RuntimeError: a worker process that died.
    """
    for name, value in (("seeds", seeds), ("steps", steps), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    settings = settings or Settings()
    if steps is not None:
        settings = Settings(**{**asdict(settings), "steps": steps})
    output = Path(output).resolve()
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output: {output} is a file; expected a folder")
    if importlib.util.find_spec("nilearn") is None:
        raise ConfigError(
            "the demo needs the package nilearn, for its brain templates; install it with: "
            'pip install "riskmap_ext[demo]"'
        )
    _clear(output)
    started = time.perf_counter()
    console = Console(highlight=False)
    console.print(
        f"Simulated brains: {settings.source_subjects} source subjects with tissue labels, "
        f"{settings.labelled_subjects} target subjects with structure labels, "
        f"{settings.test_subjects} to test on; {len(ARMS)} arms, {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}, {settings.steps} steps each, "
        f"{workers} {'process' if workers == 1 else 'processes'}."
    )
    sources, arms = _run_all(output, seeds, workers, settings, console)
    page, picture, csv = (output / name for name in _FILES)
    _draw(picture, output, arms, settings)
    _write_results(csv, sources, arms)
    for seed in range(seeds):
        shutil.rmtree(_folder(output, seed) / "cache", ignore_errors=True)
    seconds = time.perf_counter() - started
    write_page(page, picture, sources, arms, ARMS, settings, seconds)
    console.print(terminal_table(sources, arms, ARMS))
    console.print(f"Done in {seconds:.0f} s. Page: {page}", soft_wrap=True)
    return DemoResult(output, page, picture, csv, sources, arms, seconds)


def _clear(output: Path) -> None:
    """Removes what an earlier demo wrote, so that a page never outlives its runs."""
    for name in _FILES:
        (output / name).unlink(missing_ok=True)
    for dataset in output.glob("seed_*/target_data/dataset.json"):
        shutil.rmtree(dataset.parent.parent)


def _run_all(
    output: Path, seeds: int, workers: int, settings: Settings, console: Console
) -> tuple[list[SourceResult], list[ArmResult]]:
    """Source networks first, then each seed's arms as soon as its source is trained."""
    sources: list[SourceResult] = []
    arms: list[ArmResult] = []
    # Spawned, since a forked child inherits torch's thread pool in an unusable state.
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker
    )
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )
    try:
        with bar:
            task = bar.add_task("Training", total=seeds * (1 + len(ARMS)), note="")

            def done(note: str) -> None:
                bar.update(task, advance=1, note=note)
                if not console.is_terminal:
                    console.print(f"  {note}", soft_wrap=True)

            waiting: set[Future[SourceResult | ArmResult]] = {
                pool.submit(train_source, output, seed, settings) for seed in range(seeds)
            }
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for result in (future.result() for future in finished):
                    if isinstance(result, ArmResult):
                        arms.append(result)
                        name = next(a.name for a in ARMS if a.key == result.arm)
                        done(f"seed {result.seed}, {name}: mean Dice {100 * result.mean_dice:.1f}")
                    else:
                        sources.append(result)
                        done(f"seed {result.seed}, source network: LEEP {result.leep:.3f}")
                        waiting |= {
                            pool.submit(train_arm, output, result.seed, arm.key, settings)
                            for arm in ARMS
                        }
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process of the demo ended without an error message (killed, often for "
            f"lack of memory); run it again with workers=1 instead of {workers}"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    order = {arm.key: index for index, arm in enumerate(ARMS)}
    return sorted(sources, key=lambda s: s.seed), sorted(arms, key=lambda a: (a.seed, order[a.arm]))


def train_source(output: Path, seed: int, settings: Settings) -> SourceResult:
    """Simulates a seed's subjects, trains its source network, computes the target's risk maps."""
    folder = _folder(output, seed)
    first = 1000 * seed
    cohort = partial(write_cohort, resolution=settings.resolution, extent=settings.extent)
    ends = np.cumsum([settings.source_subjects, settings.source_test_subjects])
    cohort(
        folder / "source_data",
        range(first, first + ends[0]),
        validation_seeds=range(first + ends[0], first + ends[1]),
        labels="tissues",
    )
    first += 500
    ends = np.cumsum([settings.labelled_subjects, settings.test_subjects])
    cohort(
        folder / "target_data",
        range(first, first + ends[0]),
        validation_seeds=range(first + ends[0], first + ends[1]),
        labels="structures",
    )
    source = finetune(_config(output, seed, settings, None), progress=False)
    maps_config = _config(output, seed, settings, ARMS[0], name="risk_maps", maps=True)
    maps = make_maps(maps_config, progress=False)
    cases = _target_cases(output, seed, settings)
    labels = torch.cat([case.label.flatten() for case in cases.train])
    counts = torch.bincount(labels.long()).double()
    frequencies = counts[counts > 0] / counts.sum()
    entropy = float(-(frequencies * frequencies.log()).sum())
    return SourceResult(seed, source.dice, maps.score, entropy, maps.remark)


def train_arm(output: Path, seed: int, arm: str, settings: Settings) -> ArmResult:
    """Fine-tunes one arm from the seed's source network and scores it on the test subjects."""
    chosen = next(a for a in ARMS if a.key == arm)
    result = finetune(
        _config(output, seed, settings, chosen),
        cases=_target_cases(output, seed, settings),
        progress=False,
    )
    subjects = {name: float(np.mean(list(row.values()))) for name, row in result.cases.items()}
    return ArmResult(seed, arm, result.dice, subjects, result.seconds)


@lru_cache(maxsize=1)
def _target_cases(output: Path, seed: int, settings: Settings) -> Cases:
    """Read once per process; a process mostly stays with one seed."""
    return prepare_cases(_config(output, seed, settings, ARMS[0]))


def _folder(output: Path, seed: int) -> Path:
    return output / f"seed_{seed}"


def _config(
    output: Path,
    seed: int,
    settings: Settings,
    arm: Arm | None,
    *,
    name: str | None = None,
    maps: bool = False,
) -> Config:
    """The driver's configuration of an arm, or of the source network where `arm` is None."""
    folder = _folder(output, seed)
    config: dict[str, Any] = {
        "output": folder / (name or (arm.key if arm else "source")),
        "overwrite": True,
        "cache": folder / "cache",
        # The same for every arm: it determines the new head, the crops and their order.
        "seed": seed,
        "device": "cpu",
        "threads": 1,
        "data": {"root": folder / ("target_data" if arm else "source_data")},
        "loss": arm.loss if arm else _CE_DICE,
        "train": {
            "steps": settings.steps if arm else settings.source_steps,
            "batch_size": settings.batch_size,
            "patch_size": settings.patch_size,
            "lr": settings.lr,
            "foreground_crops": settings.foreground_crops,
            # Scored once, after the last step: nothing is chosen by the test subjects.
            "validate_every": 0,
            "augment": {
                "affine_probability": 0.0,
                "intensity_probability": 0.0,
                "noise_probability": 0.0,
            },
        },
        "write": {
            "maps": maps,
            "predictions": arm is not None,
            "overlays": False,
            "tensorboard": False,
            "report": False,
        },
    }
    if arm is None:
        config["network"] = {
            "name": "UNet",
            "args": {
                "spatial_dims": 2,
                "channels": list(settings.channels),
                "strides": [2] * (len(settings.channels) - 1),
                "num_res_units": 1,
                "norm": "instance",
            },
        }
    else:
        config["source"] = {"checkpoint": folder / "source" / "last.pt"}
        config["train"]["head_init"] = arm.head
        config["risk"] = {"use": arm.risk, "scheme": "exponential"}  # the paper's
    return parse_config(config, origin="demo")


def _draw(path: Path, output: Path, arms: Sequence[ArmResult], settings: Settings) -> None:
    """One test subject per seed (three at most), the one nearest its seed's median score."""
    rows = []
    for seed in sorted({a.seed for a in arms})[:3]:
        results = {a.arm: a for a in arms if a.seed == seed}
        # Typical rather than best: the median over subjects of the mean over arms.
        means = {
            case: float(np.mean([r.subjects[case] for r in results.values()]))
            for case in results[BASELINE].subjects
        }
        case = sorted(means, key=means.__getitem__)[len(means) // 2]
        folder = _folder(output, seed)
        rows.append(
            Volumes(
                name=f"seed {seed}",
                image=_volume(folder / "target_data" / "imagesTr" / f"{case}.nii.gz"),
                labels=_volume(folder / "target_data" / "labelsTr" / f"{case}.nii.gz"),
                risk=_volume(folder / "risk_maps" / "maps" / f"{case}_risk.nii.gz"),
                predictions={
                    a.name: _volume(folder / a.key / "predictions" / f"{case}.nii.gz") for a in ARMS
                },
                scores={a.name: f"Dice {100 * results[a.key].subjects[case]:.1f}" for a in ARMS},
                zooms=(settings.resolution,) * 3,
            )
        )
    comparison(path, rows, STRUCTURES, "Test subjects (the median one of each seed)")


def _volume(path: Path) -> np.ndarray:
    return np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)


def _write_results(path: Path, sources: Sequence[SourceResult], arms: Sequence[ArmResult]) -> None:
    """A row per seed and arm: Dice in percent per structure and their mean, and the LEEP score."""
    leep = {source.seed: source.leep for source in sources}
    classes = list(arms[0].dice)
    rows = [
        [
            a.seed,
            a.arm,
            *(f"{100 * a.dice[c]:.3f}" for c in classes),
            f"{100 * a.mean_dice:.3f}",
            f"{leep[a.seed]:.6f}",
            f"{a.seconds:.1f}",
        ]
        for a in arms
    ]
    write_csv(path, ["seed", "arm", *classes, "mean_dice", "source_leep", "seconds"], rows)

"""A run by two processes: the statistics, the loss curve and the scores of one."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("monai")
pytest.importorskip("nibabel")

import torch
import torch.distributed as dist
from finetune_data import DYNUNET_2D, configuration, settings, write_config

from riskmap_ext.finetune import cross_validate, finetune

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

# SGD, since Adam makes steps of full length of the rounding of biases that have no effect.
TRAIN = {"steps": 6, "batch_size": 4, "validate_every": 3, "accumulate": 2, "optimizer": "SGD"}


def torchrun(config: Path, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={processes}", "-m", "riskmap_ext.finetune",
        "finetune", str(config), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def numbers(path: Path, *left_out: str) -> list[float]:
    return [
        float(value)
        for row in rows(path)
        for name, value in row.items()
        if name not in ("case", *left_out)
    ]


def test_same_statistics_and_loss_curve_as_one_process(
    root: Path, source: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "data": {"train": 3, "validation": 2},
        "source": {"checkpoint": str(source)},
        "risk": {"use": True},
        "loss": {"batch_dice": True},
        "train": TRAIN,
        "write": {"overlays": 1, "tensorboard": True},
    }
    finetune(configuration(root, tmp_path / "one", **sections), progress=False)
    config = write_config(tmp_path / "two.yaml", settings(root, tmp_path / "two", **sections))
    done = torchrun(config)
    assert done.returncode == 0, done.stderr
    one, two = tmp_path / "one", tmp_path / "two"
    leep = [json.loads((run / "leep.json").read_text()) for run in (one, two)]
    for key in ("score", "voxels", "hardness_range", "class_frequencies"):
        assert leep[1][key] == pytest.approx(leep[0][key], rel=1e-9), key
    for mine, expected in zip(leep[1]["conditional"], leep[0]["conditional"], strict=True):
        assert mine == pytest.approx(expected, rel=1e-9)
    for name in ("losses.csv", "metrics.csv", "dice.csv"):
        found, expected = (numbers(run / name, "seconds") for run in (two, one))
        assert found == pytest.approx(expected, rel=2e-4), name
    assert [row["case"] for row in rows(two / "dice.csv")] == [
        row["case"] for row in rows(one / "dice.csv")
    ]
    weights = [torch.load(run / "last.pt", weights_only=True)["state_dict"] for run in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-5)
    for folder in ("predictions", "maps", "overlays"):
        names = [sorted(p.name for p in (run / folder).iterdir()) for run in (one, two)]
        assert names[0] == names[1]
    for told in ("Done in", "The output layer starts at the class prior"):
        assert (two / "log.txt").read_text().count(told) == 1
    assert not list(two.rglob("resume.pt"))


def test_cross_validation_and_its_resume(root: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"data": {"train": 4, "validation": 0, "folds": 2}, "train": TRAIN}
    one = cross_validate(configuration(root, tmp_path / "one", **sections), progress=False)
    two = tmp_path / "two"
    config = write_config(tmp_path / "two.yaml", settings(root, two, **sections))
    done = torchrun(config)
    assert done.returncode == 0, done.stderr
    before = (two / "fold_0" / "last.pt").stat().st_mtime_ns
    for name in ("dice.csv", "log.txt", "report.html"):
        (two / name).unlink()
    shutil.rmtree(two / "fold_1")
    done = torchrun(config, "--resume")
    assert done.returncode == 0, done.stderr
    assert (two / "fold_0" / "last.pt").stat().st_mtime_ns == before
    assert (two / "report.html").exists()
    assert (two / "log.txt").read_text().count("fold_0 of 2 folds, done before") == 1
    found, expected = (numbers(run / "dice.csv", "fold") for run in (two, one.output))
    assert found == pytest.approx(expected, rel=2e-4)


def test_errors_are_told_once(root: Path, tmp_path: Path) -> None:
    content = settings(root, tmp_path / "out", train={"steps": 2, "batch_size": 3})
    done = torchrun(write_config(tmp_path / "run.yaml", content))
    assert done.returncode != 0
    told = "train.batch_size: expected a multiple of the 2 processes"
    assert done.stderr.count(told) == 1
    assert not (tmp_path / "out").exists()


def test_a_failure_of_one_process_ends_all(root: Path, tmp_path: Path) -> None:
    train = {"steps": 40, "batch_size": 2, "lr": 1e30, "grad_clip": None, "validate_every": 0}
    content = settings(root, tmp_path / "out", train={**train, "optimizer": "SGD"})
    done = torchrun(write_config(tmp_path / "run.yaml", content))
    assert done.returncode != 0
    assert done.stderr.count("riskmap: error: train: the loss is not finite") == 1
    batch = json.loads((tmp_path / "out" / "nonfinite.json").read_text())
    assert batch["step"] >= 1
    assert len(batch["cases"]) == 2
    assert set(batch["cases"]) <= {"case00", "case01"}


def test_outputs_that_the_loss_does_not_see(root: Path, tmp_path: Path) -> None:
    heads = {"deep_supervision": True, "deep_supr_num": 1}
    deep = {**DYNUNET_2D, "args": {**DYNUNET_2D["args"], **heads}}
    content = settings(root, tmp_path / "out", network=deep, train={**TRAIN, "steps": 3})
    done = torchrun(write_config(tmp_path / "run.yaml", content))
    assert done.returncode == 0, done.stderr
    assert "unused" not in done.stderr

"""The examples of docs/howto run as they stand, in an empty folder."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import riskmap_ext

HOWTO = Path(__file__).parents[1] / "docs" / "howto"
README = Path(__file__).parents[1] / "README.md"
NEEDS = {"pytorch": (), "monai": ("monai", "ignite"), "lightning": ("lightning",)}


def blocks(name: str) -> list[str]:
    text = (HOWTO / f"{name}.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def run(code: str, folder: Path) -> str:
    script = folder / "example.py"
    script.write_text(code, encoding="utf-8")
    return run_command([sys.executable, "-W", "ignore", script.name], folder)


def run_command(command: list[str], folder: Path, **environment: str) -> str:
    """What it prints; its errors where it fails."""
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _require(name: str) -> None:
    for module in NEEDS[name]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["monai", "lightning"])
def test_example(name: str, tmp_path: Path) -> None:
    _require(name)
    assert re.search(r"LEEP -\d\.\d", run("".join(blocks(name)), tmp_path))


@pytest.mark.slow
def test_pytorch(tmp_path: Path) -> None:
    """The loop and what comes after it; the part for several processes is in test_distributed."""
    *together, processes = blocks("pytorch")
    losses = re.findall(r"epoch \d: loss ([\d.]+)", run("".join(together), tmp_path))
    assert len(losses) == 3
    assert float(losses[-1]) < float(losses[0])
    assert "all_reduce" in processes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LEEP score")
def test_many_classes(tmp_path: Path) -> None:
    _require("monai")
    trainer, *examples = blocks("many_classes")
    assert re.search(r"\['2'\]\nloss \d\.\d\d", run("".join(examples), tmp_path))
    if importlib.util.find_spec("nnunetv2") is not None:
        names: dict[str, Any] = {}
        exec(trainer, names)
        assert names["nnUNetTrainerManyClasses"].fused_head is True


def _code(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_readme() -> None:
    """Both of its blocks; the second with a source and a model that give logits."""
    first, second = _code(README)
    names: dict[str, Any] = {}
    exec(first.replace("96", "9"), names)
    assert names["logits"].grad.abs().sum() > 0
    model = torch.nn.Conv3d(1, 3, 1)
    data = [(torch.randn(1, 1, 5, 5, 5), torch.randint(3, (1, 5, 5, 5))) for _ in range(2)]
    names |= {"source": torch.nn.Conv3d(1, 4, 1), "model": model, "train_set": data}
    exec(second, names)
    assert names["loss"].requires_grad
    assert names["statistics"].score < 0


def test_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It runs, with fewer steps, draws the pictures it shows and prints the page's rows."""
    pytest.importorskip("monai", reason="monai is not installed")
    pytest.importorskip("nilearn", reason="nilearn is not installed")
    monkeypatch.chdir(tmp_path)
    tutorial = HOWTO.parent / "tutorial.md"
    page, code = tutorial.read_text(encoding="utf-8"), "".join(_code(tutorial))
    assert code.count("300, ") == 2
    exec(code.replace("300, ", "10, "), {})
    for picture in re.findall(r"\(pictures/(\w+\.png)\)", page):
        assert (tmp_path / picture).stat().st_size > 5_000
    row = re.compile(r"^((?:CE \+ Dice|prior).*?)  +[\d.]+ +[\d.]+ +[\d.]+$", re.MULTILINE)
    assert row.findall(capsys.readouterr().out) == row.findall(page)
    assert len(row.findall(page)) == 4


def test_own_weights() -> None:
    """The page's boundary and class weights, on labels with a hole at an edge of the image."""
    (code,) = _code(HOWTO.parent / "weights.md")
    label = torch.zeros(1, 6, 6, 6, dtype=torch.int64)
    label[:, :2] = 1
    label[:, :, 4:] = 2
    names: dict[str, Any] = {"torch": torch, "riskmap_ext": riskmap_ext, "label": label}
    names["logits"] = torch.randn(1, 3, 6, 6, 6)
    exec(code, names)
    assert names["boundary"].min() == 0
    assert names["boundary"][0, 0, 0, 0] == 0  # far from both boundaries, at a corner
    assert names["boundary"][0, 1, 0, 0] > 0
    assert names["loss"].isfinite()
    torch.testing.assert_close(names["weight"][label].mean(), torch.tensor(1.0))


def test_every_page_is_tried() -> None:
    """nnU-Net's is tried by test_nnunet, the ten scans by test_finetune_nnunet."""
    assert {page.stem for page in HOWTO.glob("*.md")} == {
        *NEEDS,
        "many_classes",
        "nnunet",
        "ten_scans",
        "README",
    }

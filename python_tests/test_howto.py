"""The examples of docs/howto run as they stand, in an empty folder."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HOWTO = Path(__file__).parents[1] / "docs" / "howto"
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
    (code,) = blocks(name)
    assert re.search(r"LEEP -\d\.\d", run(code, tmp_path))


@pytest.mark.slow
def test_pytorch(tmp_path: Path) -> None:
    """The loop and the compiled step; the part for several processes is in test_distributed."""
    loop, compiled, processes = blocks("pytorch")
    losses = re.findall(r"epoch \d: loss ([\d.]+)", run(loop + compiled, tmp_path))
    assert len(losses) == 3
    assert float(losses[-1]) < float(losses[0])
    assert "all_reduce" in processes


def test_every_page_is_tried() -> None:
    """nnU-Net's is tried by test_nnunet."""
    assert {page.stem for page in HOWTO.glob("*.md")} == {*NEEDS, "nnunet", "README"}

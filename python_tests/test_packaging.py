"""What is shipped: the source archive builds, versions agree, links work outside the repository."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from riskmap_ext import _library

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """name -> text of every file of the source archive."""
    pytest.importorskip("build", reason="needs the package build, of the extra dev")
    folder = tmp_path_factory.mktemp("archive")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(folder.glob("*.tar.gz"))) as tar:
        files = {m.name.split("/", 1)[1]: tar.extractfile(m) for m in tar if m.isfile()}
        return {name: file.read().decode() for name, file in files.items() if file is not None}


def test_source_archive_has_what_cmake_names(archive: dict[str, str]) -> None:
    cmake = [text for name, text in archive.items() if "make" in name.lower()]
    named = {
        source
        for text in cmake
        for source in re.findall(r"csrc/[\w/]+\.(?:cpp|cu|h|py)", re.sub(r"#.*", "", text))
    }
    assert len(named) > 40
    headers = {
        str(path.relative_to(ROOT))
        for pattern in ("*.h", "*.cuh")
        for path in (ROOT / "csrc").rglob(pattern)
    }
    assert (named | headers) - archive.keys() == set()
    assert {"setup.py", "LICENSE", "riskmap_ext/py.typed"} <= archive.keys()
    assert [name for name in archive if name.endswith((".so", ".pyc"))] == []


def test_index_page_has_no_link_into_the_repository(archive: dict[str, str]) -> None:
    links = re.findall(r"\]\(([^)]+)\)", archive["PKG-INFO"])
    assert len(links) > 10
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_one_version(archive: dict[str, str]) -> None:
    version = re.search(r'^version = "(.+)"', archive["pyproject.toml"], re.MULTILINE)
    assert version is not None
    pinned = re.findall(r"riskmap-ext-cu\d+==([\d.]+)", archive["pyproject.toml"])
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert {*pinned, cited[1]} == {version[1]}
    assert len(pinned) == 2


@pytest.mark.parametrize(
    ("toolkit", "version", "expected"),
    [
        ("12.8.1", None, "its CUDA kernels were built for CUDA 12.8.1"),
        ("13.0.88", "0.0.1", "riskmap-ext-cu13 0.0.1 is installed; this is riskmap_ext"),
        ("13.0.88", None, "libriskmap_cuda.so is missing"),
    ],
)
def test_wheel_of_the_cuda_library(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    toolkit: str,
    version: str | None,
    expected: str,
) -> None:
    """It is found by torch's CUDA, and one that does not fit is told and not loaded."""
    facts = _library.build_facts()
    assert facts is not None
    package = tmp_path / "riskmap_ext_cu13"
    package.mkdir()
    (package / "__init__.py").write_text(
        f'VERSION = "{version or facts["version"]}"\nTOOLKIT = "{toolkit}"\nARCHITECTURES = "90"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda="13.0"))
    monkeypatch.setattr(_library, "_HERE", tmp_path)
    monkeypatch.delitem(sys.modules, "riskmap_ext_cu13", raising=False)
    reason = _library._load_cuda()
    assert reason is not None
    assert expected in reason


def test_without_the_wheel_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda="14.1"))
    monkeypatch.setattr(_library, "_HERE", tmp_path)
    reason = _library._load_cuda()
    assert reason is not None
    assert reason.startswith("riskmap-ext-cu14 is not installed, and riskmap_ext was built without")

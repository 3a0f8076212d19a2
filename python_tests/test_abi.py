"""The built op libraries hold to torch's stable ABI and to no place of the build machine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import riskmap_ext

FOLDER = Path(riskmap_ext.__file__).parent
LIBRARIES = sorted(FOLDER.glob("libriskmap_*.so"))
# Of C++ names only the standard library's may come from outside; torch is reached by C functions.
UNSTABLE = re.compile(r"\b(at|c10|caffe2|torch)::")


def _output_of(tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} (binutils) is not installed")
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def test_cpu_library_is_there() -> None:
    assert FOLDER / "libriskmap_cpu.so" in LIBRARIES


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_no_undefined_symbol_of_an_unstable_namespace(library: Path) -> None:
    symbols = _output_of("nm", "-D", "--undefined-only", "-C", str(library)).splitlines()
    assert any("aoti_torch_" in symbol for symbol in symbols)
    assert [symbol for symbol in symbols if UNSTABLE.search(symbol)] == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_knows_no_python_and_no_build_folder(library: Path) -> None:
    dynamic = _output_of("readelf", "-d", str(library))
    assert "(NEEDED)" in dynamic
    assert "libpython" not in dynamic
    paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
    entries = [entry for path in paths for entry in path.split(":")]
    assert all(entry.startswith("$ORIGIN") for entry in entries)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_exports_no_python_symbol(library: Path) -> None:
    symbols = _output_of("nm", "-D", "--undefined-only", str(library))
    assert re.search(r"\bPy[A-Z_]\w*", symbols) is None

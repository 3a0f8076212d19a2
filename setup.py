"""Builds the native libraries with CMake (CMakeLists.txt lists every source and flag).

Environment: RISKMAP_CUDA (AUTO, ON, OFF; AUTO), RISKMAP_BUILD_DIR, CMAKE_ARGS.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SEARCH_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


class CMakeBuild(build_ext):
    """Builds all native libraries in one CMake run and puts them beside the Python package."""

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        tag = f"cmake-{sys.implementation.cache_tag}"
        build = Path(os.environ.get("RISKMAP_BUILD_DIR", ROOT / "build" / tag))
        cmake = shutil.which("cmake", path=SEARCH_PATH)
        if cmake is None:
            raise SystemExit("riskmap_ext: cmake not found; run `pip install cmake ninja` first")
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DRISKMAP_VERSION={self.distribution.get_version()}",
            f"-DRISKMAP_CUDA={os.environ.get('RISKMAP_CUDA', 'AUTO')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        ninja = shutil.which("ninja", path=SEARCH_PATH)
        if ninja and not (build / "CMakeCache.txt").exists():
            options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        _call(cmake, "-S", str(ROOT), "-B", str(build), *options)
        _call(cmake, "--build", str(build), "--parallel")
        for stale in (package / "riskmap_ext").glob("*.so"):
            stale.unlink()  # do not ship a library of another build
        _call(cmake, "--install", str(build), "--prefix", str(package))

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "riskmap_ext").glob("*.so")]


def _call(*command: str) -> None:
    line = shlex.join(command)
    print("riskmap_ext:", line, flush=True)
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"riskmap_ext: `{line}` failed; see its messages above")


def _readme() -> str:
    """README.md with absolute links into the repository, for other sites."""
    links = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)|(?<=src=\")(?!https?:)")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return links.sub("https://github.com/riskmap-ext/riskmap_ext/raw/main/", text)


# The extension entry makes the wheels platform-specific; CMake lists the sources.
setup(
    ext_modules=[Extension("riskmap_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    long_description=_readme(),
    long_description_content_type="text/markdown",
)

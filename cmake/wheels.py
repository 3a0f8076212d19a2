"""``make wheel``: the source archive, and wheels for manylinux_2_28 built from it and tested.

Builds a wheel of riskmap_ext with the CPU library for each Python given, and for each nvcc after
``--cuda`` a wheel with only the CUDA library (riskmap-ext-cu12, -cu13), for any Python. The
libraries of torch and CUDA are not included. ``try_wheel.py`` runs in a fresh environment.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLATFORM = "manylinux_2_28_x86_64"
OF_TORCH = ["libtorch_cpu.so", "libtorch_cuda.so", "libcudart.so.12", "libcudart.so.13"]
BUILD = ["setuptools>=77", "wheel", "cmake>=3.25", "ninja", "pybind11>=2.13"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--python", nargs="*", default=[sys.executable], help="interpreters; none for none"
    )
    parser.add_argument(
        "--torch", nargs="*", default=[], help="to try them with, one for each Python"
    )
    parser.add_argument("--cuda", nargs="*", default=[], help="nvcc of each CUDA version")
    parser.add_argument("--output", type=Path, default=Path("dist"))
    options = parser.parse_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = unpacked(source_archive(output), work)
        for python in options.python:
            portable(python_wheel(python, source, work), output)
        for nvcc in options.cuda:
            portable(cuda_wheel(nvcc, source, work), output)
        for python, torch in zip(options.python, options.torch, strict=False):
            try_wheel(python, torch, output, work)


def run(*command: str | Path, **environment: str) -> str:
    """The command's output. Raises: SystemExit with the output if the command fails."""
    print("+", *command, flush=True)
    done = subprocess.run(
        [str(each) for each in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nwheels.py: {' '.join(map(str, command))} failed")
    return done.stdout


def source_archive(output: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", output, ROOT)
    return max(output.glob("riskmap_ext-*.tar.gz"), key=lambda path: path.stat().st_mtime)


def unpacked(archive: Path, work: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    return work / archive.name.removesuffix(".tar.gz")


def environment(python: str, folder: Path, *packages: str) -> Path:
    """The interpreter of a new virtual environment."""
    run(python, "-m", "venv", folder)
    inside = folder / "bin" / "python"
    run(inside, "-m", "pip", "install", "--quiet", "--upgrade", "pip", *packages)
    return inside


def python_wheel(python: str, source: Path, work: Path) -> Path:
    tag = run(python, "-c", "import sys; print(sys.implementation.cache_tag)").strip()
    inside, wheels = environment(python, work / f"build-{tag}", *BUILD), work / f"wheel-{tag}"
    flags = f"-DRISKMAP_PORTABLE=ON -DRISKMAP_TORCH_PYTHON={sys.executable}"
    run(
        *(inside, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", wheels, source),
        RISKMAP_CUDA="OFF",
        RISKMAP_BUILD_DIR=str(work / f"cmake-{tag}"),
        CMAKE_ARGS=flags,
    )
    return next(wheels.glob("*.whl"))


def cuda_wheel(nvcc: str, source: Path, work: Path) -> Path:
    from wheel.wheelfile import WheelFile

    toolkit = re.search(r"release (\d+)", run(nvcc, "--version"))
    assert toolkit is not None
    build, version = work / f"cuda{toolkit[1]}", source.name.split("-")[1]
    run(
        *("cmake", "-S", source, "-B", build, "-G", "Ninja", f"-DRISKMAP_VERSION={version}"),
        *(
            "-DRISKMAP_PORTABLE=ON",
            "-DRISKMAP_CUDA=ON",
            f"-DCMAKE_CUDA_ARCHITECTURES={os.environ.get('CUDAARCHS', 'release')}",
        ),
        f"-DPython_EXECUTABLE={sys.executable}",
        CUDACXX=nvcc,
    )
    run("cmake", "--build", build, "--target", "riskmap_cuda")
    package = f"riskmap_ext_cu{toolkit[1]}"
    path = work / f"{package}-{version}-py3-none-linux_x86_64.whl"
    info = f"{package}-{version}.dist-info"
    with WheelFile(str(path), "w") as wheel:
        wheel.write(str(build / "libriskmap_cuda.so"), f"{package}/libriskmap_cuda.so")
        wheel.write(str(build / "cuda_wheel.py"), f"{package}/__init__.py")
        wheel.write(str(source / "LICENSE"), f"{info}/licenses/LICENSE")
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.4\nName: {package.replace('_', '-')}\nVersion: {version}\n"
            f"Summary: CUDA {toolkit[1]} kernels of riskmap-ext\nLicense-Expression: Apache-2.0\n"
            f"Requires-Python: >=3.10\nRequires-Dist: riskmap-ext=={version}\n",
        )
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: riskmap_ext\nRoot-Is-Purelib: false\n"
            "Tag: py3-none-linux_x86_64\n",
        )
    return path


def portable(wheel: Path, output: Path) -> None:
    """Tags the wheel for PLATFORM. Raises: SystemExit if it needs something newer."""
    excluded = [f"--exclude={name}" for name in OF_TORCH]
    repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, *excluded]
    print(
        run(
            *repair, "-w", output, wheel, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        )
    )


def try_wheel(python: str, torch: str, output: Path, work: Path) -> None:
    """Runs try_wheel.py in an environment with only the core, and no compiler on PATH."""
    tag = run(python, "-c", "import sys; print(f'cp{sys.version_info[0]}{sys.version_info[1]}')")
    wheel = next(output.glob(f"riskmap_ext-*-{tag.strip()}-*.whl"))
    inside = environment(python, work / f"try-{tag.strip()}", *torch.split(), "numpy")
    run(inside, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    print(run(inside, ROOT / "cmake" / "try_wheel.py", PATH=str(inside.parent), PYTHONPATH=""))


if __name__ == "__main__":
    main()

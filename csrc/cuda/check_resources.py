"""Registers, shared memory and spills of every CUDA kernel, held against resources.json.

    python csrc/cuda/check_resources.py --build BUILD_FOLDER            # check
    python csrc/cuda/check_resources.py --build BUILD_FOLDER --write    # take the numbers over

Compiles the kernels once more with the commands of that build (CMake's compile_commands.json) and
reads what ptxas says. A kernel that spills more bytes than the table allows, or that the table does
not know, is an error; other numbers may differ with the version of nvcc and are only shown.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from machine_code.names import readable

TABLE = Path(__file__).with_name("resources.json")
Kernels = dict[str, dict[str, int]]


def commands(build: Path) -> list[tuple[Path, list[str], str]]:
    """Source, compile command and working folder of every kernel file of the build."""
    entries = json.loads((build / "compile_commands.json").read_text())
    return [
        (Path(entry["file"]), shlex.split(entry["command"]), entry["directory"])
        for entry in entries
        if entry["file"].endswith(".cu")
    ]


def for_architecture(command: list[str], architecture: str, output: str) -> list[str]:
    """The command for one architecture alone, with ptxas telling what the kernels take."""
    kept: list[str] = []
    words = iter(command)
    for word in words:
        if word == "-o":
            next(words)
        elif not re.match(r"(--generate-code|-gencode|-arch|--gpu-architecture)=", word):
            kept.append(word)
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    return [*kept, f"--generate-code={target}", "-Xptxas", "-v", "-o", output]


def resources_of(source: Path, command: list[str], folder: str, architecture: str) -> Kernels:
    with tempfile.TemporaryDirectory() as scratch:
        line = for_architecture(command, architecture, f"{scratch}/kernels.o")
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(line)} failed:\n{done.stdout}{done.stderr}")
    return parse(source.stem, done.stdout + done.stderr)


def parse(prefix: str, output: str) -> Kernels:
    found: Kernels = {}
    for block in re.split(r"Compiling entry function ", output)[1:]:
        mangled = block.split("'")[1]
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill st\w+, (\d+) byt", block)
        registers = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        if spills is None or registers is None:
            sys.exit(f"cannot read what ptxas says of {mangled}:\n{block}")
        found[f"{prefix}: {readable([mangled])[0]}"] = {
            "registers": int(registers[1]),
            "shared_bytes": int(shared[1]) if shared else 0,
            "spill_bytes": int(spills[2]) + int(spills[3]),
        }
    return found


def toolkit_of(command: list[str]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"release (\d+\.\d+)", version.stdout)
    return match[1] if match else "unknown"


def compare(found: Kernels, table: Kernels) -> tuple[list[str], list[str]]:
    """Errors, and differences worth a look."""
    errors = [f"{name}: not in {TABLE.name}" for name in sorted(found.keys() - table.keys())]
    errors += [f"{name}: in {TABLE.name} alone" for name in sorted(table.keys() - found.keys())]
    notes = []
    for name in sorted(found.keys() & table.keys()):
        spills, allowed = found[name]["spill_bytes"], table[name]["spill_bytes"]
        if spills > allowed:
            errors.append(f"{name}: spills {spills} bytes, {allowed} are allowed")
        if found[name] != table[name]:
            notes.append(f"{name}: {found[name]}, in the table {table[name]}")
    return errors, notes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="folder of a CMake build")
    parser.add_argument("--architecture", default="90")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    arguments = parser.parse_args()

    kernels = commands(arguments.build)
    if not kernels:
        sys.exit(f"{arguments.build} holds no build of the CUDA library")
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda each: resources_of(*each, arguments.architecture), kernels)
    found = {name: each for part in parts for name, each in part.items()}
    tables: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if arguments.write:
        tables[arguments.architecture] = {
            "nvcc": toolkit_of(kernels[0][1]),
            "kernels": dict(sorted(found.items())),
        }
        TABLE.write_text(json.dumps(tables, indent=1) + "\n")
        print(f"{TABLE}: {len(found)} kernels for architecture {arguments.architecture}")
        return
    if arguments.architecture not in tables:
        sys.exit(f"{TABLE.name} has no architecture {arguments.architecture}; run with --write")
    errors, notes = compare(found, tables[arguments.architecture]["kernels"])
    for line in (*notes, *errors):
        print(line)
    most = max(found, key=lambda name: found[name]["registers"])
    print(f"{len(found)} kernels; most registers: {found[most]['registers']} ({most})")
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()

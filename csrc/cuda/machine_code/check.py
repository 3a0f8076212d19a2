"""Executes the machine code of the CUDA kernels on the CPU: their results, and what they cost.

    python csrc/cuda/machine_code/check.py --build BUILD_FOLDER            # check
    python csrc/cuda/machine_code/check.py --build BUILD_FOLDER --write    # take the numbers over
    python csrc/cuda/machine_code/check.py --build BUILD_FOLDER --table    # show them

Takes the code for sm_90 from the objects of that build (CMake's compile_commands.json). Results of
the ops are compared with float64. Instructions and memory requests of every kernel are held
against budgets.json: a number that has grown by more than 2 % is an error, and so is the first
access to local memory (a spill). The times are predicted, nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import calls
import cubins
import lines
import measure
import tables
from check_resources import commands, toolkit_of
from launches import HostLibrary, Machine, blocks, host_library
from listing import Kernel, SassError

TABLE = Path(__file__).with_name("budgets.json")
PROCESSES = 2
BLOCKS = 3  # about as many has a launch whose results are compared


@dataclass
class Tools:
    """What a process needs to run calls."""

    library: HostLibrary
    kernels: dict[str, Kernel]


class Here:
    tools: Tools  # of this process


def start(folder: Path, library: Path) -> None:
    import torch

    torch.set_num_threads(1)
    Here.tools = Tools(HostLibrary(library), cubins.load(folder))


def run(task: tuple[str, calls.Call]) -> tuple[str, str, Any]:
    """What a task is for, its call, and what came out, or what went wrong."""
    purpose, call = task
    tools = Here.tools
    try:
        if purpose == "budget":
            return purpose, call.name, measure.budget(call, tools.library, tools.kernels)
        inputs, machine = call.inputs(), Machine(tools.kernels)
        with blocks(BLOCKS), tools.library.told(machine):
            found = call.results(inputs)
        return purpose, call.name, call.error(found, inputs)
    except (SassError, ValueError, RuntimeError) as error:
        return "failure", call.name, f"{type(error).__name__}: {error}"


def missing() -> str:
    """Why nothing can be checked here."""
    if shutil.which("nvcc") is None and "CUDACXX" not in os.environ:
        return "no nvcc on PATH and no CUDACXX"
    names = [name for name in ("cuobjdump", "nvdisasm") if cubins.tool(name) is None]
    if names:
        return f"no {' and no '.join(names)} (pip: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="folder of a CMake build")
    parser.add_argument("--only", default="", metavar="REGEX", help="calls, as the table has them")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--table", action="store_true", help="print what kernels take, as Markdown")
    parser.add_argument("--budgets", action="store_true", help="no comparison of results")
    parser.add_argument(
        "--lines", metavar="REGEX", help="lines of the source that cost these kernels most"
    )
    arguments = parser.parse_args()
    if reason := missing():
        print(f"machine code: {reason}: nothing is checked")
        return
    sources = commands(arguments.build)
    if not sources:
        sys.exit(f"{arguments.build} holds no build of the CUDA library")
    library = host_library()
    kernels = cubins.load(arguments.build)  # also leaves the listings for other processes
    wanted = re.compile(arguments.only)
    if arguments.lines:
        start(arguments.build, library)
        chosen = [call for call in calls.budget_calls() if wanted.search(call.name)]
        lines.show(chosen, arguments.lines, sources, Here.tools.library, kernels)
        return

    tasks = [("budget", call) for call in calls.budget_calls()]
    if not (arguments.budgets or arguments.table or arguments.write):
        tasks += [("result", call) for call in calls.correctness_calls()]
    tasks = [task for task in tasks if wanted.search(task[1].name)]
    tasks.sort(key=lambda task: -task[1].classes)  # the long ones first
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with context.Pool(PROCESSES, start, (arguments.build, library)) as pool:
        outcomes = list(pool.imap_unordered(run, tasks))

    errors = [f"{name}: {text}" for purpose, name, text in outcomes if purpose == "failure"]
    results = {name: pair for purpose, name, pair in outcomes if purpose == "result"}
    errors += [
        f"{name}: off by {error:.1e} of its largest number, {share:.1f} times what is allowed"
        for name, (error, share) in sorted(results.items())
        if not share <= 1
    ]
    order = [call.name for call in calls.budget_calls()]
    found = {name: row for purpose, name, row in outcomes if purpose == "budget"}
    found = {name: found[name] for name in order if name in found}
    if results:
        worst = max(results, key=lambda name: results[name][1])
        print(
            f"{len(results)} calls compared with float64; {worst} takes most of its tolerance, "
            f"{results[worst][1]:.0%}"
        )
    if arguments.table:
        print(tables.markdown(found))
    toolkit = toolkit_of(sources[0][1])
    errors += against_table(found, toolkit, arguments.write, partial=bool(arguments.only))
    for line in errors:
        print(line)
    print(f"{len(found)} calls measured, {time.monotonic() - began:.0f} s")
    sys.exit(1 if errors else 0)


def against_table(found: measure.Row, toolkit: str, write: bool, partial: bool) -> list[str]:
    """Errors; or writes the table."""
    stored: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if write:
        kept = stored.get("calls", {}) if partial else {}
        TABLE.write_text(json.dumps({"nvcc": toolkit, "calls": {**kept, **found}}, indent=1) + "\n")
        print(f"{TABLE}: {len(found)} calls")
        return []
    if stored.get("nvcc", toolkit) != toolkit:
        print(f"{TABLE.name} is of nvcc {stored['nvcc']}, this is {toolkit}: no budget is an error")
    errors, notes = tables.compare(found, stored.get("calls", {}), partial)
    for line in notes:
        print(line)
    if stored.get("nvcc", toolkit) == toolkit:
        return errors
    print(*errors, sep="\n")
    return []


if __name__ == "__main__":
    main()

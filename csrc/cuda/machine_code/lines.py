"""Which lines of the source cost most. Compiles their file once more, with line numbers."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import cubins
import measure
from calls import Call
from check_resources import for_architecture
from launches import HostLibrary
from listing import Kernel
from names import readable

Sources = list[tuple[Path, list[str], str]]  # as check_resources.commands has them
MOST = 30


def show(
    calls: Sequence[Call],
    pattern: str,
    sources: Sources,
    library: HostLibrary,
    kernels: dict[str, Kernel],
) -> None:
    for call in calls:
        for voxels, names in measure.sizes(call, library).items():
            chosen = {name for name in names if re.search(pattern, name)}
            show_call(call, voxels, chosen, sources, library, kernels)


def show_call(
    call: Call,
    voxels: int,
    chosen: set[str],
    sources: Sources,
    library: HostLibrary,
    kernels: dict[str, Kernel],
) -> None:
    if chosen:
        for count in measure.run_small(call, voxels, chosen, library, kernels):
            line_of = lines_of(kernels[count.kernel], sources)
            total: Counter[str] = Counter()
            for address, issued in count.by_address.items():
                total[line_of.get(address, "?")] += issued
            every = sum(total.values())
            print(f"{call.name}: {count.kernel}: {every} warp instructions on {voxels} voxels")
            for line, issued in total.most_common(MOST):
                print(f"{issued / every:7.1%}  {line}")


def lines_of(kernel: Kernel, sources: Sources) -> dict[int, str]:
    """The innermost line of the source that an instruction is of, by address."""
    stem = kernel.name.split(":")[0]
    source, command, folder = next(each for each in sources if each[0].stem == stem)
    with tempfile.TemporaryDirectory() as scratch:
        cubin = f"{scratch}/kernels.cubin"
        words = [word for word in command if word not in ("-c", "-x", "cu")]
        line = [*for_architecture(words, cubins.ARCHITECTURE[3:], cubin), "-cubin", "-lineinfo"]
        print(f"compiling {source.name} with line numbers", file=sys.stderr)
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{shlex.join(line)} failed:\n{done.stdout}{done.stderr}")
        program = cubins.tool("nvdisasm")
        assert program
        text = subprocess.run(
            [program, "-gi", cubin], capture_output=True, text=True, check=True
        ).stdout
    found = list(marked(text))
    mangled = sorted({each[0] for each in found})
    short = kernel.name.split(": ", 1)[1]
    known = dict(zip(mangled, readable(mangled), strict=True))
    lines = {address: line for name, address, line in found if known[name] == short}
    if lines.keys() != {i.address for i in kernel.code}:
        sys.exit(f"{source.name} has changed since the build: build again for lines of {short}")
    return lines


def marked(text: str) -> Iterator[tuple[str, int, str]]:
    kernel, line, fresh = "", "?", True
    for words in text.splitlines():
        if words.startswith(".text."):
            kernel = words[len(".text.") : -1]
        elif found := re.match(r'\s*//## File "(?:.*/)?(.*?)", line (\d+)', words):
            line, fresh = f"{found[1]}:{found[2]}" if fresh else line, False
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/", words):
            yield kernel, int(found[1], 16), line
            fresh = True

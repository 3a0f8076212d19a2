"""What the kernels of a call execute for a voxel and for a block, and what that may take."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from calls import Call
from interpreter import Grid
from launches import HostLibrary, Machine, blocks
from listing import Kernel, SassError
from state import WARP, Launch
from torch.autograd import profiler_legacy

# Of an H100: SMs, schedulers of one, Hz, bytes per second of a copy, seconds of a launch.
SMS, SCHEDULERS, CLOCK, COPY, LAUNCH = 132, 4, 1.7e9, 3.0e12, 2.5e-6
USE = 0.55  # of the issue slots
SECTOR = 32  # bytes
WIDTHS = (16, 8, 4, 2, 1)
BLOCKS = 4  # of a small run
RUNS = 64  # voxels of one label that follow each other, as in segmentations
Row = dict[str, Any]


@dataclass(frozen=True)
class Count:
    """A launch of a small run."""

    kernel: str
    blocks: int
    issued: float  # warp instructions of the block in the middle
    tail: float  # what the longest block has more: it may do the rest of the work for all
    requests: Counter[Any]  # of all blocks
    sectors: dict[str, int]  # of global memory that are read and written, each once
    by_address: dict[int, int]


def counted(launch: Launch, grids: list[Grid]) -> Count:
    kernel = grids[0].kernel
    by_address: Counter[int] = Counter()
    of_blocks = []
    requests: Counter[Any] = Counter()
    for grid in grids:
        issued = grid.issued
        of_blocks += list(sum(issued.values(), np.zeros(grid.blocks, np.int64)))
        for address, warps in issued.items():
            by_address[address] += int(warps.sum())
        for i in kernel.code:
            base = "LDG" if i.base == "LDGSTS" else i.base
            if not re.match(r"(LD|ST|ATOM|RED)[GSL]?", base) or not by_address[i.address]:
                continue
            every, passed = int(issued[i.address].sum()), grid.passed[i.address]
            requests[base, i.size] += every
            requests[base, "requests"] += passed
            requests[base, "cost"] += grid.cost[i.address]
            requests[base, "least"] += passed * i.size  # sectors of a warp without gaps
    sectors = {
        way: np.unique(
            np.concatenate([np.zeros(0, np.int64), *(s for g in grids for s in g.sectors[way])])
        ).size
        for way in "LS"
    }
    middle = float(np.median(of_blocks))
    return Count(
        kernel.name, len(of_blocks), middle, max(of_blocks) - middle, requests, sectors, by_address
    )


def small(call: Call, voxels: int) -> Call:
    """The call on so many voxels, in one image."""
    side = 1 << (voxels.bit_length() // 2)
    spatial = (voxels // side, side)
    return replace(call, batch=1, spatial=spatial)


def run_small(
    call: Call,
    voxels: int,
    names: set[str],
    library: HostLibrary,
    kernels: dict[str, Kernel],
    cut: int = BLOCKS,
) -> list[Count]:
    """Launches of these kernels, on so many voxels; g++'s code does the others."""
    machine = Machine(kernels, counting=True)

    def listen(launch: Launch) -> bool:
        return machine(launch) if launch.kernel in names else True

    fewer = small(call, voxels)
    with blocks(cut), library.told(listen):
        fewer.results(fewer.inputs(runs=RUNS))
    return [counted(launch, grids) for launch, grids in machine.done]


def recorded(call: Call, library: HostLibrary, cut: int) -> list[Launch]:
    """What a call launches; nothing runs."""
    launches = list[Launch]()

    def listen(launch: Launch) -> bool:
        launches.append(launch)
        return False

    with blocks(cut), library.told(listen):
        call.launch_only(call.inputs(real=False))
    return launches


def sizes(call: Call, library: HostLibrary) -> dict[int, set[str]]:
    """By so many voxels, the kernels that have as many blocks on twice as many, and more than
    one: these blocks are full. One that has a single block on any number is run on the fewest."""
    steps = [1024 << k for k in range(2 if call.classes <= 8 else 0, 7)]
    blocks_of: dict[str, list[int]] = defaultdict(lambda: [0] * len(steps))
    for k, voxels in enumerate(steps):
        for launch in recorded(small(call, voxels), library, BLOCKS):
            blocks_of[launch.kernel][k] = int(np.prod(launch.grid))
    found: dict[int, set[str]] = defaultdict(set)
    for name, counts in blocks_of.items():
        same = [k for k in range(len(steps) - 1) if counts[k] == counts[k + 1] > 1]
        found[steps[same[0] if same else 0]].add(name)
    return dict(sorted(found.items()))


def kernel_row(
    kernel: Kernel, one: Count, two: Count, voxels: int, real: Launch, call: Call
) -> Row:
    each = (voxels / one.blocks, 2 * voxels / two.blocks)  # voxels of a block
    if one is two:  # does not look at voxels
        per_voxel, fixed = 0.0, one.issued
    elif each[0] == each[1]:  # blocks of one size: what is fixed cannot be told apart
        per_voxel, fixed = one.issued / each[0], 0.0
    else:
        per_voxel = max(0.0, (two.issued - one.issued) / (each[1] - each[0]))
        fixed = one.issued - per_voxel * each[0]
    slope = {key: (two.requests[key] - one.requests[key]) / voxels for key in two.requests}
    requests = Counter({key: value for key, value in slope.items() if value > 0})
    row: Row = {
        "instructions": round(per_voxel * WARP, 2),
        "fixed": round(fixed, 1),
        "tail": round(one.tail, 1),
        "registers": kernel.resources["REG"],
    }
    for base, name in (("LDG", "loads"), ("STG", "stores")):
        widths = {str(w): round(requests[base, w] * WARP, 3) for w in WIDTHS if requests[base, w]}
        if widths:
            row[name] = widths
            row[f"{name}_sectors"] = ratio(requests, base, "least")
    for base, name in (("LDS", "shared_loads"), ("STS", "shared_stores")):
        if requests[base, "requests"]:
            row[f"{name}_passes"] = ratio(requests, base, "requests")
    local = sum(requests[base, w] for base in ("LDL", "STL") for w in WIDTHS) * WARP
    if local:
        row["local"] = round(local, 2)
    of_blocks = int(np.prod(real.grid))
    of_block = fixed + per_voxel * call.voxels / of_blocks
    moved = sum(max(0, two.sectors[way] - one.sectors[way]) for way in "LS") / voxels * SECTOR
    issue = (max(of_blocks / SMS, 1) * of_block + one.tail) / (SCHEDULERS * CLOCK * USE)
    row |= {
        "blocks": of_blocks,
        "threads": int(np.prod(real.block)),
        "shared_bytes": kernel.resources.get("SHARED", 0) + real.shared_bytes,
        "fixed_share": round(fixed / of_block, 3) if of_block else 0.0,
        "bytes": round(moved, 1),
        "microseconds": round(1e6 * (max(issue, moved * call.voxels / COPY) + LAUNCH), 1),
    }
    return row


def ratio(requests: Counter[Any], base: str, by: str) -> float:
    """Sectors to those that full warps would need, or passes to requests."""
    below = requests[base, by]
    return round(requests[base, "cost"] / below, 3) if below else 0.0


def allocations(call: Call, library: HostLibrary) -> int:
    """By the op and what torch's autograd adds."""
    inputs = call.inputs(real=False)
    with (
        blocks(0),
        library.told(lambda launch: False),
        profiler_legacy.profile(profile_memory=True) as profile,  # type: ignore[no-untyped-call]
    ):
        call.launch_only(inputs)
    events = profile.function_events or ()
    makers = ("aten::empty", "aten::empty_strided")
    return sum(event.name in makers and event.cpu_memory_usage > 0 for event in events)


def run_of_other(
    call: Call,
    names: list[str],
    missing: set[str],
    library: HostLibrary,
    kernels: dict[str, Kernel],
) -> dict[str, Count]:
    """Kernels that small runs do not need, on so few voxels as launch the same as the real shape;
    g++'s code does the rest."""
    voxels = 4096
    while [launch.kernel for launch in recorded(small(call, voxels), library, 0)] != names:
        voxels *= 2
        if voxels > call.voxels:
            raise SassError(f"{call.name}: no smaller shape launches {', '.join(sorted(missing))}")
    counts = run_small(call, voxels, missing, library, kernels, cut=0)
    return {count.kernel: count for count in counts}


def budget(call: Call, library: HostLibrary, kernels: dict[str, Kernel]) -> Row:
    """A call of budgets.json."""
    real = recorded(call, library, 0)
    names = [launch.kernel for launch in real]
    pairs: dict[str, list[tuple[int, Count, Count]]] = defaultdict(list)
    for voxels, chosen in sizes(call, library).items():
        one, two = (run_small(call, n, chosen, library, kernels) for n in (voxels, 2 * voxels))
        for first, second in zip(one, two, strict=True):
            if first.kernel != second.kernel:
                raise SassError(f"{call.name} launches {first.kernel}, then {second.kernel}")
            pairs[first.kernel].append((voxels, first, second))
    if missing := set(names) - pairs.keys():
        for name, count in run_of_other(call, names, missing, library, kernels).items():
            pairs[name].append((1, count, count))
    rows: dict[str, Row] = {}
    for launch in real:
        number = sum(name.split(" #")[0] == launch.kernel for name in rows)
        of_kernel = pairs[launch.kernel]
        voxels, first, second = of_kernel[min(number, len(of_kernel) - 1)]
        name = launch.kernel + (f" #{number + 1}" if number else "")
        rows[name] = kernel_row(kernels[launch.kernel], first, second, voxels, launch, call)
    predicted = sum(row["microseconds"] for row in rows.values())
    least = 1e6 * call.least_bytes() / COPY
    return {
        "launches": len(real),
        "allocations": allocations(call, library),
        "microseconds": round(predicted, 1),
        "share_of_copy": round(least / predicted, 3),
        "kernels": rows,
    }

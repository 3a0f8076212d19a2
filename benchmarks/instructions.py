"""``python -m benchmarks.instructions``: how many instructions the CPU library runs.

Counts do not depend on the machine or its load, so they show a regression that timings would hide.
valgrind's callgrind counts every instruction that libriskmap_cpu.so itself runs on fixed inputs
(what it calls elsewhere, such as memset, is not counted), with one thread and AVX2, since valgrind
knows no AVX-512. They do depend on the compiler: counts are compared only with those of the same
one. ``--update`` keeps the new counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from riskmap_ext import _library

COUNTS = Path(__file__).parent / "instruction_counts.json"
CAPABILITY = "avx2"
TOLERANCE = 0.03
MARK = "getloadavg"  # a function that nothing else calls: callgrind writes its counts at each call


def cases() -> dict[str, Callable[[], object]]:
    """The inputs are made here, the work is done when the case is called."""
    import torch

    import riskmap_ext
    from benchmarks import shapes
    from benchmarks.shapes import BRATS_REGIONS, Shape

    few = Shape("", 4, 2, (21, 22, 23))
    many = Shape("", 87, 1, (13, 14, 15))
    some = Shape("", 12, 1, (19, 20, 21))
    made = {shape: shapes.make_inputs(shape) for shape in (few, many, some)}
    regions = torch.tensor(BRATS_REGIONS)
    region_shape = Shape("", 3, 1, (21, 22, 23))
    region_inputs = shapes.make_inputs(region_shape, num_labels=regions.size(1))

    def loss(inputs, in_forward=True, dtype=torch.float32, last=False, **options):
        logits, target, risk = inputs
        logits = logits.to(dtype)
        if last:
            logits = logits.contiguous(memory_format=torch.channels_last_3d)
        logits.requires_grad_()

        def run() -> None:
            with riskmap_ext.gradient_in_forward(in_forward):
                value = riskmap_ext.weighted_loss(logits, target, risk, **options)
            torch.autograd.grad(value, logits)

        return run

    found = {}
    for shape, inputs in made.items():
        name = f"C={shape.classes}"
        half = torch.bfloat16
        found[f"weighted CE, {name}"] = loss(inputs)
        found[f"weighted CE, {name}, recompute"] = loss(inputs, False)
        found[f"weighted CE, {name}, bf16"] = loss(inputs, dtype=half)
        found[f"weighted CE, {name}, channels last"] = loss(inputs, last=True)
        found[f"weighted CE, {name}, label smoothing"] = loss(inputs, label_smoothing=0.1)
        found[f"weighted CE + Dice, {name}"] = loss(inputs, dice_weight=1.0)
        squared = {"dice_weight": 1.0, "squared_pred": True}
        found[f"weighted CE + squared Dice, {name}"] = loss(inputs, **squared)
        source, target, _ = inputs
        half_source = source.bfloat16()
        table = shapes.make_conditional(shape.classes, shape.classes)
        statistics = partial(riskmap_ext.leep_statistics, num_classes=shape.classes)
        found[f"LEEP statistics, {name}"] = partial(statistics, source, target)
        found[f"LEEP statistics, {name}, bf16"] = partial(statistics, half_source, target)
        maps = partial(riskmap_ext.transferability_map, target=target, conditional=table)
        found[f"transferability map, {name}"] = partial(maps, source)
        risk = partial(riskmap_ext.risk_map, source, target, table, scheme="exponential")
        found[f"risk map, {name}"] = partial(risk, range=(0.5, 3.0))
        found[f"risk map, {name}, range of the image"] = risk
        found[f"risk map, {name}, power"] = partial(risk, scheme="power")
    found["regions"] = loss(region_inputs, dice_weight=1.0, regions=regions)
    return found


def count() -> dict[str, int]:
    """Instructions by case, from a run under valgrind (about a minute)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind"
        command = [
            *("valgrind", "--tool=callgrind", "--dump-line=no", f"--dump-before={MARK}"),
            *(f"--callgrind-out-file={out}", sys.executable, "-m", __spec__.name, "--worker"),
        ]
        environment = {
            **os.environ,
            "RISKMAP_CPU_CAPABILITY": CAPABILITY,
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        names = json.loads(done.stdout.splitlines()[-1])
        # The first file is what came before the first mark.
        counts = {
            name: own_instructions(Path(f"{out}.{index}")) for index, name in enumerate(names, 2)
        }
    missing = [name for name, instructions in counts.items() if instructions == 0]
    if missing:
        raise RuntimeError(f"no instruction of libriskmap_cpu was seen for: {', '.join(missing)}")
    return counts


def own_instructions(path: Path) -> int:
    """What callgrind attributes to libriskmap_cpu itself, callees elsewhere left out."""
    objects: dict[str, str] = {}
    current, total, is_call = "", 0, False
    with path.open() as file:
        for line in file:
            if named := re.match(r"(c?)ob=(\(\d+\))(?: (.*))?", line):
                callee, number, name = named.groups()
                if name:
                    objects[number] = name
                if not callee:
                    current = objects.get(number, "")
            elif line.startswith("calls="):
                is_call = True  # the next line holds the cost of the callee
            elif line[:1].isdigit() or line[:1] in "+-*":
                if not is_call and "libriskmap_cpu" in current:
                    total += int(line.split()[1])
                is_call = False
    return total


def compare(counts: dict[str, int], kept: dict[str, int], tolerance: float) -> bool:
    """Print a line for each case; False where one grew by more than the tolerance."""
    good = True
    for name, now in counts.items():
        before = kept.get(name)
        if before is None:
            print(f"{name:45} {now:>12,} (new: keep it with --update)")
            continue
        change = now / before - 1
        verdict = ""
        if change > tolerance:
            good, verdict = False, f"MORE than {tolerance:.0%} above what is kept"
        elif change < -tolerance:
            verdict = "fewer: keep it with --update"
        print(f"{name:45} {now:>12,} {change:+7.1%}  {verdict}".rstrip())
    for name in kept.keys() - counts.keys():
        good = False
        print(f"{name:45} is kept, but was not counted")
    return good


def _work() -> None:
    """Inside valgrind: every case between two marks; prints their names."""
    import torch

    torch.set_num_threads(1)
    found = cases()
    os.getloadavg()
    for run in found.values():
        run()
        os.getloadavg()
    print(json.dumps(list(found)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions")
    parser.add_argument("--update", action="store_true", help="keep the new counts")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        _work()
        return 0
    if shutil.which("valgrind") is None:
        print("skipped: valgrind is not installed (apt-get install valgrind)")
        return 0
    compiler = (_library.build_facts() or {}).get("compiler", "unknown")
    kept = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    if not options.update and kept.get("compiler") != compiler:
        print(
            f"skipped: the counts in {COUNTS.name} are those of {kept.get('compiler', 'nothing')}"
            f", this library was built by {compiler}; --update replaces them"
        )
        return 0
    counts = count()
    good = compare(counts, kept.get("counts", {}), kept.get("tolerance", TOLERANCE))
    if options.update:
        _keep({"compiler": compiler, "tolerance": TOLERANCE, "counts": counts})
        return 0
    return 0 if good else 1


def _keep(values: dict[str, object]) -> None:
    text = {"instruction_set": CAPABILITY, "threads": 1, **values}
    beside = COUNTS.with_suffix(".json.part")
    beside.write_text(json.dumps(text, indent=2) + "\n")
    os.replace(beside, COUNTS)


if __name__ == "__main__":
    sys.exit(main())

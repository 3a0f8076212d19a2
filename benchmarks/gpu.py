"""``python -m benchmarks.gpu``: the ops on a GPU against the same formulas in PyTorch.

Times are medians of CUDA events around single runs; the logits are many times as large as the
caches. ``share`` is what the least traffic of the work (logits, labels and weights read once,
gradient or map written once; for the paths that must read the logits twice, twice) would take at
the speed of a device copy, over the time taken. Every contender is first shown to compute what ours
computes. Rows are written after each problem: an interrupted run keeps what it has measured.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import riskmap_ext
from benchmarks import peers, results
from benchmarks.problem import COMPILE, EAGER, OURS, RECOMPUTE, Outputs, relative_error

CE, CE_DICE, LEEP, RISK = "weighted CE", "weighted CE + Dice", "LEEP statistics", "risk map"
WORKS = (CE, CE_DICE, LEEP, RISK)
CLASSES = (2, 4, 16, 105)
LARGE = (4, 105)  # classes measured on several gigabytes too
DTYPES = (torch.float32, torch.bfloat16)
RANGE = (0.5, 3.0)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

FIELDS = (
    *("work", "contender", "classes", "batch", "spatial", "voxels", "dtype", "logits_gb"),
    *("median_ms", "q25_ms", "q75_ms", "rounds", "moved_bytes", "gb_per_s", "copy_gb_per_s"),
    *("share", "extra_bytes_per_voxel", "note", "date", "device", "torch", "cuda", "python"),
    "riskmap_ext",
)
Row = dict[str, str]


@dataclass(frozen=True)
class Size:
    """Logits [2, classes, *spatial] of about so many bytes in float32."""

    classes: int
    bytes: float

    @property
    def spatial(self) -> tuple[int, int, int]:
        side = 128 if self.bytes >= 1e8 else 16
        return (max(1, round(self.bytes / (4 * 2 * self.classes * side * side))), side, side)

    @property
    def voxels(self) -> int:
        depth, height, width = self.spatial
        return 2 * depth * height * width


class Inputs:
    """Logits that mostly agree with the labels; half of the voxels are background."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (2, *size.spatial)
        self.size = size
        target = torch.randint(size.classes, shape, generator=generator, device=device)
        background = torch.rand(shape, generator=generator, device=device) < 0.5
        self.target = target.masked_fill_(background, 0)
        del background
        logits = torch.empty((2, size.classes, *size.spatial), dtype=dtype, device=device)
        logits.normal_(generator=generator)
        at = self.target.unsqueeze(1)
        self.logits = logits.scatter_add_(
            1, at, torch.full((), 3.0, dtype=dtype, device=device).expand(at.shape)
        )
        self.risk = 1 + 9 * torch.rand(shape, generator=generator, device=device)
        table = 3 * torch.randn(size.classes, size.classes, generator=generator, device=device)
        self.conditional = torch.softmax(table, dim=0)


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[], Outputs]
    moved_bytes: int

    @property
    def compiled(self) -> bool:
        return self.name.startswith(COMPILE)


def contenders(work: str, inputs: Inputs) -> Iterator[Contender]:
    logits, target, risk = inputs.logits, inputs.target, inputs.risk
    once = target.nbytes + risk.nbytes
    if work == CE:
        ours = partial(riskmap_ext.weighted_loss, normalization="valid")
        least = 2 * logits.nbytes + once
        run = partial(_with_gradient, logits, target, risk)
        yield Contender(OURS, partial(run, ours), least)
        yield Contender(RECOMPUTE, partial(_recompute, run, ours), least + logits.nbytes + once)
        yield from _formulas(run, least, {"": peers.weighted_cross_entropy})
    elif work == CE_DICE:
        ours = partial(riskmap_ext.weighted_loss, normalization="valid", dice_weight=1.0)
        least = 3 * logits.nbytes + 2 * once
        run = partial(_with_gradient, logits, target, risk)
        yield Contender(OURS, partial(run, ours), least)
        formulas = {
            ", one-hot": peers.weighted_ce_dice_one_hot,
            ", gather": peers.weighted_ce_dice_gather,
        }
        yield from _formulas(run, least, formulas)
    elif work == LEEP:
        least = logits.nbytes + target.nbytes
        run = partial(_forward, logits, target, inputs.size.classes)
        yield Contender(OURS, partial(run, riskmap_ext.leep_statistics), least)
        formulas = {
            ", matmul": peers.leep_statistics_matmul,
            ", index_add": peers.leep_statistics_index_add,
        }
        yield from _formulas(run, least, formulas)
    else:
        least = logits.nbytes + target.nbytes + 4 * inputs.size.voxels
        arguments = (logits, target, inputs.conditional)
        ours = partial(riskmap_ext.risk_map, scheme="exponential", range=RANGE)
        yield Contender(OURS, partial(_forward, *arguments, ours), least)
        run = partial(_forward, *arguments, *RANGE)
        formulas = {", gather": peers.risk_map, ", matmul": peers.risk_map_matmul}
        yield from _formulas(run, least, formulas)


def _formulas(
    run: Callable[..., Outputs], least: int, formulas: dict[str, Callable[..., Tensor]]
) -> Iterator[Contender]:
    for suffix, formula in formulas.items():
        yield Contender(EAGER + suffix, partial(run, formula), least)
        compiled = torch.compile(formula, dynamic=False)
        yield Contender(COMPILE + suffix, partial(run, compiled), least)


def _with_gradient(
    logits: Tensor, target: Tensor, risk: Tensor, loss: Callable[..., Tensor]
) -> Outputs:
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, target, risk)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def _recompute(run: Callable[..., Outputs], loss: Callable[..., Tensor]) -> Outputs:
    with riskmap_ext.gradient_in_forward(False):
        return run(loss)


def _forward(*arguments) -> Outputs:
    *inputs, function = arguments
    return (function(*inputs),)


class Clock:
    """Times runs on a device; on the CPU (a dry run) with the clock on the wall."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.on_gpu = device.type == "cuda"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def times(self, run: Callable[[], object]) -> list[float]:
        """Seconds of 3 to 30 runs, after two that warm up."""
        run()
        self.wait()
        begin = time.perf_counter()
        run()
        self.wait()
        rounds = int(self.seconds / max(time.perf_counter() - begin, 1e-6))
        rounds = max(3, min(30, rounds))
        if not self.on_gpu:
            return [self._wall(run) for _ in range(rounds)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * rounds)]
        for turn in range(rounds):
            marks[2 * turn].record()
            run()
            marks[2 * turn + 1].record()
        self.wait()
        pairs = zip(marks[::2], marks[1::2], strict=True)
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def _wall(self, run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def extra_bytes(self, run: Callable[[], Outputs]) -> int | None:
        """Memory beyond inputs and results at the worst moment of a run."""
        if not self.on_gpu:
            return None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = run()
        peak = torch.cuda.max_memory_allocated() - before
        return peak - sum(output.nbytes for output in outputs)

    def copy_bytes_per_second(self, nbytes: int) -> float:
        source = torch.ones(nbytes // 4, device=self.device)
        into = torch.empty_like(source)
        return 2 * source.nbytes / statistics.median(self.times(lambda: into.copy_(source)))


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.clock = Clock(self.device, options.seconds)
        self.path: Path = options.output or _default_path(self.device)
        self.deadline = time.monotonic() + options.limit
        self.small = options.gigabytes * 1e9
        self.rows: list[Row] = []
        self.copy = self.clock.copy_bytes_per_second(int(min(2e9, 4 * self.small)))
        self.common = facts(self.device) | {"copy_gb_per_s": f"{self.copy / 1e9:.1f}"}
        print(f"{self.common['device']}: copy {self.copy / 1e9:.0f} GB/s", flush=True)

    def run(self) -> None:
        small = [Size(classes, self.small) for classes in CLASSES]
        large = [Size(classes, 4 * self.small) for classes in LARGE]
        for size in small + large:
            for dtype in DTYPES:
                self.measure(size, dtype, WORKS, compiled=False)
        # Compiling takes seconds for each: what matters most first, as far as the time goes.
        for work, dtype in (
            *((CE, DTYPES[0]), (CE_DICE, DTYPES[0]), (LEEP, DTYPES[0]), (CE, DTYPES[1])),
            *((RISK, DTYPES[0]), (CE_DICE, DTYPES[1]), (LEEP, DTYPES[1]), (RISK, DTYPES[1])),
        ):
            for size in (small[1], small[3], small[2], small[0]):
                self.measure(size, dtype, (work,), compiled=True)

    def measure(
        self, size: Size, dtype: torch.dtype, works: tuple[str, ...], *, compiled: bool
    ) -> None:
        if time.monotonic() > self.deadline:
            return
        inputs = Inputs(size, dtype, self.device)
        for work in works:
            expected: Outputs | None = None
            for each in contenders(work, inputs):
                if each.name == OURS:
                    expected = each.run()
                if each.compiled == compiled and time.monotonic() < self.deadline:
                    self.rows.append(self._row(work, inputs, each, expected))
            del expected
        results.write(self.rows, self.path, FIELDS)
        torch.compiler.reset()
        gc.collect()

    def _row(self, work: str, inputs: Inputs, each: Contender, expected: Outputs | None) -> Row:
        size, logits = inputs.size, inputs.logits
        row = {
            **dict.fromkeys(FIELDS, ""),
            **self.common,
            "work": work,
            "contender": each.name,
            "classes": str(size.classes),
            "batch": "2",
            "spatial": "x".join(map(str, size.spatial)),
            "voxels": str(size.voxels),
            "dtype": str(logits.dtype).removeprefix("torch."),
            "logits_gb": f"{logits.nbytes / 1e9:.2f}",
            "moved_bytes": str(each.moved_bytes),
        }
        try:
            row["note"] = self._disagreement(each, expected, TOLERANCE[logits.dtype])
            times = self.clock.times(each.run)
            extra = self.clock.extra_bytes(each.run)
        except Exception as error:  # one contender must not take the others along
            row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            return row
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        row |= {
            "median_ms": f"{median * 1e3:.4f}",
            "q25_ms": f"{low * 1e3:.4f}",
            "q75_ms": f"{high * 1e3:.4f}",
            "rounds": str(len(times)),
            "gb_per_s": f"{each.moved_bytes / median / 1e9:.1f}",
            "share": f"{each.moved_bytes / median / self.copy:.3f}",
        }
        if extra is not None:
            row["extra_bytes_per_voxel"] = f"{extra / size.voxels:.2f}"
        return row

    @staticmethod
    def _disagreement(each: Contender, expected: Outputs | None, tolerance: float) -> str:
        if expected is None or each.name == OURS:
            return ""
        errors = [relative_error(*pair) for pair in zip(each.run(), expected, strict=True)]
        return "" if max(errors) <= tolerance else f"off by {max(errors):.1e} from ours"


def facts(device: torch.device) -> Row:
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or ""),
        "python": sys.version.split()[0],
        "riskmap_ext": riskmap_ext.__version__,
    }


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[Row]) -> str:
    """One line for each problem: times in ms, in brackets the share of the copy bandwidth."""
    head = ("work", "C", "dtype", "GB", "ours", "recompute", "eager", "torch.compile", "extra B")
    lines = [head]
    problems = dict.fromkeys((r["work"], r["classes"], r["dtype"], r["logits_gb"]) for r in rows)
    for key in problems:
        own = [r for r in rows if (r["work"], r["classes"], r["dtype"], r["logits_gb"]) == key]
        ours = _best(own, lambda name: name == OURS)
        base = float(ours["median_ms"]) if ours else None
        lines.append(
            (
                *key,
                _cell(ours, None),
                _cell(_best(own, lambda name: name == RECOMPUTE), None),
                _cell(_best(own, lambda name: name.startswith(EAGER)), base),
                _cell(_best(own, lambda name: name.startswith(COMPILE)), base),
                ours["extra_bytes_per_voxel"] if ours else "",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    ]
    notes = [
        f"{r['work']}, C={r['classes']}, {r['dtype']}, {r['contender']}: {r['note']}"
        for r in rows
        if r["note"]
    ]
    return "\n".join(line.rstrip() for line in text + notes)


def _best(rows: list[Row], wanted: Callable[[str], bool]) -> Row | None:
    timed = [row for row in rows if wanted(row["contender"]) and row["median_ms"]]
    return min(timed, key=lambda row: float(row["median_ms"]), default=None)


def _cell(row: Row | None, base: float | None) -> str:
    if row is None:
        return "-"
    median = float(row["median_ms"])
    if base is None:
        return f"{median:.2f} ({float(row['share']):.0%})"
    return f"{median:.2f} ({median / base:.1f}x)"


def _default_path(device: torch.device) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", facts(device)["device"].lower()).strip("-")
    return Path(__file__).parent / "results" / f"gpu-{name}.csv"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a dry run")
    parser.add_argument("--gigabytes", type=float, default=0.5, help="float32 logits of a problem")
    parser.add_argument("--seconds", type=float, default=0.15, help="of timed runs per contender")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which to stop")
    parser.add_argument("--output", type=Path, metavar="CSV")
    bench = Bench(parser.parse_args(arguments))
    bench.run()
    print(table(bench.rows))
    print(f"rows: {bench.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

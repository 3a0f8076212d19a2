"""``python -m benchmarks.gpu``: the ops on a GPU against the same formulas in PyTorch.

Times are medians of CUDA events around single runs, the contenders of a problem and a device copy
in turns. Before each run the L2 cache is filled with something else, and the device is kept busy
until the host has sent the run: the time is the device's alone (``wall_ms`` has the whole call,
with warm caches). ``share`` is the time of a copy of as many bytes as the work must move, over the
time taken; it must read logits, labels and weights once, with Dice twice, and write the gradient or
the map once. Each contender is first compared with ours. Rows are written as they come: an
interrupted run keeps what it has measured.

``--compile N`` fills torch.compile's cache for a later run, in N processes; needs torch alone.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import itertools
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import gpu_head, gpu_table, peers
from benchmarks.gpu_table import CE, CE_DICE, HEAD_CE, HEAD_CE_DICE, LEEP, RISK, Row
from benchmarks.problem import COMPILE, EAGER, OURS, RECOMPUTE, Outputs, relative_error
from benchmarks.shapes import FULL, Shape, make_conditional, make_inputs, shape

# Half a gigabyte of float32 logits, beside the shapes of the other benchmarks.
LARGE = (
    Shape("g", classes=105, batch=2, spatial=(64, 96, 96)),
    Shape("f", classes=4, batch=2, spatial=(240, 256, 256)),
)
# What is trained with most comes first.
SHAPES = (*(FULL[key] for key in "aed"), *LARGE, *(FULL[key] for key in "bc"))
HEADS = (FULL["d"], FULL["e"], LARGE[0])
FEATURES = 32  # of a head
TINY = (shape("a", "tiny"), shape("b", "tiny"))
DTYPES = (torch.float32, torch.bfloat16)
BLOCK = 12  # voxels a side of one label; fits no tile
RANGE = (0.5, 3.0)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
EAGER_EVERY = 4  # eager is timed in every fourth round
CACHE = 2**28  # bytes that are read to empty the L2 cache: several times as large
SLEEP = 2_000_000  # cycles, about a millisecond: longer than any contender takes to be sent


@dataclass(frozen=True)
class Problem:
    """``first``: of the formulas that torch.compile gets, the one expected to be the fastest."""

    work: str
    shape: Shape
    dtype: torch.dtype
    first: bool = True


def problems(tiny: bool) -> list[Problem]:
    """What decides first; other ways to write a formula for torch.compile come last."""
    shapes = TINY if tiny else SHAPES
    chosen = [
        Problem(work, each, dtype)
        for works in ((CE, CE_DICE), (LEEP, RISK))
        for dtype, each, work in itertools.product(DTYPES, shapes, works)
    ]
    heads = itertools.product((HEAD_CE, HEAD_CE_DICE), DTYPES, TINY[1:] if tiny else HEADS)
    chosen += [Problem(work, each, dtype) for work, dtype, each in heads]
    others = itertools.product((CE_DICE, LEEP, RISK), DTYPES, shapes)
    return chosen + [Problem(work, each, dtype, False) for work, dtype, each in others]


class Inputs:
    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.key = problem.shape, problem.dtype
        self.classes = problem.shape.classes
        logits, self.target, self.risk = make_inputs(problem.shape, block=BLOCK, device=device)
        self.logits = logits.to(problem.dtype)
        self.conditional = make_conditional(self.classes, self.classes).to(device)

    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features, weight and bias of a head that makes such logits."""
        batch, classes, *spatial = self.logits.shape
        make = partial(torch.randn, dtype=self.logits.dtype, device=self.logits.device)
        return make(batch, FEATURES, *spatial), make(classes, FEATURES) / 6, make(classes)


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[], Outputs]

    @property
    def compiled(self) -> bool:
        return self.name.startswith(COMPILE)

    @property
    def eager(self) -> bool:
        return self.name.startswith(EAGER)


def least_bytes(work: str, inputs: Inputs) -> int:
    logits, target, risk = (t.nbytes for t in (inputs.logits, inputs.target, inputs.risk))
    features = logits // inputs.classes * FEATURES
    return {
        HEAD_CE: 2 * features + target + risk,
        HEAD_CE_DICE: 3 * features + 2 * (target + risk),
        CE: 2 * logits + target + risk,
        CE_DICE: 3 * logits + 2 * (target + risk),
        LEEP: logits + target,
        RISK: logits + target + 4 * inputs.target.numel(),
    }[work]


def contenders(problem: Problem, inputs: Inputs, *, ours: bool = True) -> Iterator[Contender]:
    work, logits, target = problem.work, inputs.logits, inputs.target
    if work in (HEAD_CE, HEAD_CE_DICE):
        head, maps = inputs.head(), (target, inputs.risk)
        for name, run in gpu_head.runs(work == HEAD_CE_DICE, head, maps, ours):
            yield Contender(name, run)
        return
    if work in (CE, CE_DICE):
        run = partial(_with_gradient, logits, target, inputs.risk)
    elif work == LEEP:
        run = partial(_forward, logits, target, inputs.classes)
    else:
        run = partial(_forward, logits, target, inputs.conditional)
    if ours:
        yield from _ours(work, run)
    if work == RISK:
        run = partial(run, *RANGE)
    # The first of each is what torch.compile is expected to make most of.
    by_work: dict[str, dict[str, Callable[..., Tensor]]] = {
        CE: {"": peers.weighted_cross_entropy},
        CE_DICE: {
            ", one-hot": peers.weighted_ce_dice_one_hot,
            ", gather": peers.weighted_ce_dice_gather,
        },
        LEEP: {
            ", matmul": peers.leep_statistics_matmul,
            ", index_add": peers.leep_statistics_index_add,
        },
        RISK: {", gather": peers.risk_map, ", matmul": peers.risk_map_matmul},
    }
    formulas = by_work[work]
    for index, (suffix, formula) in enumerate(formulas.items()):
        if problem.first == (index == 0):
            compiled = torch.compile(formula, dynamic=False)
            yield Contender(COMPILE + suffix, partial(run, compiled))
    if problem.first:
        for suffix, formula in formulas.items():
            yield Contender(EAGER + suffix, partial(run, formula))


def _ours(work: str, run: Callable[..., Outputs]) -> Iterator[Contender]:
    import riskmap_ext  # not built yet where --compile runs

    if work in (CE, CE_DICE):
        loss = partial(riskmap_ext.weighted_loss, normalization="valid")
        loss = partial(loss, dice_weight=1.0) if work == CE_DICE else loss
        yield Contender(OURS, partial(run, loss))
        if work == CE:
            yield Contender(RECOMPUTE, partial(_recompute, run, loss))
    elif work == LEEP:
        yield Contender(OURS, partial(run, riskmap_ext.leep_statistics))
    else:
        risk_map = partial(riskmap_ext.risk_map, scheme="exponential", range=RANGE)
        yield Contender(OURS, partial(run, risk_map))


def _with_gradient(
    logits: Tensor, target: Tensor, risk: Tensor, loss: Callable[..., Tensor]
) -> Outputs:
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, target, risk)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def _recompute(run: Callable[..., Outputs], loss: Callable[..., Tensor]) -> Outputs:
    import riskmap_ext

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
        self.other = torch.ones(CACHE // 4 if self.on_gpu else 1, device=device)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def wall(self, run: Callable[[], object]) -> float:
        self.wait()
        begin = time.perf_counter()
        kept = run()
        self.wait()
        took = time.perf_counter() - begin
        del kept
        return took

    def times(self, runs: dict[str, Callable[[], object]], every: dict[str, int]) -> dict:
        """Seconds of 9 to 30 rounds, in an order that rotates; all have run before."""
        once = sum(self.wall(run) / every.get(name, 1) for name, run in runs.items())
        rounds = max(9, min(30, int(self.seconds * len(runs) / max(once, 1e-6))))
        names = list(runs)
        marks: dict[str, list] = {name: [] for name in names}
        for turn in range(rounds):
            at = turn % len(names)
            for name in names[at:] + names[:at]:
                if turn % every.get(name, 1) == 0:
                    marks[name].append(self._one(runs[name]))
        self.wait()
        if not self.on_gpu:
            return marks
        return {
            name: [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
            for name, pairs in marks.items()
        }

    def _one(self, run: Callable[[], object]):
        if not self.on_gpu:
            return self.wall(run)
        # Read, not written: lines that wait to be written back would be paid for by the next run.
        self.other.sum()
        torch.cuda._sleep(SLEEP)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        return begin, end

    def extra_bytes(self, run: Callable[[], Outputs]) -> int | None:
        """Memory beyond inputs and results at the worst moment of a run."""
        if not self.on_gpu:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = run()
        peak = torch.cuda.max_memory_allocated() - before
        return peak - sum(output.nbytes for output in outputs)

    def copy(self, nbytes: int) -> Callable[[], object]:
        """Reads and writes so many bytes together."""
        source = torch.ones(max(nbytes // 8, 1), device=self.device)
        return partial(torch.empty_like(source).copy_, source)


class Bench:
    def __init__(self, device: torch.device, seconds: float, path: Path, limit: float) -> None:
        self.device, self.path = device, path
        self.clock = Clock(device, seconds)
        self.deadline = time.monotonic() + limit
        self.rows: list[Row] = []
        self.wrong = self.done = 0
        large = 2**31 if self.clock.on_gpu else 2**20
        copy = self.clock.copy(large)
        copy()
        median = statistics.median(self.clock.times({"copy": copy}, {})["copy"])
        self.common = facts(device) | {"large_copy_gb_per_s": f"{large / median / 1e9:.0f}"}
        print(f"{self.common['device']}: copies {self.common['large_copy_gb_per_s']} GB/s")
        gpu_table.begin(path)

    def run(self, chosen: list[Problem]) -> None:
        inputs: Inputs | None = None
        for problem in chosen:
            if time.monotonic() > self.deadline:
                break
            if inputs is None or inputs.key != (problem.shape, problem.dtype):
                inputs = None  # its memory first
                inputs = Inputs(problem, self.device)
            self.measure(problem, inputs)
            self.done += 1
            torch.compiler.reset()
            gc.collect()

    def measure(self, problem: Problem, inputs: Inputs) -> None:
        least = least_bytes(problem.work, inputs)
        expected: Outputs | None = None
        runs: dict[str, Callable[[], object]] = {}
        rows: dict[str, Row] = {}
        for each in contenders(problem, inputs):
            row = rows[each.name] = self._row(problem, each.name, least)
            try:
                found = each.run()
                if each.name == OURS:
                    expected = found
                self._compare(row, found, expected, TOLERANCE[problem.dtype])
                del found
                each.run()  # torch.compile has chosen its kernels now
                row["extra_bytes"] = _text(self.clock.extra_bytes(each.run))
            except Exception as error:  # one contender must not take the others along
                row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                self.wrong += each.name.startswith(OURS)
                continue
            runs[each.name] = each.run
        del expected
        try:
            if len(runs) < len(rows):
                self._recover()
            if runs:
                self._time(rows, runs, least)
        finally:
            gpu_table.append(list(rows.values()), self.path)
            self.rows += rows.values()
        print(gpu_table.line(list(rows.values())), flush=True)

    def _time(self, rows: dict[str, Row], runs: dict, least: int) -> None:
        copy = self.clock.copy(least)
        copy()
        every = {name: EAGER_EVERY for name in runs if name.startswith(EAGER)}
        times = self.clock.times({**runs, "copy": copy}, every)
        copied = statistics.median(times.pop("copy"))
        ours = statistics.median(times[OURS]) if OURS in times else None
        for name, taken in times.items():
            low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
            walls = [self.clock.wall(runs[name]) for _ in range(2 if name in every else 5)]
            rows[name] |= {
                "median_ms": f"{median * 1e3:.4f}",
                "q25_ms": f"{low * 1e3:.4f}",
                "q75_ms": f"{high * 1e3:.4f}",
                "rounds": str(len(taken)),
                "wall_ms": f"{statistics.median(walls) * 1e3:.4f}",
                "copy_ms": f"{copied * 1e3:.4f}",
                "share": f"{copied / median:.3f}",
                "times_ours": f"{median / ours:.3f}" if ours else "",
            }

    def _compare(
        self, row: Row, found: Outputs, expected: Outputs | None, tolerance: float
    ) -> None:
        if expected is None:
            row["note"] = "not compared: ours failed"
            return
        error = max(relative_error(*pair) for pair in zip(found, expected, strict=True))
        row["error"] = f"{error:.1e}"
        if not error <= tolerance:  # NaN, too
            row["note"] = f"off by {error:.1e} from ours"
            self.wrong += 1

    def _recover(self) -> None:
        """After an error for want of memory; raises where the device does not answer any more."""
        self.clock.wait()
        gc.collect()
        if self.clock.on_gpu:
            torch.cuda.empty_cache()

    def _row(self, problem: Problem, name: str, least: int) -> Row:
        shape = problem.shape
        return {
            **dict.fromkeys(gpu_table.FIELDS, ""),
            **self.common,
            "work": problem.work,
            "contender": name,
            "shape": shape.key,
            "classes": str(shape.classes),
            "batch": str(shape.batch),
            "spatial": "x".join(map(str, shape.spatial)),
            "voxels": str(shape.voxels),
            "dtype": str(problem.dtype).removeprefix("torch."),
            "least_bytes": str(least),
        }


def _text(number: int | None) -> str:
    return "" if number is None else str(number)


def fill_cache(options: argparse.Namespace, index: int, count: int) -> None:
    """Runs every ``count``-th of the compiled formulas once."""
    os.nice(10)  # whoever builds the library beside it goes first
    device = torch.device(options.device)
    for problem in problems(tiny=device.type == "cpu")[index::count]:
        inputs = Inputs(problem, device)
        for each in contenders(problem, inputs, ours=False):
            if each.compiled:
                with contextlib.suppress(Exception):  # the benchmark reports it
                    each.run()
        torch.compiler.reset()
        del inputs
        gc.collect()


def fill_cache_in_processes(options: argparse.Namespace) -> int:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    count = options.compile
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", options.device, "--shard"]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    running = [
        subprocess.Popen([*command, f"{index}/{count}"], env=environment) for index in range(count)
    ]
    deadline = time.monotonic() + options.limit
    cut = 0
    for process in running:
        try:
            process.wait(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            cut += 1
    # What torch.compile chose by timing, it timed beside others: it is to choose again, alone.
    for choice in Path(cache_dir()).rglob("*.best_config"):
        choice.unlink()
    failed = sum(process.returncode != 0 for process in running) - cut
    print(f"compiled in {count} processes: {failed} failed, {cut} cut off for want of time")
    return min(failed, 1)


def facts(device: torch.device) -> Row:
    import riskmap_ext

    on_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "driver": _driver() if on_gpu else "",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or ""),
        "python": sys.version.split()[0],
        "riskmap_ext": riskmap_ext.__version__,
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.splitlines()[0].strip() if done.stdout else ""


def _default_path(device: torch.device) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", facts(device)["device"].lower()).strip("-")
    return Path(__file__).parent / "results" / f"gpu-{name}.csv"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a dry run")
    parser.add_argument("--seconds", type=float, default=0.1, help="of timed runs per contender")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which to stop")
    parser.add_argument("--output", type=Path, metavar="CSV")
    parser.add_argument("--compile", type=int, metavar="N", help="only fill torch.compile's cache")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = False  # float32 for everyone: convolutions have it by default
    if options.compile:
        return fill_cache_in_processes(options)
    if options.shard:
        fill_cache(options, *map(int, options.shard.split("/")))
        return 0
    device = torch.device(options.device)
    path = options.output or _default_path(device)
    bench = Bench(device, options.seconds, path, options.limit)
    chosen = problems(tiny=device.type == "cpu")
    bench.run(chosen)
    print(gpu_table.table(bench.rows))
    print(f"rows: {path}")
    missing = sum(not row["median_ms"] for row in bench.rows)
    print(
        f"{bench.done} of {len(chosen)} problems; of {len(bench.rows)} rows {missing} without a "
        f"time, {bench.wrong} wrong"
    )
    return 1 if bench.wrong or not bench.done else 0


if __name__ == "__main__":
    sys.exit(main())

"""``make gpu-check``: builds for the GPU at hand, tests, sanitizes and measures, within minutes.

Every step runs in a process of its own under a time limit, and reports even where an earlier one
failed; one table comes last. Needs a Python with torch >= 2.10 for CUDA, cmake, ninja, pybind11 and
pytest, and nvcc; no network, no virtual environment, no other package. ``--device cpu`` tries the
steps themselves on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "python_tests"
OP_TESTS = (
    *("weighted_loss", "regions", "gradient_in_forward", "dice", "leep", "source_regions"),
    *("transferability_map", "risk_map", "autograd", "identities", "cuda_bad_values"),
)
RUNTIME = "python_tests/test_cuda_runtime.py"
TAIL = 25  # lines of a failed step that are shown

PASS, FAIL, SKIP, LATE = "pass", "FAIL", "skipped", "TIME UP"


def _any(output: str) -> None:
    """Leaves the verdict to the exit status."""


@dataclass
class Step:
    """``seconds``: at most; ``least``: what earlier steps must leave for it."""

    name: str
    command: list[str]
    seconds: float
    least: float = 5.0
    environment: dict[str, str] = field(default_factory=dict)
    judge: Callable[[str], tuple[str, str] | None] = _any
    unavailable: str = ""  # why it cannot run here


@dataclass
class Outcome:
    name: str
    verdict: str
    seconds: float
    note: str


def run(step: Step, seconds: float, log: Path) -> Outcome:
    """Runs a step in a process group that ends with it."""
    if step.unavailable:
        return Outcome(step.name, SKIP, 0.0, step.unavailable)
    print(f"\n=== {step.name} (at most {seconds:.0f} s)", flush=True)
    begin = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": _path()} | step.environment
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(step.name, FAIL, 0.0, str(error))
        try:
            code: int | None = process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            code = None
        except BaseException:
            _end(process)
            raise
        _end(process)
    took = time.monotonic() - begin
    output = log.read_text(errors="replace")
    verdict, note = (LATE, _last(output)) if code is None else _verdict(step, code, output)
    shown = output.splitlines()[-TAIL:] if verdict in (FAIL, LATE) else [_last(output)]
    print("\n".join(shown), flush=True)
    print(f"=== {step.name}: {verdict} after {took:.0f} s", flush=True)
    return Outcome(step.name, verdict, took, note)


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of the step's own process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _verdict(step: Step, code: int, output: str) -> tuple[str, str]:
    judged = step.judge(output)
    if judged is not None:
        return judged
    note = _last(output)
    return (PASS, note) if code == 0 else (FAIL, f"exit status {code}: {note}")


def _last(output: str) -> str:
    lines = [line.strip(" =") for line in output.splitlines() if line.strip(" =")]
    return lines[-1][:110] if lines else ""


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])


def _judge_info(output: str) -> tuple[str, str] | None:
    """The line about the CUDA library is what matters here."""
    lines = [line for line in output.splitlines() if line.startswith("CUDA ")]
    if not lines:
        return None
    note = " ".join(lines[0].split())
    return (FAIL if note.startswith("CUDA no:") else PASS), note


def _judge_sanitizer(output: str) -> tuple[str, str] | None:
    for refusal in ("Device not supported", "Unable to find injection library"):
        if refusal in output:
            return SKIP, f"compute-sanitizer: {refusal}"
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    if not summary:
        return None
    clean = all(
        f" {zero}" in summary[-1] for zero in ("0 errors", "0 hazards") if zero[2:] in summary[-1]
    )
    note = summary[-1].strip(" =")
    return (PASS, note) if clean and "exercised" in output else (FAIL, note)


def steps(options: argparse.Namespace, work: Path) -> list[Step]:
    python = sys.executable
    gpu = options.device != "cpu"
    only_gpu = "" if gpu else "needs a GPU"
    pytest = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "cuda" if gpu else "not cuda",
    ]
    sanitizer = shutil.which("compute-sanitizer") or ""
    no_sanitizer = only_gpu or ("" if sanitizer else "compute-sanitizer is not installed")
    exercise = [python, str(TESTS / "gpu_check.py"), "--exercise", "--device", options.device]
    rows = work / "gpu.csv"
    tests = OP_TESTS if gpu else ("risk_map",)

    def sanitized(tool: str) -> Step:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *exercise]
        # Without its caching allocator every tensor of torch is an allocation with its own end.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Step(tool, command, 90, 20, environment, _judge_sanitizer, no_sanitizer)

    return [
        Step(
            "build",
            [python, "setup.py", "build_ext", "--inplace"],
            *(240, 60),
            environment={"RISKMAP_CUDA": "ON" if gpu else "OFF"},
            unavailable="--no-build" if options.no_build else "",
        ),
        Step("info", [python, "-m", "riskmap_ext.info"], 60, judge=_judge_info if gpu else _any),
        Step("exercise", exercise, 60),
        Step("op tests", [*pytest, *(f"python_tests/test_{name}.py" for name in tests)], 150, 40),
        Step("determinism", [*pytest, "python_tests/test_determinism.py"], 40, 10),
        Step(
            "graph capture",
            [*pytest, RUNTIME, "-k", "not reduce_overhead"],
            60,
            20,
            unavailable=only_gpu,
        ),
        Step(
            "reduce-overhead",
            [*pytest, RUNTIME, "-k", "reduce_overhead"],
            90,
            30,
            unavailable=only_gpu,
        ),
        sanitized("memcheck"),
        sanitized("racecheck"),
        Step(
            "benchmark",
            [python, "-m", "benchmarks.gpu", "--device", options.device, "--output", str(rows)],
            *(150, 90),
        ),
    ]


def exercise(device: str) -> None:
    """Every op, on small shapes of every kind, as compute-sanitizer is to see them."""
    import cases
    import torch

    import riskmap_ext

    where = torch.device(device)
    chosen = [
        cases.BASE,
        *(case for case in cases.SIZES if case.name in ("one_voxel", "volume_13x11x9")),
        *(case for case in cases.CLASSES if max(case.classes, case.source_classes) <= 87),
        *cases.DTYPES,
        *(case for case in cases.STRIDES if len(case.spatial) == 2),
    ]
    for case in chosen:
        riskmap_ext.leep_statistics(*case.leep_call(where)[0])
        maps = case.map_call(where)[0]
        riskmap_ext.transferability_map(*maps)
        riskmap_ext.risk_map(*maps)
        for options in ({}, {"reduction": "none"}, {"dice_weight": float(case.classes > 1)}):
            for path in (True, False):
                args, kwargs = case.loss_call(where)
                with riskmap_ext.gradient_in_forward(path):
                    cases.loss_and_gradients((args, {**kwargs, **options}))
        if case.classes > 1:
            squared = {"dice_weight": 1.0, "squared_pred": True}
            args, kwargs = case.loss_call(where)
            cases.loss_and_gradients((args, {**kwargs, **squared}))
            cases.loss_in_two_steps(case, where)
    for case in (cases.REGION_TABLES[3], cases.REGION_TABLES[11]):
        args, kwargs = case.loss_call(where)
        for squared in (False, True):
            options = {"dice_weight": 1.0, "squared_pred": squared}
            cases.loss_and_gradients((args, {**kwargs, **options}))
    for case in cases.SOURCE_REGION_CASES[3:6]:
        args, kwargs = case.leep_call(where)
        riskmap_ext.leep_statistics(*args, **kwargs)
    if where.type == "cuda":
        torch.cuda.synchronize()
    print(f"exercised {len(chosen)} cases")


def summary(outcomes: list[Outcome], rows: Path, results: Path | None) -> str:
    """The measured rows and the verdicts, as one table."""
    lines = []
    if rows.exists():
        try:
            sys.path.insert(0, str(ROOT))
            from benchmarks import gpu

            lines += [gpu.table(gpu.read(rows)), ""]
        except Exception as error:  # the verdicts are still worth printing
            lines.append(f"rows of the benchmark cannot be shown: {error}")
    if results is not None:
        lines.append(f"rows: {results}")
    lines += [
        f"{one.name:<16}  {one.verdict:<8} {one.seconds:5.0f} s  {one.note}" for one in outcomes
    ]
    return "\n".join(lines)


def keep(rows: Path) -> Path | None:
    """Puts the rows among the results of the benchmarks, under the name of the device."""
    if not rows.exists():
        return None
    import csv

    with rows.open(newline="") as file:
        device = next(csv.DictReader(file), {"device": ""})["device"]
    name = "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
    if name in ("", "cpu"):  # a dry run
        return None
    target = ROOT / "benchmarks" / "results" / f"gpu-{name}.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".part")
    shutil.copyfile(rows, beside)
    os.replace(beside, target)
    return target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all steps together")
    parser.add_argument("--no-build", action="store_true", help="test what is built already")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps alone")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    parser.add_argument("--exercise", action="store_true", help="run every op once and end")
    options = parser.parse_args(arguments)
    if options.exercise:
        exercise(options.device)
        return 0
    if options.device != "cpu" and not options.list:
        import torch

        if not torch.cuda.is_available():
            print(f"gpu-check: torch {torch.__version__} sees no GPU", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as folder:
        return _check(options, Path(folder))


def _check(options: argparse.Namespace, work: Path) -> int:
    chosen = steps(options, work)
    if options.list:
        print("\n".join(step.name for step in chosen))
        return 0
    if options.only:
        unknown = set(options.only) - {step.name for step in chosen}
        if unknown:
            print(f"gpu-check: no step {', '.join(sorted(unknown))}", file=sys.stderr)
            return 2
        chosen = [step for step in chosen if step.name in options.only]
    deadline = time.monotonic() + 60 * options.minutes
    outcomes = []
    for index, step in enumerate(chosen):
        kept = sum(later.least for later in chosen[index + 1 :] if not later.unavailable)
        seconds = min(step.seconds, deadline - time.monotonic() - kept)
        if seconds <= 0:
            outcomes.append(Outcome(step.name, LATE, 0.0, "no time was left for it"))
            continue
        if step.name == "benchmark":
            step.command += ["--limit", f"{max(seconds - 20, 5):.0f}"]
            if options.device == "cpu":
                step.command += ["--gigabytes", "0.0005", "--seconds", "0.01"]
        outcomes.append(run(step, seconds, work / f"{index}.log"))
    rows = work / "gpu.csv"
    print("\n" + summary(outcomes, rows, keep(rows)), flush=True)
    return 0 if all(one.verdict in (PASS, SKIP) for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

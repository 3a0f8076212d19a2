"""``make gpu-check``: builds for the GPU at hand, then whatever decides first, within minutes.

The order: build, a look at what was built, every op against float64, the benchmark, the tests of
the ops, compute-sanitizer with what time is left. Every step runs in a process of its own under a
time limit, and reports even where an earlier one failed; one table comes last. Needs a Python with
torch >= 2.10 for CUDA, cmake, ninja, pybind11 and pytest, and nvcc; no network, no virtual
environment, no plugin of pytest. Rows go to benchmarks/results and, where the environment has OUT,
to that folder, as do the logs of failed steps. ``--device cpu`` tries the steps without a GPU.
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

import op_tests

ROOT = Path(__file__).parents[1]
BESIDE_OP_TESTS = ("autograd", "identities", "cuda_bad_values")
RUNTIME = "python_tests/test_cuda_runtime.py"
LOG_BYTES = 1_000_000  # of a failed step's log that are kept: its end

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
    tail: int = 25  # lines that are shown where it failed
    # An option of the command that makes it end by itself, with so many seconds to spare.
    ends_itself: tuple[str, float] | None = None
    beside: str = ""  # begins with this earlier step, and reports when its own turn comes


@dataclass
class Outcome:
    name: str
    verdict: str
    seconds: float
    note: str


class Run:
    """A step in a process group that ends with it."""

    def __init__(self, step: Step, seconds: float, log: Path) -> None:
        self.step, self.log = step, log
        self.begin = time.monotonic()
        self.end = self.begin + max(seconds, 1.0)
        command = list(step.command)
        if step.ends_itself:
            option, spare = step.ends_itself
            command += [option, f"{max(seconds - spare, 3):.0f}"]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])
        environment = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path} | step.environment
        print(f"\n=== {step.name} (at most {seconds:.0f} s)", flush=True)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | environment,
                start_new_session=True,
            )

    def finish(self) -> Outcome:
        try:
            code: int | None = self.process.wait(timeout=max(self.end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            code = None
            self.interrupt()
        finally:
            self.stop()
        step, took = self.step, time.monotonic() - self.begin
        output = self.log.read_text(errors="replace")
        verdict, note = (LATE, _last(output)) if code is None else _verdict(step, code, output)
        failed = verdict in (FAIL, LATE)
        print("\n".join(output.splitlines()[-step.tail :] if failed else [_last(output)]))
        print(f"=== {step.name}: {verdict} after {took:.0f} s", flush=True)
        return Outcome(step.name, verdict, took, note)

    def interrupt(self) -> None:
        """Lets pytest name the failures that it has seen, and compute-sanitizer sum up."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.process.pid, signal.SIGINT)
            self.process.wait(timeout=3)

    def stop(self) -> None:
        """Ends what is left of the step's own process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _verdict(step: Step, code: int, output: str) -> tuple[str, str]:
    judged = step.judge(output)
    if judged is not None:
        return judged
    note = _last(output)
    return (PASS, note) if code == 0 else (FAIL, f"exit status {code}: {note}")


def _last(output: str) -> str:
    lines = [line.strip(" =") for line in output.splitlines() if line.strip(" =")]
    return lines[-1][:110] if lines else ""


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
    exercised = [line for line in output.splitlines() if line.startswith("exercised")]
    note = "; ".join([summary[-1].strip(" ="), *exercised])
    return (PASS if clean and exercised else FAIL), note


def steps(device: str, build: bool, rows: Path, work: Path) -> list[Step]:
    python = sys.executable
    gpu = device != "cpu"
    only_gpu = "" if gpu else "needs a GPU"
    chosen = ("-p", "no:cacheprovider", "-m", "cuda" if gpu else "not cuda")
    pytest = [python, "-m", "pytest", "-q", *chosen]
    beside = [f"python_tests/test_{name}.py" for name in BESIDE_OP_TESTS]
    tests = [*op_tests.files(), *beside] if gpu else ["python_tests/test_risk_map.py"]
    ops = [python, "python_tests/gpu_ops.py", "--device", device]
    benchmark = [python, "-m", "benchmarks.gpu", "--device", device]
    processes = str(max(2, min(6, (os.cpu_count() or 2) // 2)))
    compiler = {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    sanitizer = shutil.which("compute-sanitizer") or ""
    no_sanitizer = only_gpu or ("" if sanitizer else "compute-sanitizer is not installed")

    def sanitized(tool: str, seconds: float, beside: str = "") -> Step:
        return Step(
            tool,
            [sanitizer, "--tool", tool, "--error-exitcode", "9", *ops, "exercise"],
            *(seconds, 40),
            # Without its caching allocator every tensor of torch is an allocation with its own end.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            judge=_judge_sanitizer,
            unavailable=no_sanitizer,
            ends_itself=("--seconds", 40),  # it starts slowly
            beside=beside,
        )

    return [
        Step(
            "build",
            [python, "setup.py", "build_ext", "--inplace"],
            *(200, 60),
            environment={"RISKMAP_CUDA": "ON" if gpu else "OFF"},
            unavailable="" if build else "--no-build",
        ),
        Step("info", [python, "-m", "riskmap_ext.info"], 40, judge=_judge_info if gpu else _any),
        Step(
            "correctness",
            [*ops, "check"],
            *((75, 40) if gpu else (30, 15)),
            # Threads would wait for one that has lost its core to what compiles beside them.
            environment={"OMP_NUM_THREADS": "1"},
            tail=60,
            ends_itself=("--seconds", 25 if gpu else 5),
        ),
        Step(
            "torch.compile",  # needs nothing of ours: runs while that is built
            [*benchmark, "--compile", processes],
            *(180 if gpu else 75, 0),
            environment=compiler,
            ends_itself=("--limit", 5),
            beside="build",
        ),
        Step(
            "benchmark",
            [*benchmark, "--output", str(rows), *(() if gpu else ("--seconds", "0.01"))],
            *((200, 130) if gpu else (45, 20)),
            environment=compiler,
            ends_itself=("--limit", 30 if gpu else 10),
        ),
        Step("op tests", [*pytest, *tests], 120, 40),
        Step("determinism", [*pytest, "python_tests/test_determinism.py"], 30, 10),
        Step(
            "graph capture",
            [*pytest, RUNTIME, "-k", "not reduce_overhead"],
            *(50, 15),
            unavailable=only_gpu,
        ),
        Step(
            "reduce-overhead",
            [*pytest, RUNTIME, "-k", "reduce_overhead"],
            *(60, 25),
            unavailable=only_gpu,
        ),
        Step(
            "exercise",
            [*ops, "exercise"],
            30,
            unavailable="the sanitizers run it" if gpu and not no_sanitizer else "",
            ends_itself=("--seconds", 15),
        ),
        sanitized("memcheck", 150, beside="op tests"),
        sanitized("racecheck", 120),
    ]


def run_all(chosen: list[Step], deadline: float, work: Path, out: Path | None) -> list[Outcome]:
    outcomes: list[Outcome] = []
    beside: dict[str, Run] = {}
    try:
        for index, step in enumerate(chosen):
            for later in chosen[index + 1 :]:
                if later.beside == step.name and not later.unavailable:
                    seconds = min(later.seconds, deadline - time.monotonic())
                    with contextlib.suppress(OSError):  # tried again, and reported, at its turn
                        beside[later.name] = Run(later, seconds, work / f"{later.name}.log")
            kept = sum(later.least for later in chosen[index + 1 :] if not later.unavailable)
            seconds = min(step.seconds, deadline - time.monotonic() - kept)
            outcome = _one(step, seconds, work, beside.get(step.name))
            outcomes.append(outcome)
            log = work / f"{step.name}.log"
            if out is not None and outcome.verdict in (FAIL, LATE) and log.exists():
                with (out / "failed-steps.log").open("ab") as file:
                    file.write(f"\n=== {step.name}: {outcome.verdict}\n".encode())
                    file.write(log.read_bytes()[-LOG_BYTES:])
    finally:
        for run in beside.values():
            run.stop()
    return outcomes


def _one(step: Step, seconds: float, work: Path, running: Run | None) -> Outcome:
    if step.unavailable:
        return Outcome(step.name, SKIP, 0.0, step.unavailable)
    if running is not None:
        running.end = min(running.end, time.monotonic() + seconds)
        return running.finish()
    if seconds <= 0:
        return Outcome(step.name, LATE, 0.0, "no time was left for it")
    try:
        return Run(step, seconds, work / f"{step.name}.log").finish()
    except OSError as error:
        return Outcome(step.name, FAIL, 0.0, str(error))


def summary(outcomes: list[Outcome], rows: Path, kept: Path | None) -> str:
    """The measured rows and the verdicts, as one table."""
    lines = []
    if rows.exists():
        try:
            sys.path.insert(0, str(ROOT))
            from benchmarks import gpu_table

            lines += [gpu_table.table(gpu_table.read(rows)), ""]
        except Exception as error:  # the verdicts are still worth printing
            lines.append(f"rows of the benchmark cannot be shown: {error}")
    if kept is not None:
        lines.append(f"rows: {kept}")
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
    beside = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(rows, beside)
        os.replace(beside, target)
    except OSError:  # a folder that only the owner may write to
        return None
    return target


def main(arguments: list[str] | None = None) -> int:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all steps together")
    parser.add_argument("--no-build", action="store_true", help="test what is built already")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps alone")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not options.list:
        import torch

        if not torch.cuda.is_available():
            print(f"gpu-check: torch {torch.__version__} sees no GPU", file=sys.stderr)
            return 2
    out = Path(os.environ["OUT"]).resolve() if os.environ.get("OUT") else None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            for name in ("gpu.csv", "failed-steps.log", "summary.txt"):
                (out / name).unlink(missing_ok=True)  # of an earlier run
        rows = (out or work) / "gpu.csv"
        chosen = steps(options.device, not options.no_build, rows, work)
        if options.list:
            print("\n".join(step.name for step in chosen))
            return 0
        if options.only:
            unknown = set(options.only) - {step.name for step in chosen}
            if unknown:
                print(f"gpu-check: no step {', '.join(sorted(unknown))}", file=sys.stderr)
                return 2
            chosen = [step for step in chosen if step.name in options.only]
        outcomes = run_all(chosen, begin + 60 * options.minutes, work, out)
        text = summary(outcomes, rows, keep(rows))
        print(f"\n{text}", flush=True)
        if out is not None:
            (out / "summary.txt").write_text(text + "\n")
    return 0 if all(one.verdict in (PASS, SKIP) for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

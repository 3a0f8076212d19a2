"""``make long-life``: two long fine-tunings, of which one is killed again and again.

Both take the same steps on the hippocampi (RISKMAP_DATA). The second gets a SIGKILL every few
minutes and goes on with ``--resume``. In the end weights, losses and scores must be the same bits.
CPU seconds per step, memory and open files are sampled on the way and must not drift: the median of
the last quarter is held against that of the second one. Started again with its folder, it goes on.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
TICKS = os.sysconf("SC_CLK_TCK")
COMMAND = [sys.executable, "-c", "from riskmap_ext.finetune.cli import main; main()", "finetune"]
SMALL = ("device=cpu", "threads=1", "write.tensorboard=false", "train.patch_size=[24,32,24]")


@dataclass(frozen=True)
class Sample:
    """Of a process at one time; cpu_seconds since it began."""

    run: str
    pid: int
    seconds: float
    step: int
    cpu_seconds: float
    memory_mib: float
    open_files: int
    threads: int


def sample(run: str, pid: int, output: Path, begun: float) -> Sample | None:
    """None if the process has just ended."""
    process = Path("/proc") / str(pid)
    try:
        times = (process / "stat").read_text().rpartition(")")[2].split()
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        files = len(list((process / "fd").iterdir()))
    except (OSError, ProcessLookupError):
        return None
    if "RssAnon" not in status:  # a zombie
        return None
    cpu = (int(times[11]) + int(times[12])) / TICKS
    memory = int(status["RssAnon"].split()[0]) / 1024
    elapsed = time.monotonic() - begun
    return Sample(run, pid, elapsed, _step(output), cpu, memory, files, int(status["Threads"]))


def _step(output: Path) -> int:
    """Of the last validation."""
    path = output / "metrics.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    return int(rows[-1]["step"]) if rows else 0


def start(file: Path, output: Path, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    overrides = [f"output={output}", *arguments]
    with log.open("ab") as out:
        return subprocess.Popen(
            [*COMMAND, str(file), *overrides, "--resume", "--quiet"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )


def live(folder: Path, arguments: list[str], kill_every: float, seed: int) -> list[Sample]:
    """Both runs at once, to the end; samples.csv grows meanwhile.

    Raises: SystemExit if one fails by itself.
    """
    pick = random.Random(seed)
    begun = time.monotonic()
    file, log = EXAMPLES / "hippocampus.yaml", folder / "output.txt"
    runs = {name: start(file, folder / name, arguments, log) for name in ("unbroken", "killed")}
    next_kill = begun + pick.uniform(0.2, 1.8) * kill_every
    samples: list[Sample] = []
    kills = 0
    try:
        while any(process.poll() is None for process in runs.values()):
            time.sleep(5)
            for name, process in runs.items():
                found = sample(name, process.pid, folder / name, begun)
                if found is not None:
                    samples.append(found)
                    with (folder / "samples.csv").open("a", newline="") as out:
                        csv.writer(out).writerow(astuple(found))
                if process.poll() not in (None, 0):
                    raise SystemExit(f"{name} ended with {process.returncode}: see {log}")
            if time.monotonic() > next_kill and runs["killed"].poll() is None:
                time.sleep(pick.uniform(0, 5))
                runs["killed"].send_signal(signal.SIGKILL)
                runs["killed"].wait()
                kills += 1
                print(f"kill {kills} at step {_step(folder / 'killed')} or later", flush=True)
                runs["killed"] = start(file, folder / "killed", arguments, log)
                next_kill = time.monotonic() + pick.uniform(0.2, 1.8) * kill_every
    finally:
        for process in runs.values():
            process.kill()
    print(f"{kills} kills, {(time.monotonic() - begun) / 3600:.2f} h")
    return samples


def differences(found: Path, expected: Path) -> list[str]:
    """The results that are not the same; wall-clock seconds may differ."""
    wrong = []
    for name in ("last.pt", "best.pt"):
        one, other = (torch.load(run / name, weights_only=True) for run in (found, expected))
        weights = [one["state_dict"], other["state_dict"]]
        if weights[0].keys() != weights[1].keys() or not all(
            torch.equal(value, weights[1][key]) for key, value in weights[0].items()
        ):
            wrong.append(name)
    for name in ("metrics.csv", "losses.csv", "dice.csv"):
        rows = [list(csv.DictReader((run / name).open())) for run in (found, expected)]
        for row in (*rows[0], *rows[1]):
            row.pop("seconds", None)
        if rows[0] != rows[1]:
            wrong.append(name)
    volumes = sorted((expected / "predictions").glob("*.nii.gz"))
    if not volumes or any(
        path.read_bytes() != (found / "predictions" / path.name).read_bytes() for path in volumes
    ):
        wrong.append("predictions")
    return wrong


def drift(samples: list[Sample]) -> dict[str, tuple[float, float]]:
    """Of the unbroken run: medians of its second and of its last quarter."""
    own = [each for each in samples if each.run == "unbroken" and each.step > 0]
    steps = sorted({each.step for each in own})
    firsts = [next(each for each in own if each.step == step) for step in steps]
    pairs = list(itertools.pairwise(firsts))
    rates = [(b.cpu_seconds - a.cpu_seconds) / (b.step - a.step) for a, b in pairs]
    values = {
        "CPU ms per step, validations included": [1000 * rate for rate in rates],
        "memory, MiB": [each.memory_mib for each in own],
        "open files": [float(each.open_files) for each in own],
        "threads": [float(each.threads) for each in own],
    }
    return {
        name: (
            statistics.median(each[len(each) // 4 : len(each) // 2]),
            statistics.median(each[3 * len(each) // 4 :]),
        )
        for name, each in values.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "long_life")
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--validate-every", type=int, default=250)
    parser.add_argument("--kill-every", type=float, default=240, help="seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = Path(os.environ.get("RISKMAP_DATA", ROOT.parent / "shared" / "data")) / "hippocampus"
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source"
    arguments = [f"data.root={data}", *SMALL]
    if not (source / "dice.csv").exists():
        first = start(
            EXAMPLES / "hippocampus_source.yaml",
            source,
            [*arguments, "train.steps=100", "train.validate_every=0"],
            folder / "output.txt",
        )
        if first.wait() != 0:
            raise SystemExit(f"the source model failed: see {folder / 'output.txt'}")
    arguments += [
        f"source.checkpoint={source / 'last.pt'}",
        f"train.steps={options.steps}",
        f"train.validate_every={options.validate_every}",
    ]
    with (folder / "samples.csv").open("w", newline="") as out:
        csv.writer(out).writerow([each.name for each in fields(Sample)])
    samples = live(folder, arguments, options.kill_every, options.seed)
    wrong = differences(folder / "killed", folder / "unbroken")
    print("different:", ", ".join(wrong) if wrong else "nothing")
    for name, (early, late) in drift(samples).items():
        print(f"{name}: {early:.2f} in the second quarter, {late:.2f} in the last")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

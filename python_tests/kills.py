"""``make kill-runs``: runs that are killed at random moments must end in the same bits.

A trial starts a command, kills it once to three times (SIGKILL, SIGTERM, SIGINT) at moments spread
over the duration of an unbroken run, resuming after each, and lets it end. All files must then be
those of an unbroken run, with nothing left behind. Trial n depends on ``--seed`` and n alone:
``--only N`` repeats it, as far as moments repeat. ``--each-write`` kills instead before every
change of a file, and in the middle of every write.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broken_runs import Fault, Runner, Started, differences, left_behind
from finetune_data import MERGED, NETWORK_2D, real_data, settings, write_cases, write_config

TRAIN: dict[str, Any] = {
    "steps": 8,
    "validate_every": 2,
    "optimizer": "AdamW",
    "schedule": "cosine",
    "augment": {"rotation": 15, "noise": 0.1},
}
DROPOUT = {**NETWORK_2D, "args": {**NETWORK_2D["args"], "dropout": 0.2}}
FOLDS = {"train": 4, "validation": 0, "folds": 2}
# Sections that each kind adds to those of all.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"train": {**TRAIN, "accumulate": 3, "optimizer": "SGD", "momentum": 0.9}},
    "disk": {"data": {"storage": "disk"}},
    "folds": {"data": FOLDS, "write": {"tensorboard": False}},
    "two_processes": {
        "network": NETWORK_2D,
        "train": {**TRAIN, "batch_size": 4},
        "data": {"train": 3, "validation": 2},
    },
    "predict": {},
    "report": {},
    # For tests: most of a small run's time is pictures.
    "short": {
        "train": {**TRAIN, "steps": 4},
        "write": {"overlays": False, "tensorboard": False, "report": False},
    },
}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
FINISHED = "holds a finished run: there is nothing to resume"
STOPPED = {signal.SIGTERM: 143, signal.SIGINT: 130}


@dataclass
class Kind:
    """A command in a folder of its own, and what an unbroken one leaves.

    seconds: of an unbroken one, forked and (once one was made) fresh.
    """

    name: str
    runner: Runner
    folder: Path
    seconds: dict[bool, float]

    @property
    def expected(self) -> Path:
        return self.folder / "unbroken" / "run"

    @property
    def processes(self) -> int:
        return 2 if self.name == "two_processes" else 1

    def arguments(self, output: Path, *, again: bool) -> list[object]:
        if self.name == "predict":
            given = ["predict", self.folder.parent / "source", "--output", output]
            return [*given, "--image", self.folder.parent / "data" / "images", "--skip-existing"]
        if self.name == "report":
            return ["report", output]
        given = ["finetune", self.folder / "run.yaml", f"output={output}"]
        return [*given, "--resume"] if again else given

    def begin(self, output: Path) -> None:
        """What there is before the command."""
        shutil.rmtree(output.parent, ignore_errors=True)
        output.parent.mkdir(parents=True)
        if self.name == "report":
            plain = self.folder.parent / "source"
            shutil.copytree(plain, output)
            (output / "report.html").unlink()

    def unbroken(self, fresh: bool = False) -> None:
        output = self.folder / "unbroken" / "run"
        self.begin(output)
        begun = time.monotonic()
        given = self.arguments(output, again=False)
        done = self.runner.run(given, processes=self.processes, fresh=fresh)
        self.seconds[fresh] = time.monotonic() - begun
        assert set(done.codes) == {0}, done.told


def kinds(folder: Path, names: Sequence[str], images: Path | None = None) -> dict[str, Kind]:
    """images: a data set instead of the small synthetic one."""
    runner = Runner(folder / "printed")
    data = folder / "data"
    write_cases(data, 5)
    source = folder / "source"
    sections: dict[str, Any] = {"data": MERGED, "train": {"steps": 30, "validate_every": 0}}
    write_config(folder / "source.yaml", settings(data, source, **sections))
    runner.run(["finetune", folder / "source.yaml"])
    found = {}
    for name in names:
        kind = Kind(name, runner, folder / name, {})
        kind.folder.mkdir()
        content = settings(
            data,
            kind.expected,
            train=TRAIN,
            network=DROPOUT,
            source={"checkpoint": str(source / "last.pt")},
            risk={"use": True},
            write={"overlays": 1, "tensorboard": True},
        )
        for section, changes in KINDS[name].items():
            content[section] = {**content.get(section, {}), **changes}
        if images is not None:
            content["data"] |= {"root": str(images), "classes": ["background", "a", "b"]}
        write_config(kind.folder / "run.yaml", content)
        kind.unbroken()
        found[name] = kind
    return found


def trial(
    kind: Kind, pick: random.Random, told: Callable[[str], None], fresh: bool = False
) -> Counter[str]:
    """Kills in one run; returns how many of which signal."""
    if fresh and True not in kind.seconds:
        kind.unbroken(fresh=True)
    output = kind.folder / "killed" / "run"
    kind.begin(output)
    counts: Counter[str] = Counter()
    again = False
    for _ in range(pick.choice((1, 1, 2, 3))):
        number, moment = pick.choice(SIGNALS), pick.uniform(0, 1.05) * kind.seconds[fresh]
        only = pick.choice((None, 0, 1)) if kind.processes > 1 and not fresh else None
        given = kind.arguments(output, again=again)
        started = kind.runner.start(given, processes=kind.processes, fresh=fresh)
        if started.wait(moment):
            break
        whom = "" if only is None else f" (rank {only})"
        told(f"{number.name} after {moment:.2f} s, {stage(output)}{whom}")
        started.send(number, only)
        if only is not None:  # torchrun ends the others, which may wait in torch for this one
            for end_others in (signal.SIGTERM, signal.SIGKILL):
                if not started.wait(15):
                    started.send(end_others)
        if not started.wait(60):
            started.send(signal.SIGKILL)
            raise AssertionError(f"goes on after {number.name}: {started.told[-2000:]}")
        counts[f"{number.name} {stage(output)}"] += 1
        if only is None and not (fresh and kind.processes > 1):  # torchrun tells more
            check_stopped(started, number, output)
        again = True
    end(kind, output)
    return counts


def end(kind: Kind, output: Path) -> None:
    """Resumes to the end, and compares."""
    done = kind.runner.run(kind.arguments(output, again=True), processes=kind.processes)
    if set(done.codes) != {0}:
        assert FINISHED in done.told, done.told[-3000:]
    problems = differences(output, kind.expected)
    assert not problems, problems


def check_stopped(started: Started, number: signal.Signals, output: Path) -> None:
    """A signal ends a command with one line and nothing half-written."""
    told = [line for line in started.told.splitlines() if line.startswith("riskmap: ")]
    assert "Traceback" not in started.told, started.told[-3000:]
    if number == signal.SIGKILL or len(started.parts) > 1:
        return
    code = started.codes[0]
    had_ended = FINISHED in started.told or "Done" in started.told
    if code in (0, -number) or had_ended:  # or had not begun
        return
    assert code == STOPPED[number], (code, started.told[-3000:])
    stops = [line for line in told if line.startswith("riskmap: stopped")]
    assert len(stops) == 1, started.told[-3000:]
    assert not left_behind(output.parent), left_behind(output.parent)


def stage(output: Path) -> str:
    """How far a command has come, by its files."""
    folders = sorted(output.glob("fold_*")) or [output]
    run = folders[-1]
    steps = {
        "report": ("report.html",),
        "results": ("dice.csv",),
        "training": ("losses.csv",),
        "maps": ("config.yaml",),
    }
    if any((run / name).exists() for name in ("config.yaml", "dice.csv")):
        return next(s for s, names in steps.items() if all((run / n).exists() for n in names))
    return "predictions" if any(output.glob("*.nii.gz")) else "inputs"


def changes(kind: Kind) -> list[str]:
    """Each change of a file in an unbroken command, in words."""
    output, listed = kind.folder / "killed" / "run", kind.folder / "changes.txt"
    kind.begin(output)
    listed.write_text("")
    fault = Fault("count", output.parent, listed=listed)
    kind.runner.run(kind.arguments(output, again=False), fault.install)
    return listed.read_text().splitlines()


def kill_at(kind: Kind, at: int, how: str, resumed_at: int | None = None) -> None:
    """Before change `at` of a file ("kill") or in the write before it ("halve"), and in its resume.

    Raises: AssertionError unless the resumed command leaves the same files.
    """
    output = kind.folder / "killed" / "run"
    kind.begin(output)
    for again, place in ((False, at), (True, resumed_at)):
        if place is not None:
            fault = Fault(how, output.parent, place)
            kind.runner.run(kind.arguments(output, again=again), fault.install)
    end(kind, output)


def each_write(kind: Kind, told: Callable[[str], None]) -> tuple[int, int]:
    """Kills at every change of a file; returns how many kills, and how many went wrong."""
    places = changes(kind)
    done = wrong = 0
    for at, change in enumerate(places):
        middle = change.startswith("open ") and ".N-" in change
        for how in ("kill", "halve") if middle else ("kill",):
            done += 1
            try:
                kill_at(kind, at, how)
            except AssertionError as error:
                wrong += 1
                told(f"{kind.name}: {how} at change {at} ({change}): {str(error)[:600]}")
    return done, wrong


def told_at_once(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="several: repeat it")
    parser.add_argument("--fresh", type=float, default=0.1, help="share of whole interpreters")
    parser.add_argument("--only", type=int, help="this trial")
    parser.add_argument("--each-write", action="store_true")
    parser.add_argument("--real", action="store_true", help="hippocampi of RISKMAP_DATA")
    parser.add_argument("--folder", type=Path, help="for the runs; kept")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kills"))
    try:
        return campaign(folder, options)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


def campaign(folder: Path, options: argparse.Namespace) -> int:
    begun, names = time.monotonic(), options.kind or list(KINDS)[:-1]
    images = real_data("hippocampus") if options.real else None
    found = kinds(folder, names, images)
    told = ", ".join(f"{name} {kind.seconds[False]:.1f} s" for name, kind in found.items())
    print(f"Unbroken: {told}", flush=True)
    if options.each_write:
        results = {name: each_write(kind, told_at_once) for name, kind in found.items()}
        for name, (done, wrong) in results.items():
            print(f"{name}: {done} kills at each change of a file, {wrong} went wrong")
        print(f"{time.monotonic() - begun:.0f} s")
        return 1 if any(wrong for _, wrong in results.values()) else 0
    counts: Counter[str] = Counter()
    failures, number = 0, 0 if options.only is None else options.only
    while sum(counts.values()) < options.kills:
        pick = random.Random(f"{options.seed} {number}")
        kind = found[names[number % len(names)]]
        fresh = pick.random() < options.fresh
        lines: list[str] = []
        try:
            mine = trial(kind, pick, lines.append, fresh)
            how = "fresh" if fresh else "forked"
            counts += Counter({f"{kind.name} {how} {key}": n for key, n in mine.items()})
        except AssertionError as error:
            failures += 1
            counts[f"{kind.name} failed"] += 1
            lines.append(f"FAILED: {str(error)[:3000]}")
        print(f"{number}: {kind.name}{' fresh' * fresh}: {'; '.join(lines)}", flush=True)
        number += 1
        if options.only is not None:
            break
    print(f"{sum(counts.values())} kills, {failures} failed, {time.monotonic() - begun:.0f} s")
    for place, title in enumerate(("kind", "start", "signal", "stage")):
        each: Counter[str] = Counter()
        for key, count in counts.items():
            each[([*key.split(), *[""] * 4])[place]] += count
        print(f"  by {title}:", ", ".join(f"{key} {count}" for key, count in sorted(each.items())))
    print(f"  python python_tests/kills.py --seed {options.seed} --only N repeats one")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

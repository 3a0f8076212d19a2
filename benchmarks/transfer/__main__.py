"""``python -m benchmarks.transfer run | report | list``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.transfer import runner
from benchmarks.transfer.arms import ARMS, DEFAULT, GROUPS
from benchmarks.transfer.scenario import FOLDER, ROOT, TUNING_SEED, chosen, load_scenarios
from benchmarks.transfer.work import Place

OUT = ROOT / "benchmarks" / "results" / "transfer"
WORK = ROOT / "build" / "transfer"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return {"run": _run, "report": _report, "list": _list}[options.command](options)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on with what is stored", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do the runs that are not stored yet")
    several: dict[str, Any] = {"type": _names, "metavar": "A,B"}
    run.add_argument("--scenarios", **several, help="default: all")
    run.add_argument("--round", type=int, choices=(1, 2), help="scenarios of this round alone")
    run.add_argument(
        "--arms", **several, help=f"arms or {', '.join(GROUPS)}; default: {','.join(DEFAULT)}"
    )
    run.add_argument("--lengths", **several, help="default: all of each scenario")
    run.add_argument("--seeds", type=_numbers, metavar="0-9", help="default: as the scenario says")
    run.add_argument(
        "--tuning-seeds", type=_count, metavar="N", help="default: as the scenario says"
    )
    run.add_argument(
        "--workers", type=_workers, default=2, help="processes of one thread (2); 0: this one"
    )
    run.add_argument("--shard", type=_shard, metavar="I/N", help="every N-th scenario, from I = 1")
    run.add_argument("--device", default="cpu", help="cpu (default) or cuda:N")
    run.add_argument("--work", type=Path, default=WORK, help="folder of what can be made again")
    report = commands.add_parser("report", help="make the page from the stored rows")
    report.add_argument("--page", type=Path, default=ROOT / "docs" / "evidence.md")
    for each in (run, report):
        each.add_argument("--out", type=Path, default=OUT, help="folder of the rows")
        each.add_argument("--scenario-files", type=Path, default=FOLDER, help="folder of scenarios")
    commands.add_parser("list", help="scenarios and arms")
    return parser


def _run(options: argparse.Namespace) -> int:
    scenarios = chosen(load_scenarios(options.scenario_files), options.scenarios)
    if options.round is not None:
        scenarios = {name: each for name, each in scenarios.items() if each.round == options.round}
    for name, each in list(scenarios.items()):
        if reason := each.missing():
            print(f"{name}: left out: {reason}")
            del scenarios[name]
    part = ""
    if options.shard:
        index, count = options.shard
        part = f"{index}of{count}"
        scenarios = dict(list(scenarios.items())[index - 1 :: count])
    named = [GROUPS.get(key, (key,)) for key in options.arms or ["default"]]
    arms = list(dict.fromkeys(arm for group in named for arm in group))
    if unknown := [key for key in arms if key not in ARMS]:
        known = ", ".join([*GROUPS, *ARMS])
        raise ValueError(f"--arms: {', '.join(unknown)} unknown; there are {known}")
    if late := [seed for seed in options.seeds or () if seed >= TUNING_SEED]:
        raise ValueError(f"--seeds: {late[0]} and above are for the learning rates alone")
    _check_places(options)
    lengths = sorted({length for each in scenarios.values() for length in each.lengths})
    if unknown := [each for each in options.lengths or () if scenarios and each not in lengths]:
        raise ValueError(f"--lengths: {', '.join(unknown)} unknown; there are {', '.join(lengths)}")
    tuning = options.tuning_seeds
    wanted = runner.Wanted(
        scenarios,
        arms,
        options.lengths,
        options.seeds,
        None if tuning is None else range(TUNING_SEED, TUNING_SEED + tuning),
    )
    files, work, out = (p.resolve() for p in (options.scenario_files, options.work, options.out))
    place = Place(files, work, out, part, options.device)
    try:
        failed = runner.run(wanted, place, options.workers, _say)
    finally:
        place.store().pack()
    return 1 if failed else 0


def _check_places(options: argparse.Namespace) -> None:
    for option in ("work", "out"):
        path = getattr(options, option)
        if path.exists() and not path.is_dir():
            raise ValueError(f"--{option}: {path} is no folder")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: {options.device} cannot be used: {reason}") from None


def _say(line: str) -> None:
    print(line, flush=True)


def _report(options: argparse.Namespace) -> int:
    from benchmarks.transfer.second import write_pages

    if not options.out.is_dir():
        raise ValueError(f"--out: no folder of rows at {options.out}")
    write_pages(options.out, options.page, options.scenario_files)
    print(options.page)
    return 0


def _list(options: argparse.Namespace) -> int:
    for name, each in load_scenarios().items():
        lengths = ", ".join(f"{key} {steps}" for key, steps in each.lengths.items())
        missing = each.missing()
        print(
            f"{name}: {each.title}; {lengths}; {each.seeds} seeds"
            + (f" (left out here: {missing})" if missing else "")
        )
    for arm in ARMS.values():
        print(f"{arm.key}: {arm.name}; {arm.what}")
    return 0


def _names(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError("expected names, got none")
    return found


def _numbers(text: str) -> list[int]:
    """`0-4,7`: 0, 1, 2, 3, 4, 7."""
    found: list[int] = []
    for part in _names(text):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        low, high = (int(each or match[1]) for each in match.groups()) if match else (1, 0)
        if low > high:
            raise argparse.ArgumentTypeError(f"expected numbers such as 0-4,7, got {text}")
        found += range(low, high + 1)
    return list(dict.fromkeys(found))


def _count(text: str, least: int = 1) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a number from {least}, got {text}")
    return int(text)


def _workers(text: str) -> int:
    return _count(text, 0)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = match.groups() if match else ("0", "0")
    if not 1 <= int(index) <= int(count):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, got {text}")
    return int(index), int(count)


if __name__ == "__main__":
    sys.exit(main())

"""A short form of `make kill-runs` and `make disk-faults`, and what these have found."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("monai", reason="needs the extra 'finetune'")
pytest.importorskip("fcntl", reason="signals and limits of POSIX")

import yaml
from broken_runs import Fault, Started, differences, left_behind
from disks import (
    FailingSync,
    JumpingClock,
    Limit,
    MemoryToSpare,
    Output,
    check_told,
    fail,
    fill,
    small_disk,
)
from kills import Kind, changes, kill_at, kinds, trial

FULL = "No space left on device"


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return kinds(tmp_path_factory.mktemp("commands"), ["plain", "short", "predict"])


@pytest.fixture(scope="module")
def plain(commands: dict[str, Kind]) -> Kind:
    return commands["plain"]


@pytest.fixture(scope="module")
def short(commands: dict[str, Kind]) -> Kind:
    return commands["short"]


@pytest.fixture(scope="module")
def places(short: Kind) -> list[str]:
    return changes(short)


@pytest.mark.parametrize("name", ["short", "predict"])
def test_killed_at_random_moments(commands: dict[str, Kind], name: str) -> None:
    counts: Counter[str] = Counter()
    for number in range(40):  # a command may have ended before its kill
        counts += trial(commands[name], random.Random(number), lambda _: None)
        if counts.total() >= 4:
            return
    pytest.fail(f"too few kills arrived in time: {counts}")


@pytest.mark.parametrize(
    "change",
    [
        "open run/.lock",
        "rename run/cache/.N-statistics",
        "rename run/.N-last.pt",  # the first checkpoint: nothing has been saved before
        "rename run/.N-best.pt",
        "rename run/predictions",
        "remove run/resume.pt",
    ],
)
def test_killed_at_a_change_of_a_file(short: Kind, places: list[str], change: str) -> None:
    at = next(index for index, place in enumerate(places) if place.startswith(change))
    kill_at(short, at, "kill")


def test_killed_in_the_middle_of_a_write_and_in_that_of_the_resume(
    short: Kind, places: list[str]
) -> None:
    at = [index for index, place in enumerate(places) if place == "open run/.N-resume.pt"]
    kill_at(short, at[1], "halve", resumed_at=at[0])


def test_killed_while_the_report_is_written(plain: Kind) -> None:
    kill_at(plain, changes(plain).index("rename run/.N-report.html"), "kill")


def test_a_restart_by_resume_allows_no_overwriting(short: Kind, places: list[str]) -> None:
    kill_at(short, places.index("open run/.N-environment.json"), "kill")
    config = yaml.safe_load((short.folder / "killed" / "run" / "config.yaml").read_text())
    assert config["overwrite"] is False


def test_half_a_segmentation_is_removed(commands: dict[str, Kind]) -> None:
    kill_at(
        commands["predict"],
        changes(commands["predict"]).index("open run/.N-case02.nii.gz"),
        "halve",
    )


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("ENOSPC", "open run/log.txt"),
        ("EIO", "open run/cache/"),
        ("EDQUOT", "rename run/.N-resume.pt"),
        ("ESTALE", "open run/maps"),
        ("EROFS", "mkdir run/predictions"),
    ],
)
def test_a_change_of_a_file_fails(short: Kind, places: list[str], code: str, change: str) -> None:
    at = next(index for index, place in enumerate(places) if place.startswith(change))
    fail(short, Fault(code, short.folder / "killed", at).install)


def test_a_failing_fsync(short: Kind) -> None:
    fail(short, FailingSync(9, "EIO").install)


def test_a_clock_that_jumps_by_years(short: Kind) -> None:
    fail(short, JumpingClock().install)


@pytest.mark.parametrize("options", ["size=60k", "size=200k", "size=64m,nr_inodes=12"])
def test_a_small_disk(short: Kind, options: str) -> None:
    try:
        fill(short, options)
    except PermissionError as error:
        pytest.skip(str(error))


def test_a_read_only_disk_with_the_lock_of_a_killed_run(short: Kind) -> None:
    output = short.folder / "readonly" / "run"
    try:
        with small_disk(output.parent, "size=1m"):
            output.mkdir()
            (output / ".lock").touch()
            subprocess.run(["mount", "-o", "remount,ro", str(output.parent)], check=True)
            started = short.runner.run(short.arguments(output, again=True))
    except PermissionError as error:
        pytest.skip(str(error))
    assert started.codes == [2], started.told
    assert f"riskmap: error: {short.folder}" in started.told
    assert "Traceback" not in started.told


def test_a_limit_of_file_sizes(short: Kind) -> None:
    fail(short, Limit("RLIMIT_FSIZE", 6000).install)


def test_few_open_files(short: Kind) -> None:
    output = short.folder / "killed" / "run"
    short.begin(output)
    started = short.runner.run(
        short.arguments(output, again=False), Limit("RLIMIT_NOFILE", 9).install
    )
    assert "Traceback" not in started.told, started.told
    assert started.codes[0] in (0, 2)


def test_little_memory(short: Kind) -> None:
    output = short.folder / "killed" / "run"
    short.begin(output)
    started = short.runner.run(short.arguments(output, again=False), MemoryToSpare(4).install)
    assert started.codes == [2], started.told
    assert "Traceback" not in started.told, started.told
    assert started.told.count("riskmap: error:") == 1
    assert not left_behind(output.parent)


@pytest.mark.parametrize("path", ["/dev/full", None])
def test_an_output_that_takes_nothing(short: Kind, path: str | None) -> None:
    output = short.folder / "killed" / "run"
    short.begin(output)
    started = short.runner.run(short.arguments(output, again=False), Output(path).install)
    assert started.codes[0] in (1, 2), started.told
    assert "Traceback" not in started.told, started.told
    assert "Exception ignored" not in started.told, started.told
    assert not left_behind(output.parent)
    if path is not None:
        assert started.told.count("riskmap: error:") == 1
        assert f"standard output: {FULL}" in started.told


def test_an_output_folder_that_is_deleted(plain: Kind) -> None:
    output = plain.folder / "killed" / "run"
    plain.begin(output)
    started = plain.runner.start(plain.arguments(output, again=False))
    _wait_for(output / "losses.csv", started)
    shutil.rmtree(output, ignore_errors=True)
    assert started.wait(60)
    check_told(started, output)


def test_two_starts_at_once(short: Kind) -> None:
    output = short.folder / "killed" / "run"
    short.begin(output)
    both = [short.runner.start(short.arguments(output, again=True)) for _ in range(2)]
    assert all(started.wait(120) for started in both)
    codes = sorted(code for started in both for code in started.codes if code is not None)
    assert codes in ([0, 2], [0, 0]), [started.told for started in both]
    told = ("is in use by a run", "was used by another run", "there is nothing to resume")
    losers = [started for started in both if any(each in started.told for each in told)]
    assert len(losers) == 1, [started.told for started in both]
    assert not differences(output, short.expected)


def test_two_runs_with_one_cache(short: Kind) -> None:
    folder = short.folder / "killed"
    short.begin(folder / "run")
    outputs = [folder / "run", folder / "other"]
    both = [
        short.runner.start([*short.arguments(each, again=False), f"cache={folder / 'cache'}"])
        for each in outputs
    ]
    assert all(started.wait(120) for started in both)
    for output in outputs:
        found = [each for each in differences(output, short.expected) if "cache" not in each]
        assert [each for each in found if "config.yaml" not in each] == []


def test_a_signal_ends_the_command_with_its_code(plain: Kind) -> None:
    output = plain.folder / "killed" / "run"
    plain.begin(output)
    started = plain.runner.start(plain.arguments(output, again=False))
    _wait_for(output / "leep.json", started)
    started.send(signal.SIGTERM)
    assert started.wait(60)
    assert started.codes == [143]
    assert started.told.count("riskmap: stopped") == 1


def test_a_signal_in_a_finalizer_is_not_lost() -> None:
    code = (
        "import os, signal, sys, time\n"
        "from riskmap_ext.finetune.commands import _command, app\n"
        "class Last:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.1)\n"
        "@_command()\n"
        "def _wait() -> None:\n"
        "    Last()\n"
        "    time.sleep(20)\n"
        "sys.argv = ['riskmap', 'wait']\n"
        "app()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (143, "riskmap: stopped\n")


def _wait_for(path: Path, started: Started) -> None:
    until = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until and not started.wait(0):
        time.sleep(0.005)
    assert path.exists(), started.told

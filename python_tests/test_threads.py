"""The ops among threads and processes: same bits, no hang, no leak."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from case import Case
from every_op import results
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

CPU = torch.device("cpu")
# Several chunks, so that the ops have something to share among threads.
CASES = [
    Case("threads", spatial=(33, 30, 29), with_weight=True),
    Case("threads_many", spatial=(40, 41), classes=37, source_classes=20, dtype=torch.bfloat16),
    Case("threads_regions", spatial=(41, 40), regions=3, source_regions=3, classes=4),
]


def everything(case: Case) -> list[Tensor]:
    return [part.clone() for name, parts in sorted(results(case, CPU).items()) for part in parts]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_eight_python_threads_at_once(case: Case) -> None:
    expected = everything(case)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(everything, [case] * 24):
            assert_same(found, expected)


def test_the_number_of_threads_changes_meanwhile() -> None:
    expected, before = everything(CASES[0]), torch.get_num_threads()
    try:
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(everything, CASES[0]) for _ in range(8)]
            for count in (1, 2, 3, 1, 4, 2):
                torch.set_num_threads(count)
                assert_same(everything(CASES[0]), expected)
            for each in running:
                assert_same(each.result(), expected)
    finally:
        torch.set_num_threads(before)


class _Losses(Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([part.flatten().double() for part in everything(CASES[1])])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start: str) -> None:
    """Workers have one thread each; the parent has used the ops, and their threads, before."""
    expected = _Losses()[0].nan_to_num(-1)
    loader = DataLoader(_Losses(), num_workers=2, multiprocessing_context=start, timeout=120)
    assert [torch.equal(found[0].nan_to_num(-1), expected) for found in loader] == [True] * 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_fork_after_use(threads: int) -> None:
    """A child of a process whose thread pool has run: OpenMP's own threads are not there."""
    code = f"""
import os, signal, sys, torch, riskmap_ext
torch.set_num_threads({threads})
logits, label = torch.randn(2, 4, 40, 40, 40), torch.randint(4, (2, 40, 40, 40))
call = lambda: riskmap_ext.weighted_loss(logits, label, dice_weight=1.0)
expected = call()
child = os.fork()
if child == 0:
    signal.alarm(60)
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(call(), expected) else 3)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    ran = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
    assert ran.returncode == 0


def test_calls_while_python_ends() -> None:
    """From atexit and from a thread that outlives main.

    Later still torch's own functions fail, too: in __del__ with an exception that is ignored, in a
    daemon thread with signal 6.
    """
    code = """
import atexit, threading, time, torch, riskmap_ext
logits = torch.randn(2, 4, 30, 30, 30, requires_grad=True)
label = torch.randint(4, (2, 30, 30, 30))
def call(loss=riskmap_ext.weighted_loss):
    loss(logits, label, dice_weight=1.0).backward()
atexit.register(lambda: (call(), print("at exit")))
def work():
    time.sleep(0.5)
    for _ in range(20):
        call()
    print("thread")
threading.Thread(target=work).start()
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], timeout=120, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.split("\n") == ["thread", "at exit", ""]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_and_handles_are_flat() -> None:
    """Over thousands of calls, right ones and wrong ones, in a process of their own.

    A leak of one of its tensors (6 KiB) in each call would take 12 MiB.
    """
    code = """
import gc, os, torch, riskmap_ext
logits = torch.randn(2, 3, 16, 16, requires_grad=True)
label = torch.randint(3, (2, 16, 16))
def calls(count):
    for _ in range(count):
        logits.grad = None
        riskmap_ext.weighted_loss(logits, label, dice_weight=1.0).backward()
        try:
            riskmap_ext.weighted_loss(logits, label + 3)
        except ValueError:
            continue
        raise SystemExit("a wrong label was accepted")
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
memory, handles = calls(300)
memory_after, handles_after = calls(2000)
print(memory_after - memory < 4 << 20, handles_after == handles, memory_after - memory)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], timeout=300, capture_output=True, text=True, check=False
    )
    assert ran.stdout.startswith("True True"), ran.stdout + ran.stderr

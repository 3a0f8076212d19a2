"""``python python_tests/gpu_ops.py check|exercise``: every op in one process, for ``gpu_check.py``.

``check`` compares with the float64 reference: a line for each case that is wrong, with its error,
and on it goes. ``exercise`` only runs them, on small shapes, as compute-sanitizer is to see them.
Both end by themselves after ``--seconds``, in an order that has every class count, dtype and layout
early.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import cases
import every_op
import torch
from cases import Case
from compare import assert_loss_matches_reference
from test_linear_weighted_loss import assert_matches as head_loss_matches
from test_risk_map import test_matches_reference as risk_map_matches
from test_weighted_loss import test_sums_and_what_becomes_of_them as two_steps_match

import riskmap_ext

# Registers up to 8 classes, shared memory beyond, global memory beyond 128.
CLASSES = (4, 105, 1, 2, 16, 87, 3, 5, 300, 8, 133, 6, 7)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHOWN = 300  # characters of an error

Work = tuple[str, every_op.Check, Case]


def grid(aligned: tuple[int, ...], odd: tuple[int, ...]) -> Iterator[Case]:
    """Every class count, dtype and layout; planar logits are read in words only where aligned."""
    placed = (("contiguous", aligned), ("channels_last", odd), ("contiguous", odd))
    for (layout, spatial), dtype in product(placed, DTYPES):
        for index, classes in enumerate(CLASSES):
            # As many source classes as labels, and another number.
            source = classes if layout == "contiguous" else CLASSES[index - 1]
            name = f"{layout}_{spatial[-1]}_{str(dtype)[6:]}_{classes}_source_{source}"
            yield Case(
                name,
                layout=layout,
                spatial=spatial,
                dtype=dtype,
                classes=classes,
                source_classes=source,
                risk_dtype=torch.float32 if dtype == torch.bfloat16 else dtype,
            )


def _two_steps_match(case: Case, device: torch.device) -> None:
    two_steps_match(case, False, device)


def _from_features(case: Case, device: torch.device) -> None:
    head_loss_matches(case.head_call(device), case.dtype, rounds_logits=True)


def _loss(name: str, check: every_op.Check, case: Case, **options: Any) -> Work:
    return name, check, replace(case, loss_options=options)


def _of_softmax(case: Case) -> Iterator[Work]:
    for name, (check, _) in every_op.OF_SOFTMAX.items():
        yield name, check, case
    ranged = {"scheme": "exponential", "range": (0.5, 3.0)}
    yield "risk map of a range", risk_map_matches, replace(case, risk_options=ranged)
    yield "loss from features", _from_features, case
    yield _loss("loss map", assert_loss_matches_reference, case, reduction="none")
    if case.classes == 1:
        return
    dice = {"dice_weight": 1.0}
    yield _loss("loss + Dice", assert_loss_matches_reference, case, **dice)
    yield _loss("loss + Dice from features", _from_features, case, **dice)
    yield _loss("loss + squared", assert_loss_matches_reference, case, **dice, squared_pred=True)
    every = {"batch_dice": True, "label_smoothing": 0.1, "normalization": "batch_foreground"}
    with_all = replace(case, with_weight=True, with_foreground=True)
    yield _loss("loss + batch Dice", assert_loss_matches_reference, with_all, **dice, **every)
    yield "two steps", _two_steps_match, replace(case, with_weight=True)


def works() -> Iterator[Work]:
    for case in grid((8, 16, 20), (5, 17, 29)):
        yield from _of_softmax(case)
    for classes, dtype in product((4, 105), DTYPES[:2]):  # many blocks
        many = Case(f"many_blocks_{classes}", spatial=(48, 50, 52), dtype=dtype)
        yield from _of_softmax(replace(many, classes=classes, source_classes=classes))
    for case in cases.REGION_TABLES:
        for options in ({}, {"dice_weight": 1.0}, {"dice_weight": 1.0, "squared_pred": True}):
            yield _loss("regions", assert_loss_matches_reference, case, **options)
    for name in ("LEEP of regions", "maps of regions"):
        check, made_for = every_op.OF_REGIONS[name]
        yield from ((name, check, case) for case in made_for)
    for case in (*cases.TARGET_DTYPES, *cases.STRIDES, *cases.PATTERNS, *cases.SIZES):
        yield from _of_softmax(case)


def check(device: torch.device, seconds: float) -> int:
    """The number of works that are wrong."""
    end = time.monotonic() + seconds
    chosen = list(works())
    wrong: dict[str, int] = {}
    done = 0
    for name, matches, case in chosen:
        if time.monotonic() > end:
            break
        done += 1
        try:
            matches(case, device)
        except Exception as error:  # the others are still worth knowing
            wrong[name] = wrong.get(name, 0) + 1
            text = " ".join(str(error).split())[:SHOWN]
            print(f"wrong: {name}, {case.name}: {type(error).__name__}: {text}", flush=True)
            if not _answers(device):
                print("the device does not answer any more: the rest is not checked")
                break
    which = ", ".join(f"{name} {count}" for name, count in wrong.items())
    print(f"{done - sum(wrong.values())} of {done} right, of {len(chosen)} there are. {which}")
    return sum(wrong.values())


def _answers(device: torch.device) -> bool:
    """False after an error that spoils the process, as an illegal access does."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device=device).item() == 1)
    except RuntimeError:
        return False


def exercise(device: torch.device, seconds: float) -> None:
    end = time.monotonic() + seconds
    chosen = [
        *grid((4, 16), (5, 9)),
        *(case for case in cases.SIZES if case.name in ("one_voxel", "volume_13x11x9")),
        *(case for case in cases.STRIDES if len(case.spatial) == 2),
    ]
    _exercise_regions(device)
    done = 0
    for case in chosen:
        if time.monotonic() > end:
            break
        every_op.results(case, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"exercised {done} of {len(chosen)} cases", flush=True)


def _exercise_regions(device: torch.device) -> None:
    for case in (cases.REGION_TABLES[3], cases.REGION_TABLES[11]):
        args, kwargs = case.loss_call(device)
        for squared in (False, True):
            options = {"dice_weight": 1.0, "squared_pred": squared}
            cases.loss_and_gradients((args, {**kwargs, **options}))
    for case in cases.SOURCE_REGION_CASES[3:6]:
        args, kwargs = case.leep_call(device)
        riskmap_ext.leep_statistics(*args, **kwargs)
        riskmap_ext.risk_map(*case.map_call(device)[0], **case.map_call(device)[1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_ops.py", description=__doc__)
    parser.add_argument("what", choices=("check", "exercise"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=45.0)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.what == "check":
        return min(check(device, options.seconds), 1)
    exercise(device, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which CUDA kernels a call launches: no usual call may fall to the general ones unseen.

The host code chooses; here it runs on the CPU (csrc/cuda_on_host) and tells of every launch.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_on_host
import pytest
import torch
from cases import Case

import riskmap_ext

sys.path.append(str(Path(__file__).parents[1] / "csrc" / "cuda" / "machine_code"))
CPU = torch.device("cpu")
GENERAL = "_of_any"
CLASSES = (2, 3, 4, 5, 6, 7, 8, 16, 87, 256)
LOW = (torch.float32, torch.bfloat16, torch.float16)
LABELS = (torch.int64, torch.int32, torch.uint8)
LOSSES: tuple[dict[str, Any], ...] = (
    {},
    {"dice_weight": 1.0},
    {"dice_weight": 1.0, "batch_dice": True, "label_smoothing": 0.1, "squared_pred": True},
    {"reduction": "none"},
    {"ce_voxels": "foreground"},
)
Launched = Callable[..., set[str]]


@pytest.fixture(scope="module")
def launched() -> Launched:
    """The kernels that a call launches, without running them."""
    if cuda_on_host.LIBRARY not in os.environ:
        pytest.skip("takes minutes to compile: make cuda-on-host builds and runs it")
    if not (shutil.which("readelf") and shutil.which("c++filt")):
        pytest.skip("no readelf or c++filt: binutils is not installed")
    import launches

    library = launches.HostLibrary(launches.host_library())

    def record(call: Callable[[], Any], look: Callable[[Any], None] | None = None) -> set[str]:
        names = set[str]()

        def listen(launch: Any) -> bool:
            names.add(launch.kernel.split("<")[0])
            if look is not None:
                look(launch)
            return False

        with library.told(listen):
            call()
        return names

    return record


def loss(case: Case, with_risk_gradient: bool = False, **options: Any) -> None:
    (logits, target, risk), kwargs = case.loss_call(CPU)
    logits.requires_grad_()
    if risk is not None:
        risk.requires_grad_(with_risk_gradient)
    found = riskmap_ext.weighted_loss(logits, target, risk, **{**kwargs, **options})
    found.backward(torch.ones_like(found))


def every_op(case: Case) -> None:
    for options in LOSSES:
        loss(case, **options)
    loss(replace(case, with_weight=True), with_risk_gradient=True)
    maps, options = case.map_call(CPU)
    # The op itself: the function looks at what comes of tensors on the CPU.
    torch.ops.riskmap_ext.leep_statistics(*maps[:2], None, case.classes, case.ignore_index)
    riskmap_ext.transferability_map(*maps, **options)
    riskmap_ext.risk_map(*maps, **options)


def is_general(names: set[str]) -> set[str]:
    return {name for name in names if name.endswith(GENERAL)}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", CLASSES)
def test_usual_calls_have_kernels_of_their_own(
    classes: int, layout: str, launched: Launched
) -> None:
    for index, dtype in enumerate(LOW):
        # An image is a multiple of 16 bytes: of neighbouring classes that takes 8 voxels.
        spatial = (4, 5) if layout == "contiguous" or dtype == torch.float32 else (4, 6)
        label = LABELS[(index + CLASSES.index(classes)) % 3]
        case = Case(
            "usual", classes=classes, source_classes=classes, spatial=spatial, dtype=dtype,
            target_dtype=label, ignore_index=-100 if label.is_signed else 255, layout=layout,
            ignored=0.1 if label.is_signed or classes < 256 else 0.0, with_foreground=True,
        )  # fmt: skip
        names = launched(lambda case=case: every_op(case))
        assert len(names) > 4
        assert not is_general(names)


@pytest.mark.parametrize("classes", [3, 19])
@pytest.mark.parametrize(
    "change",
    [
        {"spatial": (5, 7)},
        {"dtype": torch.float64},
        {"layout": "shifted"},
        {"layout": "images_shifted"},
        {"map_layout": "shifted"},
        {"map_layout": "images_shifted"},
    ],
    ids=str,
)
def test_what_fits_no_tile_takes_the_general_kernels(
    classes: int, change: dict[str, Any], launched: Launched
) -> None:
    case = replace(
        Case("unusual", classes=classes, source_classes=classes, spatial=(4, 5)), **change
    )
    args, kwargs = case.map_call(CPU)
    calls: list[Callable[[], Any]] = [
        lambda: loss(case, dice_weight=1.0),
        lambda: riskmap_ext.transferability_map(*args, **kwargs),
        lambda: torch.ops.riskmap_ext.leep_statistics(*args[:2], None, classes, -100),
    ]
    for call in calls:
        assert is_general(launched(call))


@pytest.mark.parametrize("classes", [1, 257])
def test_other_numbers_of_classes_take_the_general_kernels(
    classes: int, launched: Launched
) -> None:
    case = Case("numbers", classes=classes, source_classes=classes, spatial=(4, 5))
    assert is_general(launched(lambda: loss(case)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("regions", [2, 4, 8])
def test_few_regions_have_kernels_of_their_own(
    regions: int, layout: str, launched: Launched
) -> None:
    case = Case("regions", classes=5, regions=regions, spatial=(4, 6), layout=layout)
    for options in ({}, {"dice_weight": 1.0}):
        assert not is_general(launched(lambda options=options: loss(case, **options)))


def test_gradients_of_a_map_are_read_in_whole_words(launched: Launched) -> None:
    """A GPU reads 16 bytes at addresses that are multiples of 16 only, in every image."""
    case = Case("map", classes=3, spatial=(4, 5), loss_options={"reduction": "none"})
    (logits, target, risk), kwargs = case.loss_call(CPU)
    gradient = torch.ones(48)
    first = -gradient.data_ptr() // 4 % 4  # of the storage, that is a multiple of 16 bytes
    gradient = gradient[first:].as_strided((2, 4, 5), (21, 5, 1))
    assert gradient.data_ptr() % 16 == 0
    strides: list[int] = []

    def look(launch: Any) -> None:
        if GENERAL in launch.kernel or "backward" not in launch.kernel:
            return
        at = launch.argument.find(struct.pack("<Q", gradient.data_ptr()))
        if at >= 0:  # the pointer of a map, and its stride
            strides.append(struct.unpack_from("<q", launch.argument, at + 8)[0])

    def call() -> None:
        logits.requires_grad_()
        riskmap_ext.weighted_loss(logits, target, risk, **kwargs).backward(gradient)

    launched(call, look)
    assert all(stride % 16 == 0 for stride in strides)

"""The sample inputs that feed the tests of every operator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from case import (  # noqa: F401  (what the tests import from here)
    LAYOUTS,
    Call,
    Case,
    in_double,
    laid_out,
    loss_and_gradients,
    loss_in_two_steps,
    loss_leaves,
    network_output,
    overwritten,
)

BASE = Case("base")

SIZES = [
    Case("one_voxel", spatial=(1,)),
    Case("line_7", spatial=(7,)),
    Case("line_1000", spatial=(1000,), batch=3),
    Case("plane_17x5", spatial=(17, 5)),
    Case("plane_1x64", spatial=(1, 64)),
    Case("volume_13x11x9", spatial=(13, 11, 9)),
    Case("volume_33", spatial=(33, 33, 33), batch=1),
    Case("volume_of_ones", spatial=(1, 1, 1), batch=3),
    Case("five_images", spatial=(5, 6), batch=5),
    Case("many_small_images", spatial=(2, 2), batch=70),
]

CLASSES = [
    Case(f"classes_{c}_source_{z}", classes=c, source_classes=z, spatial=(7, 9))
    for c, z in (
        (1, 3), (2, 1), (3, 8), (5, 2), (8, 9), (9, 5), (17, 33), (33, 17), (87, 3), (3, 87),
        (1, 1), (1000, 700),
    )
]  # fmt: skip

DTYPES = [
    Case(f"{str(dtype)[6:]}_{len(spatial)}d", dtype=dtype, risk_dtype=dtype, spatial=spatial)
    for dtype in (torch.float64, torch.float16, torch.bfloat16)
    for spatial in ((101,), (13, 11, 9))
] + [
    Case("float32_logits_float64_risk", risk_dtype=torch.float64),
    Case("bfloat16_logits_float32_risk", dtype=torch.bfloat16),
    Case("float32_logits_float16_risk", risk_dtype=torch.float16),
]

TARGET_DTYPES = [
    Case(f"target_{str(dtype)[6:]}", target_dtype=dtype, ignore_index=ignore, channel=channel)
    for dtype, ignore, channel in (
        (torch.uint8, 255, False),
        (torch.int8, -100, False),
        (torch.int16, -100, True),
        (torch.int32, -1, False),
        (torch.uint16, 65535, False),
        (torch.float32, -100, True),
        (torch.float64, 255, False),
        (torch.float16, 255, False),
        (torch.bfloat16, 255, True),
    )
] + [
    Case("target_bool", classes=2, target_dtype=torch.bool, ignored=0.0),
    # -100 does not exist in uint8: the label 156 of the same bits must not be taken for it.
    Case("target_uint8_no_ignore", classes=200, target_dtype=torch.uint8, ignored=0.0),
    Case("channel_3d", spatial=(5, 6, 7), channel=True, with_foreground=True),
]

STRIDES = [
    Case(
        f"{layout}_{len(spatial)}d",
        layout=layout,
        spatial=spatial,
        channel=layout == "sliced",
        with_foreground=True,
    )
    for layout in LAYOUTS[1:]
    for spatial in ((37,), (17, 5), (6, 7, 9))
] + [
    Case("channels_last_many_classes", layout="channels_last", classes=17, source_classes=33),
    Case("channels_last_bfloat16", layout="channels_last", dtype=torch.bfloat16),
    Case("channels_last_float64_slim", layout="channels_last", dtype=torch.float64, spatial=(1, 9)),
    Case("channels_last_one_class", layout="channels_last", classes=1, source_classes=1),
    Case("transposed_float16", layout="transposed", dtype=torch.float16),
    Case("sliced_float64", layout="sliced", dtype=torch.float64),
]

PATTERNS = [
    Case("nothing_ignored", ignored=0.0),
    Case("ignore_index_0", ignore_index=0),
    Case("ignore_index_inside", ignore_index=2),
    Case("no_foreground", labels="background"),
    Case("no_foreground_but_mask", labels="background", with_foreground=True),
    Case("all_ignored", labels="ignored"),
    Case("one_image_ignored", empty_image=True, batch=3),
    Case("empty_batch", batch=0),
    Case("no_voxels_1d", spatial=(0,)),
    Case("no_voxels_3d", spatial=(4, 0, 3)),
]

# What the CUDA kernels hold in registers, a tile at once: four neighbouring voxels and their
# classes. Each number of few classes has a kernel of its own, many classes have three.
_LOW = (torch.float32, torch.float16, torch.bfloat16)
_TILES = [
    Case(
        f"tiles_{classes}_source_{sources}_{layout}_{str(dtype)[6:]}",
        classes=classes,
        source_classes=sources,
        layout=layout,
        dtype=dtype,
        risk_dtype=dtype,
        # An image is a multiple of 16 bytes, of 16 bits and channels-last too.
        spatial=(12, 12) if max(classes, sources) <= 8 else (12, 14),
    )
    for dtype in _LOW
    for classes, sources, layout in (
        *((classes, classes, "contiguous") for classes in range(2, 9)),
        (9, 16, "contiguous"),
        (17, 33, "contiguous"),
        (40, 256, "contiguous"),
        (3, 2, "channels_last"),
        (6, 8, "channels_last"),
        (11, 40, "channels_last"),
    )
]

# More of these: of labels, and where they may not be read as tiles. Few classes and many.
_FEW = Case("few", spatial=(12, 11), with_foreground=True)
_MANY = Case("many", spatial=(12, 13), with_foreground=True, classes=11, source_classes=19)
_MORE_TILES = [
    *(
        replace(
            base,
            name=f"{base.name}_{case.name}",
            target_dtype=case.target_dtype,
            ignore_index=case.ignore_index,
            ignored=case.ignored,
            channel=case.channel,
            classes=case.classes if case.classes == 2 else base.classes,
        )
        for base in (_FEW, _MANY)
        for case in [
            *TARGET_DTYPES[:-2],
            Case("target_uint32", target_dtype=torch.uint32, ignore_index=2**32 - 1),
            Case("target_uint64", target_dtype=torch.uint64, ignore_index=255),
            Case("ignore_index_inside", ignore_index=2),
            Case("target_uint8_ignore_0", target_dtype=torch.uint8, ignore_index=0),
        ]
    ),
    *(
        replace(base, name=f"{base.name}_{layout}_{maps}", layout=layout, map_layout=maps)
        for base in (_FEW, _MANY)
        for layout, maps in (
            ("shifted", "contiguous"),
            ("images_shifted", "contiguous"),
            ("contiguous", "shifted"),
            ("contiguous", "images_shifted"),
            ("batch_strided", ""),
            ("channels_last_rows_apart", ""),
            ("expanded", ""),
        )
    ),
    *(replace(base, name=f"{base.name}_ignored", labels="ignored") for base in (_FEW, _MANY)),
    # LEEP: tables that fit fewer warps, one warp, none; more labels than a table has rows.
    Case("table_20x5", classes=20, source_classes=5, spatial=(12, 11)),
    Case("table_50x6", classes=50, source_classes=6, spatial=(12, 11), layout="channels_last"),
    Case("table_200x3", classes=200, source_classes=3, spatial=(12, 13)),
    Case("table_200x8", classes=200, source_classes=8, spatial=(12, 13), layout="channels_last"),
    Case("table_300x9", classes=300, source_classes=9, spatial=(12, 11)),
    # So many voxels that sums in float are added up on the way.
    Case("few_runs", source_classes=2, spatial=(90, 70), batch=3, labels="runs", ignored=0.02),
    Case("many_runs", source_classes=9, spatial=(50, 40), labels="runs", ignored=0.02),
    Case("many_one_label", source_classes=9, spatial=(50, 40), labels="background"),
    Case("many_random", source_classes=9, spatial=(50, 40), layout="channels_last"),
]

TILES = [*_TILES, *_MORE_TILES]

EVERY_CASE = [BASE, *SIZES, *CLASSES, *DTYPES, *TARGET_DTYPES, *STRIDES, *PATTERNS, *TILES]

# One for each way in which the CUDA kernels read logits.
EVERY_WAY = [
    BASE,
    Case("few_classes", classes=4, spatial=(12, 11)),
    Case("few_classes_channels_last", classes=5, spatial=(12, 11), layout="channels_last"),
    Case("many_classes", classes=19, source_classes=40, spatial=(12, 13)),
    Case(
        "many_classes_channels_last",
        classes=11,
        source_classes=9,
        spatial=(12, 13),
        layout="channels_last",
    ),
]

_RANGES: tuple[dict[str, Any], ...] = (
    {},
    {"range": (0.5, 3.0)},
    {"range": (1.0, 1.05)},
    {"background": None},
)

RISK_CASES = EVERY_CASE + [
    replace(base, name=f"{base.name}_{index}", risk_options={"scheme": scheme, **options})
    for base in (
        Case("options", spatial=(11, 13)),
        Case("options_one_image_ignored", empty_image=True, batch=3, dtype=torch.bfloat16),
    )
    for index, (scheme, options) in enumerate(
        [
            *(("exponential", options) for options in _RANGES),
            *(("linear", options) for options in _RANGES),
            ("power", {}),
            ("power", {"alpha": 1.0, "range": (0.5, 3.0)}),
            ("power", {"alpha": 1 / 3}),
            ("exponential", {"base": 2.5}),
            ("exponential", {"base": 0.5}),
            ("linear", {"scale": 2.0}),
            ("linear", {"scale": 0.0}),
            ("exponential", {"background": 2}),
        ]
    )
]

_LOSS_OPTIONS: tuple[dict[str, Any], ...] = (
    {"normalization": "foreground", "foreground_floor": 0.9},
    {"normalization": "foreground", "foreground_floor": 0.0},
    {"normalization": "batch_foreground"},
    {"normalization": "batch_foreground", "foreground_floor": 1.0, "reduction": "sum"},
    {"normalization": "valid", "reduction": "sum"},
    {"normalization": "none"},
    {"ce_voxels": "foreground"},
    {"ce_voxels": "foreground", "normalization": "valid", "reduction": "sum"},
    {"ce_voxels": "foreground", "reduction": "none"},
    {"reduction": "none", "label_smoothing": 0.2, "ce_weight": 0.5},
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0, "ce_voxels": "foreground"},
    {"background": None},
    {"background": 2},
    {"ce_weight": 2.5},
    {"ce_weight": 0.0, "dice_weight": 1.0},
    {"dice_weight": 1.0, "reduction": "sum"},
    {"dice_weight": 0.7, "include_background": True, "label_smoothing": 0.1},
    {"dice_weight": 1.5, "background": None, "ce_voxels": "foreground"},
    {"dice_weight": 1.0, "batch_dice": True, "background": 1},
    {"dice_weight": 1.0, "batch_dice": True, "reduction": "sum"},
    {"dice_weight": 1.0, "squared_pred": True},
    {"dice_weight": 1.0, "alpha": 1.0, "beta": 1.0, "batch_dice": True},
    {
        "dice_weight": 0.8,
        "squared_pred": True,
        "alpha": 1.0,
        "beta": 1.0,
        "include_background": True,
    },
    {"dice_weight": 1.0, "smooth_nr": 0.0, "smooth_dr": 1e-6, "squared_pred": True},
    {"dice_weight": 1.0, "alpha": 0.3, "beta": 0.9, "reduction": "sum"},
    {"dice_weight": 1.0, "smooth_nr": 0.0, "smooth_dr": 0.0, "reduction": "sum"},
    {
        "dice_weight": 1.0,
        "smooth_nr": 2.0,
        "smooth_dr": 0.5,
        "alpha": 1.0,
        "beta": 1.0,
        "batch_dice": True,
    },
    {"normalization": "batch_valid"},
    {"normalization": "weighted"},
    {"normalization": "weighted", "dice_weight": 1.0, "reduction": "sum"},
)

_LOSS_INPUTS = (
    Case("risk_mask_weight", spatial=(9, 11), with_foreground=True, with_weight=True),
    Case("plain", spatial=(5, 6, 7), with_risk=False, ignored=0.0, classes=4),
    Case("awkward_images", empty_image=True, batch=3, with_weight=True, channel=True),
    Case("tiles", classes=5, spatial=(12, 11), with_foreground=True),
    Case(
        "many_tiles", classes=19, spatial=(12, 13), empty_image=True, batch=3, with_foreground=True
    ),
    *(
        Case(
            f"tiles_{classes}_weight_{str(dtype)[6:]}",
            classes=classes,
            dtype=dtype,
            layout=layout,
            spatial=(12, 11),
            with_foreground=True,
            with_weight=True,
        )
        for classes, dtype, layout in (
            (4, torch.float32, "channels_last"),
            (11, torch.bfloat16, "contiguous"),
        )
    ),
)

_EVERY_OPTION: tuple[dict[str, Any], ...] = (
    {"label_smoothing": 0.1, "dice_weight": 1.0, "squared_pred": True},
    {"label_smoothing": 0.2, "ce_voxels": "foreground", "reduction": "none"},
    {"ce_voxels": "foreground", "normalization": "batch_foreground"},
)

# With every option at once, for every dtype and number of slots that classes take.
_TILES_WITH_ALL = [
    replace(case, name=f"{case.name}_{index}", with_weight=True, with_foreground=True,
            loss_options=options)
    for case in _TILES
    if case.classes in (3, 6, 9, 11)
    for index, options in enumerate(_EVERY_OPTION)
]  # fmt: skip

LOSS_CASES = (
    EVERY_CASE
    + _TILES_WITH_ALL
    + [
        replace(base, name=f"{base.name}_{index}", loss_options=options)
        for base in _LOSS_INPUTS
        for index, options in enumerate(_LOSS_OPTIONS)
    ]
    + [
        replace(case, name=f"{case.name}_dice", loss_options={"dice_weight": 1.0, "batch_dice": b})
        for case, b in zip(
            [case for case in EVERY_CASE if case.classes > 1 and case not in _MORE_TILES],
            [False, True] * len(EVERY_CASE),
            strict=False,
        )
    ]
)

# Labels background, oedema, non-enhancing and enhancing tumour; regions whole tumour, tumour core
# and enhancing tumour.
BRATS = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])

REGION_TABLES = [
    Case(f"regions_{r}_labels_{c}", regions=r, classes=c, spatial=(7, 9), with_weight=True)
    for r, c in (
        (1, 1), (1, 2), (2, 1), (3, 4), (2, 16), (3, 17), (5, 33), (7, 2), (8, 15), (9, 3),
        (16, 200), (17, 8), (40, 5), (40, 200),
    )
]  # fmt: skip

# Of up to four regions, and up to eight.
_REGION_TILES = [case for case in _TILES if case.classes in (3, 6)]

_LOSS_OPTIONS_OF_REGIONS = tuple(
    options for options in _LOSS_OPTIONS if options.get("normalization") != "weighted"
)

REGION_CASES = (
    REGION_TABLES
    + [
        replace(case, name=f"{case.name}_regions", regions=min(case.classes + 1, 9))
        for case in (BASE, *SIZES, *DTYPES, *TARGET_DTYPES, *STRIDES, *PATTERNS, *_REGION_TILES)
    ]
    + [
        replace(base, name=f"{base.name}_regions_{index}", loss_options=options, regions=4)
        for base in _LOSS_INPUTS[:4]
        for index, options in enumerate(_LOSS_OPTIONS_OF_REGIONS)
    ]
)
REGION_CASES += [
    replace(case, name=f"{case.name}_dice", loss_options={"dice_weight": 1.0, "batch_dice": b})
    for case, b in zip(REGION_CASES, [False, True] * len(REGION_CASES), strict=False)
    if not case.loss_options
]

SOURCE_REGION_CASES = [
    Case(f"source_regions_{r}_labels_{z}", source_regions=r, source_classes=z, spatial=(7, 9))
    for r, z in ((1, 1), (1, 2), (2, 4), (3, 4), (3, 8), (9, 3), (5, 33), (8, 16), (40, 200))
] + [
    replace(case, name=f"{case.name}_source_regions", source_regions=3)
    for case in (BASE, *SIZES, *DTYPES, *TARGET_DTYPES, *STRIDES, *PATTERNS, *_REGION_TILES)
]

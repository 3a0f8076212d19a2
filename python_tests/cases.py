"""The sample inputs that feed the tests of every operator."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import riskmap_ext

Call = tuple[tuple[Any, ...], dict[str, Any]]

LAYOUTS = (
    "contiguous",
    "channels_last",
    "transposed",
    "sliced",
    "offset",
    "batch_strided",
    "expanded",
    "channel_expanded",
)


@dataclass(frozen=True)
class Case:
    """One set of inputs; ``*_call(device)`` gives (args, kwargs) of each public function.

    ``labels``: "random", "background" (only class 0), or "ignored" (nothing valid).
    ``empty_image``: the labels of image 0 are all ignored, those of image 1 all background.
    ``regions``, ``source_regions``: so many overlapping regions as channels of the logits and of
    the source, made up of ``classes`` and ``source_classes`` labels; 0: a softmax.
    """

    name: str
    batch: int = 2
    classes: int = 3
    source_classes: int = 4
    spatial: tuple[int, ...] = (7, 9)
    dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype = torch.int64
    risk_dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    channel: bool = False
    labels: str = "random"
    empty_image: bool = False
    ignored: float = 0.15
    ignore_index: int = -100
    magnitude: float = 3.0
    with_risk: bool = True
    with_foreground: bool = False
    with_weight: bool = False
    regions: int = 0
    source_regions: int = 0
    risk_options: Mapping[str, Any] = field(default_factory=dict)
    loss_options: Mapping[str, Any] = field(default_factory=dict)

    def source(self, device: torch.device) -> Tensor:
        return self._scores("source", self.source_regions or self.source_classes, device)

    def logits(self, device: torch.device) -> Tensor:
        return self._scores("logits", self.regions or self.classes, device)

    def target(self, device: torch.device) -> Tensor:
        generator = self._generator("target")
        shape = (self.batch, *self.spatial)
        if self.labels == "random":
            target = torch.randint(self.classes, shape, generator=generator)
        else:
            target = torch.zeros(shape, dtype=torch.int64)
        dropped = torch.rand(shape, generator=generator) < self.ignored
        if self.labels == "ignored":
            dropped = torch.ones_like(dropped)
        if self.empty_image:
            target[1] = 0
            dropped[0] = True
        target[dropped] = self.ignore_index
        return self._voxels(target.to(self.target_dtype), device)

    def valid(self, device: torch.device) -> Tensor:
        """Valid voxels, [B, *S]."""
        target = self.target(device).to(torch.int64)
        return (target.squeeze(1) if self.channel else target) != self.ignore_index

    def risk(self, device: torch.device) -> Tensor:
        """Weights in [0, 10]; NaN at the ignored voxels, where nothing may look at them."""
        risk = 10 * torch.rand((self.batch, *self.spatial), generator=self._generator("risk"))
        risk = risk.to(self.risk_dtype)
        risk[~self.valid(torch.device("cpu"))] = torch.nan
        return self._voxels(risk, device)

    def foreground(self, device: torch.device) -> Tensor:
        generator = self._generator("foreground")
        mask = torch.rand((self.batch, *self.spatial), generator=generator) < 0.4
        return self._voxels(mask, device)

    def weight(self, device: torch.device) -> Tensor:
        channels = self.regions or self.classes
        return (0.1 + torch.rand(channels, generator=self._generator("weight"))).to(device)

    def table(self, rows: int, labels: int, device: torch.device) -> Tensor:
        """Regions [R, L] with every label in about half of them, and label 0 in the first alone."""
        table = torch.rand((rows, labels), generator=self._generator("regions")) < 0.5
        table[:, 0] = False
        table[0, 0] = True
        return table.to(device)

    def conditional(self, device: torch.device) -> Tensor:
        """P(y|z) float64 with a column without mass where there are several source classes."""
        joint = torch.rand(
            (self.classes, self.source_classes),
            generator=self._generator("conditional"),
            dtype=torch.float64,
        ).square()
        joint /= joint.sum(dim=0)
        if self.source_classes > 2:
            joint[:, 1] = 0
        return joint.to(device)

    def leep_call(self, device: torch.device) -> Call:
        args = (self.source(device), self.target(device), self.classes)
        return args, self._source_options(device)

    def map_call(self, device: torch.device) -> Call:
        args = (self.source(device), self.target(device), self.conditional(device))
        return args, self._source_options(device)

    def risk_call(self, device: torch.device) -> Call:
        args, kwargs = self.map_call(device)
        return args, {**kwargs, **self.risk_options}

    def loss_call(self, device: torch.device) -> Call:
        args = (
            self.logits(device),
            self.target(device),
            self.risk(device) if self.with_risk else None,
        )
        kwargs: dict[str, Any] = {"ignore_index": self.ignore_index, **self.loss_options}
        if self.with_foreground:
            kwargs["foreground"] = self.foreground(device)
        if self.with_weight:
            kwargs["weight"] = self.weight(device)
            kwargs["dice_class_weight"] = self.weight(device).flip(0)
        if self.regions:
            kwargs["regions"] = self.table(self.regions, self.classes, device)
        return args, kwargs

    def _source_options(self, device: torch.device) -> dict[str, Any]:
        options: dict[str, Any] = {"ignore_index": self.ignore_index}
        if self.source_regions:
            options["regions"] = self.table(self.source_regions, self.source_classes, device)
        return options

    def _generator(self, what: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.name}/{what}".encode()))

    def _scores(self, what: str, channels: int, device: torch.device) -> Tensor:
        shape = (self.batch, channels, *self.spatial)
        scores = self.magnitude * torch.randn(
            shape, generator=self._generator(what), dtype=torch.float64
        )
        return laid_out(scores.to(self.dtype).to(device), self.layout)

    def _voxels(self, voxels: Tensor, device: torch.device) -> Tensor:
        layout = "contiguous" if self.layout == "channels_last" else self.layout
        voxels = laid_out(voxels.to(device), layout)
        return voxels.unsqueeze(1) if self.channel else voxels


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The values (for "expanded" those of image 0, or channel 0) with other strides."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":  # the order of all dimensions reversed in memory
        return (
            tensor.permute(*reversed(range(tensor.dim())))
            .contiguous()
            .permute(*reversed(range(tensor.dim())))
        )
    if layout == "sliced":  # every other voxel of something larger
        larger = tensor.repeat_interleave(2, dim=-1)
        return larger[..., ::2]
    if layout == "offset":  # storage that starts one element in, rows that do not follow closely
        larger = torch.nn.functional.pad(tensor, (1, 2))
        return larger[..., 1:-2]
    if layout == "batch_strided":  # one of several stacked: contiguous inside an image only
        return torch.stack([tensor, torch.zeros_like(tensor)], dim=1)[:, 0]
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    if layout == "channel_expanded":  # dimension 1 has stride 0
        return tensor[:, :1].expand_as(tensor)
    raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")


def in_double(call: Call) -> Call:
    """The same call with every floating tensor in float64, each a new leaf."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double()
        return value

    args, kwargs = call
    return tuple(map(convert, args)), {name: convert(value) for name, value in kwargs.items()}


def loss_leaves(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, target and risk of a case; logits and risk are finite and require grad."""
    (logits, target, risk), _ = case.loss_call(device)
    return logits.requires_grad_(), target, risk.nan_to_num(1.0).requires_grad_()


def loss_and_gradients(
    call: Call, function: Any = None, grad_output: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss and its gradients for the logits and the risk (None without risk)."""
    (logits, target, risk), kwargs = call
    function = function or riskmap_ext.weighted_loss
    logits = logits.detach().requires_grad_()
    risk = None if risk is None else risk.detach().requires_grad_()
    loss = function(logits, target, risk, **kwargs)
    loss.backward(torch.as_tensor(grad_output, dtype=loss.dtype).to(loss.device).expand_as(loss))
    return loss.detach(), logits.grad, None if risk is None else risk.grad


def loss_in_two_steps(
    case: Case, device: torch.device, batch_dice: bool = False
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The sums of a loss, what becomes of them, and what the op makes in one step."""
    case = replace(case, channel=False)  # the ops take maps [B, *S]
    tensors = [case.logits(device), case.target(device), case.risk(device), case.weight(device)]
    table = case.table(case.regions, case.classes, device) if case.regions else None
    tensors += [None, table]
    dice_weight = case.weight(device).flip(0)
    floor, by_batch, added, valid_voxels, smoothing = 0.05, 1, 1, 0, 0.1
    formula = (1e-3, 1e-4, 0.4, 0.7)  # smooth_nr, smooth_dr, alpha, beta
    ops = torch.ops.riskmap_ext
    at_once = ops.weighted_loss(
        *tensors, dice_weight, case.ignore_index, 0, floor, by_batch, valid_voxels, added,
        smoothing, 0.7, 1.3, *formula, True, False, batch_dice,
    )  # fmt: skip
    sums = ops._weighted_loss_sums(*tensors, case.ignore_index, 0, valid_voxels, smoothing, True)
    finished = ops._weighted_loss_finish(
        sums, tensors[3], dice_weight, None if case.regions else 0, floor, by_batch, added,
        0.7, 1.3, *formula, batch_dice, case.dtype == torch.float64,
    )  # fmt: skip
    return sums, finished, at_once


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

EVERY_CASE = [BASE, *SIZES, *CLASSES, *DTYPES, *TARGET_DTYPES, *STRIDES, *PATTERNS]

_RANGES = ({}, {"range": (0.5, 3.0)}, {"range": (1.0, 1.05)}, {"background": None})

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
)

LOSS_CASES = (
    EVERY_CASE
    + [
        replace(base, name=f"{base.name}_{index}", loss_options=options)
        for base in _LOSS_INPUTS
        for index, options in enumerate(_LOSS_OPTIONS)
    ]
    + [
        replace(case, name=f"{case.name}_dice", loss_options={"dice_weight": 1.0, "batch_dice": b})
        for case, b in zip(
            [case for case in EVERY_CASE if case.classes > 1],
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

_LOSS_OPTIONS_OF_REGIONS = tuple(
    options for options in _LOSS_OPTIONS if options.get("normalization") != "weighted"
)

REGION_CASES = (
    REGION_TABLES
    + [
        replace(case, name=f"{case.name}_regions", regions=min(case.classes + 1, 9))
        for case in (BASE, *SIZES, *DTYPES, *TARGET_DTYPES, *STRIDES, *PATTERNS)
    ]
    + [
        replace(base, name=f"{base.name}_regions_{index}", loss_options=options, regions=4)
        for base in _LOSS_INPUTS
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
    for case in (BASE, *SIZES, *DTYPES, *TARGET_DTYPES, *STRIDES, *PATTERNS)
]

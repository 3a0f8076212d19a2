"""What a sample input of the operators is made of, see cases.py for the samples."""

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
    "shifted",
    "images_shifted",
    "batch_strided",
    "expanded",
    "channel_expanded",
    "channels_last_rows_apart",
)


@dataclass(frozen=True)
class Case:
    """One set of inputs; ``*_call(device)`` gives (args, kwargs) of each public function.

    ``labels``: "random", "runs" of neighbours, "background" (only class 0), or "ignored" (nothing
    valid).
    ``empty_image``: the labels of image 0 are all ignored, those of image 1 all background.
    ``features``: channels of the features that a head makes logits of.
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
    features: int = 6
    map_layout: str = ""  # of target, risk and mask, where it is not that of the logits
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
        elif self.labels == "runs":
            numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
            target = numbers // 37 % self.classes
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

    def head(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, F, *S], weight [C, F] and bias [C] of a head that makes logits."""
        shape = (self.batch, self.features, *self.spatial)
        generator = self._generator("head")
        features = torch.randn(shape, generator=generator, dtype=torch.float64)
        channels = self.regions or self.classes
        parameters = torch.randn((channels, self.features + 1), generator=generator)
        scale = self.magnitude / max(1, self.features) ** 0.5
        weight, bias = scale * parameters[:, 1:], parameters[:, 0]
        return (
            laid_out(features.to(self.dtype).to(device), self.layout),
            weight.to(self.dtype).to(device),
            bias.to(self.dtype).to(device),
        )

    def head_call(self, device: torch.device) -> Call:
        (_, target, risk), kwargs = self.loss_call(device)
        if "weight" in kwargs:
            kwargs["class_weight"] = kwargs.pop("weight")
        return (*self.head(device), target, risk), kwargs

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
        layout = self.map_layout or self.layout
        if layout.startswith("channels_last"):
            layout = "contiguous"
        voxels = laid_out(voxels.to(device), layout)
        return voxels.unsqueeze(1) if self.channel else voxels


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The values (for "expanded" those of image 0, or channel 0) with other strides."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "channels_last_rows_apart":  # part of a larger image: no stride for all voxels
        larger = torch.nn.functional.pad(tensor, (0, 1)).movedim(1, -1).contiguous()
        return larger.movedim(-1, 1)[..., :-1]
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
    if layout == "shifted":  # storage that starts one element in
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].reshape(tensor.shape)
    if layout == "images_shifted":  # one element between the images
        images = torch.nn.functional.pad(tensor.flatten(1), (0, 1))
        return images[:, :-1].unflatten(1, tensor.shape[1:])
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
) -> tuple[Tensor, Tensor, Any]:
    """The loss and its gradients for the logits and the risk (a tensor, or None without risk)."""
    (logits, target, risk), kwargs = call
    function = function or riskmap_ext.weighted_loss
    logits = logits.detach().requires_grad_()
    risk = None if risk is None else risk.detach().requires_grad_()
    loss = function(logits, target, risk, **kwargs)
    loss.backward(torch.as_tensor(grad_output, dtype=loss.dtype).to(loss.device).expand_as(loss))
    return loss.detach(), logits.grad, None if risk is None else risk.grad


class _Output(torch.autograd.Function):
    """A network's output: its memory is `values`, and its gradient is kept as it comes."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, values: Tensor, got: list[Tensor]) -> Tensor:
        ctx.got = got
        return values.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.got.append(gradient)
        return (None, None, None)


def network_output(values: Tensor, got: list[Tensor] | None = None) -> Tensor:
    return _Output.apply(torch.zeros((), requires_grad=True), values, [] if got is None else got)


def overwritten(call: Call, grad_output: float | Tensor = 1.0) -> tuple[Tensor, Tensor, Any]:
    """As loss_and_gradients, but the call's logits are lost: the gradient is where they were."""
    (values, target, risk), kwargs = call
    got: list[Tensor] = []
    risk = None if risk is None else risk.detach().requires_grad_()
    before = values.clone()
    logits = network_output(values, got)
    loss = riskmap_ext.weighted_loss(logits, target, risk, **kwargs, overwrite_logits=True)
    made_in_forward = "GradientInForward" in type(loss.grad_fn).__name__
    assert made_in_forward or torch.equal(values, before)
    loss.backward(torch.as_tensor(grad_output, dtype=loss.dtype).to(loss.device).expand_as(loss))
    (gradient,) = got
    assert gradient.data_ptr() == values.data_ptr()
    assert gradient.stride() == values.stride()
    return loss.detach(), gradient, None if risk is None else risk.grad


def loss_in_two_steps(
    case: Case, device: torch.device, batch_dice: bool = False
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The sums of a loss, what becomes of them, and what the op makes in one step."""
    case = replace(case, channel=False)  # the ops take maps [B, *S]
    weight = case.weight(device)
    table = case.table(case.regions, case.classes, device) if case.regions else None
    tensors = (case.logits(device), case.target(device), case.risk(device), weight, None, table)
    dice_weight = weight.flip(0)
    floor, by_batch, added, valid_voxels, smoothing = 0.05, 1, 1, 0, 0.1
    formula = (1e-3, 1e-4, 0.4, 0.7)  # smooth_nr, smooth_dr, alpha, beta
    ops = torch.ops.riskmap_ext
    at_once = ops.weighted_loss(
        *tensors, dice_weight, case.ignore_index, 0, floor, by_batch, valid_voxels, added,
        smoothing, 0.7, 1.3, *formula, True, False, batch_dice,
    )  # fmt: skip
    sums = ops._weighted_loss_sums(*tensors, case.ignore_index, 0, valid_voxels, smoothing, True)
    finished = ops._weighted_loss_finish(
        sums, weight, dice_weight, None if case.regions else 0, floor, by_batch, added,
        0.7, 1.3, *formula, batch_dice, case.dtype == torch.float64,
    )  # fmt: skip
    return sums, finished, at_once

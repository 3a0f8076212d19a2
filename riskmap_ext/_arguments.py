"""Argument checks shared by the public functions and their plain-PyTorch reference.

All checks use metadata only (type, dtype, shape, device, plain numbers): no voxel is
read, so they cost no device synchronisation and trace under ``torch.compile``.
The kernels check values (labels in range, risk finite).
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCHEMES = ("exponential", "power", "linear")  # in the order of the numbers in the schemas

_DENSE = torch.strided  # looked up once: every call of every function checks it
_STACK = (
    "; is it a stack [B, heads, C, *S] of deep supervision, as MONAI's DynUNet returns it in "
    "training? torch.unbind(output, 1) splits it, finest first"
)
_DEFERRED = " of a fused head: riskmap_ext.nn.RiskWeightedLoss takes them; .logits() computes them"
MAX_WEIGHT = 1e38  # voxel weights are float32
MAX_CLASSES = 2**16  # of a table for labels that no tensor has yet

FLOATING_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGER_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
LABEL_DTYPES = INTEGER_DTYPES + FLOATING_DTYPES


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; every other floating dtype is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plain_tensor(name: str, value: Any) -> Tensor:
    """``value`` as a plain tensor: MONAI MetaTensors and the like are unwrapped, without a copy."""
    if not isinstance(value, torch.Tensor):
        # By name: importing its module would be circular.
        hint = _DEFERRED if type(value).__name__ == "DeferredLogits" else ""
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}{hint}")
    if value.layout is not _DENSE:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one")
    if type(value) is torch.Tensor or isinstance(value, torch.nn.Parameter):
        return value
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return value  # fake or wrapper tensors bring their own kernels
    if hasattr(value, "as_tensor"):
        return value.as_tensor()
    return value.as_subclass(torch.Tensor)


def validate_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {_names(allowed)}, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {_names(allowed)}, got '{value}'")
    return value


def near_names(name: str, known: Collection[str], most: int = 2) -> str:
    """A "did you mean" question that ends a message; empty if nothing in ``known`` is close."""
    near = difflib.get_close_matches(name, known, n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def validate_flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool_", "bool"):  # numpy scalars
        return bool(value)
    raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    exclusive_low: bool = False,
) -> float:
    """``value`` (Python or numpy) as a finite float in [low, high], or (low, high]."""
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    finite = -math.inf < value < math.inf
    inside = low < value <= high if exclusive_low else low <= value <= high
    if not (finite and inside):
        raise ValueError(f"{name}: expected {_interval(low, high, exclusive_low)}, got {value}")
    return value


def number_sequence(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf
) -> tuple[float, ...]:
    """A list, tuple or array of numbers, each a finite float in [low, high]."""
    if isinstance(value, (str, bytes, Mapping, Set)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a sequence of numbers, got {type(value).__name__}")
    return tuple(number(name, each, low, high) for each in value)


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """``value`` (Python or numpy) as an int in low..high."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    value = int(value)
    if low is not None and value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value}")
    if high is not None and value > high:
        raise ValueError(f"{name}: expected an integer <= {high}, got {value}")
    return value


def validate_background(background: Any, num_classes: int) -> int | None:
    return None if background is None else integer("background", background, 0, num_classes - 1)


def validate_logits(name: str, value: Any, channels: str = "C") -> Tensor:
    """A plain floating tensor [B, C, *S] with 1 to 3 spatial dimensions and C >= 1."""
    tensor = plain_tensor(name, value)
    _require_dtype(name, tensor, FLOATING_DTYPES, "float64, float32, float16 or bfloat16")
    if not 3 <= tensor.dim() <= 5:
        raise ValueError(
            f"{name}: expected [B, {channels}, *S] with 1 to 3 spatial dimensions, "
            f"got shape {_shape(tensor)}{_STACK if tensor.dim() == 6 else ''}"
        )
    if tensor.size(1) == 0:
        of_what = "class" if channels == "C" else "channel"
        raise ValueError(f"{name}: expected at least one {of_what}, got shape {_shape(tensor)}")
    return tensor


def validate_head(weight: Any, bias: Any, features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight [C, F], also from [C, F, 1, 1, 1], and bias [C] of a 1x1 convolution."""
    weight = plain_tensor("weight", weight)
    _require_dtype("weight", weight, FLOATING_DTYPES, "a floating dtype")
    channels = features.size(1)
    fits = weight.dim() >= 2 and weight.size(0) > 0 and weight.size(1) == channels
    if not fits or any(size != 1 for size in weight.shape[2:]):
        raise ValueError(
            f"weight: expected [C, {channels}], or as a 1x1 convolution has it "
            f"[C, {channels}, 1, 1, 1], to go with features {_shape(features)}, "
            f"got shape {_shape(weight)}"
        )
    _require_device("weight", weight, "features", features)
    if bias is not None:
        bias = plain_tensor("bias", bias)
        _require_dtype("bias", bias, FLOATING_DTYPES, "a floating dtype")
        if tuple(bias.shape) != (weight.size(0),):
            raise ValueError(
                f"bias: expected [{weight.size(0)}], one value per row of weight "
                f"{_shape(weight)}, got shape {_shape(bias)}"
            )
        _require_device("bias", bias, "features", features)
    return weight.flatten(1), bias


def validate_labels(name: str, value: Any, logits: Tensor, logits_name: str = "logits") -> Tensor:
    """Labels as a view [B, *S], in any integer dtype, bool, or a floating dtype."""
    tensor = plain_tensor(name, value)
    _require_dtype(name, tensor, LABEL_DTYPES, "an integer, bool or floating dtype")
    return _voxels_of(name, tensor, logits, logits_name)


def validate_voxel_map(
    name: str, value: Any, logits: Tensor, logits_name: str = "logits"
) -> Tensor:
    """A floating map as a view [B, *S]."""
    tensor = plain_tensor(name, value)
    _require_dtype(name, tensor, FLOATING_DTYPES, "float64, float32, float16 or bfloat16")
    return _voxels_of(name, tensor, logits, logits_name)


def validate_mask(name: str, value: Any, logits: Tensor, logits_name: str = "logits") -> Tensor:
    """A bool or integer mask (non-zero is inside) as a view [B, *S]."""
    tensor = plain_tensor(name, value)
    _require_dtype(name, tensor, INTEGER_DTYPES, "bool or an integer dtype")
    return _voxels_of(name, tensor, logits, logits_name)


def validate_conditional(value: Any, source: Tensor, source_classes: int) -> Tensor:
    """P(y|z) as a floating tensor [C, Z] on the device of ``source``."""
    tensor = plain_tensor("conditional", value)
    _require_dtype("conditional", tensor, FLOATING_DTYPES, "a floating dtype")
    if tensor.dim() != 2 or tensor.size(0) == 0 or tensor.size(1) != source_classes:
        raise ValueError(
            f"conditional: expected [C, {source_classes}], one column per class of source "
            f"{_shape(source)}, got shape {_shape(tensor)}"
        )
    _require_device("conditional", tensor, "source", source)
    return tensor


def validate_joint(value: Any) -> Tensor:
    tensor = plain_tensor("joint", value)
    _require_dtype("joint", tensor, FLOATING_DTYPES, "a floating dtype")
    if tensor.dim() != 2:
        raise ValueError(f"joint: expected [C, Z], got shape {_shape(tensor)}")
    return tensor


def class_weights(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    """A floating tensor unchanged; a sequence of numbers as float32 on ``device``."""
    if isinstance(value, torch.Tensor):
        tensor = plain_tensor(name, value)
        _require_dtype(name, tensor, FLOATING_DTYPES, "a floating dtype")
        return tensor
    numbers = number_sequence(name, value, 0.0, MAX_WEIGHT)
    # torch.tensor(..., device=...) would wait for the device.
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").to(device, non_blocking=True)


def class_weight_row(name: str, value: Any) -> Tensor:
    """Class weights [C] for any number of classes."""
    weights = class_weights(name, value)
    if weights.dim() != 1 or weights.size(0) == 0:
        raise ValueError(f"{name}: expected [C], got shape {_shape(weights)}")
    return weights


def validate_class_weight(name: str, value: Any, logits: Tensor) -> Tensor | None:
    """Class weights [C] on the device of ``logits``."""
    if value is None:
        return None
    tensor = class_weights(name, value, logits.device)
    if tensor.dim() != 1 or tensor.size(0) != logits.size(1):
        raise ValueError(
            f"{name}: expected [{logits.size(1)}], one value per class of logits "
            f"{_shape(logits)}, got shape {_shape(tensor)}"
        )
    _require_device(name, tensor, "logits", logits)
    return tensor.detach()


def validate_regions(value: Any, logits: Tensor, logits_name: str = "logits") -> Tensor | None:
    """Table [R, L], true where label l is in region r, as bool on the device of ``logits``."""
    if value is None:
        return None
    table = region_table(value, logits.device)
    if table.size(0) != logits.size(1):
        raise ValueError(
            f"regions: expected [{logits.size(1)}, L], one row per channel of {logits_name} "
            f"{_shape(logits)}, got shape {_shape(table)}"
        )
    _require_device("regions", table, logits_name, logits)
    return table


def region_table(value: Any, device: torch.device | None = None) -> Tensor:
    """A tensor, or nested lists of 0 and 1 (then created on ``device``), as a bool table [R, L]."""
    if isinstance(value, torch.Tensor):
        table = plain_tensor("regions", value)
        _require_dtype("regions", table, INTEGER_DTYPES, "bool or an integer dtype")
    elif isinstance(value, (list, tuple)):
        table = _table_of_lists(value, device)
    else:
        raise TypeError(
            f"regions: expected a torch.Tensor or nested lists, got {type(value).__name__}"
        )
    if table.dim() != 2 or table.size(0) == 0 or table.size(1) == 0:
        raise ValueError(
            f"regions: expected [R, L], one row per region and one column per label, "
            f"got shape {_shape(table)}"
        )
    if table.dtype != torch.bool and may_look(table):
        wrong = table[table.ne(0) & table.ne(1)]
        if wrong.numel():
            raise ValueError(f"regions: expected 0 or 1 for each label, got {wrong[0].item()}")
    return table.to(torch.bool)


def may_look(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting for a device or breaking a graph."""
    return (
        type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    )


def _table_of_lists(value: Sequence[Any], device: torch.device | None) -> Tensor:
    for row in value:
        if not isinstance(row, (list, tuple)) or len(row) != len(value[0]):
            raise ValueError(f"regions: expected rows of the same length, got {value!r}")
        for inside in row:
            try:
                known = inside in (0, 1)
            except (TypeError, ValueError, RuntimeError):  # an array
                known = False
            if not known:  # a list of labels, perhaps
                raise ValueError(f"regions: expected 0 or 1 for each label, got {inside!r}")
    return torch.tensor(value, dtype=torch.bool, device="cpu").to(device, non_blocking=True)


def validate_range(value: Any) -> tuple[float, float] | None:
    """The hardness range (lo, hi) as floats, or None for the scope of each image."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"range: expected None or (lo, hi), got {value!r}")
    lo, hi = number("range", value[0]), number("range", value[1])
    if hi < lo:
        raise ValueError(f"range: expected lo <= hi, got ({lo}, {hi})")
    return lo, hi


class LeepArguments(NamedTuple):
    source: Tensor
    target: Tensor
    regions: Tensor | None
    num_classes: int
    ignore_index: int


def leep_arguments(
    source: Any, target: Any, num_classes: Any, ignore_index: Any, regions: Any = None
) -> LeepArguments:
    source = validate_logits("source", source)
    return LeepArguments(
        source,
        validate_labels("target", target, source, "source"),
        validate_regions(regions, source, "source"),
        integer("num_classes", num_classes, 1, MAX_CLASSES),
        integer("ignore_index", ignore_index, -(2**63), 2**63 - 1),
    )


class MapArguments(NamedTuple):
    source: Tensor
    target: Tensor
    conditional: Tensor
    regions: Tensor | None
    ignore_index: int


def map_arguments(
    source: Any, target: Any, conditional: Any, ignore_index: Any, regions: Any = None
) -> MapArguments:
    source = validate_logits("source", source)
    regions = validate_regions(regions, source, "source")
    source_classes = source.size(1) if regions is None else regions.size(1)
    return MapArguments(
        source,
        validate_labels("target", target, source, "source"),
        validate_conditional(conditional, source, source_classes),
        regions,
        integer("ignore_index", ignore_index, -(2**63), 2**63 - 1),
    )


class RiskOptions(NamedTuple):
    scheme: str
    base: float
    alpha: float
    scale: float
    range: tuple[float, float] | None
    background: int | None


def risk_options(
    scheme: Any,
    base: Any,
    alpha: Any,
    scale: Any,
    range: Any,  # the name is the public one
    background: Any,
    num_classes: int,
) -> RiskOptions:
    return RiskOptions(
        validate_choice("scheme", scheme, SCHEMES),
        number("base", base, 0.0, MAX_WEIGHT, exclusive_low=True),
        number("alpha", alpha, 0.0, 1.0, exclusive_low=True),
        number("scale", scale, 0.0, MAX_WEIGHT),
        validate_range(range),
        validate_background(background, num_classes),
    )


def _voxels_of(name: str, tensor: Tensor, logits: Tensor, logits_name: str) -> Tensor:
    plain = (logits.size(0), *logits.shape[2:])
    has_channel = tensor.dim() == logits.dim() and tensor.size(1) == 1
    voxels = tensor.squeeze(1) if has_channel else tensor
    if tuple(voxels.shape) != plain:
        channel = (logits.size(0), 1, *logits.shape[2:])
        heads = logits.dim() > 3 and _of_a_stack(tensor, logits)
        raise ValueError(
            f"{name}: expected shape {list(plain)} or {list(channel)} to go with {logits_name} "
            f"{_shape(logits)}, got {_shape(tensor)}{_STACK if heads else ''}"
        )
    _require_device(name, voxels, logits_name, logits)
    return voxels


def _of_a_stack(tensor: Tensor, logits: Tensor) -> bool:
    """Whether ``tensor`` goes with logits [B, heads, C, *S]."""
    batch, space = logits.shape[:1], logits.shape[3:]
    return tensor.shape in (batch + space, (*batch, 1, *space))


def _require_dtype(
    name: str, tensor: Tensor, allowed: Sequence[torch.dtype], expected: str
) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")


def _require_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: expected on {other.device} as {other_name} is, got {tensor.device}"
        )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _names(allowed: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in allowed)


def _interval(low: float, high: float, exclusive_low: bool) -> str:
    if high < math.inf:
        return f"a finite number in {'(' if exclusive_low else '['}{low:g}, {high:g}]"
    if low > -math.inf:
        return f"a finite number {'>' if exclusive_low else '>='} {low:g}"
    return "a finite number"

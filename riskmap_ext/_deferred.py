"""Deferred logits: what a fused head returns instead of logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}
_HELP = (
    "riskmap_ext.nn.RiskWeightedLoss and the losses of riskmap_ext.integrations take them as they "
    "are; for anything else .logits() computes them, and riskmap_ext.nn.unfuse_head(network) "
    "restores the convolution"
)


@dataclass(frozen=True, eq=False, repr=False)
class DeferredLogits:
    r"""Logits [B, C, \*S] not computed yet: the input and parameters of a 1x1 convolution.

    :class:`riskmap_ext.nn.FusedHead` returns them; :class:`riskmap_ext.nn.RiskWeightedLoss`, the
    losses of ``riskmap_ext.integrations``, and the functions of a source model
    (:func:`riskmap_ext.leep_statistics`, :func:`riskmap_ext.risk_map`, ...) take them instead of
    logits. They pass through DistributedDataParallel, torch.compile, forward hooks and
    checkpointing with ``use_reentrant=False``.

    features: [B, F, \*S]. weight: [C, F] or [C, F, 1(, 1, 1)]. bias: [C] or None.

    Torch's and numpy's functions, operators, indexing, iteration and tensor attributes raise a
    TypeError or AttributeError that says what to do: features are never mistaken for logits.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features, weight and bias."""
        return self.features, self.weight, self.bias

    @property
    def shape(self) -> torch.Size:
        """Shape of the logits: [B, C, *S]."""
        features = self.features.shape
        return torch.Size((features[0], self.weight.shape[0], *features[2:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        return self.features.device

    def logits(self) -> Tensor:
        """Computes the logits as the convolution does."""
        kernel = (1,) * (self.features.dim() - 2)
        weight = self.weight.reshape(*self.weight.shape[:2], *kernel)
        return convolved(self.features, weight, self.bias)

    def channels(self, mine: slice) -> DeferredLogits:
        """Deferred logits of these channels: ``logits[:, mine]``."""
        bias = None if self.bias is None else self.bias[mine]
        return DeferredLogits(self.features, self.weight[mine], bias)

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={list(self.shape)}, not computed: .logits() computes them)"

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any, **__: Any) -> NoReturn:
        name = getattr(function, "__name__", str(function))
        raise TypeError(f"{name}: got DeferredLogits, logits that have not been computed; {_HELP}")

    def __getattr__(self, name: str) -> NoReturn:
        hint = "" if name.startswith("_") else f", since they have not been computed; {_HELP}"
        raise AttributeError(f"DeferredLogits have no {name!r}{hint}")


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(self: DeferredLogits, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{name}: DeferredLogits have not been computed; {_HELP}")

    return refuse


_OPERATORS = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
)
_REFUSED = (
    # Indexing or unpacking would return the features as the first of several outputs.
    *("getitem", "iter", "next", "reversed", "len", "contains"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
    *_OPERATORS,
    *(f"r{name}" for name in _OPERATORS),
    *("neg", "pos", "abs", "invert", "float"),
    *("array", "array_ufunc", "array_function", "dlpack"),
)
for _name in _REFUSED:
    setattr(DeferredLogits, f"__{_name}__", _refusal(f"__{_name}__"))

pytree.register_pytree_node(
    DeferredLogits, lambda given: (list(given.parts), None), lambda parts, _: DeferredLogits(*parts)
)


def convolved(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """weight: [C, F, 1(, 1, 1)]. features may lack a batch dimension, as in a convolution."""
    return _CONVOLUTIONS[weight.dim() - 2](features, weight, bias)


def cast_by_autocast(
    features: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts as for a convolution; float64 is kept."""
    kind = features.device.type
    # There is no autocast on the meta device.
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    if not autocast or features.dtype == torch.float64:
        return features, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    bias = None if bias is None else bias.to(dtype)
    return features.to(dtype), weight.to(dtype), bias

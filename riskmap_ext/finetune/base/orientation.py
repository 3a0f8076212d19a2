"""The order in which a network sees the axes of a volume: reorients volumes to it and back.

Orders are letters like nibabel's axis codes: "RAS" increases to the right, the front and the top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from riskmap_ext._deferred import DeferredLogits
from riskmap_ext.finetune.base.errors import ConfigError

T = TypeVar("T")
# Volumes are prepared with the slice axis last; "RAS" is nibabel's canonical order.
PREPARED: Mapping[str, str] = {"axial": "RAS", "coronal": "RSA", "sagittal": "ASR"}
_AXES = ("RL", "AP", "SI")
_PLANES = {"RL": "sagittal", "AP": "coronal", "SI": "axial"}


def axis_of(letter: str) -> str:
    """The two directions of the letter's axis."""
    return next(axis for axis in _AXES if letter in axis)


def check_orientation(letters: Any) -> Any:
    """Upper-case letters; ValueError if they do not name different axes."""
    if letters is None:
        return None
    known = [axis for letter in str(letters).upper() for axis in _AXES if letter in axis]
    if not (len(known) == len(set(known)) == len(str(letters)) and len(known) in (2, 3)):
        raise ValueError(
            "expected a letter of R or L, one of A or P and one of S or I, in the order of the "
            f"axes, such as RAS or LPS, got {letters!r}"
        )
    return str(letters).upper()


def slice_axis_of(letter: str) -> str:
    """The plane perpendicular to an axis, as `data.slice_axis` names it."""
    return _PLANES[axis_of(letter)]


def arranged(values: Sequence[T], have: str, wanted: str) -> list[T]:
    """Values of the axes `have` (sizes, spacings) in the order of `wanted`."""
    by_axis = {axis_of(letter): value for letter, value in zip(have, values, strict=True)}
    return [by_axis[axis_of(letter)] for letter in wanted]


def orient(network: nn.Module, wanted: str | None, slice_axis: str, dims: int) -> None:
    """Lets `network` see prepared images [B, M, *S] in the order `wanted`; None: as they are.

    Its output is returned in the prepared order. The names of its weights do not change.

    Raises: ConfigError if a 2-D network sees slices other than those of `slice_axis`.
    """
    if wanted is None:
        return
    have = PREPARED[slice_axis][:dims]
    if len(wanted) != dims:
        raise ConfigError(
            f"network.orientation: expected {dims} letters for a {dims}-D network, got {wanted!r}"
        )
    missing = [letter for letter in wanted if not set(axis_of(letter)) & set(have)]
    if missing:
        left = next(axis for axis in _AXES if not set(axis) & set(wanted))
        raise ConfigError(
            f"data.slice_axis: the network sees {_PLANES[left]} slices (its axes are {wanted}), "
            f"got {slice_axis}; set data.slice_axis={_PLANES[left]}"
        )
    if wanted == have:
        return
    order = [0, 1, *arranged(range(2, 2 + dims), have, wanted)]
    inverse = [order.index(axis) for axis in range(2 + dims)]
    flips = [2 + axis for axis, letter in enumerate(wanted) if letter not in have]

    def flipped(image: Tensor) -> Tensor:
        return image.flip(flips) if flips else image

    def there(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        image, *others = inputs
        return flipped(image.permute(order)).contiguous(), *others

    def back(output: Any) -> Any:
        if isinstance(output, DeferredLogits):
            return DeferredLogits(back(output.features), output.weight, output.bias)
        if isinstance(output, (list, tuple)):
            return type(output)(map(back, output))
        return flipped(output).permute(inverse)

    network.register_forward_pre_hook(there)
    network.register_forward_hook(lambda _, inputs, output: back(output))

"""Types of the configuration's keys: their checks, and what is said of other values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Len, Predicate
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from riskmap_ext.finetune.base.orientation import check_orientation
from riskmap_ext.finetune.base.structures import check_names

_BELOW_ROOT = ("datalist", "images", "labels")


def _absolute(value: Any, info: ValidationInfo) -> Any:
    """Relative paths start from data.root, the configuration's file, or here where typed."""
    if not isinstance(value, (str, Path)):
        return value
    if not str(value).strip():
        raise ValueError("expected a path, got an empty text")
    given = info.context or {}
    root = info.data.get("root") if info.field_name in _BELOW_ROOT else None
    base = None if info.field_name in given.get("typed", ()) else given.get("base")
    start = root or base or Path.cwd()
    return Path(os.path.normpath(start / Path(value).expanduser()))


def _no_bool(value: Any) -> Any:
    """pydantic would take yes for 1."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {str(value).lower()}")
    return value


def expected(text: str) -> WrapValidator:
    """Says in one line what a key takes that allows several kinds of values."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            ours = [e["ctx"]["error"] for e in error.errors() if e["type"] == "value_error"]
            raise ValueError(ours[0] if ours else f"expected {text}, got {value!r}") from None

    return WrapValidator(check)


NUMBER = BeforeValidator(_no_bool)
LIST = BeforeValidator(lambda value: value if isinstance(value, (list, tuple)) else [value])
PositiveInt = Annotated[int, Field(ge=1), NUMBER]
Count = Annotated[int, Field(ge=0), NUMBER]
Fraction = Annotated[float, Field(ge=0, le=1), NUMBER]
BelowOne = Annotated[float, Field(ge=0, lt=1), NUMBER]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), NUMBER]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER]
Sizes = Annotated[list[PositiveInt], LIST]
Spacing = Annotated[
    list[Positive | None], Len(3, 3), expected("[x, y, z] in mm, each above 0 or null")
]
Interval = Annotated[
    list[Annotated[float, NUMBER]], Len(2, 2), Predicate(lambda pair: pair[0] <= pair[1])
]
Pair = Annotated[list[Annotated[float, Field(allow_inf_nan=False), NUMBER]], Len(2, 2)]
Window = Annotated[Pair, Predicate(lambda pair: pair[0] < pair[1])]
MeanStd = Annotated[Pair, Predicate(lambda pair: pair[1] > 0)]
Normalization = Literal["zscore", "zscore_foreground", "rescale", "none"]
FilePath = Annotated[Path, BeforeValidator(_absolute)]
FilePaths = Annotated[list[FilePath], Len(1)]
Folder = Annotated[FilePath, expected("a folder")]
Names = Annotated[list[str], Len(1), AfterValidator(check_names)]
ClassNames = Annotated[list[str], Len(2), AfterValidator(check_names)]
Member = Annotated[int | str, expected("the number or name of a class")]
Channel = Annotated[Count | str, expected("the number or name of a channel")]
Orientation = Annotated[str, AfterValidator(check_orientation)]
Axis = Literal["sagittal", "coronal", "axial"]

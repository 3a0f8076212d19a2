"""Configuration of a fine-tuning run: one YAML file, `key.sub=value` overrides, pydantic checks."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from riskmap_ext.finetune.errors import ConfigError
from riskmap_ext.finetune.yaml_text import DuplicateKeyError, read_yaml

IGNORE_INDEX = -100


def _against_base(value: Any, info: ValidationInfo) -> Any:
    """Relative paths of a config file start from the file's folder."""
    if not isinstance(value, (str, Path)):
        return value
    if not str(value).strip():
        raise ValueError("expected a path, got an empty text")
    base = (info.context or {}).get("base") or Path.cwd()
    return Path(os.path.normpath(Path(base) / Path(value).expanduser()))


def check_names(names: Any) -> Any:
    """Class names as they are; ValueError for empty ones and for the same name twice."""
    if isinstance(names, list):
        empty = [place for place, name in enumerate(names) if not name.strip()]
        if empty:
            raise ValueError(f"expected a name for each class, got none for class {empty[0]}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"expected distinct names, got {', '.join(twice)} more than once")
    return names


def _one_or_many(value: Any) -> Any:
    return value if value is None or isinstance(value, (list, tuple)) else [value]


FilePath = Annotated[Path, BeforeValidator(_against_base)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Sizes = Annotated[list[PositiveInt], BeforeValidator(_one_or_many)]
Axis = Literal["sagittal", "coronal", "axial"]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class CaseConfig(_Section):
    """One image with its label."""

    image: FilePath
    label: FilePath
    name: Annotated[str, Field(pattern=r"^[^/\\]+$")] | None = None


class DataConfig(_Section):
    """Which files are read, and how labels and intensities are prepared."""

    root: FilePath | None = None
    datalist: Path | None = None
    images: Path | None = None
    labels: Path | None = None
    cases: list[CaseConfig] | None = None
    image_suffix: str = ""
    label_suffix: str = ""
    train: Annotated[int, Field(ge=1)] | list[str] | None = None
    validation: Annotated[int, Field(ge=0)] | list[str] | None = None
    classes: list[str] | None = None
    label_map: dict[int, int | str] | None = None
    other_labels: Literal["error", "background", "ignore"] = "error"
    spacing: Annotated[list[Positive], Field(min_length=3, max_length=3)] | None = None
    normalize: Literal["zscore", "none"] = "zscore"
    image_foreground: Literal["nonzero", "otsu", "all"] = "nonzero"
    slice_axis: Axis = "axial"

    @field_validator("classes")
    @classmethod
    def _distinct_classes(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and len(value) < 2:
            raise ValueError(f"expected two or more distinct names, background first, got {value}")
        return check_names(value)

    @model_validator(mode="after")
    def _one_way_to_list_files(self, info: ValidationInfo) -> DataConfig:
        given = [k for k in ("datalist", "images", "cases") if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"expected one of datalist, images + labels, cases; got {given}")
        if (self.images is None) != (self.labels is None):
            raise ValueError("expected images and labels together, got one of them")
        if not given and self.root is None:
            raise ValueError(
                "no data given: set root (a folder with dataset.json or with images/ and labels/), "
                "datalist, images and labels, or cases"
            )
        base = self.root or (info.context or {}).get("base") or Path.cwd()
        for key in ("datalist", "images", "labels"):
            value = getattr(self, key)
            if value is not None:
                # Assignment would validate again, without the context.
                resolved = Path(os.path.normpath(Path(base) / value.expanduser()))
                self.__dict__[key] = resolved
        return self


class NetworkConfig(_Section):
    """A class of monai.networks.nets and its arguments (channels follow from the classes)."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)


class SourceConfig(_Section):
    """The frozen source model: where the weights and the transfer risk come from."""

    checkpoint: FilePath
    network: NetworkConfig | None = None
    classes: Annotated[int, Field(ge=1)] | list[str] | None = None
    initialize: bool = True
    head: Literal["auto", "keep", "reinitialize"] = "auto"

    @field_validator("classes")
    @classmethod
    def _distinct_classes(cls, value: int | list[str] | None) -> int | list[str] | None:
        return check_names(value)


class RiskConfig(_Section):
    """The transfer risk map (options of riskmap_ext.risk_map)."""

    use: bool = True
    scheme: Literal["exponential", "power", "linear"] = "exponential"
    base: Positive = 10.0
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.5
    scale: NonNegative = 9.0
    range: Literal["dataset", "image"] | Interval = "dataset"

    @field_validator("range")
    @classmethod
    def _ordered(cls, value: Any) -> Any:
        if isinstance(value, list) and not value[0] <= value[1]:
            raise ValueError(f"expected [lo, hi] with lo <= hi, got {value}")
        return value


class LossConfig(_Section):
    """The loss (options of riskmap_ext.weighted_loss)."""

    ce_weight: NonNegative = 1.0
    dice_weight: NonNegative = 1.0
    normalization: Literal["foreground", "batch_foreground", "valid", "none"] = "foreground"
    foreground_floor: Fraction = 0.05
    region: Literal["valid", "foreground"] = "valid"
    class_weights: Literal["sqrt_inverse_frequency"] | list[NonNegative] | None = None
    label_smoothing: Fraction = 0.0
    include_background: bool = False
    batch_dice: bool = False

    @model_validator(mode="after")
    def _something_to_minimize(self) -> LossConfig:
        if self.ce_weight == 0 and self.dice_weight == 0:
            raise ValueError("expected ce_weight or dice_weight above 0, got 0 for both")
        return self


class AugmentConfig(_Section):
    """Random changes of each crop; angles in degrees, everything else relative."""

    flip: list[Axis] = Field(default_factory=list)
    affine_probability: Fraction = 0.5
    rotation: Annotated[float, Field(ge=0, le=180)] = 15.0
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.15
    intensity_probability: Fraction = 0.5
    brightness: NonNegative = 0.1
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.2
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.2
    noise_probability: Fraction = 0.2
    noise: NonNegative = 0.1


class TrainConfig(_Section):
    """The optimisation."""

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 2
    patch_size: Sizes | None = None
    lr: Positive = 1e-3
    weight_decay: NonNegative = 1e-5
    optimizer: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    momentum: Fraction = 0.99
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    validate_every: Annotated[int, Field(ge=0)] = 100
    foreground_crops: Fraction = 1 / 3
    crop_balance: Literal["class", "voxel"] = "class"
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    amp: Literal["none", "bf16", "fp16"] = "none"
    grad_clip: Positive | None = 12.0


class InferenceConfig(_Section):
    """Sliding windows of validation, of the final prediction and of the source model."""

    patch_size: Sizes | None = None
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.25
    batch_size: PositiveInt | None = None


class WriteConfig(_Section):
    """Which of the larger outputs are written."""

    maps: bool = True
    predictions: bool = True
    overlays: bool | Annotated[int, Field(ge=0)] = True
    tensorboard: bool = True
    report: bool = True


DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


class Config(_Section):
    """A whole run. Field by field: docs/finetune.md."""

    output: FilePath
    overwrite: bool = False
    cache: FilePath | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: str = "auto"
    threads: PositiveInt | None = None
    data: DataConfig
    network: NetworkConfig | None = None
    source: SourceConfig | None = None
    risk: RiskConfig = Field(default_factory=RiskConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    write: WriteConfig = Field(default_factory=WriteConfig)

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not DEVICE.fullmatch(value):
            raise ValueError(
                "expected auto, cpu, cuda or cuda:N (the driver runs on the CPU and on CUDA "
                f"devices), got {value!r}"
            )
        return value

    @model_validator(mode="after")
    def _network_known(self) -> Config:
        if self.network is None and self.source is None:
            raise ValueError(
                "network: expected a name and args, or a source whose network is taken; got neither"
            )
        if self.source is None and self.risk.use and "use" in self.risk.model_fields_set:
            raise ValueError("risk.use: true needs a source model; set source.checkpoint")
        return self

    @property
    def uses_risk(self) -> bool:
        return self.source is not None and self.risk.use

    def to_yaml(self) -> str:
        """The resolved configuration; loading it again gives the same run."""
        plain = self.model_dump(mode="json")
        if self.source is None:
            # true (the default) is refused where there is no source.
            plain["risk"]["use"] = False
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


# What the keys take that allow values of several kinds.
_EXPECTED = {
    "output": "a folder",
    "cache": "a folder",
    "data.train": "a number >= 1 or a list of case names",
    "data.validation": "a number >= 0 or a list of case names",
    "data.spacing": "[x, y, z] in mm, each above 0",
    "source.checkpoint": "a file",
    "source.classes": "a number >= 1 or a list of class names",
    "risk.range": "dataset, image or [lo, hi]",
    "loss.class_weights": "sqrt_inverse_frequency or a list of numbers >= 0",
    "write.overlays": "true, false or a number >= 0",
}
_PATH_KEYS = ("output", "cache", "data.root", "source.checkpoint")
_PATH_KEYS_BELOW_ROOT = ("data.datalist", "data.images", "data.labels")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file with `key.sub=value` overrides (values parsed as YAML).

    Relative paths in the file start from the file's folder, those in overrides from the current
    folder; `data.datalist`, `data.images` and `data.labels` from `data.root` where it is set.

    Raises: ConfigError naming the file, the key and what was expected.
    """
    path = Path(path)
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except DuplicateKeyError as error:
        raise ConfigError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({_one_line(error)})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys such as output, data, source; got {content!r}")
    apply_overrides(content, overrides)
    return parse_config(content, base=path.resolve().parent, origin=str(path))


def parse_config(
    content: Mapping[str, Any], *, base: Path | None = None, origin: str = "configuration"
) -> Config:
    """A Config from plain mappings; relative paths start from `base` (default: current folder)."""
    try:
        return Config.model_validate(content, context={"base": base})
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _explain(error, content))
        raise ConfigError(f"{origin}:\n{lines}") from None


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Writes `key.sub=value` overrides into `content`; paths become absolute."""
    below_root: list[tuple[str, Any]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"{override!r}: expected key=value or key.sub=value")
        try:
            value = read_yaml(text)
        except DuplicateKeyError as error:
            raise ConfigError(f"{override!r}: the key {error.key} is given twice") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{override!r}: not valid YAML ({_one_line(error)})") from None
        dotted = ".".join(parts)
        # An empty path is left for the configuration to refuse: here it would become this folder.
        given_path = isinstance(value, str) and bool(value.strip())
        if dotted in _PATH_KEYS and given_path:
            value = str(Path.cwd() / Path(value).expanduser())
        if dotted in _PATH_KEYS_BELOW_ROOT and given_path:
            below_root.append((parts[-1], value))
        section: Any = content
        for depth, part in enumerate(parts[:-1]):
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                prefix = ".".join(parts[: depth + 1])
                raise ConfigError(f"{override!r}: {prefix} is a value, not a section")
        section[parts[-1]] = value
    for key, value in below_root:
        if content["data"].get("root") is None:
            content["data"][key] = str(Path.cwd() / Path(value).expanduser())


def _explain(error: ValidationError, content: Mapping[str, Any]) -> list[str]:
    """One line per problem: dotted key, what was expected, what came, near names."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        names = [str(part) for part in problem["loc"]]
        key = ".".join(_keys_only(names))
        if problem["type"] == "extra_forbidden":
            lines[key] = f"{key}: unknown key{_suggest(names)}"
        elif problem["type"] == "missing":
            lines[key] = f"{key}: missing"
        elif problem["type"] == "value_error":
            text = str(problem["ctx"]["error"])
            lines[key] = f"{key}: {text}" if key else text
        elif key in _EXPECTED:
            lines[key] = f"{key}: expected {_EXPECTED[key]}, got {_given(content, key)!r}"
        else:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            text = f"{key}: {message}, got {problem['input']!r}"
            near = _near_value(problem)
            # A union reports one problem per alternative; they belong to one line.
            lines[key] = f"{lines[key]}; or {message}" if key in lines else text + near
    return list(lines.values())


def _given(content: Mapping[str, Any], key: str) -> Any:
    value: Any = content
    for part in key.split("."):
        value = value[part]
    return value


def _keys_only(names: Sequence[str]) -> list[str]:
    """The parts of a location that are keys of the file, without pydantic's union branch tags."""
    kept: list[str] = []
    for name in names:
        branch = name.startswith(("literal", "constrained-", "function-"))
        if branch or "[" in name or name in ("int", "float", "str", "bool"):
            break
        kept.append(name)
    return kept


def _suggest(names: Sequence[str]) -> str:
    section: Any = Config
    for name in names[:-1]:
        section = _section_of(section, name)
    known = list(section.model_fields) if section is not None else []
    near = difflib.get_close_matches(names[-1], known, n=2, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known keys are {', '.join(known)}" if known else ""


def _section_of(section: Any, name: str) -> Any:
    field = section.model_fields.get(name) if section is not None else None
    if field is None:
        return section if name.isdigit() else None
    candidates = [field.annotation, *get_args(field.annotation)]
    candidates += [inner for c in candidates for inner in get_args(c)]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _near_value(problem: Mapping[str, Any]) -> str:
    if problem["type"] != "literal_error" or not isinstance(problem["input"], str):
        return ""
    expected = problem["ctx"]["expected"].replace(" or ", ", ").split(", ")
    by_lower = {text.strip("'").lower(): text for text in expected}
    near = difflib.get_close_matches(problem["input"].lower(), list(by_lower), n=1)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

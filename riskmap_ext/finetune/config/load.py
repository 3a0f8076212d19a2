"""A configuration read from a YAML file with `key.sub=value` overrides; what is wrong, in words."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from riskmap_ext._arguments import near_names
from riskmap_ext.finetune.base.errors import ConfigError
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.config.yaml_text import DuplicateKeyError, key_lines, read_yaml

# What the keys take that allow values of several kinds.
_EXPECTED = {
    "output": "a folder",
    "cache": "a folder",
    "data.train": "a number >= 1 or a list of case names",
    "data.validation": "a number >= 0 or a list of case names",
    "data.channels": "a number >= 1 or a list of channel names",
    "data.image_suffix": "a text, or a list with one for each channel",
    "data.label_map": "label value: class, or a file with such a table",
    "data.spacing": "[x, y, z] in mm, each above 0",
    "source.checkpoint": "a file, or the folder of a MONAI bundle",
    "source.classes": "a number >= 1 or a list of class names",
    "risk.range": "dataset, image or [lo, hi]",
    "loss.class_weights": "sqrt_inverse_frequency, a list of numbers >= 0 or null",
    "write.overlays": "true, false or a number >= 0",
}
_PATH_KEYS = ("output", "cache", "data.root", "data.label_map", "source.checkpoint")
_PATH_KEYS_BELOW_ROOT = ("data.datalist", "data.images", "data.labels")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file with `key.sub=value` overrides (values parsed as YAML).

    Relative paths in the file start from the file's folder, those in overrides from the current
    folder; `data.datalist`, `data.images` and `data.labels` from `data.root` where it is set.

    Raises: ConfigError naming the file, the key and what was expected.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = read_yaml(text)
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
    places = _places(text, overrides)
    return parse_config(content, base=path.resolve().parent, origin=str(path), places=places)


@contextmanager
def located(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Iterator[None]:
    """Adds the place of the key to a ConfigError that begins with one, for a file just loaded."""
    try:
        yield
    except ConfigError as error:
        found = re.match(r"([a-z_]+(\.[a-z_0-9]+)*): ", str(error))
        try:
            places = _places(Path(path).read_text(encoding="utf-8"), overrides)
        except (OSError, ValueError, yaml.YAMLError):  # changed since
            raise error from None
        place = _place(found[1], places) if found else ""
        raise type(error)(f"{path}: {place}{error}" if place else str(error)) from None


def _places(text: str, overrides: Sequence[str]) -> dict[str, str]:
    places = {key: f"line {line}" for key, line in key_lines(text).items()}
    for override in overrides:
        places[override.partition("=")[0].strip()] = "command line"
    return places


def parse_config(
    content: Mapping[str, Any],
    *,
    base: Path | None = None,
    origin: str = "configuration",
    places: Mapping[str, str] | None = None,
) -> Config:
    """A Config from plain mappings; relative paths start from `base` (default: current folder).

    origin, places: what the errors call the whole and the place of each dotted key.
    """
    try:
        return Config.model_validate(content, context={"base": base})
    except ValidationError as error:
        lines = [
            f"  {_place(key, places or {})}{text}" for key, text in _explain(error, content).items()
        ]
        raise ConfigError("\n".join([f"{origin}:", *lines])) from None


def _place(key: str, places: Mapping[str, str]) -> str:
    """Where the key stands, or the section that it is missing in."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in places:
            return f"{places[name]}: "
    return ""


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


def _explain(error: ValidationError, content: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> a line that names it, what was expected, what came, and near names."""
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
    return lines


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
    return near_names(names[-1], known) or (f"; known keys are {', '.join(known)}" if known else "")


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

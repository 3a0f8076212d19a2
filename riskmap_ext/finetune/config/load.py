"""A configuration read from a YAML file with `key.sub=value` overrides; what is wrong, in words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from riskmap_ext._arguments import near_names
from riskmap_ext.finetune.base.errors import ConfigError, InputError, Problems, one_line
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.config.types import BELOW_ROOT
from riskmap_ext.finetune.config.yaml_text import read_mapping, read_yaml

_PATH_KEYS = ("output", "cache", "data.root", "data.label_map", "data.folds", "source.checkpoint")
_KEYS_BELOW_ROOT = tuple(f"data.{key}" for key in BELOW_ROOT)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file with `key.sub=value` overrides (values parsed as YAML).

    Relative paths in the file start from the file's folder, those in overrides from the current
    folder; `data.datalist`, `data.images` and `data.labels` from `data.root` where it is set.

    Raises: ConfigError naming the file, the key and what was expected.
    """
    return _read(path, overrides)[0]


@contextmanager
def located_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Iterator[Config]:
    """load_config; lines of an error within that begin with a key also get the key's place."""
    config, places = _read(path, overrides)
    try:
        yield config
    except ConfigError as error:

        def placed(found: re.Match[str]) -> str:
            place = _place(found[1], places)
            return f"{path}: {place}{found[0]}" if place else found[0]

        told = re.sub(r"(?m)^([a-z_]+(?:\.[a-z_0-9]+)*): ", placed, str(error))
        raise type(error)(told) from None


def _read(path: str | os.PathLike[str], overrides: Sequence[str]) -> tuple[Config, dict[str, str]]:
    """Also the place of each key."""
    path, errors, config = Path(path), Problems(), None
    content, lines = read_mapping(path)
    places = {key: f"line {line}" for key, line in lines.items()}
    places |= {override.partition("=")[0].strip(): "command line" for override in overrides}
    with errors.collected(InputError):
        apply_overrides(content, overrides)
    with errors.collected(InputError):
        base = path.resolve().parent
        config = parse_config(content, base=base, origin=str(path), places=places)
    errors.tell()
    assert config is not None
    return config, places


def _place(key: str, places: Mapping[str, str]) -> str:
    """Where the key stands, or the section that it is missing in."""
    while key and key not in places:
        key = key.rpartition(".")[0]
    return f"{places[key]}: " if key else ""


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
        lines = (
            f"  {_place(key, places or {})}{key}{': ' if key else ''}{told}"
            for key, told in problems_of(error, Config)
        )
        raise ConfigError("\n".join([f"{origin}:", *lines])) from None


def problems_of(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Of each problem the key, and what was expected there and came. model: what was validated."""
    for problem in error.errors():
        # Of a wrong key of a mapping, pydantic says that it is one.
        names = [str(part) for part in problem["loc"] if part != "[key]"]
        yield ".".join(names), _told(problem, names, model)


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Writes `key.sub=value` overrides into `content`; paths become absolute.

    Raises: ConfigError with a line for each that cannot be.
    """
    errors = Problems()
    # The root comes first: relative paths below it start there.
    pairs = [(*map(str.strip, each.partition("=")), each) for each in overrides]
    for key, equals, text, override in sorted(pairs, key=lambda pair: pair[0] != "data.root"):
        with errors.collected(InputError):
            *above, last = key.split(".")
            if not equals or not all((*above, last)):
                raise ConfigError(f"{override!r}: expected key=value or key.sub=value")
            _check_key(key)
            try:
                value, _ = read_yaml(text)
            except yaml.YAMLError as error:
                raise ConfigError(f"{override!r}: not valid YAML ({one_line(error)})") from None
            section: Any = content
            for depth, part in enumerate(above, 1):
                if section.get(part) is None:
                    section[part] = {}
                section = section[part]
                if not isinstance(section, dict):
                    prefix = ".".join(above[:depth])
                    raise ConfigError(f"{override!r}: {prefix} is a value, not a section")
            paths = _PATH_KEYS if section.get("root") else (*_PATH_KEYS, *_KEYS_BELOW_ROOT)
            # An empty path, here this folder, is left for the configuration to refuse.
            if key in paths and isinstance(value, str) and value.strip():
                value = str(Path.cwd() / Path(value).expanduser())
            section[last] = value
    errors.tell()


def _check_key(key: str) -> None:
    """Raises: ConfigError with the key that was probably meant where there is none such."""
    section: type[BaseModel] | None = Config
    for depth, part in enumerate(key.split(".")):
        if section is None:  # a value's own keys
            return
        if part not in section.model_fields:
            known, everywhere = list(section.model_fields), [*_keys(Config)]
            near = near_names(part, known) if depth else near_names(key, everywhere, 1)
            if same := [each for each in everywhere if each.endswith(f".{key}")]:
                near = f"; did you mean {' or '.join(same)}?"
            hint = near or f"; known keys are {', '.join(known)}"
            raise ConfigError(f"command line: {key}: unknown key{hint}")
        section = _section_in(section.model_fields[part].annotation)


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if (below := _section_in(field.annotation)) is not None:
            yield from _keys(below, f"{prefix}{name}.")


def _told(problem: Any, names: Sequence[str], model: type[BaseModel]) -> str:
    """What was expected at a key, what came, and near names. problem: one of pydantic's errors."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        known = list(_section_at(names[:-1], model).model_fields)
        hint = near_names(names[-1], known) or f"; known keys are {', '.join(known)}"
        return f"unknown key{hint}"
    if kind == "missing":
        return "missing"
    if kind == "value_error":
        return str(context["error"])
    names = re.findall(r"'(.*?)'", context["expected"]) if kind == "literal_error" else []
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{message}, got {problem['input']!r}{near_names(str(problem['input']), names)}"


def _section_at(names: Sequence[str], section: type[BaseModel]) -> type[BaseModel]:
    for name in names:
        if name in section.model_fields:  # and no number of an item
            section = _section_in(section.model_fields[name].annotation) or section
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)

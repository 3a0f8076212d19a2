"""Reads a configuration from a YAML file with `key.sub=value` overrides, and explains errors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from riskmap_ext._arguments import near_names
from riskmap_ext.finetune.base.errors import ConfigError, InputError, Problems, one_line, shortened
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.config.yaml_text import read_mapping, read_yaml


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file with `key.sub=value` overrides (values parsed as YAML).

    Relative paths in the file are relative to the file's folder, those in overrides to the current
    folder; `data.datalist`, `data.images` and `data.labels` to `data.root` if it is set.

    Raises: ConfigError naming the file, the key and what was expected.
    """
    with located_config(path, overrides) as config:
        return config


@contextmanager
def located_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Iterator[Config]:
    """load_config; errors raised within also get the location of each key that begins a line."""
    path, errors, config = Path(path), Problems(), None
    content, lines = read_mapping(path)
    places = {key: f"line {line}" for key, line in lines.items()}
    typed = [override.partition("=")[0].strip() for override in overrides]
    for key in typed:
        for above in accumulate(key.split("."), "{}.{}".format):
            places.setdefault(above, "command line")
        places[key] = "command line"

    def placed(found: re.Match[str]) -> str:
        """Adds the line of the key, or of the section that lacks it."""
        indent, key = found.groups()
        while key and key not in places:
            key = key.rpartition(".")[0]
        return f"{indent or f'{path}: '}{places[key]}: {found[2]}: " if key else found[0]

    try:
        with errors.collected(InputError):
            apply_overrides(content, overrides)
        with errors.collected(InputError):
            config = parse_config(
                content, base=path.resolve().parent, origin=str(path), typed=typed
            )
        errors.tell()
        assert config is not None
        yield config
    except ConfigError as error:
        raise type(error)(re.sub(r"(?m)^( *)([^:\n]+): ", placed, str(error))) from None


def parse_config(
    content: Mapping[str, Any],
    *,
    base: Path | None = None,
    origin: str = "configuration",
    typed: Sequence[str] = (),
) -> Config:
    """A Config from plain mappings; relative paths start from `base` (default: current folder).

    origin: the name used in errors. typed: keys whose paths start from the current folder.
    """
    # Paths are nested at most one section deep.
    names = {key.rpartition(".")[2] for key in typed if key.count(".") < 2}
    try:
        return Config.model_validate(content, context={"base": base, "typed": names})
    except ValidationError as error:
        lines = (f"  {key}{': ' if key else ''}{told}" for key, told in problems_of(error, Config))
        raise ConfigError("\n".join([f"{origin}:", *lines])) from None


def problems_of(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Each problem's key, and what was expected and given. model: what was validated."""
    for problem in error.errors():
        # pydantic adds this part for a bad key of a mapping.
        names = [str(part) for part in problem["loc"] if part != "[key]"]
        yield ".".join(names), _told(problem, names, model)


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Writes `key.sub=value` overrides into `content`.

    Raises: ConfigError with a line for each that cannot be.
    """
    errors = Problems()
    for override in overrides:
        key, equals, text = map(str.strip, override.partition("="))
        *above, last = key.split(".")
        with errors.collected(InputError):
            if not equals or not all((*above, last)):
                raise ConfigError(f"{override!r}: expected key=value or key.sub=value")
            section: Any = content
            for depth, part in enumerate(above, 1):
                if section.get(part) is None:
                    section[part] = {}
                section = section[part]
                if not isinstance(section, dict):
                    prefix = ".".join(above[:depth])
                    raise ConfigError(f"{override!r}: {prefix} is a value, not a section")
            try:
                section[last], _ = read_yaml(text)
            except yaml.YAMLError as error:
                raise ConfigError(f"{override!r}: not valid YAML ({one_line(error)})") from None
    errors.tell()


def _told(problem: Any, names: Sequence[str], model: type[BaseModel]) -> str:
    """What was expected at a key, what was given, and near names. problem: an error of pydantic."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        sections, (*above, last) = dict(_sections(model)), names
        same = [f"{key}.{last}" for key, known in sections.items() if key and last in known]
        if same:
            return f"unknown key; did you mean {' or '.join(same)}?"
        # Without the indices of list items.
        known = sections.get(".".join(n for n in above if not n.isdigit()), sections[""])
        hint = near_names(last, known) or f"; known keys are {', '.join(known)}"
        return f"unknown key{hint}"
    if kind == "missing":
        return "missing"
    if kind == "value_error":
        return str(context["error"])
    names = re.findall(r"'(.*?)'", context["expected"]) if kind == "literal_error" else []
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{message}, got {shortened(problem['input'])}{near_names(str(problem['input']), names)}"


def _sections(model: type[BaseModel], key: str = "") -> Iterator[tuple[str, list[str]]]:
    """The dotted key of each section, starting with `model`, and the names of its keys."""
    yield key, list(model.model_fields)
    for name, field in model.model_fields.items():
        if (below := _section_in(field.annotation)) is not None:
            yield from _sections(below, f"{key}.{name}".lstrip("."))


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)

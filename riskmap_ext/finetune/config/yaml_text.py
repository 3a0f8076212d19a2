"""YAML as it is read here: with the line of each key, and none given twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from riskmap_ext.finetune.base.errors import ConfigError, InputError, one_line
from riskmap_ext.finetune.base.files import read_text


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A scalar by the rules of its tag: `2020-13-45` looks like a date, but is none."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"no {kind}: {error}; a text goes in quotes", node.start_mark
            ) from None


def read_mapping(
    path: Path, kind: type[InputError] = ConfigError
) -> tuple[dict[str, Any], dict[str, int]]:
    """The keys of a file; dotted key -> its line, of YAML. Raises: `kind` naming the file."""
    language, text = "JSON" if path.suffix == ".json" else "YAML", read_text(path, kind)
    try:
        content, lines = (json.loads(text), {}) if language == "JSON" else read_yaml(text)
    except (ValueError, yaml.YAMLError) as error:
        raise kind(f"{path}: cannot be read as {language} ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise kind(f"{path}: expected keys with values, got {content!r}")
    return content, lines


def read_yaml(text: str) -> tuple[Any, dict[str, int]]:
    """The plain content of a document; dotted key -> its line from 1, items of lists by number.

    Raises: yaml.YAMLError, also for a key that is given twice and a value within itself.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        lines: dict[str, int] = {}
        if root is None:
            return None, lines
        _find_lines(root, "", (), lines)
        return loader.construct_document(root), lines
    finally:
        loader.dispose()


def _find_lines(
    node: yaml.Node, prefix: str, above: tuple[Any, ...], lines: dict[str, int]
) -> None:
    """Writes the lines of the keys in `node`, which is within the nodes `above`."""
    if node in above:
        raise yaml.YAMLError(f"line {_line(node)}: an alias (*) of this value is within itself")
    below: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        below = [(str(key.value), key, value) for key, value in node.value]
        # Keys that a merge (<<) brings in are not among these, and may be given again.
        given: dict[tuple[str, str], yaml.Node] = {}
        for name, key, _ in below:
            first = given.setdefault((key.tag, name), key)
            if first is not key:
                raise yaml.YAMLError(
                    f"line {_line(key)}: the key {name} is given twice, first in line "
                    f"{_line(first)}"
                )
    elif isinstance(node, yaml.SequenceNode):
        below = [(str(index), each, each) for index, each in enumerate(node.value)]
    for name, place, value in below:
        lines[prefix + name] = _line(place)
        _find_lines(value, f"{prefix}{name}.", (*above, node), lines)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1

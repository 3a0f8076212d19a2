"""YAML as it is read here: a key that is given twice is an error, not silently the last one."""

from __future__ import annotations

from typing import Any

import yaml


class DuplicateKeyError(yaml.YAMLError):
    """A mapping with the same key twice; lines count from 1."""

    def __init__(self, key: str, line: int, first: int) -> None:
        self.key, self.line, self.first = key, line, first
        super().__init__(f"line {line}: the key {key} is given twice, first in line {first}")


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # As composed: keys that a merge (<<) brings in later may be given again.
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            place = (key.tag, key.value)
            line = key.start_mark.line + 1
            if place in seen:
                raise DuplicateKeyError(key.value, line, seen[place])
            seen[place] = line
        return node


def key_lines(text: str) -> dict[str, int]:
    """Dotted key -> its line in a YAML document, from 1; items of lists are numbered keys."""
    found: dict[str, int] = {}

    def visit(node: yaml.Node | None, prefix: str) -> None:
        pairs: list[tuple[str, yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            pairs = [(str(key.value), key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            pairs = [(str(index), value, value) for index, value in enumerate(node.value)]
        for name, place, value in pairs:
            # An alias (*) may lead to what is told already.
            if prefix + name not in found:
                found[prefix + name] = place.start_mark.line + 1
                visit(value, f"{prefix}{name}.")

    visit(yaml.compose(text, Loader=_Loader), "")
    return found


def read_yaml(text: str) -> Any:
    """The plain content of a YAML document. Raises: yaml.YAMLError, DuplicateKeyError."""
    return yaml.load(text, Loader=_Loader)

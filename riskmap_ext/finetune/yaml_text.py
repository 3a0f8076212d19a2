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


def read_yaml(text: str) -> Any:
    """The plain content of a YAML document. Raises: yaml.YAMLError, DuplicateKeyError."""
    return yaml.load(text, Loader=_Loader)

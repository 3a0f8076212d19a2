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
    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        # Anchors of the nodes that are being composed.
        self._open: list[str | None] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            if alias.anchor in self._open:
                raise yaml.composer.ComposerError(
                    None, None, f"*{alias.anchor} is within what it stands for", alias.start_mark
                )
            return super().compose_node(parent, index)
        anchor = self.peek_event().anchor
        self._open.append(anchor)
        node = super().compose_node(parent, index)
        self._open.pop()
        return node

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


def _plain_value(loader: _Loader, node: yaml.Node) -> Any:
    """A scalar by the rules of its tag: `2020-13-45` looks like a date, but is none."""
    try:
        return _CONSTRUCTORS[node.tag](loader, node)
    except (ValueError, KeyError, OverflowError) as error:
        kind = node.tag.rpartition(":")[2]
        raise yaml.constructor.ConstructorError(
            None, None, f"no {kind}: {error}; a text goes in quotes", node.start_mark
        ) from None


_CONSTRUCTORS = {
    f"tag:yaml.org,2002:{kind}": yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{kind}"]
    for kind in ("bool", "float", "int", "timestamp")
}
for _tag in _CONSTRUCTORS:
    _Loader.add_constructor(_tag, _plain_value)

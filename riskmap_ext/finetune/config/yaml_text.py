"""Reads YAML with the line of each key; a duplicate key is an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from riskmap_ext._files import check_content
from riskmap_ext.finetune.base.errors import ConfigError, InputError, one_line, shortened
from riskmap_ext.finetune.base.files import read_text

_MOST_VALUES = 200_000


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A scalar by the rules of its tag: `2020-13-45` looks like a date, but is not one."""
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
    """The keys of a file; dotted key -> its line if YAML. Raises: `kind` naming the file."""
    language, text = "JSON" if path.suffix == ".json" else "YAML", read_text(path, kind)
    try:
        content, lines = (json.loads(text), {}) if language == "JSON" else read_yaml(text)
        check_content(content)
    except RecursionError:
        raise kind(f"{path}: cannot be read as {language} (nested too deeply)") from None
    except (ValueError, yaml.YAMLError) as error:
        raise kind(f"{path}: cannot be read as {language} ({one_line(error)})") from None
    if content is None:
        raise kind(f"{path}: is empty; expected keys with values")
    if not isinstance(content, dict):
        raise kind(f"{path}: expected keys with values, got {shortened(content)}")
    return content, lines


def read_yaml(text: str) -> tuple[Any, dict[str, int]]:
    """The plain content of a document; dotted key -> its line from 1, list items by number.

    Raises: yaml.YAMLError, also for a duplicate key, for a value that contains itself, and for
    aliases of aliases that stand for more values than memory holds.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, {}
        pairs = list(islice(_lines(root, "", ()), _MOST_VALUES + 1))
        if len(pairs) > _MOST_VALUES:
            raise yaml.YAMLError(f"expected at most {_MOST_VALUES:,} values, with those of aliases")
        return loader.construct_document(root), dict(pairs)
    except RecursionError:
        raise yaml.YAMLError("the values are nested too deeply") from None
    finally:
        loader.dispose()


def _lines(node: yaml.Node, prefix: str, above: tuple[Any, ...]) -> Iterator[tuple[str, int]]:
    """Each key in `node` and its line. above: the nodes that enclose it."""
    if node in above:
        line = node.start_mark.line + 1
        raise yaml.YAMLError(f"line {line}: an alias (*) of this value is within itself")
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    if isinstance(node, yaml.SequenceNode):
        pairs = [(each, each) for each in node.value]
    # Keys merged in by << are not among these, and may be given again.
    given: dict[tuple[str, str], int] = {}
    for index, (key, value) in enumerate(pairs):
        line, name = key.start_mark.line + 1, str(index)
        if isinstance(node, yaml.MappingNode):
            name = str(key.value)
            if (first := given.get((key.tag, name))) is not None:
                raise yaml.YAMLError(
                    f"line {line}: the key {name} is given twice, first in line {first}"
                )
            given[key.tag, name] = line
        yield prefix + name, line
        yield from _lines(value, f"{prefix}{name}.", (*above, node))

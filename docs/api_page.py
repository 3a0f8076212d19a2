"""docs/api.md from the code: every public name with its signature and the first paragraph of its
docstring."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import riskmap_ext
from riskmap_ext import nn, reference

HEAD = """\
# API

This page lists every public name. The docstrings have formulas, shapes, dtypes, units and errors:
`help(riskmap_ext.weighted_loss)`. The integrations are described in the
[how-to pages](howto/README.md); [the driver](finetune.md) and [the formulas](method.md) have their
own pages. Names without an underscore keep their meaning within a minor version; nothing is
deprecated."""

MODULES = {"riskmap_ext": riskmap_ext, "riskmap_ext.nn": nn, "riskmap_ext.reference": reference}


def public() -> dict[str, Any]:
    """By qualified name, as the page has them."""
    objects: dict[str, Any] = {}
    for prefix, module in MODULES.items():
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.ismodule(value) or name == "__version__":
                continue
            objects[f"{prefix}.{name}"] = value
            if value is riskmap_ext.TransferStatistics:
                members = {each: vars(value)[each] for each in vars(value) if each[0] != "_"}
                objects |= {f"{prefix}.{name}.{each}": found for each, found in members.items()}
    return objects


def signature(value: Callable[..., Any] | property) -> str:
    """Names and defaults: the docstrings have the types."""
    if isinstance(value, property):
        return ""
    found = inspect.signature(value)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in found.parameters.items()
        if name != "self" and not name.startswith("_")
    ]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def page() -> str:
    parts = [HEAD]
    module = ""
    for name, value in public().items():
        prefix = max((each for each in MODULES if name.startswith(f"{each}.")), key=len)
        if prefix != module:
            module = prefix
            parts += [f"## {prefix}", _first_paragraph(MODULES[prefix])]
        parts += [f"### `{name}{signature(value)}`", _first_paragraph(value)]
    return "\n\n".join(parts) + "\n"


def _first_paragraph(value: Any) -> str:
    """In Markdown."""
    text = " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"\\?([*<])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)

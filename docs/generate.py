"""Makes docs/reference/ and docs/api.md from the code: `python docs/generate.py`, or `make
docs-reference`."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import api_page
from pydantic import BaseModel
from typer.models import ArgumentInfo, OptionInfo

from riskmap_ext.finetune.commands import app
from riskmap_ext.finetune.config.schema import Config

FOLDER = Path(__file__).parent
RENEW = "make docs-reference"
NOTICE = f"<!-- Made from the code by `{RENEW}`. -->"

CONFIG_HEAD = """\
# Configuration

The keys of the YAML file that `riskmap finetune` and `riskmap rank` read. `KEY=VALUE` arguments
override them by the names in these tables: `train.steps=500`. Where relative paths start, and what
is refused: [the driver](../finetune.md#configuration)."""

CLI_HEAD = """\
# Command line

`riskmap COMMAND --help` says the same. Input errors are one message on standard error and exit
code 2. What the commands write, with examples: [the driver](../finetune.md)."""


def config_page() -> str:
    homes = {Config: "top level"}
    return "\n\n".join([NOTICE, CONFIG_HEAD, *_section(Config, "", homes)]) + "\n"


def _section(model: type[BaseModel], prefix: str, homes: dict[Any, str]) -> Iterator[str]:
    """The table of a section, then those of the sections in it; `homes` has where each is."""
    schema = model.model_json_schema()
    rows, inner = [], []
    for name, field in model.model_fields.items():
        key = prefix + name
        kind = _kind(schema["properties"][name])
        found, listed = _section_in(field.annotation)
        if found is not None:
            if found not in homes:
                homes[found] = key
                inner.append((found, f"{key}.N." if listed else f"{key}."))
            what = "list of sections" if listed else "section"
            kind = f"{what} [{homes[found]}](#{homes[found].replace('.', '')})"
        if field.is_required():
            default = "needed"
        else:
            value = field.get_default(call_default_factory=True)
            default = "" if isinstance(value, BaseModel) else _value(value)
        meaning = field.description or (found and inspect.getdoc(found)) or ""
        rows.append((f"`{key}`", kind, default, meaning))
    yield f"## {homes[model]}"
    if model is not Config:
        yield inspect.getdoc(model) or ""
    yield _table(("key", "value", "default", "meaning"), rows)
    for found, below in inner:
        yield from _section(found, below, homes)


def _section_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section in a key's type, and whether it is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for inner in get_args(annotation):
        found, listed = _section_in(inner)
        if found is not None:
            return found, listed or get_origin(annotation) is list
    return None, False


def _kind(schema: Mapping[str, Any], plural: str = "") -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{each}`" for each in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        fixed = schema.get("minItems")
        count = f"{fixed} " if fixed and fixed == schema.get("maxItems") else ""
        return f"list of {count}{_kind(schema['items'], 's')}"
    words = {"string": "text", "object": "mapping", "boolean": "`true`, `false`", "null": "`null`"}
    if kind not in ("integer", "number"):
        return "path" if schema.get("format") == "path" else words.get(str(kind), "")
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]:.10g}" for name, sign in signs.items() if name in schema]
    return f"{kind}{plural} {', '.join(bounds)}".strip()


def cli_page() -> str:
    commands = [
        part
        for command in app.registered_commands
        for part in _command(str(command.name), command.callback, str(command.epilog))
    ]
    return "\n\n".join([NOTICE, CLI_HEAD, *commands]) + "\n"


def _command(name: str, function: Any, epilog: str) -> Iterator[str]:
    usage, rows = [f"riskmap {name}"], []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        annotation, info = get_args(parameter.annotation)
        needed = parameter.default is inspect.Parameter.empty
        many = get_origin(annotation) is list or list in map(get_origin, get_args(annotation))
        kind = _cli_kind(annotation, info)
        if isinstance(info, ArgumentInfo):
            shown = info.metavar or parameter.name.upper()
            usage.append(shown if needed else f"[{shown} ...]")
        else:
            # Inside Annotated, typer takes the first flag for the default.
            flags = [each for each in (info.default, *(info.param_decls or ())) if each is not ...]
            flags = flags or [f"--{parameter.name.replace('_', '-')}"]
            shown = f"{', '.join(flags)} {info.metavar or ''}".strip()
            if needed:
                usage.append(f"{flags[0]} {kind.upper()}" + f" [{flags[0]} ...]" * many)
        default = parameter.default
        told = "needed" if needed else "" if default in (None, False) else _value(default)
        rows.append((f"`{shown}`", f"{kind}, repeatable" if many else kind, told, info.help or ""))
    if any(row[0].startswith("`--") and row[2] != "needed" for row in rows):
        usage.append("[OPTIONS]")
    yield f"## riskmap {name}"
    yield f"```text\n{' '.join(usage)}\n```"
    yield inspect.getdoc(function) or ""
    if rows:
        yield _table(("argument", "value", "default", "meaning"), rows)
    head, *examples = epilog.split("\n\n")
    yield "\n".join([f"{head}\n\n```text", *examples, "```"])


def _cli_kind(annotation: Any, info: OptionInfo | ArgumentInfo) -> str:
    names = {Path: "path", int: "integer", float: "number", str: "text", bool: ""}
    plain = [each for each in names if each.__name__ in re.findall(r"\w+", str(annotation))]
    bounds = [
        f"{sign} {edge:g}" for sign, edge in (("≥", info.min), ("≤", info.max)) if edge is not None
    ]
    return f"{names[plain[0]]} {', '.join(bounds)}".strip()


def _value(value: Any) -> str:
    """As it would stand in a file."""
    if isinstance(value, float):
        return f"`{value:.4g}`"
    if isinstance(value, str | Path):
        return f"`{value}`" if str(value) else '`""`'
    return f"`{json.dumps(value)}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    return f'<div class="keys" markdown>\n\n{table}\n\n</div>'


def _cell(text: str) -> str:
    """One line, with what Markdown would take for its own escaped outside of `code`."""
    parts = re.split(r"(`[^`]*`|\]\(#\w+\))", " ".join(text.split()))
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"([\\*|]|\b_|_\b)", r"\\\1", parts[index]).replace("<", "&lt;")
    return "".join(parts)


PAGES = {"reference/cli.md": cli_page, "reference/config.md": config_page, "api.md": api_page.page}


def main() -> None:
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

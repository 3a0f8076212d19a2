"""docs/reference is what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    for module in ("pydantic", "typer"):
        pytest.importorskip(module, reason="needs the extra 'finetune'")
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cli.md", "config.md"])
def test_reference(generate: ModuleType, name: str) -> None:
    committed = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert committed == generate.PAGES[name](), f"docs/reference/{name}: run `{generate.RENEW}`"


def test_every_key_is_described(generate: ModuleType) -> None:
    lines = generate.config_page().splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) > 60
    assert not [line for line in rows if line.endswith("|  |")]


def test_every_argument_is_described(generate: ModuleType) -> None:
    rows = [line for line in generate.cli_page().splitlines() if line.startswith("| `")]
    assert rows
    assert not [line for line in rows if line.endswith("|  |")]

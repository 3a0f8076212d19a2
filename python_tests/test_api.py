"""The public API is what docs/api.md says: names, signatures, docstrings, types."""

from __future__ import annotations

import importlib.resources
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import riskmap_ext

DOCS = Path(__file__).parents[1] / "docs"
sys.path.append(str(DOCS))
from api_page import MODULES, page, public  # noqa: E402


def test_the_page_is_what_the_code_says() -> None:
    committed = (DOCS / "api.md").read_text(encoding="utf-8")
    assert committed == page(), "docs/api.md: run `make docs-reference`"


@pytest.mark.parametrize("name", sorted(public()))
def test_docstring_and_types(name: str) -> None:
    value = public()[name]
    assert len(inspect.getdoc(value) or "") > 30
    is_class = inspect.isclass(value) and not issubclass(value, tuple)  # whose fields are typed
    function = value.__init__ if is_class else value
    if isinstance(value, property):
        function = value.fget
    untyped = {
        parameter
        for parameter in inspect.signature(function).parameters
        if parameter not in (*typing.get_type_hints(function), "self")
    }
    assert not untyped


def test_names_are_sorted() -> None:
    for module in MODULES.values():
        assert list(module.__all__) == sorted(module.__all__)


def test_is_marked_as_typed() -> None:
    assert importlib.resources.files(riskmap_ext).joinpath("py.typed").is_file()


def test_the_core_imports_torch_alone() -> None:
    code = (
        "import sys; before = set(sys.modules); import torch, riskmap_ext; "
        "print(*{name.partition('.')[0] for name in sys.modules} & "
        "{'monai', 'ignite', 'nnunetv2', 'lightning', 'nibabel', 'pydantic', 'typer', 'yaml'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("monai", "monai", "pip install monai"), ("nnunet", "nnunetv2", "pip install nnunetv2")],
)
def test_a_missing_framework_is_named(module: str, package: str, extra: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import riskmap_ext.integrations.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.search(f"ImportError: riskmap_ext.integrations.{module} needs .*{extra}", done.stderr)

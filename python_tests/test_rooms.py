"""The driver's rooms: each imports only the ones below it, and no module imports in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

DRIVER = Path(__file__).resolve().parents[1] / "riskmap_ext" / "finetune"
# From the bottom up; files beside the rooms are commands, above all of them.
ROOMS = (
    "base",
    "config",
    "data",
    "pictures",
    "metrics",
    "folder",
    "source",
    "report",
    "train",
)
FILES = sorted(path for path in DRIVER.rglob("*.py") if path.name != "__init__.py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(DRIVER).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Modules of the driver, as room.module; those within functions count."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "riskmap_ext.finetune."
        ):
            assert node.module is not None
            found.add(node.module.removeprefix("riskmap_ext.finetune."))
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down(path: Path) -> None:
    room = module_of(path).split(".")[0]
    height = ROOMS.index(room) if path.parent != DRIVER else len(ROOMS)
    above = {name for name in imports_of(path) if name.split(".")[0] not in ROOMS[: height + 1]}
    # Commands use each other, and the entry points start them.
    assert not above or path.parent == DRIVER


def test_every_room_is_in_the_list() -> None:
    assert {path.parent.name for path in DRIVER.glob("*/__init__.py")} == set(ROOMS)


def test_no_module_imports_in_a_circle() -> None:
    below = {module_of(path): imports_of(path) for path in FILES}
    while below:
        free = {name for name, wanted in below.items() if not wanted & set(below)}
        assert free, f"a circle among {sorted(below)}"
        below = {name: wanted for name, wanted in below.items() if name not in free}

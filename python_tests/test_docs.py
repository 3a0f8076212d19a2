"""docs/reference and docs/api.md are what the code says; links lead somewhere."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DRAWN = (DOCS / "evidence", ROOT / "benchmarks" / "results")  # from stored rows
FOUND = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *DOCS.rglob("*.md")]
PAGES = [page for page in FOUND if page.parent not in DRAWN]


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    for module in ("pydantic", "typer"):
        pytest.importorskip(module, reason="needs the extra 'finetune'")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        yield importlib.import_module("generate")


@pytest.mark.parametrize("name", ["reference/cli.md", "reference/config.md", "api.md"])
def test_reference(generate: ModuleType, name: str) -> None:
    committed = (DOCS / name).read_text(encoding="utf-8")
    assert committed == generate.PAGES[name](), f"docs/{name}: run `{generate.RENEW}`"


def test_every_key_is_described(generate: ModuleType) -> None:
    lines = generate.config_page().splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) > 60
    assert not [line for line in rows if line.endswith("|  |")]


def test_every_argument_is_described(generate: ModuleType) -> None:
    rows = [line for line in generate.cli_page().splitlines() if line.startswith("| `")]
    assert rows
    assert not [line for line in rows if line.endswith("|  |")]


def prose(page: Path) -> str:
    """Without code, where brackets mean something else."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`", "", text)


def anchors(page: Path) -> set[str]:
    """The headings' names as GitHub makes them, which are the site's too."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]*)[^)]*\)", prose(page)):
        url = urlsplit(link)
        if url.scheme:
            assert url.scheme == "https", link
            assert re.fullmatch(r"([a-z0-9-]+\.)+[a-z]+", url.netloc), link
            continue
        target = page.parent / url.path if url.path else page
        if target.parent in DRAWN and target.suffix in (".png", ".md"):
            continue  # `make docs` draws it and ends where it is missing
        assert target.is_file(), link
        assert target.resolve().is_relative_to(ROOT), link
        if url.fragment:
            assert url.fragment in anchors(target), link


def test_what_is_drawn_from_rows_is_not_stored() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    folders = [str(each.relative_to(ROOT)) for each in DRAWN]
    listed = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert listed
    assert not [name for name in listed if name.endswith(".png")]


def test_the_links_are_seen() -> None:
    assert len(re.findall(r"\]\([^)]*\)", "".join(map(prose, PAGES)))) > 30

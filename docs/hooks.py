"""mkdocs: pages of the site that lie outside docs/, under links that are the repository's own.

Pictures of measurements are not stored: they are drawn from the rows, which are.
"""

from __future__ import annotations

import functools
import logging
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "csrc/README.md": "csrc.md",
}
# Of the same name there and here.
ASSETS = ("benchmarks/results/*.csv", "examples/*.yaml")
DRAWN = ROOT / "build" / "docs"
ELSEWHERE = re.compile(
    r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
)
LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?(\))")


LOG = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    assets = {path.relative_to(ROOT).as_posix(): path for g in ASSETS for path in ROOT.glob(g)}
    pages = {target: ROOT / source for source, target in PAGES.items()}
    for target, source in {**pages, **assets, **pictures()}.items():
        if (there := files.get_file_from_path(target)) is not None:  # of an earlier report
            files.remove(there)
        files.append(File.generated(config, target, abs_src_path=str(source)))
    return files


@functools.cache  # once for all builds of `mkdocs serve`
def pictures() -> dict[str, Path]:
    """By their place on the site."""
    import riskmap_ext  # noqa: F401  (the installed one: its libraries are built)

    sys.path.append(str(ROOT))
    from benchmarks import chart, results
    from benchmarks.transfer.__main__ import OUT
    from benchmarks.transfer.second import write_pages

    page, stored = DRAWN / "evidence.md", ROOT / "docs" / "evidence.md"
    write_pages(OUT, page)
    if page.read_bytes() != stored.read_bytes():
        LOG.warning("%s: not what the rows say: python -m benchmarks.transfer report", stored)
    drawn = {path.relative_to(DRAWN).as_posix(): path for path in DRAWN.glob("evidence/*")}
    folder = ROOT / "benchmarks"
    for link in re.findall(r"\]\((results/[^)]*\.png)\)", (folder / "README.md").read_text()):
        rows = results.read((folder / link).with_suffix(".csv"))
        drawn[f"benchmarks/{link}"] = chart.draw(rows, DRAWN / Path(link).name)
    return drawn


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links, which are between files of the repository, made ones between files of the site."""
    here = page.file.src_uri
    sources = {target: source for source, target in PAGES.items()}
    folder = posixpath.dirname(sources.get(here, f"docs/{here}"))

    def on_site(match: re.Match[str]) -> str:
        before, link, anchor, after = match.groups(default="")
        source = posixpath.normpath(posixpath.join(folder, link))
        target = PAGES.get(source, source.removeprefix("docs/"))
        return before + posixpath.relpath(target, posixpath.dirname(here) or ".") + anchor + after

    return LINK.sub(on_site, markdown)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Names without signatures in the API page's table of contents."""
    if page.file.src_uri == "api.md":
        for link in (part for chapter in page.toc for part in chapter.children):
            for name in (link, *link.children):
                name.title = name.title.partition("(")[0].removeprefix("riskmap_ext.")
    return html


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """The site is read without a network: nothing is fetched from elsewhere."""
    for found in ELSEWHERE.findall(output):
        LOG.warning("%s: %s", page.file.src_uri, found)
    return output

"""mkdocs: pages of the site that lie outside docs/, under links that are the repository's own."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "csrc/README.md": "csrc.md",
}
# Of the same name there and here.
ASSETS = ("benchmarks/results/*.png", "benchmarks/results/*.csv", "examples/*.yaml")
ELSEWHERE = re.compile(
    r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
)
LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    assets = [path.relative_to(ROOT).as_posix() for glob in ASSETS for path in ROOT.glob(glob)]
    for source, target in {**PAGES, **{asset: asset for asset in assets}}.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


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
        logging.getLogger("mkdocs.hooks").warning("%s: %s", page.file.src_uri, found)
    return output

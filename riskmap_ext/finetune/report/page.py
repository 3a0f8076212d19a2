"""Pages that need no other file and no network: frame, style, escaping."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape


def page(title: str, body: str, style: str = "") -> str:
    """A whole HTML document; `body` is markup, `style` comes after the shared rules."""
    return _PAGE.format(title=escape(title), style=_STYLE + style, body=body)


def section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def marked(text: str) -> str:
    """HTML of a text in which `...` is code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def note(text: str) -> str:
    return f"<p class='note'>{marked(text)}</p>"


def picture(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f"<img src='data:image/png;base64,{data}' alt='{escape(alt)}'>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values, escaped."""
    lines = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return "<dl>\n" + "\n".join(lines) + "\n</dl>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, bold: Sequence[str] = ()) -> str:
    """Texts, escaped, in a box of its own that scrolls; rows whose first cell is in `bold` are."""
    head = "".join(f"<th scope='col'><span>{escape(name)}</span></th>" for name in header)
    body = "\n".join(
        "<tr{}><th scope='row'><span>{}</span></th>{}</tr>".format(
            " class='total'" if row[0] in bold else "",
            escape(row[0]),
            "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]),
        )
        for row in rows
    )
    return (
        f"<div class='scroll' tabindex='0'><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        f"{body}\n</tbody>\n</table></div>"
    )


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #dde2e8;
  --paper: #fff; --wash: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #a3adba; --line: #39424e; --paper: #1b2027; --wash: #12161b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.1rem 1.2rem; margin-top: 1.1rem; }
p, ul { max-width: 52rem; margin: 0 0 .6rem; }
ul { padding-left: 1.2rem; }
li { margin-bottom: .4rem; }
.note { color: var(--soft); font-size: .9rem; margin-top: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; }
tbody th { font-weight: 400; }
thead th { font-size: .9rem; color: var(--soft); font-weight: 600; vertical-align: bottom; }
th span { display: inline-block; width: max-content; max-width: 12rem; white-space: normal;
  overflow-wrap: anywhere; }
tbody th span { max-width: 22rem; }
.total th, .total td { font-weight: 700; border-top: 2px solid var(--ink); }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; }
code { white-space: nowrap; font-size: .92em; background: var(--wash); padding: .05em .3em;
  border-radius: 4px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  h1 { font-size: 1.4rem; }
  section { padding: .9rem .9rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: .6rem; }
  th, td { padding: .35rem .45rem; font-size: .9rem; }
  tbody th, thead th:first-child { position: sticky; left: 0; background: var(--paper); }
  thead th span { max-width: 7.5rem; }
  tbody th span { max-width: 9rem; }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

"""A page as a reader has it: its text, its tables, and everything that it would load."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_EMPTY = ("meta", "img")
_LOADED = ("src", "href", "data", "action", "srcset", "poster", "background")


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in _LOADED]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in _LOADED]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        if "pre" not in self.open:
            data = re.sub(r"\s+", " ", data)
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

"""Pages that need no other file and no network: templates, and how they write numbers."""

from __future__ import annotations

import base64
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from riskmap_ext.finetune.base.log import number


def render(template: str, **facts: Any) -> str:
    """The page of a template (its path in the package); every text in it is escaped."""
    return _PAGES.get_template(template).render(facts)


def _duration(seconds: Any) -> str | None:
    if not isinstance(seconds, (int, float)):
        return None
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _mib(size: Any) -> str | None:
    return f"{size / 2**20:,.0f} MiB" if isinstance(size, (int, float)) else None


def _share(value: float, digits: str = ".2%") -> str:
    """What would round to 0 is told from nothing."""
    text = format(value, digits)
    if value == 0:
        return "0"
    return text if re.search("[1-9]", text) else "<" + re.sub(r"0(%?)$", r"1\1", text)


_PAGES = Environment(
    loader=PackageLoader("riskmap_ext", ""),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_PAGES.filters.update(duration=_duration, mib=_mib, number=number, share=_share)
_PAGES.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")

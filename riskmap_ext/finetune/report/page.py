"""Pages that need no other file and no internet access: templates and number formats."""

from __future__ import annotations

import base64
from datetime import timedelta
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from riskmap_ext.finetune.base.log import number


def render(template: str, **facts: Any) -> str:
    """The page of a template (its path in the package); all text in it is escaped."""
    return _PAGES.get_template(template).render(facts)


def duration(seconds: float) -> str:
    if not 100 <= seconds < 1e9:
        return f"{seconds:.3g} s"
    return f"{timedelta(seconds=round(seconds))} h"


_PAGES = Environment(
    loader=PackageLoader("riskmap_ext", ""),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_PAGES.filters.update(duration=duration, number=number)
_PAGES.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")

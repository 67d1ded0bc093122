"""Jinja templates (*.j2), which lie beside the code that fills them in."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def templates(package: str, *, escaped: bool, **filters: Callable[..., Any]) -> Environment:
    """The templates in the folder of `package`. `escaped`: values are escaped, as HTML and SVG need it."""
    environment = Environment(
        loader=PackageLoader(package, "."),
        autoescape=escaped,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment

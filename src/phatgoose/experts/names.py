"""What an expert may be called: its name is a folder's name in a pool, and part of what people type."""

from __future__ import annotations

import re

from phatgoose.errors import ExpertError, brief

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def slug(text: str) -> str:
    """A valid expert name made from any text: "bigbench:tense" → "bigbench-tense"."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100]
    return name or "expert"


def check_name(name: str) -> None:
    """Raises ExpertError for what can't name an expert."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ExpertError(
            f"{brief(name)} can't name an expert: use letters, digits, '.', '_', '-' (at most 100, starting with a letter or digit); "
            f"for example {slug(str(name)[:100])!r}."
        )

"""Markdown for model cards: other people's text stays literal, and local paths are cut."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_HUB_ID = re.compile(rf"{_NAME}/{_NAME}", re.ASCII)
_SPEC = re.compile(rf"{_NAME}(/{_NAME})?(@[\w./-]{{1,96}})?", re.ASCII)
# A path that starts at a root, a home or a drive, up to its last part. It may contain spaces, so it ends only with the
# text or at a "?".
_PATH = re.compile(
    r"(?:(?<![\w/])/(?!/)|~\w*/|\b[A-Za-z]:[\\/](?!/)|\\\\)(?:[^?]*[\\/](?=[^?]))?([^?\\/]*)[\\/]?"
)
_RELATIVE = re.compile(r"\.{1,2}[\\/](?:.*[\\/])?([^\\/]+)[\\/]?", re.DOTALL)


def hub_id(spec: str | None) -> str | None:
    """The repository that a base's spec names ("org/name@revision" → "org/name"); None if it names a local folder
    or none."""
    name = (spec or "").partition("@")[0]
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def loadable(spec: str | None) -> str | None:
    """A base's spec if it can mean the same elsewhere: an alias or a Hub id that needs no quoting."""
    name = (spec or "").partition("@")[0]
    return spec if spec and _SPEC.fullmatch(spec) and not Path(name).exists() else None


def public(text: str | None) -> str:
    """`text` with local paths cut to their last part, since the folders above may tell who somebody is.

    Where a path's end is unclear, too much is cut rather than too little.
    """
    if not text:
        return ""
    relative = _RELATIVE.fullmatch(text)
    return relative[1] if relative else _PATH.sub(r"\1", text)


def code(text: str | None, limit: int = 200) -> str:
    """Any text as a Markdown code span, also within a table: one line, printable, at most `limit` characters."""
    kept = "".join(c if unicodedata.category(c)[0] not in "CZ" else " " for c in text or "")
    kept = " ".join(kept.replace("`", "'").split())
    if not kept:
        return "–"
    return "`" + (kept if len(kept) <= limit else kept[: limit - 1] + "…").replace("|", "\\|") + "`"

"""Metadata of the wheel that depends on where the repository is: its URLs, and the README's links."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAPER = "https://arxiv.org/abs/2402.05859"
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")
"""A Markdown link or picture within the repository."""


class CustomMetadataHook(MetadataHookInterface):
    """What pyproject.toml calls dynamic. $PHATGOOSE_REPOSITORY is the repository's address, as .ci/release sets it."""

    def update(self, metadata: dict[str, Any]) -> None:
        repository, tag = os.environ.get("PHATGOOSE_REPOSITORY", "").rstrip("/"), f"v{metadata['version']}"
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": outside(text, repository, tag)}
        metadata["urls"] = {"Paper": PAPER}
        if repository:
            changes = f"{repository}/blob/{tag}/CHANGELOG.md"
            metadata["urls"] |= {
                "Repository": repository,
                "Issues": f"{repository}/issues",
                "Changelog": changes,
            }


def outside(text: str, repository: str, tag: str) -> str:
    """A README that reads well outside the repository: links lead to it, at a tag. Without an address they are text."""

    def place(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if repository:
            return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/{tag}/{target})"
        return f"*{words}*" if picture else words

    return LINK.sub(place, text)

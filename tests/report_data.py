"""Reads what a report's page embeds."""

from __future__ import annotations

import base64
import struct


def unpacked(text: str) -> list[int]:
    """What `analysis.prompts.packed` packed."""
    raw = base64.b64decode(text)
    return list(struct.unpack(f"<{len(raw) // 2}h", raw))

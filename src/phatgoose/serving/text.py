"""Tokens → text as they come, cut before the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from phatgoose.tasks.batch import decoded

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes of a character whose other bytes are still to come."""


class Decoder:
    """Decodes tokens one after the other; the pieces add up to the text that all of them have together.

    Only the last few tokens are decoded again each time: those of the last piece, since a token's text may depend on the one before
    (spaces in SentencePiece), and those after it.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._before, self._read = 0, 0

    def push(self, token: int) -> str:
        """The text that is sure now."""
        self._ids.append(token)
        return self._piece(last=False)

    def rest(self) -> str:
        """What is left at the end: unfinished characters as they are."""
        return self._piece(last=True)

    def _piece(self, last: bool) -> str:
        known = self._text(self._ids[self._before : self._read])
        whole = self._text(self._ids[self._before :])
        if len(whole) <= len(known) or (whole.endswith(UNFINISHED) and not last):
            return ""
        self._before, self._read = self._read, len(self._ids)
        return whole[len(known) :]

    def _text(self, ids: list[int]) -> str:
        return decoded(self.tokenizer, ids)


@dataclass
class Stops:
    """Looks for stop strings in text that comes in pieces; holds back what may be the beginning of one."""

    strings: Sequence[str]
    stopped: bool = False
    _held: str = field(default="", repr=False)

    def push(self, piece: str) -> str:
        """What may be shown now; nothing after the first stop string, nor it."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = min((at for s in self.strings if (at := text.find(s)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        hold = max((_overlap(text, s) for s in self.strings), default=0)
        cut = len(text) - hold
        self._held = text[cut:]
        return text[:cut]

    def rest(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)

"""Tokens → text as they come, cut before the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from phatgoose.models.text.encoding import decode_text

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes of a character whose other bytes are still to come."""
MOST_HELD = 64
"""Tokens that are waited for until a character is finished."""


class Decoder:
    """Decodes tokens one after the other; the pieces add up to the text that all of them have together.

    Only the last few tokens are decoded again each time: those of the last piece, since a token's text may depend on the one before
    (spaces in SentencePiece), and those after it.
    """

    def __init__(self, tokenizer: Any, *, special: bool = False):
        """`special`: whether special tokens are shown as text."""
        self.tokenizer, self.special = tokenizer, special
        self.began = 0
        """Where in the text the last token begins; of a character's tokens each where the character does."""
        self._ids: list[int] = []
        self._before, self._read, self._length = 0, 0, 0

    def push(self, token: int) -> str:
        """The text that is sure now."""
        self._ids.append(token)
        self.began, waiting = self._length, len(self._ids) - self._read > 1
        piece = self._piece(last=False)
        self._length += len(piece)
        if piece and waiting:
            own = self._text([token])
            if own and UNFINISHED not in own and piece.endswith(own):
                self.began = self._length - len(own)  # behind bytes that never became a character
        return piece

    def rest(self) -> str:
        """What is left at the end: unfinished characters as they are."""
        return self._piece(last=True)

    def _piece(self, last: bool) -> str:
        known = self._text(self._ids[self._before : self._read])
        whole = self._text(self._ids[self._before :])
        held = len(self._ids) - self._read
        # A character has four bytes at most: what stays unfinished for longer isn't one, and would be decoded again and again.
        if not last and held < MOST_HELD and (len(whole) <= len(known) or whole.endswith(UNFINISHED)):
            return ""
        self._before, self._read = self._read, len(self._ids)
        return whole[len(known) :]

    def _text(self, ids: list[int]) -> str:
        return shown(self.tokenizer, ids) if self.special else decode_text(self.tokenizer, ids)


def shown(tokenizer: Any, ids: Sequence[int]) -> str:
    """Token ids → text with special tokens, and spaces as they are."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def offsets(tokenizer: Any, ids: Sequence[int], text: str) -> list[int]:
    """Where in `text` each of its tokens begins: a character of several tokens at its first."""
    whole = shown(tokenizer, ids)
    # What the tokenizer itself puts before a text isn't in it, though special tokens that the text spells out are.
    special = whole.endswith(text)
    before = len(whole) - len(text) if special else 0
    decoder, found = Decoder(tokenizer, special=special), []
    for token in ids:
        decoder.push(token)
        found.append(min(max(decoder.began - before, 0), len(text)))
    return found


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

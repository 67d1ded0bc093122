"""Tokens as text while they come: `IncrementalDecoder`."""

from __future__ import annotations

from typing import Any

from phatgoose.models.text.encoding import decode_text

REPLACEMENT = "\ufffd"
"""What a decoder writes for the bytes of an incomplete character."""
MAX_HELD_TOKENS = 64


class IncrementalDecoder:
    """Decodes one token after the other. The parts add up to the text that all tokens have together.

    Only the last few tokens are decoded again each time: those of the last part, since a token's text may depend on
    the one before it (spaces in SentencePiece), and those after it.

    tokenizers' `DecodeStream` does the same for fast tokenizers, but never gives out the end of a text that isn't a
    whole character, holds back invalid bytes without a bound, and doesn't say where a token begins.
    """

    def __init__(self, tokenizer: Any, *, special: bool = False):
        """`special`: whether special tokens are shown as text."""
        self.tokenizer, self.special = tokenizer, special
        self.token_start = 0
        """Where the last token begins in the text. All tokens of one character begin where the character does."""
        self.ids: list[int] = []
        # ids[:_context] isn't decoded any more. ids[_context:_decoded] was given out last, the rest is held back.
        self._context, self._decoded, self._length = 0, 0, 0

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self.ids.append(token)
        self.token_start, had_held = self._length, len(self.ids) - self._decoded > 1
        part = self._next_part(last=False)
        self._length += len(part)
        if part and had_held:
            own = self._decode([token])
            # The held bytes never became a character, so this token begins behind them.
            if own and REPLACEMENT not in own and part.endswith(own):
                self.token_start = self._length - len(own)
        return part

    def flush(self) -> str:
        """The rest at the end, with incomplete characters as they are."""
        return self._next_part(last=True)

    def _next_part(self, last: bool) -> str:
        known = self._decode(self.ids[self._context : self._decoded])
        whole = self._decode(self.ids[self._context :])
        held = len(self.ids) - self._decoded
        # A character has at most four bytes. What is incomplete for longer isn't one, and would be decoded forever.
        incomplete = len(whole) <= len(known) or whole.endswith(REPLACEMENT)
        if incomplete and not last and held < MAX_HELD_TOKENS:
            return ""
        self._context, self._decoded = self._decoded, len(self.ids)
        return whole[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return decode_text(self.tokenizer, ids, special=self.special)

"""Where a sequence's text begins: behind special tokens, and what a chat template puts there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

START = 0
"""The state of a sequence before its first token, and behind a special token that the template doesn't know. It
must be 0, as what is known of a sequence that begins beside others that go on (`PassMemory.previous`)."""
BEGUN = 1
"""The state of a sequence in which there was text: whatever follows has read it."""


class Markup:
    """Tells where a sequence's text begins, token by token, from what came before alone.

    Before it there are special tokens, and what follows one for as long as it goes on as the chat template does: of
    "<|im_start|>user\\nuser names" all up to the line break, but not the second "user".

    Args:
        special: ids of special tokens.
        pieces: token ids that the template writes, each beginning with a special token, and with no other in it.
    """

    def __init__(self, special: Collection[int], pieces: Iterable[Sequence[int]] = ()):
        self.special = frozenset(special)
        # State → token → next state.
        self._next: list[dict[int, int]] = [{}, {}]
        for piece in pieces:
            state = START
            for token in piece:
                if token not in self._next[state]:
                    self._next[state][token] = len(self._next)
                    self._next.append({})
                state = self._next[state][token]

    def read(self, ids: Tensor, real: Tensor, states: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(which tokens are text or behind some, bool [B, T]; the state after each, int64 [B, T]), on the CPU.

        Args:
            ids: int64 [B, T]. real: bool [B, T], False at padding, which is no text and changes no state.
            states: of each of the B sequences before these tokens.
        """
        counts, after = real.cpu().clone(), torch.full(ids.shape, BEGUN)
        for b, state in enumerate(states):
            if state == BEGUN:
                continue
            for t, (token, is_real) in enumerate(zip(ids[b].tolist(), real[b].tolist(), strict=True)):
                if is_real:
                    otherwise = START if token in self.special else BEGUN
                    state = self._next[START if token in self.special else state].get(token, otherwise)
                if state == BEGUN:
                    break
                counts[b, t], after[b, t] = False, state
        return counts, after

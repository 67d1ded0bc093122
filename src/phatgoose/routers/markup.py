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
        self._table: tuple[Tensor, Tensor] | None = None
        """The tokens that mean something, int64 [n + 1], and the next state by state and token, int64 [states, n + 1],
        whose last column is for all other tokens."""
        for piece in pieces:
            state = START
            for token in piece:
                if token not in self._next[state]:
                    self._next[state][token] = len(self._next)
                    self._next.append({})
                state = self._next[state][token]

    def read(self, ids: Tensor, real: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """(which tokens are text or behind some, bool [B, T]; the state after each, int64 [B, T]), on ids' device.

        Args:
            ids: int64 [B, T]. real: bool [B, T], False at padding, which is no text and changes no state.
            states: int64 [B], of each of the sequences before these tokens.
        """
        if ids.shape[1] == 1:  # as when text is generated: no GPU is waited for
            after = torch.where(real, self._step(ids[:, 0], states)[:, None], states[:, None])
            return real & (after == BEGUN), after
        counts, after = real.cpu().clone(), torch.full(ids.shape, BEGUN)
        rows = zip(ids.tolist(), counts.tolist(), states.tolist(), strict=True)
        for b, (tokens, are_real, state) in enumerate(rows):
            if state == BEGUN:
                continue
            for t, (token, is_real) in enumerate(zip(tokens, are_real, strict=True)):
                if is_real:
                    state = self._after(state, token)
                if state == BEGUN:
                    break
                counts[b, t], after[b, t] = False, state
        return counts.to(ids.device), after.to(ids.device)

    def _after(self, state: int, token: int) -> int:
        """The state behind a token."""
        if state == BEGUN:
            return BEGUN
        if token in self.special:
            return self._next[START].get(token, START)
        return self._next[state].get(token, BEGUN)

    def _step(self, ids: Tensor, states: Tensor) -> Tensor:
        """`_after` of tensors [B]."""
        if self._table is None or self._table[0].device != ids.device:
            known = sorted({*self.special, *(token for after in self._next for token in after)})
            rows = [
                [*(self._after(state, t) for t in known), self._after(state, -1)]
                for state in range(len(self._next))
            ]
            tokens = torch.tensor([*known, torch.iinfo(torch.int64).max])
            self._table = tokens.to(ids.device), torch.tensor(rows).to(ids.device)
        (tokens, following), ids = self._table, ids.long().contiguous()
        place = torch.searchsorted(tokens, ids)
        return following[states, torch.where(tokens[place] == ids, place, len(tokens) - 1)]

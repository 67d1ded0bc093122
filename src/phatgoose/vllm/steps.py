"""Which requests a step of vLLM continues, and what is kept of each beside the key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import RoutingError


@dataclass(frozen=True, eq=False)
class Request:
    """The new tokens of one request in a step."""

    begin: int
    """Where they begin in the step's flat batch."""
    tokens: int
    """How many there are."""
    first: int
    """The first one's position in the request."""
    continues: int | None
    """The block that holds the token before the first; None if the request begins."""
    ends: tuple[tuple[int, int], ...]
    """(block, how many of the new tokens there are up to the last one in it), for each block that is written."""


@dataclass(frozen=True, eq=False)
class Step:
    """The new tokens of all requests in one forward pass, one request after the other in a flat batch."""

    requests: tuple[Request, ...]
    tokens: int
    """How many there are; what the batch has behind them is padding."""

    @staticmethod
    def of(metadata: Any, block_size: int) -> Step | None:
        """
        Args:
            metadata: vLLM's attention metadata of one layer. With R requests and N tokens: query_start_loc [≥ R + 1],
                seq_lens [≥ R], block_table [≥ R, blocks], slot_mapping [≥ N].
            block_size: tokens in a block.

        Returns: None for a step that writes nothing into the cache, as vLLM runs when it warms up.

        Raises:
            RoutingError: the metadata doesn't say where tokens are written, or says it in another way.
        """
        names = ("query_start_loc", "seq_lens", "block_table", "slot_mapping")
        if lacking := [name for name in names if not isinstance(getattr(metadata, name, None), Tensor)]:
            raise RoutingError(
                f"vLLM's attention ({type(metadata).__name__}) doesn't say in its {lacking[0]} which request a token "
                "belongs to, which Gander must know: choose another one with --attention-backend, or use `phatgoose "
                "serve`."
            )
        starts, lengths, table, slots = (getattr(metadata, name).cpu().long() for name in names)
        counts = starts.diff()
        tokens = int(starts[-1])
        if not tokens or bool((slots[:tokens] < 0).all()):
            return None
        first = lengths[: len(counts)] - counts
        row = torch.arange(len(counts)).repeat_interleave(counts)
        position = first[row] + torch.arange(tokens) - starts[:-1][row]
        column = position // block_size
        known = column < table.shape[1]
        block = table[row, column.where(known, 0)].where(known, -1)
        if not torch.equal(block * block_size + position % block_size, slots[:tokens]):
            raise RoutingError(
                f"vLLM keeps a request's tokens elsewhere than in blocks of {block_size} one after the other, so "
                "Gander can't tell which request they belong to. Set --block-size to what the attention's kernel uses, "
                "or use `phatgoose serve`."
            )
        found = []
        for r, (begin, count, at) in enumerate(
            zip(starts.tolist(), counts.tolist(), first.tolist(), strict=False)
        ):
            if not count:
                continue
            continues = int(table[r, (at - 1) // block_size]) if at else None
            # The last new token in each block: where another follows in the next one, and the last of all.
            last = [*range(block_size - at % block_size, count, block_size), count]
            ends = tuple((int(block[begin + upto - 1]), upto) for upto in last)
            found.append(Request(begin, count, at, continues, ends))
        return Step(tuple(found), tokens)

    def rounds(self) -> Iterator[list[Request]]:
        """The requests in an order in which what each continues is known: vLLM lets a request continue behind blocks
        that another one, with the same text, writes in the same step."""
        left = list(self.requests)
        while left:
            written = {block: request for request in left for block, _ in request.ends}
            ready = [r for r in left if r.continues is None or written.get(r.continues, r) is r]
            if not ready:
                raise RoutingError(
                    "requests of one step of vLLM continue each other: this isn't known to happen."
                )
            yield ready
            left = [] if len(ready) == len(left) else [r for r in left if r not in ready]


class BlockStates:
    """What is known of a request after the last token in each block of the key-value cache.

    vLLM shares blocks between requests only once they are full, so whoever continues behind a block finds there what
    belongs to its text.
    """

    def __init__(self, width: int):
        self.states = torch.zeros(0, width)
        """float32 [blocks, width]; it grows as blocks are used."""
        self.positions = torch.full((0,), -1)
        """int64 [blocks], on the CPU: of the token after which each state was, in its request."""

    def before(self, requests: Sequence[Request]) -> Tensor | None:
        """The states that requests continue, [requests, width], zeros for those that begin; None if all of them do.

        Raises:
            RoutingError: a request continues behind a token after which nothing was kept.
        """
        if all(request.continues is None for request in requests):
            return None
        for request in requests:
            block, at = request.continues, request.first - 1
            found = int(self.positions[block]) if block is not None and block < len(self.positions) else -1
            if block is not None and found != at:
                raise RoutingError(
                    f"a request of vLLM goes on behind token {at}, and what Gander knows of its block is of "
                    f"{'no token' if found < 0 else f'token {found}'}: its keys and values come from elsewhere, or "
                    "tokens were taken back. That can't be routed exactly: turn off what does so, or use `phatgoose "
                    "serve`."
                )
        rows = [
            self.states.new_zeros(self.states.shape[1]) if r.continues is None else self.states[r.continues]
            for r in requests
        ]
        return torch.stack(rows)

    def keep(self, requests: Sequence[Request], after: Tensor) -> None:
        """after: float32 [requests, T, width], the state after each of the T new tokens that each of them has."""
        ends = [(row, upto, block) for row, request in enumerate(requests) for block, upto in request.ends]
        rows, uptos, blocks = (torch.tensor(column) for column in zip(*ends, strict=True))
        self._grow(int(blocks.max()) + 1, after)
        firsts = torch.tensor([request.first for request in requests])
        self.states[blocks.to(after.device)] = after[rows.to(after.device), (uptos - 1).to(after.device)]
        self.positions[blocks] = firsts[rows] + uptos - 1

    def _grow(self, blocks: int, like: Tensor) -> None:
        if self.states.device != like.device:
            self.states = self.states.to(like.device)
        if blocks > (known := len(self.positions)):
            more = max(blocks, 2 * known) - known
            self.states = torch.cat([self.states, self.states.new_zeros(more, self.states.shape[1])])
            self.positions = torch.cat([self.positions, torch.full((more,), -1)])

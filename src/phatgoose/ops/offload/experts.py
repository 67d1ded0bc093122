"""Routing at one module whose experts stand on the host, with those used last on the device: score → choose → mix, exactly.

Coarse gates of all experts are on the device. They rule out all but a few of a token's best; those few are scored again by their float32
gates, and the chosen experts' rows are brought to the device, both from the host if they aren't there yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.ops import fast, reference
from phatgoose.ops.offload import quantized_gates as coarsely
from phatgoose.ops.offload.quantized_gates import AT_ONCE, Coarse, exact_scores, standardised
from phatgoose.ops.offload.slots import Counts, Slots
from phatgoose.ops.stack import Layer, Stack

Mix = Callable[[Tensor, Tensor, Stack, Tensor, Tensor, Layer | None], Tensor]


@dataclass(frozen=True)
class Room:
    """For how many float32 gates, and for how many rows of A and B, there is room on the device."""

    gates: int
    rows: int


@dataclass(eq=False)
class _There:
    """What is on one device."""

    device: torch.device
    coarse: Coarse
    gates: Slots
    rows: Slots
    others: Stack
    """The stack without its low-rank rows."""
    done: Any = None
    """When the last call will be done with the slots; None on CPUs."""


class Cached:
    """The three steps of one module in one call, as `ops.Prepared`. One thread at a time; more wait.

    Args:
        gates: standardised, float32 [E, d_in], on the host.
        stack: on the host. Its rows are brought to the device; vectors (biases, (IA)³) stay there.
        mix: a backend's, for experts that are on the device.
        path: the module's, for messages.
    """

    def __init__(
        self,
        gates: Tensor,
        top_k: int,
        stack: Stack,
        layer: Layer | None,
        mix: Mix,
        path: str,
        room: Room | None = None,
    ):
        if stack.embedding or stack.bottlenecks:
            raise RoutingError(
                f"{path}: only low-rank rows and vectors can be brought to a device when needed."
            )
        self.gates, self.stack, self.layer, self.mix, self.path = gates, stack, layer, mix, path
        self.top_k = min(top_k, stack.experts)
        self.coarse = coarsely.coarse(gates)
        self.room = self.most if room is None else room
        self._there: _There | None = None
        self._lock = threading.Lock()
        self._run = torch.compiler.disable(self._routed)  # what is where is no part of a graph

    def __reduce__(self) -> Any:  # copies begin with nothing on the device
        return Cached, (self.gates, self.top_k, self.stack, self.layer, self.mix, self.path, self.room)

    @property
    def least(self) -> Room:
        """The least that it can work with."""
        return Room(1, max(self.stack.ranks))

    @property
    def most(self) -> Room:
        """All experts."""
        return Room(self.stack.experts, sum(self.stack.ranks))

    def bytes(self, room: Room) -> int:
        """What this much room takes on the device."""
        width = (self.stack.A.shape[1] + self.stack.B.shape[1]) * self.stack.A.element_size()
        return room.gates * self.gates.shape[1] * 4 + room.rows * width

    @property
    def resident_bytes(self) -> int:
        """What is always on the device: coarse gates and vectors."""
        return self.coarse.bytes + sum(t.nbytes for t in self.stack.other_tensors())

    @property
    def counts(self) -> tuple[Counts, Counts]:
        """Of rows, and of gates."""
        there = self._there
        return (Counts(), Counts()) if there is None else (there.rows.counts, there.gates.counts)

    def __call__(self, u: Tensor, y: Tensor, into_y: bool = False) -> Tensor:
        """y + Σ w Δ(u); u: [..., d_in], y: [..., d_out].

        Raises:
            RoutingError: a gradient is asked for, a CUDA graph is captured, or an input isn't finite.
        """
        return self._run(u, y)[0]

    def can(self, u: Tensor, y: Tensor) -> bool:
        """Always; what can't be done is refused by the call."""
        return True

    def with_choice(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Also who was chosen, int64 [N, k], and their weights, float32 [N, k]."""
        return self._run(u, y)

    def _routed(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._check(u, y)
        flat_u, flat_y = u.reshape(-1, u.shape[-1]).to(y.device), y.reshape(-1, y.shape[-1])
        if not len(flat_u):
            none = torch.empty(0, self.top_k, dtype=torch.float32, device=y.device)
            return y, none.long(), none
        with self._lock:
            there = self._on(y.device)
            if there.done is not None:  # of a call on another stream
                torch.cuda.current_stream(y.device).wait_event(there.done)
            chosen, weights = self._choose(there, flat_u)
            added = self._mix(there, flat_u, flat_y, chosen, weights)
            if y.is_cuda:
                there.done = torch.cuda.Event()
                there.done.record(torch.cuda.current_stream(y.device))
        added = fast.with_others(added, flat_u, flat_y, there.others, chosen, weights, self.layer)
        return added.reshape(y.shape), chosen, weights

    def _check(self, u: Tensor, y: Tensor) -> None:
        why = fast.gradient_refused(u, y)
        if why is None and _capturing(y):
            why = (
                "which experts are on the device, and so what has to be copied, is decided in every forward, and a CUDA graph "
                "would do the same copies again. Run it eagerly, or route without device_memory."
            )
        if why is not None:
            raise RoutingError(f"{self.path}: routing with device_memory can't do this: {why}")

    def _on(self, device: torch.device) -> _There:
        if self._there is None or self._there.device != device:
            stack, none = self.stack, (0,) * self.stack.experts
            with torch.inference_mode(False):
                rest = replace(stack, A=stack.A[:0], B=stack.B[:0], starts=none, ranks=none).to(device)
                self._there = _There(
                    device,
                    self.coarse.to(device),
                    Slots([self.gates], range(stack.experts), [1] * stack.experts, self.room.gates, device),
                    Slots(
                        [stack.A, stack.B], stack.starts, stack.ranks, self.room.rows, device, stack.prefetch
                    ),
                    rest,
                )
        return self._there

    def _choose(self, there: _There, u: Tensor) -> tuple[Tensor, Tensor]:
        """Some hundreds or thousands of tokens at once, so that what is needed beside the budget is bounded."""
        each = max(1, AT_ONCE // max(self.gates.shape))
        parts = [self._choose_some(there, u[i : i + each]) for i in range(0, u.shape[0], each)]
        chosen, weights = zip(*parts, strict=True)
        return torch.cat(chosen), torch.cat(weights)

    def _choose_some(self, there: _There, u: Tensor) -> tuple[Tensor, Tensor]:
        x, dtype = standardised(u), torch.promote_types(u.dtype, torch.float32)
        leaders = there.coarse.leaders(x, self.top_k)
        unknown = ~leaders.any(1).all()
        *_, leading, lost = torch.cat([leaders.any(0), unknown[None]]).cpu().split([self.stack.experts, 1])
        if bool(lost):
            raise RoutingError(
                f"{self.path}: its input isn't finite. Routing with device_memory can't tell then who is chosen."
            )
        experts = leading.nonzero()[:, 0].tolist()
        place = {expert: i for i, expert in enumerate(experts)}
        scores = x.new_empty(x.shape[0], len(experts), dtype=dtype)
        each = max(1, AT_ONCE // x.shape[1])
        for some, rows in there.gates.visit(experts):
            for i in range(0, len(some), each):
                gates = there.gates.there[0][torch.tensor(rows[i : i + each], device=u.device)]
                scores[:, [place[e] for e in some[i : i + each]]] = exact_scores(x, gates, dtype)
        # Of equal scores the lower index, as everywhere: the leaders are in the experts' order.
        best, weights = reference.choose(scores, self.top_k)
        return torch.tensor(experts, device=u.device)[best], weights

    def _mix(self, there: _There, u: Tensor, y: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        needed = [e for e in chosen.unique().tolist() if self.stack.ranks[e]]
        sum_of_parts = None
        for experts, rows in there.rows.visit(needed):
            stack = self._part(there, experts, rows)
            index = torch.full((self.stack.experts,), -1)
            index[experts] = torch.arange(len(experts))
            own = index.to(u.device)[chosen]
            if len(experts) == len(needed):
                return self.mix(u, y, stack, own, weights, None)
            if sum_of_parts is None:  # rounded once, at the end, however many parts there are
                sum_of_parts = y.to(torch.promote_types(y.dtype, torch.float32))
            sum_of_parts = self.mix(u, sum_of_parts, stack, own, weights, None)
        return y if sum_of_parts is None else sum_of_parts.to(y.dtype)

    def _part(self, there: _There, experts: list[int], rows: list[int]) -> Stack:
        a, b = there.rows.there
        ranks = tuple(self.stack.ranks[e] for e in experts)
        return Stack(a, b, tuple(rows), ranks, tuple(self.stack.scales[e] for e in experts))


def _capturing(y: Tensor) -> bool:
    return y.is_cuda and torch.cuda.is_current_stream_capturing()

"""Score, choose and mix at one module whose experts stay on the host, exactly.

Quantized gates of all experts are on the device. They rule out all but a few of a token's best. Those few are
scored again by their float32 gates, and the chosen experts' rows are brought to the device; both are fetched
from the host if they aren't there yet.
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
from phatgoose.ops.backends import Mix
from phatgoose.ops.fused import NO_BACKWARD
from phatgoose.ops.offload.slots import Counts, Slots
from phatgoose.ops.quantized_gates import CHUNK_VALUES, QuantizedGates, exact_scores, quantize, standardised
from phatgoose.ops.stack import Layer, Stack

_Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Capacity:
    """How many float32 gates, and how many rows of A and B, there is room for on the device."""

    gates: int
    rows: int


@dataclass(eq=False)
class _OnDevice:
    """What is on one device."""

    device: torch.device
    quantized: QuantizedGates
    gates: Slots
    rows: Slots
    others: Stack
    """The stack without its low-rank rows."""
    done: Any = None
    """When the last call will be done with the slots; None on CPUs."""


class OffloadedExperts:
    """Score, choose and mix of one module in one call, as `ops.FusedRouting`. One thread at a time; others wait.

    Args:
        gates: standardised, float32 [E, d_in], on the host.
        stack: on the host. Its rows are brought to the device when they are needed; vectors (biases, (IA)³) stay there.
        mix: a backend's, for experts that are on the device.
        path: the module's, for messages.
        capacity: None: room for all experts.
    """

    def __init__(
        self,
        gates: Tensor,
        top_k: int,
        stack: Stack,
        layer: Layer | None,
        mix: Mix,
        path: str,
        capacity: Capacity | None = None,
    ):
        if stack.embedding or stack.bottlenecks:
            raise RoutingError(
                f"{path}: only low-rank rows and vectors can be brought to a device when needed."
            )
        self.gates, self.stack, self.layer, self.mix, self.path = gates, stack, layer, mix, path
        self.top_k = min(top_k, stack.experts)
        self.quantized = quantize(gates)
        self.capacity = self.max_capacity if capacity is None else capacity
        self._state: _OnDevice | None = None
        self._lock = threading.Lock()
        # Which experts are on the device is no part of a graph.
        self._run: _Run = torch.compiler.disable(self._routed)

    def __reduce__(self) -> Any:
        # Copies begin with nothing on the device.
        given = (self.gates, self.top_k, self.stack, self.layer, self.mix, self.path, self.capacity)
        return OffloadedExperts, given

    @property
    def min_capacity(self) -> Capacity:
        """The least that it can work with: one gate, and any one expert's rows."""
        return Capacity(1, max(self.stack.ranks))

    @property
    def max_capacity(self) -> Capacity:
        """Room for all experts."""
        return Capacity(self.stack.experts, sum(self.stack.ranks))

    def bytes(self, capacity: Capacity) -> int:
        """What this capacity takes on the device."""
        width = (self.stack.A.shape[1] + self.stack.B.shape[1]) * self.stack.A.element_size()
        return capacity.gates * self.gates.shape[1] * 4 + capacity.rows * width

    @property
    def resident_bytes(self) -> int:
        """What is always on the device: quantized gates and vectors."""
        return self.quantized.nbytes + sum(t.nbytes for t in self.stack.other_tensors())

    @property
    def counts(self) -> tuple[Counts, Counts]:
        """Of rows, and of gates."""
        state = self._state
        return (Counts(), Counts()) if state is None else (state.rows.counts, state.gates.counts)

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
        """The output, who was chosen, int64 [N, k], and their weights, float32 [N, k]."""
        return self._run(u, y)

    def _routed(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._check(u, y)
        flat_u, flat_y = u.reshape(-1, u.shape[-1]).to(y.device), y.reshape(-1, y.shape[-1])
        if not len(flat_u):
            none = torch.empty(0, self.top_k, dtype=torch.float32, device=y.device)
            return y, none.long(), none
        with self._lock:
            state = self._state_on(y.device)
            if state.done is not None:  # the last call may be on another stream, and still read the slots
                torch.cuda.current_stream(y.device).wait_event(state.done)
            chosen, weights = self._choose(state, flat_u)
            added = self._mix(state, flat_u, flat_y, chosen, weights)
            if y.is_cuda:
                state.done = torch.cuda.Event()
                state.done.record(torch.cuda.current_stream(y.device))
        added = fast.with_others(added, flat_u, flat_y, state.others, chosen, weights, self.layer)
        return added.reshape(y.shape), chosen, weights

    def _check(self, u: Tensor, y: Tensor) -> None:
        why = None
        if torch.is_grad_enabled() and (u.requires_grad or y.requires_grad):
            why = NO_BACKWARD
        elif _is_capturing(y):
            why = (
                "every forward pass decides which experts have to be copied to the device, and a CUDA graph "
                "would repeat the same copies. Run it eagerly, or route without device_memory."
            )
        if why is not None:
            raise RoutingError(f"{self.path}: routing with device_memory can't do this: {why}")

    def _state_on(self, device: torch.device) -> _OnDevice:
        """What is on this device; made anew, and empty, if the module was moved."""
        if self._state is None or self._state.device != device:
            stack, capacity, none = self.stack, self.capacity, (0,) * self.stack.experts
            with torch.inference_mode(False):  # tensors made in inference mode couldn't be used outside of it
                gates = Slots([self.gates], range(stack.experts), [1] * stack.experts, capacity.gates, device)
                rows = Slots(
                    [stack.A, stack.B], stack.starts, stack.ranks, capacity.rows, device, stack.prefetch
                )
                others = replace(stack, A=stack.A[:0], B=stack.B[:0], starts=none, ranks=none).to(device)
                self._state = _OnDevice(device, self.quantized.to(device), gates, rows, others)
        return self._state

    def _choose(self, state: _OnDevice, u: Tensor) -> tuple[Tensor, Tensor]:
        """Hundreds or thousands of tokens at a time, so that memory beside the budget is bounded."""
        chunk = max(1, CHUNK_VALUES // max(self.gates.shape))
        parts = [self._choose_some(state, u[i : i + chunk]) for i in range(0, u.shape[0], chunk)]
        chosen, weights = zip(*parts, strict=True)
        return torch.cat(chosen), torch.cat(weights)

    def _choose_some(self, state: _OnDevice, u: Tensor) -> tuple[Tensor, Tensor]:
        x, dtype = standardised(u), torch.promote_types(u.dtype, torch.float32)
        leaders = state.quantized.leaders(x, self.top_k)
        # One copy tells the host both which experts lead anywhere, and whether a token has no leaders.
        not_finite = ~leaders.any(1).all()
        flags = torch.cat([leaders.any(0), not_finite[None]]).cpu()
        if bool(flags[-1]):
            raise RoutingError(
                f"{self.path}: its input isn't finite. Routing with device_memory can't tell who is chosen then."
            )
        experts = flags[:-1].nonzero()[:, 0].tolist()
        column = {expert: i for i, expert in enumerate(experts)}
        scores = x.new_empty(x.shape[0], len(experts), dtype=dtype)
        chunk = max(1, CHUNK_VALUES // x.shape[1])
        for some, rows in state.gates.visit(experts):
            for i in range(0, len(some), chunk):
                gates = state.gates.on_device[0][torch.tensor(rows[i : i + chunk], device=u.device)]
                columns = [column[expert] for expert in some[i : i + chunk]]
                scores[:, columns] = exact_scores(x, gates, dtype)
        # Leaders are in the experts' order, so of equal scores the lower index is chosen, as in every backend.
        best, weights = reference.choose(scores, self.top_k)
        return torch.tensor(experts, device=u.device)[best], weights

    def _mix(self, state: _OnDevice, u: Tensor, y: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """y + the low-rank parts, in as many parts as the chosen experts' rows need."""
        needed = [e for e in chosen.unique().tolist() if self.stack.ranks[e]]
        total = None
        for experts, rows in state.rows.visit(needed):
            stack = self._stack_of(state, experts, rows)
            index = torch.full((self.stack.experts,), -1)
            index[experts] = torch.arange(len(experts))
            chosen_here = index.to(u.device)[chosen]
            if len(experts) == len(needed):
                return self.mix(u, y, stack, chosen_here, weights, None)
            if total is None:  # it is rounded once, at the end, however many parts there are
                total = y.to(torch.promote_types(y.dtype, torch.float32))
            total = self.mix(u, total, stack, chosen_here, weights, None)
        return y if total is None else total.to(y.dtype)

    def _stack_of(self, state: _OnDevice, experts: list[int], rows: list[int]) -> Stack:
        """The stack of these experts, whose rows on the device begin at `rows`."""
        a, b = state.rows.on_device
        ranks = tuple(self.stack.ranks[e] for e in experts)
        return Stack(a, b, tuple(rows), ranks, tuple(self.stack.scales[e] for e in experts))


def _is_capturing(y: Tensor) -> bool:
    return y.is_cuda and torch.cuda.is_current_stream_capturing()

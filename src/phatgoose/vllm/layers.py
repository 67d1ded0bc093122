"""A pool in one process of vLLM: which layer holds which module, and its routing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.candidates import stacked
from phatgoose.vllm.binding import bind, differing, prepare_router, shard_stack
from phatgoose.vllm.settings import Settings
from phatgoose.vllm.site import AllReduce, RoutedLinear, RoutedSlice, Shard
from phatgoose.vllm.slices import Linear, Slice, columns, modules_in, slices


class Layers:
    """Makes the routing of one layer after the other, and releases the pool after the last.

    Args:
        samples: weights of the base at each module that the pool adapts.
        renamed: a module's path in the base → its path in vLLM's model, before layers are merged.
    """

    def __init__(
        self, settings: Settings, samples: Mapping[str, tuple[float, ...]], renamed: Callable[[str], str]
    ):
        self._pool: Pool | None = Pool.load(settings.pool, verify=False)  # the front process has verified it
        self._router = prepare_router(settings.router, self._pool)
        if lacking := [path for path in self._pool.modules if path not in samples]:
            raise RoutingError(
                f"{settings.pool} was changed while vLLM started: {lacking[0]} is new. Start vLLM again."
            )
        self._samples = samples
        self.paths = {renamed(path): path for path in self._pool.modules}
        """vLLM's name → the pool's."""
        self._taken: set[str] = set()
        self._waiting = len(self.paths)

    def take(self, linear: Linear, merged: Mapping[str, list[str]]) -> list[Slice]:
        """The adapted modules in a layer. Every layer of the model asks before the first one is made."""
        if not any(name in self.paths for name in modules_in(linear, merged)):
            return []
        found = [s for s in slices(linear, merged) if s.path in self.paths]
        for part in found:
            if part.path in self._taken:
                raise RoutingError(
                    f"two layers of vLLM's model are {part.path}: this architecture can't be routed."
                )
            self._taken.add(part.path)
        return found

    def check_taken(self) -> None:
        """Raises RoutingError: a module that the pool adapts is in no linear layer of vLLM's model."""
        if left := [path for name, path in self.paths.items() if name not in self._taken]:
            raise RoutingError(
                f"{len(left)} modules that the pool adapts are no linear layers of vLLM's model that a "
                f"plugin can reach, {left[0]} among them; without them the experts would compute something "
                "else. Serve a pool that doesn't adapt them, or route it in transformers."
            )

    def make(self, linear: Linear, parts: list[Slice], weight: Tensor, all_reduce: AllReduce) -> RoutedLinear:
        """The routing of a layer, on the device and in the dtype of its weight [this rank's outputs, this
        rank's inputs].

        Raises:
            RoutingError: the layer isn't the modules that it should be.
        """
        made = [(p.begin, p.end, self._part(linear, p, weight, all_reduce)) for p in parts]
        self._waiting -= len(parts)
        if not self._waiting:
            self._pool = None
        return RoutedLinear(made)

    def _part(self, linear: Linear, part: Slice, weight: Tensor, all_reduce: AllReduce) -> RoutedSlice:
        assert self._pool is not None
        path, d_in, had = self.paths[part.path], linear.d_in, columns(linear)
        candidates, gates, top_k = bind(self._pool, self._router, path)
        update = next(u for u in candidates.updates if u is not None)
        if (update.d_in, update.d_out) != (d_in, part.d_out):
            raise RoutingError(
                f"{path} is {update.d_in} → {update.d_out} in the pool and {d_in} → {part.d_out} in vLLM. "
                "This architecture can't be routed."
            )
        begin = part.begin
        for rows in part.rows:
            own = weight[begin : begin + len(rows)]
            if why := differing(own, path, self._samples[path], rows, had, (part.d_out, d_in)):
                raise RoutingError(
                    f"vLLM's {linear.path} isn't the base's {path}, row by row: {why}. Its weights were "
                    "changed or reordered as they were loaded, and experts would act on the wrong rows. This "
                    "architecture can't be routed."
                )
            begin += len(rows)
        stack, *_ = stacked(self._pool, candidates, (d_in, part.d_out), weight.dtype)
        stack = shard_stack(stack, had, part.rows, d_in, part.d_out)
        shard = Shard(linear.rank, linear.ranks, had, d_in, all_reduce) if linear.splits_input else None
        return RoutedSlice(gates, top_k, stack, torch.device(weight.device), shard)

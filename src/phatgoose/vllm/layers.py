"""A pool in one process of vLLM: which layer holds which module, and its routing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.fingerprints import ABSOLUTE, RELATIVE
from phatgoose.models.attach.candidates import candidates_at, stacked
from phatgoose.models.base.fingerprint import sample_positions
from phatgoose.ops import Stack
from phatgoose.routers import Gander, Router
from phatgoose.routers.gander import Reading
from phatgoose.routers.parse import parse_router
from phatgoose.routers.router import Candidates, Encoder, Setup
from phatgoose.vllm.gander import ActingSlice, GanderRun, ReadLayer, see_first
from phatgoose.vllm.settings import Settings
from phatgoose.vllm.site import AllReduce, RoutedLinear, RoutedSlice, Shard, StackSlice
from phatgoose.vllm.slices import Linear, Slice, columns, modules_in, slices

SAMPLES = 32


@dataclass(frozen=True, eq=False)
class Checked:
    """What the front process found out about a pool on its base, for the processes that run the model."""

    samples: Mapping[str, tuple[float, ...]]
    """A few of the base's weights for each module that the pool adapts, by its path."""
    reading: Reading | None = None
    """Of Gander, shown the reference text."""


class Layers:
    """Makes the routing of one layer after the other, and releases the pool after the last.

    Args:
        checked: what the front process found out.
        renamed: a module's path in the base → its path in vLLM's model, before layers are merged.
        block_size: finds out how many tokens a block of the key-value cache holds, once there is one.
        device: the type of the model's device, such as "cpu".
    """

    def __init__(
        self,
        settings: Settings,
        checked: Checked,
        renamed: Callable[[str], str],
        block_size: Callable[[], int],
        device: str,
    ):
        self._pool: Pool | None = Pool.load(settings.pool, verify=False)  # the front process has verified it
        self._router = prepare_router(settings.router, self._pool)
        if lacking := [path for path in self._pool.modules if path not in checked.samples]:
            raise RoutingError(
                f"{settings.pool} was changed while vLLM started: {lacking[0]} is new. Start vLLM again."
            )
        self._samples = checked.samples
        self.gander: GanderRun | None = None
        """What sums up evidence, if the router is Gander."""
        if checked.reading is not None:
            self.gander = GanderRun(checked.reading, self._pool.names, block_size, device)
        self.paths = {renamed(path): path for path in self._pool.modules}
        """vLLM's name → the pool's."""
        self._taken: set[str] = set()
        self._waiting = len(self.paths)
        self._embeddings = 0

    def take_embedding(self, embedding: nn.Module) -> None:
        """The model's table of tokens, of which there must be one for Gander: it sees the tokens' ids."""
        if self.gander is not None:
            embedding.register_forward_pre_hook(see_first)
            self._embeddings += 1

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
        if self.gander is not None and self._embeddings != 1:
            raise RoutingError(
                f"this model of vLLM has {self._embeddings} tables of tokens that a plugin can reach, and Gander must "
                "see each token's id in one: serve it with `phatgoose serve`, or choose another router."
            )

    def make(
        self, linear: Linear, parts: list[Slice], weight: Tensor, all_reduce: AllReduce
    ) -> RoutedLinear | ReadLayer | None:
        """The routing of a layer, on the device and in the dtype of its weight [this rank's outputs, this
        rank's inputs]; None if the base acts there.

        Raises:
            RoutingError: the layer isn't the modules that it should be, or can't be read as it is split.
        """
        assert self._pool is not None
        made: list[tuple[int, int, StackSlice]] = []
        read = []
        for part in parts:
            candidates = self._checked(linear, part, weight)
            if self.gander is None or candidates.path not in self.gander.reading.waiting:
                made.append((part.begin, part.end, self._part(linear, part, candidates, weight, all_reduce)))
            elif candidates.path in self.gander.reading.read:
                read.append(candidates.path)
        self._waiting -= len(parts)
        if not self._waiting:
            self._pool = None
        if read and linear.splits_input:
            raise RoutingError(
                f"Gander would read {read[0]}, whose input tensor parallelism splits over ranks: use experts that "
                "adapt the projection to values, or --tensor-parallel-size 1."
            )
        return RoutedLinear(made) if made else ReadLayer(read) if read else None

    def _checked(self, linear: Linear, part: Slice, weight: Tensor) -> Candidates:
        """The experts at the module that a part of a layer is."""
        assert self._pool is not None
        path, d_in, had = self.paths[part.path], linear.d_in, columns(linear)
        candidates = low_rank_at(self._pool, path, self._router.offers_null)
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
        return candidates

    def _part(
        self, linear: Linear, part: Slice, candidates: Candidates, weight: Tensor, all_reduce: AllReduce
    ) -> StackSlice:
        assert self._pool is not None
        path, d_in, had, device = candidates.path, linear.d_in, columns(linear), torch.device(weight.device)
        stack, *_ = stacked(self._pool, candidates, (d_in, part.d_out), weight.dtype)
        stack = shard_stack(stack, had, part.rows, d_in, part.d_out)
        if self.gander is not None:
            self.gander.acting[path] = replace(candidates, gates=(), updates=())  # which would stay in memory
            return ActingSlice(path, stack, device)
        shard = Shard(linear.rank, linear.ranks, had, d_in, all_reduce) if linear.splits_input else None
        return RoutedSlice(*gates_at(candidates, self._router), stack, device, shard)


def prepare_router(text: str, pool: Pool) -> Router:
    """The router that `text` names, prepared for this pool; Gander isn't, as it must look at the base first.

    Raises:
        RoutingError, UnknownName, PluginError: there is no such router, or it can't serve this pool, or it reads text.
    """
    router = parse_router(text)
    router.check(pool.names)
    if isinstance(router, Gander):
        return router
    if router.reads == "texts" or router.remembers:
        raise _no_gates(router)

    def encoder(name: str) -> Encoder:
        raise _no_gates(router)

    return router.prepared(Setup(pool.experts, None, encoder))


def low_rank_at(pool: Pool, path: str, offers_null: bool) -> Candidates:
    """The experts at a module, with the null candidate if it is offered. Raises RoutingError: one isn't LoRA alone."""
    candidates = candidates_at(pool, path, offers_null)
    for member, update in zip(candidates.members, candidates.updates, strict=True):
        if update is not None and not update.is_low_rank:
            raise RoutingError(
                f"expert {pool.names[member]!r} is {update.described} at {path}; in vLLM only plain LoRA of "
                "linear layers is routed. Serve a pool without it (`phatgoose pool remove`), or route it in "
                "transformers."
            )
    return candidates


def gates_at(candidates: Candidates, router: Router) -> tuple[Tensor, int]:
    """The candidates' standardised gates, float32 [candidates, d_in], and top_k.

    Raises:
        RoutingError: an expert lacks what the router needs, or the router doesn't choose by gates.
    """
    bound = router.bind(candidates)
    if bound.by_gates is None:
        raise _no_gates(router)
    return bound.by_gates


def shard_stack(stack: Stack, columns: range, rows: Sequence[range], d_in: int, d_out: int) -> Stack:
    """The part of a stack with these inputs and outputs, as one rank holds it. A and B aren't copied if it is
    all of them."""
    a = stack.A if len(columns) == d_in else stack.A[:, columns.start : columns.stop].clone()
    whole = len(rows) == 1 and len(rows[0]) == d_out
    b = stack.B if whole else torch.cat([stack.B[:, r.start : r.stop] for r in rows], 1)
    return replace(stack, A=a, B=b)


def _no_gates(router: Router) -> RoutingError:
    name = type(getattr(router, "settings", router)).__name__
    return RoutingError(
        f"{name} can't be served by vLLM. These routers can: gander, and those that choose by gates, one vector per "
        "expert and module (phatgoose, average-activation, shuffled-gates). PHATGOOSE needs every expert to have gates "
        "(`phatgoose gate`). Serve other routers with `phatgoose serve`."
    )


def sample(module: nn.Module, path: str) -> tuple[float, ...]:
    """SAMPLES values of the weight [d_out, d_in] of a linear module, at places that depend only on its path
    and shape."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
    flat = torch.tensor(sample_positions(path, weight.shape, SAMPLES))
    return tuple(weight[torch.unravel_index(flat, weight.shape)].float().tolist())


def differing(
    part: Tensor, path: str, expected: tuple[float, ...], rows: range, columns: range, size: tuple[int, int]
) -> str:
    """How `part`, these rows and columns of a weight of `size`, differs from samples; "" if by no more than a cast."""
    for flat, value in zip(sample_positions(path, size, SAMPLES), expected, strict=True):
        row, column = divmod(flat, size[1])
        if row not in rows or column not in columns:
            continue
        found = float(part[row - rows.start, column - columns.start])
        if not abs(found - value) <= RELATIVE * max(abs(found), abs(value)) + ABSOLUTE:
            return f"the weight at row {row}, column {column} is {found:.6g}, expected {value:.6g}"
    return ""

"""What runs inside a traced model: takes in every module's choices at little cost, and sums them up now and then.

A kernel that can writes its choices where it is told (`buffer`); a call of `record` notes those of others and returns. Nothing is looked at,
moved between devices or waited for. When a pass is over, the choices of all its modules are packed as int16 and half precision. Every FLUSH
choices, between two passes (and at the end), what is pending is brought to the CPU in large pieces: padding is left out, candidates
become indices of the pool's experts, and either choices or only sums are kept.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.models.context.caches import length_of
from phatgoose.models.context.streams import Streams
from phatgoose.models.trace.choices import Tokens, joined
from phatgoose.models.trace.trace import Trace
from phatgoose.routers.context import RoutingContext, Sequences

FLUSH = 2**19
"""Pending choices (tokens × modules × top-k) at which they are summed up: a few MB, and what one pass chose."""


@dataclass(eq=False)
class _Pass:
    """One run of a stack as one module saw it; its tokens are worked out when they are needed."""

    sequences: Sequences
    rows: int
    length: int
    kept: Tensor | None
    first_input: int
    rows_per_input: int
    generated: bool
    whole: _Pass | None = None
    """Where a module saw tokens that were picked for it: all of the pass's, of which `picked` are its."""
    picked: Tensor | None = None
    rejected: int = 0
    """How many of the last tokens were drafts that weren't accepted."""
    tokens: Tokens | None = None
    real: Tensor | None = None


class _Call(NamedTuple):  # made for every module and token: a dataclass would take thrice as long
    """One call of one module, as it was handed over."""

    path: str
    seen: _Pass
    chosen: Tensor
    weights: Tensor
    margin: Tensor | None


class ChoiceBuffer:
    """Where a kernel writes the choices of modules that see the same tokens, one module after the other.

    chosen: int64 [M, N, k] and weights: float32 [M, N, k] on the CPU. paths: the modules whose choices are written, in order.
    """

    def __init__(self, seen: _Pass, shape: torch.Size, modules: int, k: int):
        self.seen, self.shape, self.modules = seen, shape, modules
        self.chosen = torch.empty(modules, shape.numel(), k, dtype=torch.int64)
        self.weights = torch.empty(modules, shape.numel(), k, dtype=torch.float32)
        self.paths: dict[str, None] = {}
        self._starts = self.chosen.data_ptr(), self.weights.data_ptr()
        self._steps = tuple(x.stride(0) * x.element_size() for x in (self.chosen, self.weights))

    def fits(self, path: str, shape: torch.Size) -> bool:
        """Whether the choices of this module, whose output has this shape, have a place here."""
        return shape[:-1] == self.shape and path not in self.paths and len(self.paths) < self.modules

    def wrote(self, path: str) -> None:
        """The module at `path` has written to the addresses that `next` gave."""
        self.paths[path] = None

    def next(self) -> tuple[int, int]:
        """Addresses of the next module's choices and weights."""
        i = len(self.paths)
        return self._starts[0] + i * self._steps[0], self._starts[1] + i * self._steps[1]


@dataclass(frozen=True, eq=False)
class _Block:
    """The calls of M modules in one pass: chosen int16 and weights [M, N, k], margins [M, N] or None."""

    paths: tuple[str, ...]
    seen: _Pass
    chosen: Tensor
    weights: Tensor
    margins: Tensor | None

    @property
    def kind(self) -> tuple[tuple[str, ...], int, bool]:
        return self.paths, self.chosen.shape[2], self.margins is not None


class Expanded(NamedTuple):
    """Prompts that stand in `times` rows each; ids: int64 [rows, T] or None."""

    ids: Tensor | None
    times: int

    def rows_per_input(self, sequences: Sequences) -> int:
        """`times` if these are the prompts, else 1: that generate() ended before it read them, or is done with them."""
        ids, read = self.ids, sequences.ids
        if read is None or ids is None:
            return self.times if sequences.positions.shape[0] % self.times == 0 else 1
        begins = read.shape[0] == ids.shape[0] and read.shape[1] <= ids.shape[1]
        return self.times if begins and torch.equal(ids[:, : read.shape[1]], read) else 1


class Recorder:
    """Fills a Trace; `models/attach/attach.py` calls `record` for every call of every module."""

    def __init__(self, trace: Trace, *, histogram: bool, margins: bool, sample: float, max_bytes: int):
        self.trace, self.histogram, self.max_bytes = trace, histogram, max_bytes
        self.wants_scores = margins and not histogram
        self.trace.share = sample
        self._calls: list[_Call] = []  # of the pass that runs
        self._buffers: dict[
            tuple[str, int], ChoiceBuffer
        ] = {}  # likewise, by whose tokens are read and top-k
        self._blocks: list[_Block] = []  # of passes that are over
        self._members: dict[str, tuple[int, ...]] = {}
        self._pending = 0
        self._passes: dict[tuple[str, int, int, tuple[int, ...] | None], _Pass] = {}
        self._streams: dict[str, str] = {}  # of the modules that ran, whose tokens they read
        self._inputs = self._rows = 0  # inputs before those that are being read, and how many these are
        self._encoded: weakref.ref[Tensor] | None = None  # what the decoder reads them from
        self._awaited = False  # an encoder has read them, and no decoder yet
        self._led = False  # a decoder began them, as no module of the encoder is routed
        self._expanded: Expanded | None = None
        self._random = torch.Generator().manual_seed(0)
        self._thread: threading.Thread | None = None  # whose passes these are

    def record(
        self,
        context: RoutingContext,
        members: tuple[int, ...],
        chosen: Tensor,
        weights: Tensor,
        scores: Tensor | None,
    ) -> None:
        """Takes in one module's choices among its candidates: int64 [N, k] and weights [N, k]; scores [N, candidates] or None.

        They are kept until the pass is over, so nobody may write into them. Cached tokens that the module sees again were counted before.

        Raises:
            RoutingError: it can't be told which tokens these are, or another thread runs the model as well.
        """
        if context.again:
            chosen, weights = (_last(x, context) for x in (chosen, weights))
            scores = None if scores is None else _last(scores, context)
            context = context.new()
        margin = None if scores is None else _margins(scores.detach(), chosen)
        seen = self._pass(context)  # may be the first of a new pass, and then packs the calls of the last
        if any(context.path in buffer.paths for buffer in self._buffers.values()):
            self._pack()  # what the module chose before stays before this
        self._members[context.path] = members
        weights = weights.detach() if weights.requires_grad else weights
        self._calls.append(_Call(context.path, seen, chosen, weights, margin))
        self._pending += chosen.numel()

    def buffer(
        self, top_k: int, path: str, members: tuple[int, ...], u: Tensor, shape: torch.Size, streams: Streams
    ) -> ChoiceBuffer | None:
        """Where a kernel is to write the choices of the module at `path`, at `next()`; what is in its `paths` is written. None: nowhere,
        since not all of them are counted.

        top_k: how many experts each token gets. u: the module's input. shape: of its output, [..., d].
        """
        self._members[path] = members
        stream = streams.stream_at(path, u)
        kind = stream, top_k
        buffer = self._buffers.get(kind)
        if (
            buffer is None
            or buffer.seen.sequences is not streams.current(stream)
            or not buffer.fits(path, shape)
            or not streams.is_whole(path, stream, shape)
            or self._streams.get(path) != stream
        ):
            context = streams.context(path, u, shape)
            if context.again:
                return None
            seen = self._pass(context)
            if buffer is not None and (buffer.seen is not seen or not buffer.fits(path, shape)):
                self._pack()  # of this pass: a module runs again, or sees other tokens, or in another shape
            if (buffer := self._buffers.get(kind)) is None:
                buffer = self._buffers[kind] = ChoiceBuffer(
                    seen, shape[:-1], len(self.trace.locations), top_k
                )
        return buffer

    def _check_thread(self) -> None:
        """Refuses a second thread: passes that run at once can't be told apart by what is recorded of them."""
        now = threading.current_thread()
        if self._thread is not now:
            if self._thread is not None and self._thread.is_alive():
                raise RoutingError(
                    "a trace records the passes of one thread, and another one runs this model as well. Run it in one thread while it "
                    "is traced, or give each thread a copy of the model."
                )
            self._thread = now

    def _pass(self, context: RoutingContext) -> _Pass:
        self._check_thread()
        context.check()
        assert context.sequences is not None
        if context.picked is not None:
            whole = self._pass(context.whole())
            return replace(whole, tokens=None, real=None, whole=whole, picked=context.picked.cpu())
        self._place(context.path, context.stream)
        kept = None if context.kept is None else tuple(context.kept.tolist())
        key = (context.stream, context.rows, context.length, kept)
        known = self._passes.get(key)
        if known is None or known.sequences is not context.sequences:
            if not any(p.sequences is context.sequences for p in self._passes.values()):
                self._new_sequences(context.path, context.sequences)
            known = self._passes[key] = _Pass(
                context.sequences, context.rows, context.length, context.kept,
                self._inputs, context.rows // max(self._rows, 1),
                context.sequences.past > 0 and key[0] == "decoder",
            )  # fmt: skip
        return known

    def _place(self, path: str, stream: str) -> None:
        """Notes whose tokens a module turned out to read."""
        if (known := self._streams.setdefault(path, stream)) != stream:
            raise RoutingError(
                f"{path} reads the encoder's tokens in one call and the decoder's in another, which a trace can't tell apart. "
                "Trace a pool whose experts leave it alone."
            )
        if known != self.trace.locations[path].reads:
            self.trace.move(path, stream)

    def _new_sequences(self, path: str, sequences: Sequences) -> None:
        """A stack runs over new tokens: of new inputs, unless it goes on behind a cache or is the decoder of an encoder's."""
        self._pack()
        if (
            self._pending >= FLUSH
        ):  # only between passes, so that all modules of a pass are summed up together
            self.flush()
        place = self.trace.locations[path]
        self._passes = {key: one for key, one in self._passes.items() if key[0] != place.reads}
        begins = sequences.past == 0
        if self.trace.encoder_decoder and place.reads == "decoder":
            # It reads the same encoded inputs in every pass over them.
            now, before = ((x and x()) for x in (sequences.encoded, self._encoded))
            begins = begins and not self._awaited and (now is None or now is not before)
            self._led, self._awaited = self._led or begins, False
            self._encoded = sequences.encoded
        elif self.trace.encoder_decoder:
            begins = not (place.part == "cross-attention" and self._led)
            self._awaited, self._led = begins, not begins
        rows = sequences.positions.shape[0]
        if begins or self._rows == 0 or rows % self._rows:
            of_one = 1 if self._expanded is None else self._expanded.rows_per_input(sequences)
            self._inputs, self._rows, self._expanded = self._inputs + self._rows, rows // of_one, None

    def expanded(self, ids: Tensor | None, times: int) -> None:
        """generate() is about to read each of its inputs in `times` rows (beams, several samples); ids: int64 [rows, T], its prompts."""
        self._expanded = Expanded(ids, times)

    def take_back(self, cache: object) -> None:
        """Drafts of the last pass have been checked, and `cache` has been cropped to those that were accepted.

        Raises:
            RoutingError: they have been handed out as choices already.
        """
        for (stream, *_), one in self._passes.items():
            if stream != "decoder" or (length := length_of(cache)) is None:
                continue
            one.rejected = one.sequences.past + one.sequences.positions.shape[1] - length
            if one.rejected and one.tokens is not None:
                raise RoutingError(
                    "a trace that is read while drafts are being checked counts those that are rejected: read it when generate() is done."
                )

    def _pack(self) -> None:
        """Makes blocks of the calls so far: a few copies for all modules of a pass, instead of a few for each."""
        calls, self._calls = self._calls, []
        groups: dict[tuple[object, ...], list[_Call]] = {}
        times: dict[tuple[str, int], int] = {}  # a module may run twice in a pass
        for call in calls:
            which = (call.path, id(call.seen))
            times[which] = times.get(which, 0) + 1
            key = (id(call.seen), call.chosen.shape[1], call.margin is None, call.chosen.device, times[which])
            groups.setdefault(key, []).append(call)
        half = torch.float32 if self.histogram else torch.float16
        buffers, self._buffers = self._buffers, {}
        for group in groups.values():
            margins = [call.margin for call in group if call.margin is not None]
            self._blocks.append(
                _Block(
                    tuple(call.path for call in group),
                    group[0].seen,
                    torch.stack([call.chosen for call in group]).to(torch.int16),
                    torch.stack([call.weights for call in group]).to(half),
                    torch.stack(margins) if margins else None,
                )
            )
        for buffer in buffers.values():
            n, paths = len(buffer.paths), tuple(buffer.paths)
            chosen, weights = buffer.chosen[:n].to(torch.int16), buffer.weights[:n].to(half)
            self._blocks.append(_Block(paths, buffer.seen, chosen, weights, None))
            self._pending += chosen.numel()

    def flush(self) -> None:
        """Sums up what is pending."""
        self._pack()
        blocks, self._blocks, self._pending = self._blocks, [], 0
        chains: dict[object, list[_Block]] = {}
        owner: dict[str, object] = {}
        for block in blocks:
            kind = block.kind
            if any(
                owner.get(path, kind) != kind for path in block.paths
            ):  # keeps every module's tokens in order
                self._take(chains)
                chains, owner = {}, {}
            chains.setdefault(kind, []).append(block)
            owner.update(dict.fromkeys(block.paths, kind))
        self._take(chains)
        self.trace.arrange(self._members)
        while not self.histogram and self.trace.bytes > self.max_bytes:
            self.trace.thin(self.trace.share / 2)

    def _take(self, chains: dict[object, list[_Block]]) -> None:
        known: dict[tuple[int, ...], tuple[Tokens, Tensor | None]] = {}
        for chain in chains.values():
            paths, key = chain[0].paths, tuple(id(block.seen) for block in chain)
            if key not in known:
                known[key] = self._tokens([block.seen for block in chain])
            tokens, keep = known[key]
            chosen = torch.cat([block.chosen for block in chain], dim=1).cpu()
            weights = torch.cat([block.weights for block in chain], dim=1).cpu()
            scored = [block.margins for block in chain if block.margins is not None]
            margins = torch.cat(scored, dim=1).cpu() if scored else None
            if keep is not None:
                chosen, weights = chosen[:, keep], weights[:, keep]
                margins = None if margins is None else margins[:, keep]
            experts = self._owners(paths, chosen)
            self.trace.take(paths, tokens, experts, weights, margins, sums_only=self.histogram)

    def _owners(self, paths: tuple[str, ...], chosen: Tensor) -> Tensor:
        """Candidates → indices of the pool's experts, −1 for none: int16 [M, N, k]."""
        members = [self._members[path] for path in paths]
        width = max(map(len, members)) + 1
        table = torch.full((len(paths), width), -1, dtype=torch.int16)
        for row, of_module in zip(table, members, strict=True):
            row[: len(of_module)] = torch.tensor(of_module, dtype=torch.int16)
        index = torch.where(chosen < 0, width - 1, chosen.long())
        return table[:, None].expand(-1, chosen.shape[1], -1).gather(2, index)

    def _tokens(self, passes: list[_Pass]) -> tuple[Tokens, Tensor | None]:
        """The tokens of these passes that are kept, and which of all they are (None: all)."""
        seen = [self._seen(one) for one in passes]
        tokens = joined([one for one, _ in seen])
        keep = torch.cat([real for _, real in seen]) & (tokens.draws < self.trace.share)
        return (tokens, None) if bool(keep.all()) else (tokens[keep], keep)

    def _seen(self, one: _Pass) -> tuple[Tokens, Tensor]:
        """All tokens of a pass, worked out once, and which are real."""
        if one.whole is not None and one.picked is not None:
            tokens, real = self._seen(one.whole)
            return tokens[one.picked], real[one.picked]
        if one.tokens is None or one.real is None:
            aligned = one.sequences.aligned(one.rows, one.length, one.kept)
            rows = torch.arange(one.rows)[:, None].expand(-1, one.length).reshape(-1)
            one.real = aligned.real.reshape(-1).cpu()
            if one.rejected:
                accepted = (
                    torch.arange(one.sequences.positions.shape[1])
                    < one.sequences.positions.shape[1] - one.rejected
                )
                one.real = one.real & (accepted if one.kept is None else accepted[one.kept]).repeat(one.rows)
            one.tokens = Tokens(
                rows,
                aligned.positions.reshape(-1).cpu().long(),
                one.first_input + rows // max(one.rows_per_input, 1),
                torch.full_like(rows, -1) if aligned.ids is None else aligned.ids.reshape(-1).cpu().long(),
                torch.full_like(one.real, one.generated),
                torch.rand(len(rows), generator=self._random, dtype=torch.float32),
            )
        return one.tokens, one.real


def _last(x: Tensor, context: RoutingContext) -> Tensor:
    """x [rows·length, …] without the tokens that are seen again."""
    return x.unflatten(0, (context.rows, -1))[:, context.again :].flatten(0, 1)


def _margins(scores: Tensor, chosen: Tensor) -> Tensor:
    """The lowest chosen score minus the highest of the others: float16 [N]; NaN where nothing is chosen or nothing is left."""
    none, n = chosen < 0, scores.shape[0]
    worst = scores.gather(1, chosen.clamp(min=0)).masked_fill(none, torch.inf).amin(1)
    taken = torch.zeros(n, scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    rest = scores.masked_fill(taken.scatter_(1, chosen + 1, True)[:, 1:], -torch.inf).amax(1)
    margin = worst - rest
    return torch.where(margin.isfinite(), margin.clamp(max=65504), torch.nan).to(torch.float16)

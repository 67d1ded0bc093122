"""What runs inside a traced model and takes in every module's choices.

It must cost little. While a pass runs, nothing is looked at, moved between devices or waited for. The CPU's kernel
writes its choices where the recorder says (`buffer`); every other call hands its choice over (`record`) and goes on.
When the next pass begins, the choices of all modules are packed as int16 and half precision. Every FLUSH choices,
between two passes and at the end, what is pending is brought to the CPU in large pieces: padding is left out,
candidates become indices of the pool's experts, and either choices or only sums are kept.

Nobody tells a hook that a new pass begins, or that it is one of new inputs. Both are read off the `Sequences` of a
call: every pass has an object of its own (`Recorder._pass`), and `InputCounter` knows which passes go on with the
same inputs.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.models.base.module_names import ModuleLocation
from phatgoose.models.context.runs import length_of
from phatgoose.models.context.streams import Streams
from phatgoose.models.trace.choices import Tokens, joined
from phatgoose.models.trace.passes import Block, Call, ChoiceBuffer, PendingChoices, TracedPass
from phatgoose.models.trace.result import Trace
from phatgoose.routers.context import RoutingContext, Sequences

FLUSH = 2**19
"""Pending choices (tokens × modules × top-k) at which they are summed up: a few MB, and what one pass chose."""


class InputCounter:
    """Numbers the inputs of a trace: which passes read new ones, and which go on with those of the pass before."""

    def __init__(self, encoder_decoder: bool):
        self.encoder_decoder = encoder_decoder
        self.before = 0
        """Inputs before those that are being read."""
        self.current = 0
        """Inputs that are being read."""
        # Prompts, int64 [rows, T] or None, and how many rows generate() will read each of them in.
        self.expanded: tuple[Tensor | None, int] | None = None
        # The encoder's states that the decoder read last.
        self._encoded: weakref.ref[Tensor] | None = None
        # An encoder has read the inputs, and no decoder yet.
        self._awaits_decoder = False
        # The decoder began these inputs, since no module of the encoder is routed.
        self._led_by_decoder = False

    def begin_pass(self, location: ModuleLocation, sequences: Sequences) -> None:
        """A stack runs over new tokens; `location` is that of the first module that saw them."""
        # A decoder alone: what stands behind a cache continues, what doesn't is new.
        new = sequences.past == 0
        if self.encoder_decoder and location.reads == "decoder":
            # The encoder's pass has counted these inputs, if any of its modules is routed. If none is, the decoder
            # counts them: it reads the very same encoded states in every pass over the same inputs, with a cache and
            # without.
            now, before = ((x and x()) for x in (sequences.encoded, self._encoded))
            new = new and not self._awaits_decoder and (now is None or now is not before)
            self._led_by_decoder, self._awaits_decoder = self._led_by_decoder or new, False
            self._encoded = sequences.encoded
        elif self.encoder_decoder:
            # Every pass of an encoder is of new inputs. But keys and values of cross-attention read the encoder's
            # tokens while the decoder runs: if it has begun these inputs, they mustn't be counted twice.
            new = not (location.part == "cross-attention" and self._led_by_decoder)
            self._awaits_decoder, self._led_by_decoder = new, not new
        rows = sequences.positions.shape[0]
        # Rows that aren't a multiple of the inputs' can't continue them, whatever the cache says.
        if new or self.current == 0 or rows % self.current:
            self.before, self.current = self.before + self.current, rows // self._rows_per_input(sequences)
            self.expanded = None

    def _rows_per_input(self, sequences: Sequences) -> int:
        """More than 1 if a pass reads the expanded prompts: generate() may have ended before it read them."""
        if self.expanded is None:
            return 1
        (ids, times), read = self.expanded, sequences.ids
        if read is None or ids is None:
            return times if sequences.positions.shape[0] % times == 0 else 1
        begins = read.shape[0] == ids.shape[0] and read.shape[1] <= ids.shape[1]
        return times if begins and torch.equal(ids[:, : read.shape[1]], read) else 1


class Recorder:
    """Fills a Trace; a `Site` calls it for every call of its module."""

    def __init__(self, trace: Trace, *, margins: bool, sample: float, max_bytes: int):
        self.trace, self.max_bytes = trace, max_bytes
        self.wants_scores = margins and not trace.sums_only
        self.trace.share = sample
        self.inputs = InputCounter(trace.encoder_decoder)
        self._pending = PendingChoices(torch.float32 if trace.sums_only else torch.float16)
        self._members: dict[str, tuple[int, ...]] = {}
        self._passes: dict[tuple[str, int, int, tuple[int, ...] | None], TracedPass] = {}
        # Of the modules that ran, whose tokens they read.
        self._streams: dict[str, str] = {}
        self._random = torch.Generator().manual_seed(0)
        # The thread whose passes are recorded.
        self._thread: threading.Thread | None = None

    def record(
        self,
        context: RoutingContext,
        members: tuple[int, ...],
        chosen: Tensor,
        weights: Tensor,
        scores: Tensor | None,
    ) -> None:
        """Takes in one module's choices among its candidates: int64 [N, k] and weights [N, k]; scores [N, candidates]
        or None.

        They are kept until the pass is over, so nobody may write into them.

        Raises:
            RoutingError: it can't be told which tokens these are, or another thread runs the model as well.
        """
        # Cached tokens that the module sees again were counted when it saw them first.
        if context.again:
            chosen, weights = (_new_tokens(x, context) for x in (chosen, weights))
            scores = None if scores is None else _new_tokens(scores, context)
            context = context.new()
        margin = None if scores is None else _margins(scores.detach(), chosen)
        # This may be the first call of a new pass. Then the calls of the last pass are packed before this one is added.
        seen = self._pass(context)
        self._members[context.path] = members
        weights = weights.detach() if weights.requires_grad else weights
        self._pending.add(Call(context.path, seen, chosen, weights, margin))

    def buffer(
        self, top_k: int, path: str, members: tuple[int, ...], u: Tensor, shape: torch.Size, streams: Streams
    ) -> ChoiceBuffer | None:
        """Where a kernel is to write the choices of the module at `path`; None if not all of its tokens are counted.

        top_k: how many experts each token gets. u: the module's input. shape: of its output, [..., d].
        """
        self._members[path] = members
        stream, whole = streams.whole_pass(path, u, shape)
        kind = stream, top_k
        buffer = self._pending.buffers.get(kind)
        # This is asked at every module and token, so the usual case is told without a RoutingContext: the pass is the
        # one that the buffer is for, and the module sees all of its tokens, as it did before.
        if (
            buffer is None
            or buffer.seen.sequences is not whole
            or not buffer.fits(path, shape)
            or self._streams.get(path) != stream
        ):
            context = streams.context(path, u, shape)
            if context.again:
                return None
            seen = self._pass(context)
            if buffer is not None and (buffer.seen is not seen or not buffer.fits(path, shape)):
                # A module runs again in this pass, or sees other tokens, or the same ones in another shape.
                self._pending.pack()
            if (buffer := self._pending.buffers.get(kind)) is None:
                buffer = ChoiceBuffer(seen, shape[:-1], len(self.trace.locations), top_k)
                self._pending.buffers[kind] = buffer
        return buffer

    def _pass(self, context: RoutingContext) -> TracedPass:
        """The pass that a call belongs to, as the module sees it. Begins a new one if nobody has seen these tokens."""
        self._check_thread()
        context.check()
        assert context.sequences is not None
        if context.picked is not None:
            whole = self._pass(context.whole())
            return replace(whole, tokens=None, real=None, whole=whole, picked=context.picked.cpu())
        self._note_stream(context.path, context.stream)
        kept = None if context.kept is None else tuple(context.kept.tolist())
        key = (context.stream, context.rows, context.length, kept)
        known = self._passes.get(key)
        if known is None or known.sequences is not context.sequences:
            # Modules of one pass may see it in several shapes (beams, the last tokens only). They share its
            # `sequences`, so only an object that none of them has seen is a new pass.
            if not any(p.sequences is context.sequences for p in self._passes.values()):
                self._begin_pass(context.path, context.sequences)
            known = self._passes[key] = TracedPass(
                context.sequences, context.rows, context.length, context.kept,
                self.inputs.before, context.rows // max(self.inputs.current, 1),
                context.sequences.past > 0 and context.stream == "decoder",
            )  # fmt: skip
        return known

    def _begin_pass(self, path: str, sequences: Sequences) -> None:
        self._pending.pack()
        # Only between passes, so that all modules of a pass are summed up together.
        if self._pending.count >= FLUSH:
            self.flush()
        location = self.trace.locations[path]
        self._passes = {key: one for key, one in self._passes.items() if key[0] != location.reads}
        self.inputs.begin_pass(location, sequences)

    def _check_thread(self) -> None:
        """Refuses a second thread: passes that run at once can't be told apart by what is recorded of them."""
        now = threading.current_thread()
        if self._thread is not now:
            if self._thread is not None and self._thread.is_alive():
                raise RoutingError(
                    "a trace records the passes of one thread, and another one runs this model as well. Run it in "
                    "one thread while it is traced, or give each thread a copy of the model."
                )
            self._thread = now

    def _note_stream(self, path: str, stream: str) -> None:
        """Notes whose tokens a module turned out to read, which its name may not say."""
        if (known := self._streams.setdefault(path, stream)) != stream:
            raise RoutingError(
                f"{path} reads the encoder's tokens in one call and the decoder's in another, which a trace can't "
                "tell apart. Trace a pool whose experts leave it alone."
            )
        if known != self.trace.locations[path].reads:
            self.trace.move(path, stream)

    def expand(self, ids: Tensor | None, times: int) -> None:
        """generate() will read each input in `times` rows (beams, samples); ids: int64 [rows, T], its prompts."""
        self.inputs.expanded = ids, times

    def reject_drafts(self, cache: object) -> None:
        """Drafts of the last pass have been checked, and `cache` has been cropped to those that were accepted. Raises
        RoutingError if they have been handed out as choices already."""
        for (stream, *_), one in self._passes.items():
            if stream != "decoder" or (length := length_of(cache)) is None:
                continue
            # The cache has lost the rejected ones, which are the last tokens of the pass.
            one.rejected = one.sequences.past + one.sequences.positions.shape[1] - length
            if one.rejected and one.tokens is not None:
                raise RoutingError(
                    "a trace that is read while drafts are being checked counts those that are rejected: read it "
                    "when generate() is done."
                )

    def flush(self) -> None:
        """Sums up what is pending."""
        for chains in self._pending.take():
            self._sum_up(chains)
        self.trace.arrange(self._members)
        # Halving the share drops tokens that are kept now, and as many of those to come: the rest is a fair sample.
        while not self.trace.sums_only and self.trace.bytes > self.max_bytes:
            self.trace.thin(self.trace.share / 2)

    def _sum_up(self, chains: list[list[Block]]) -> None:
        known: dict[tuple[int, ...], tuple[Tokens, Tensor | None]] = {}
        for chain in chains:
            # Modules that read the same tokens share one `Tokens`, in memory and in files.
            paths, key = chain[0].paths, tuple(id(block.seen) for block in chain)
            if key not in known:
                seen = [block.seen.read(self._random) for block in chain]
                tokens = joined([one for one, _ in seen])
                kept = torch.cat([real for _, real in seen]) & (tokens.draws < self.trace.share)
                known[key] = (tokens, None) if bool(kept.all()) else (tokens[kept], kept)
            tokens, keep = known[key]
            chosen = torch.cat([block.chosen for block in chain], dim=1).cpu()
            weights = torch.cat([block.weights for block in chain], dim=1).cpu()
            scored = [block.margins for block in chain if block.margins is not None]
            margins = torch.cat(scored, dim=1).cpu() if scored else None
            if keep is not None:
                chosen, weights = chosen[:, keep], weights[:, keep]
                margins = None if margins is None else margins[:, keep]
            experts = self._experts_of(paths, chosen)
            self.trace.take(paths, tokens, experts, weights, margins)

    def _experts_of(self, paths: tuple[str, ...], chosen: Tensor) -> Tensor:
        """Candidates → indices of the pool's experts, −1 for none: int16 [M, N, k]."""
        members = [self._members[path] for path in paths]
        width = max(map(len, members)) + 1
        table = torch.full((len(paths), width), -1, dtype=torch.int16)
        for row, of_module in zip(table, members, strict=True):
            row[: len(of_module)] = torch.tensor(of_module, dtype=torch.int16)
        index = torch.where(chosen < 0, width - 1, chosen.long())
        return table[:, None].expand(-1, chosen.shape[1], -1).gather(2, index)


def _new_tokens(x: Tensor, context: RoutingContext) -> Tensor:
    """x [rows·length, …] without the tokens that are seen again."""
    return x.unflatten(0, (context.rows, -1))[:, context.again :].flatten(0, 1)


def _margins(scores: Tensor, chosen: Tensor) -> Tensor:
    """The lowest chosen score minus the highest of the others: float16 [N]; NaN if either is missing."""
    none, n = chosen < 0, scores.shape[0]
    worst = scores.gather(1, chosen.clamp(min=0)).masked_fill(none, torch.inf).amin(1)
    taken = torch.zeros(n, scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    rest = scores.masked_fill(taken.scatter_(1, chosen + 1, True)[:, 1:], -torch.inf).amax(1)
    margin = worst - rest
    return torch.where(margin.isfinite(), margin.clamp(max=65504), torch.nan).to(torch.float16)

"""Record which experts act on which tokens, at every routed module."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.models.attach.attach import routing_of
from phatgoose.models.base.base import Base
from phatgoose.models.base.module_names import ModuleLocation, locate_modules
from phatgoose.models.context.caches import cache_of
from phatgoose.models.trace.choices import Choices, Load, load_of, loads_of, merged
from phatgoose.models.trace.recorder import TOKEN_FIELDS, Recorder, Tokens
from phatgoose.registry import unknown

if TYPE_CHECKING:
    from pandas import DataFrame

MAX_BYTES = 2**29
__all__ = ["Choices", "Load", "ModuleLocation", "Tokens", "Trace", "trace"]


@dataclass(eq=False)
class Trace:
    """Everything recorded. While recording goes on, `choices` and `loads` hold what came so far."""

    experts: tuple[str, ...]
    locations: dict[str, ModuleLocation] = field(default_factory=dict)
    """Every routed module, in the pool's order."""
    encoder_decoder: bool = False
    share: float = 1.0
    """Share of the tokens that were kept; below 1 they are a random sample, the same tokens at all modules."""
    sums_only: bool = False
    """Recorded with histogram=True: `loads` is there, `choices` is empty."""
    reordered: bool = False
    """Beam search moved sequences to other rows: `rows` then follow no sequence (`inputs` do: an input's beams share its number)."""
    _choices: dict[str, list[Choices]] = field(default_factory=dict, repr=False)
    _loads: dict[str, Load] = field(default_factory=dict, repr=False)
    _flush: Callable[[], None] = field(default=lambda: None, repr=False)

    @property
    def places(self) -> dict[str, ModuleLocation]:
        """The former name of `locations`."""
        warnings.warn("Trace.places is now Trace.locations.", DeprecationWarning, stacklevel=2)
        return self.locations

    @property
    def choices(self) -> list[Choices]:
        """One entry a module, in the order in which they first ran; its tokens in the order they were read."""
        self._flush()
        whole: dict[tuple[int, ...], Tokens] = {}  # modules that read the same tokens go on sharing them
        for path, parts in self._choices.items():
            if len(parts) > 1:
                key = tuple(id(part.tokens) for part in parts)
                one = merged(parts, whole.get(key))
                whole[key], self._choices[path] = one.tokens, [one]
        return [parts[0] for parts in self._choices.values()]

    def drain(self) -> list[Choices]:
        """`choices` since the last call of this. They are let go of here, so that a long run can be followed in little memory."""
        found, self._choices = self.choices, {}
        return found

    def __getitem__(self, path: str) -> Choices:
        """The choices of one module.

        Raises:
            UnknownName: nothing was recorded there.
        """
        found = {c.path: c for c in self.choices}
        if path not in found:
            raise unknown("traced module", path, found)
        return found[path]

    @property
    def loads(self) -> dict[str, Load]:
        """Sums of every module that ran."""
        self._flush()
        if self.sums_only:
            return self._loads
        return {c.path: load_of(c, len(self.experts)) for c in self.choices}

    @property
    def bytes(self) -> int:
        """Memory of the recorded choices; tokens that modules share count once."""
        parts = [part for members in self._choices.values() for part in members]
        tensors = [t for p in parts for t in (p.experts, p.weights, p.margins) if t is not None]
        tokens = {id(p.tokens): p.tokens for p in parts}.values()
        tensors += [getattr(one, name) for one in tokens for name in TOKEN_FIELDS]
        return sum(t.numel() * t.element_size() for t in tensors)

    def shares(self) -> dict[str, Tensor]:
        """Share of the routing weight each expert got, per module: float64 [experts] summing to at most 1."""
        return {p: load.weight.sum(0)[:-1] / load.tokens.sum().clamp(min=1) for p, load in self.loads.items()}

    def take(
        self,
        paths: Sequence[str],
        tokens: Tokens,
        experts: Tensor,
        weights: Tensor,
        margins: Tensor | None,
        *,
        sums_only: bool,
    ) -> None:
        """Adds choices of M modules on the same tokens ([M, N, k], margins [M, N]), or with `sums_only` what they add up to."""
        if sums_only:
            for path, load in zip(paths, loads_of(tokens, experts, weights, len(self.experts)), strict=True):
                self._loads[path] = self._loads[path] + load if path in self._loads else load
            return
        for i, path in enumerate(paths):
            margin = None if margins is None else margins[i]
            self._choices.setdefault(path, []).append(Choices(path, experts[i], weights[i], tokens, margin))

    def move(self, path: str, stream: str) -> None:
        """Says that the module at `path` reads the tokens of `stream`: another than its name says, so its block is cross-attention."""
        self.locations[path] = replace(self.locations[path], reads=stream)
        block = path.rpartition(".")[0]
        for other, place in self.locations.items():
            if stream == "encoder" and other.rpartition(".")[0] == block:
                self.locations[other] = replace(place, part="cross-attention")

    def arrange(self, order: Iterable[str]) -> None:
        """Puts modules into this order."""
        order = list(order)
        self._choices = {path: self._choices[path] for path in order if path in self._choices}
        self._loads = {path: self._loads[path] for path in order if path in self._loads}

    def thin(self, share: float) -> None:
        """Keeps only this share of all tokens read, drawn at random; what is read later is thinned as well."""
        self.share = share
        kept: dict[int, tuple[Tokens, Tensor]] = {}
        for path, parts in self._choices.items():
            for part in parts:
                if id(part.tokens) not in kept:
                    keep = part.tokens.draws < share
                    kept[id(part.tokens)] = part.tokens[keep], keep
            self._choices[path] = [
                replace(part[kept[id(part.tokens)][1]], tokens=kept[id(part.tokens)][0]) for part in parts
            ]

    def filter(
        self,
        *,
        experts: Collection[str] | None = None,
        modules: Collection[str] | None = None,
        layers: Collection[int] | None = None,
        kinds: Collection[str] | None = None,
        parts: Collection[str] | None = None,
        rows: Collection[int] | None = None,
        inputs: Collection[int] | None = None,
        ids: Collection[int] | None = None,
        generated: bool | None = None,
    ) -> Trace:
        """Only the decisions that fit everything given; modules that are left without any go.

        Args:
            experts: names; a decision fits if one of them was among the chosen.
            modules: paths. layers, kinds, parts: of `places`, e.g. 3, "mlp.up_proj", "cross-attention".
            rows, inputs, ids: of the tokens. generated: True: only tokens read behind a cache, False: only the others.

        Raises:
            UnknownName: an expert, module, kind or part that isn't in the trace. RoutingError: the trace has sums only.
        """
        if self.sums_only:
            raise RoutingError(
                "this trace holds sums, not single choices: record without histogram=True to filter it."
            )
        for word, asked, known in (
            ("expert", experts, self.experts),
            ("module", modules, tuple(self.locations)),
            ("kind of module", kinds, tuple(p.kind for p in self.locations.values())),
            ("part", parts, tuple(p.part for p in self.locations.values())),
        ):
            for name in asked or ():
                if name not in known:
                    raise unknown(word, name, dict.fromkeys(known))
        found: dict[str, list[Choices]] = {}
        kept: dict[int, tuple[Tensor, Tokens]] = {}
        for c in self.choices:
            place = self.locations[c.path]
            wanted = ((c.path, modules), (place.layer, layers), (place.kind, kinds), (place.part, parts))
            if any(only is not None and value not in only for value, only in wanted):
                continue
            if id(c.tokens) not in kept:
                keep = _fitting(c.tokens, rows, inputs, ids, generated)
                kept[id(c.tokens)] = keep, c.tokens[keep]
            keep, tokens = kept[id(c.tokens)]
            fits = replace(c[keep], tokens=tokens)
            if experts is not None:
                those = torch.tensor([self.experts.index(e) for e in experts], dtype=torch.int16)
                fits = fits[torch.isin(fits.experts, those).any(1)]
            if len(fits.tokens):
                found[c.path] = [fits]
        return replace(self, _choices=found, _flush=lambda: None)

    def save(self, path: Path | str) -> Path:
        """Writes one safetensors file, whole or not at all; `Trace.load` reads it."""
        from phatgoose.models.trace.files import save

        return save(self, Path(path))

    @staticmethod
    def load(path: Path | str) -> Trace:
        """Reads what `save` wrote, checked.

        Raises:
            RoutingError: it is no such file, damaged, or inconsistent; the message says where.
        """
        from phatgoose.models.trace.files import load

        return load(Path(path))

    def to_pandas(self) -> DataFrame:
        """A table with one row per token, module and choice (columns: see docs/tracing.md).

        Raises:
            RoutingError: pandas isn't installed, or the trace has sums only.
        """
        from phatgoose.models.trace.files import to_pandas

        return to_pandas(self)


def _fitting(
    tokens: Tokens,
    rows: Collection[int] | None,
    inputs: Collection[int] | None,
    ids: Collection[int] | None,
    generated: bool | None,
) -> Tensor:
    keep = torch.ones(len(tokens), dtype=torch.bool)
    for values, asked in ((tokens.rows, rows), (tokens.inputs, inputs), (tokens.ids, ids)):
        if asked is not None:
            keep &= torch.isin(values, torch.tensor(sorted(asked), dtype=torch.int64))
    return keep if generated is None else keep & (tokens.generated == generated)


@contextlib.contextmanager
def trace(
    model: Base | PreTrainedModel,
    *,
    histogram: bool = False,
    margins: bool = True,
    sample: float = 1.0,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Trace]:
    """Records the routing of every call of `model` inside the with block. Outside of one, tracing costs nothing.

    Args:
        histogram: keep only sums per module and expert (`Trace.loads`): memory doesn't grow, and it costs least.
        margins: also record how far the last chosen expert was ahead of the next; computes every module's scores once more.
        sample: share of the tokens to keep, drawn at random.
        max_bytes: memory for choices, beside a few MB of what is pending and what one pass chose. When it is full, every second token is let go and
            `Trace.share` is halved, as often as needed: what is left is a random sample of the whole run.

    Raises:
        RoutingError: if no routing is attached, a trace is already running, or an argument is out of its range.
    """
    routing = routing_of(model)
    if routing is None:
        raise RoutingError("there is nothing to trace: attach routing first, with route(model, pool).")
    if routing.recorder is not None:
        raise RoutingError("a trace of this model is already running.")
    if not 0 < sample <= 1:
        raise RoutingError(f"sample is {sample!r}, expected a share above 0 and at most 1.")
    if max_bytes < 2**20:
        raise RoutingError(f"max_bytes is {max_bytes!r}, expected at least {2**20} (1 MiB).")
    paths = [site.path for site in routing.sites]
    where = locate_modules(paths, [routing.streams.stream_of(path) for path in paths])
    recorded = Trace(routing.pool.names, where, "encoder" in routing.streams.stacks, sums_only=histogram)
    recorder = Recorder(recorded, histogram=histogram, margins=margins, sample=sample, max_bytes=max_bytes)
    recorded._flush = recorder.flush
    routing.record(recorder)
    try:
        with _generate_watched(routing.model, recorder):
            yield recorded
    finally:
        routing.record(None)
        recorder.flush()
        recorded._flush = lambda: None


@contextlib.contextmanager
def _generate_watched(model: Any, recorder: Recorder) -> Iterator[None]:
    """Notes how many rows generate() gives each input; when it moves sequences to other rows of its cache, for which it asks the
    model's `_reorder_cache`, if there is one; and how many drafted tokens it took back (assisted decoding, prompt lookup)."""
    own = getattr(model, "_reorder_cache", None)
    expand = getattr(model, "_expand_inputs_for_generation", None)
    update = getattr(model, "_update_model_kwargs_for_generation", None)
    drafting = getattr(model, "_get_candidate_generator", None)

    def expanded(*args: Any, **kwargs: Any) -> Any:
        assert expand is not None
        found = expand(*args, **kwargs)
        if (times := kwargs.get("expand_size", 1)) > 1:
            recorder.expanded(found[0], times)
        return found

    def reorder(kept: Any, beams: Tensor) -> Any:
        if not torch.equal(beams.cpu(), torch.arange(len(beams))):
            recorder.trace.reordered = True
        if own is not None:
            return own(kept, beams)
        kept.reorder_cache(beams)
        return kept

    def updated(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        assert update is not None
        if "num_new_tokens" in kwargs:  # drafts were checked, and the cache was cropped to what was accepted
            recorder.take_back(cache_of(outputs))
        return update(outputs, *args, **kwargs)

    def drafts(generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        assert drafting is not None
        if generation_config.assistant_early_exit is not None:
            raise RoutingError(
                "with assistant_early_exit the model's first layers also read drafts, which a trace can't tell from the text: "
                "leave it out, or use another model as the assistant."
            )
        return drafting(generation_config, *args, **kwargs)

    watched = {
        "_reorder_cache": reorder,
        "_expand_inputs_for_generation": expand and expanded,
        "_update_model_kwargs_for_generation": update and updated,
        "_get_candidate_generator": drafting and drafts,
    }
    watched = {name: function for name, function in watched.items() if function is not None}
    model.__dict__.update(watched)
    try:
        yield
    finally:
        for name in watched:
            del model.__dict__[name]

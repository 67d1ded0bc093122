"""`Trace`: which experts acted on which tokens, at every routed module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.models.base.module_names import ModuleLocation
from phatgoose.models.trace import files
from phatgoose.models.trace.choices import TOKEN_FIELDS, Choices, Load, Tokens, load_of, loads_of, merged
from phatgoose.registry import unknown

if TYPE_CHECKING:
    from pandas import DataFrame


class Selection(TypedDict, total=False):
    """What `Trace.filter` keeps. A condition that isn't given, or is None, always holds."""

    experts: Collection[str] | None
    """Names: a decision fits if one of them was among the chosen."""
    modules: Collection[str] | None
    """Paths."""
    layers: Collection[int] | None
    kinds: Collection[str] | None
    """As `locations` has them, e.g. "mlp.up_proj"."""
    parts: Collection[str] | None
    """As `locations` has them, e.g. "cross-attention"."""
    rows: Collection[int] | None
    inputs: Collection[int] | None
    ids: Collection[int] | None
    generated: bool | None
    """True: only tokens that were read behind a cache. False: only the others."""


_PLACES = {"modules": "path", "layers": "layer", "kinds": "kind", "parts": "part"}
"""What a condition compares of a module's location."""


@dataclass(eq=False)
class Trace(files.Header):
    """What was recorded. During a recording, `choices` and `loads` hold what came so far."""

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
        """One entry per module, in the order in which they first ran, with its tokens in the order they were read."""
        self._flush()
        whole: dict[tuple[int, ...], Tokens] = {}  # modules that read the same tokens go on sharing them
        for path, parts in self._choices.items():
            if len(parts) > 1:
                key = tuple(id(part.tokens) for part in parts)
                one = merged(parts, whole.get(key))
                whole[key], self._choices[path] = one.tokens, [one]
        return [parts[0] for parts in self._choices.values()]

    def drain(self) -> list[Choices]:
        """The choices since the last `drain`, removed from the trace: a long run can be followed in little memory."""
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
        return sum(t.nbytes for t in tensors)

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
    ) -> None:
        """Adds choices of M modules on the same tokens ([M, N, k], margins [M, N]), or only their sums."""
        if self.sums_only:
            for path, load in zip(paths, loads_of(tokens, experts, weights, len(self.experts)), strict=True):
                self._loads[path] = self._loads[path] + load if path in self._loads else load
            return
        for i, path in enumerate(paths):
            margin = None if margins is None else margins[i]
            self._choices.setdefault(path, []).append(Choices(path, experts[i], weights[i], tokens, margin))

    def move(self, path: str, stream: str) -> None:
        """Corrects whose tokens a module reads. Its name said otherwise, so its block is cross-attention."""
        self.locations[path] = replace(self.locations[path], reads=stream)
        block = path.rpartition(".")[0]
        for other, place in self.locations.items():
            if stream == "encoder" and other.rpartition(".")[0] == block:
                self.locations[other] = replace(place, part="cross-attention")

    def arrange(self, order: Iterable[str]) -> None:
        """Sorts modules in this order."""
        order = list(order)
        self._choices = {path: self._choices[path] for path in order if path in self._choices}
        self._loads = {path: self._loads[path] for path in order if path in self._loads}

    def thin(self, share: float) -> None:
        """Keeps only this share of all tokens, drawn at random, and of those that are read later."""
        self.share = share
        narrow = _narrowing(lambda tokens: tokens.draws < share)
        self._choices = {path: [narrow(part) for part in parts] for path, parts in self._choices.items()}

    def filter(self, **only: Unpack[Selection]) -> Trace:
        """Only the decisions that fit everything given (see `Selection`); modules that are left without any go.

        Raises:
            UnknownName: an expert, module, kind or part that isn't in the trace. RoutingError: the trace has sums only.
        """
        self._check_has_choices("to filter it")
        if extra := only.keys() - Selection.__annotations__.keys():
            raise TypeError(f"filter() got an unexpected keyword argument {min(extra)!r}.")
        wanted: dict[str, Any] = {name: given for name, given in only.items() if given is not None}
        self._check_names(wanted)
        places = {_PLACES[name]: wanted[name] for name in wanted.keys() & _PLACES.keys()}
        experts = torch.tensor([self.experts.index(e) for e in wanted.get("experts", ())], dtype=torch.int16)
        narrow = _narrowing(partial(_selected_tokens, wanted))
        found: dict[str, list[Choices]] = {}
        for c in self.choices:
            location = self.locations[c.path]
            if not all(getattr(location, place) in names for place, names in places.items()):
                continue
            rest = narrow(c)
            if "experts" in wanted:
                rest = rest[torch.isin(rest.experts, experts).any(1)]
            if len(rest.tokens):
                found[c.path] = [rest]
        return replace(self, _choices=found, _flush=lambda: None)

    def _check_names(self, wanted: Mapping[str, Any]) -> None:
        places = self.locations.values()
        for name, word, known in (
            ("experts", "expert", self.experts),
            ("modules", "module", tuple(self.locations)),
            ("kinds", "kind of module", tuple(place.kind for place in places)),
            ("parts", "part", tuple(place.part for place in places)),
        ):
            for one in wanted.get(name, ()):
                if one not in known:
                    raise unknown(word, one, known)

    def _check_has_choices(self, purpose: str) -> None:
        if self.sums_only:
            raise RoutingError(
                f"this trace holds sums, not single choices: record without histogram=True {purpose}."
            )

    def save(self, path: Path | str) -> Path:
        """Writes one safetensors file, whole or not at all; `Trace.load` reads it."""
        return files.save(Path(path), self, self.choices, self.loads if self.sums_only else {})

    @staticmethod
    def load(path: Path | str) -> Trace:
        """Reads what `save` wrote, checked.

        Raises:
            RoutingError: it is no such file, damaged, or inconsistent; the message says where.
        """
        header, choices, loads = files.load(Path(path))
        return Trace(**vars(header), _choices={c.path: [c] for c in choices}, _loads=loads)

    def to_pandas(self) -> DataFrame:
        """A table with one row per token, module and choice (columns: see docs/tracing.md).

        Raises:
            RoutingError: pandas isn't installed, or the trace has sums only.
        """
        self._check_has_choices("for a table")
        return files.to_pandas(self.choices, self.locations, self.experts)


def _narrowing(keeps: Callable[[Tokens], Tensor]) -> Callable[[Choices], Choices]:
    """Choices → those on the tokens that `keeps` says. Modules that read the same tokens go on sharing them."""
    kept: dict[int, tuple[Tensor, Tokens]] = {}

    def narrow(c: Choices) -> Choices:
        if id(c.tokens) not in kept:
            keep = keeps(c.tokens)
            kept[id(c.tokens)] = keep, c.tokens[keep]
        keep, tokens = kept[id(c.tokens)]
        return replace(c[keep], tokens=tokens)

    return narrow


def _selected_tokens(wanted: Mapping[str, Any], tokens: Tokens) -> Tensor:
    keep = torch.ones(len(tokens), dtype=torch.bool)
    for name in wanted.keys() & {"rows", "inputs", "ids"}:
        values = torch.tensor(sorted(wanted[name]), dtype=torch.int64)
        keep &= torch.isin(getattr(tokens, name), values)
    return keep & (tokens.generated == wanted["generated"]) if "generated" in wanted else keep

"""Experts of a packed pool: their low-rank rows and gates stand in the pool's file of stacks.

Nothing is read before it is used, and nothing is copied: an expert's tensors are views of the file. `opening` makes them from a
pool's manifest, `packing` writes the file; docs/experts-and-pools.md has the format.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from phatgoose.errors import PoolError
from phatgoose.experts.adapters.peft import to_contents
from phatgoose.experts.data_signature import DataSignature
from phatgoose.experts.expert import Expert
from phatgoose.experts.files.safetensors_header import Header
from phatgoose.experts.gates import checked_gates
from phatgoose.experts.names import CONFIG_FILE, GATES_FILE, HEADERS, PEFT_WEIGHTS, REST_FILE, check_name
from phatgoose.experts.packed.layout import Layout, Pair
from phatgoose.experts.packed.stack_file import StackFile, bytes_of
from phatgoose.files import write_bytes
from phatgoose.ops.update import Update

T = TypeVar("T")


def gate_stack(path: str) -> str:
    """The stack of a module's gates."""
    return f"{path}.gate"


@dataclass(frozen=True, eq=False)
class Source:
    """Where one expert of a packed pool stands."""

    file: StackFile
    folder: Path
    """Its own folder: config, record, headers, and what stands in no stack."""
    config: Mapping[str, Any]
    layout: Layout
    starts: Sequence[int]
    """The first row of each of its pairs."""
    gates: Header | None
    """What gates.safetensors had in it."""
    gate_index: Mapping[str, int]
    """Module path → number of its gate; gates that aren't here stand in the rest."""
    gate_rows: Sequence[int]
    """The row of each gate in its stack."""
    hashes: Mapping[str, str]
    """sha256 of every file of the expert as it was before packing."""
    drop: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        state = {
            key: value for key, value in vars(self).items() if key not in ("_rest", "_last")
        }  # an open file
        return {**state, "folder": self.folder.absolute()}

    def rows(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """A [r, d_in] and B transposed [r, d_out], as they stand in the stacks."""
        start, stacks = self.starts[pair.index], self.file.stacks
        return stacks[pair.down].narrow(0, start, pair.rank), stacks[pair.up].narrow(0, start, pair.rank)

    def tensor(self, key: str) -> Tensor:
        """A tensor of the adapter, under PEFT's key."""
        if (spot := self.layout.spots.get(key)) is None:
            return self._rest.get_tensor(f"{PEFT_WEIGHTS}/{key}")
        a, b = self.rows(spot[0])
        return b.T if spot[1] else a

    def raw_gate(self, path: str) -> Tensor:
        """A gate as gates.safetensors had it, of whatever dtype."""
        if (index := self.gate_index.get(path)) is None:
            return self._rest.get_tensor(f"{GATES_FILE}/{path}")
        return self.file.stacks[gate_stack(path)][self.gate_rows[index]]

    def gate(self, path: str) -> Tensor:
        return self.raw_gate(path).to(torch.float32)

    def base_copy(self, name: str) -> Tensor:
        return self.tensor(self.layout.copies[name])

    def update(self, path: str) -> Update:
        """What the expert does at a module."""
        template, pair = self.layout.updates[path], self.layout.pairs.get(path)
        if pair is not None and template.is_low_rank:
            a, b = self.rows(pair)
            return Update(a, b.T, template.scale)
        keys = self.layout.keys[path]
        last = self.__dict__.get(
            "_last"
        )  # the layers of a mixture's experts share their tensors, and are asked for in turn
        if last is None or last[0] != keys:
            tensors = {key: self.tensor(key) for key in keys}
            config = {**self.config, "modules_to_save": None}  # they were checked with the whole adapter
            last = keys, to_contents(config, tensors, str(self.folder), self.drop).updates
            self.__dict__["_last"] = last
        return last[1][path]

    @cached_property
    def _rest(self) -> Any:
        with self._there():
            return safe_open(self.folder / REST_FILE, framework="pt")

    @contextlib.contextmanager
    def _there(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as cause:
            raise PoolError(
                f"{self.folder} was unpacked or removed since this pool was opened: load it again."
            ) from cause

    def original(self, name: str) -> Iterator[memoryview]:
        """The bytes of adapter_model.safetensors or gates.safetensors as they were, in pieces."""
        with self._there():
            head = (self.folder / HEADERS[name]).read_bytes()
        yield memoryview(head)
        header = self.layout.header if name == PEFT_WEIGHTS else self.gates
        get = self.tensor if name == PEFT_WEIGHTS else self.raw_gate
        assert header is not None
        for key, _ in header.in_order():
            yield bytes_of(get(key))

    def check(self, name: str, digest: str) -> None:
        """Refuses bytes of `original(name)` with another sha256 than the pool's manifest records."""
        if digest != self.hashes[name]:
            raise PoolError(
                f"{self.file.path}: the rows of {self.folder.name} are damaged or were changed: its {name} had sha256 "
                f"{self.hashes[name]}, and has {digest} now."
            )

    def write(self, name: str, folder: Path) -> None:
        """Writes adapter_model.safetensors or gates.safetensors as it was, to the byte."""
        data = b"".join(self.original(name))
        self.check(name, hashlib.sha256(data).hexdigest())
        write_bytes(folder / name, data)

    def __deepcopy__(self, memo: object) -> Source:
        return self


class Views(Mapping[str, T]):
    """Tensors or updates of an expert in a packed pool, each made when it is asked for."""

    def __init__(self, source: Source, names: Collection[str], get: Callable[[str], T]):
        self.source, self._names, self._get = source, names, get

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class PackedExpert(Expert):
    """An expert of a packed pool: config, records and headers were checked; the values are, by `pool verify`.

    Made by `packed_expert`; what is derived from it (`with_gates`, `renamed`) shares its file.
    """

    @property
    def source(self) -> Source:
        assert isinstance(self.tensors, Views)
        return self.tensors.source

    def __post_init__(self) -> None:
        check_name(self.name)
        source = self.source
        object.__setattr__(self, "updates", Views(source, source.layout.updates, source.update))
        object.__setattr__(self, "base_copies", Views(source, source.layout.copies, source.base_copy))
        if self.gates is not None and not isinstance(self.gates, Views):
            object.__setattr__(self, "gates", checked_gates(self.gates, self.updates, self._where()))
        if self.signature is not None:
            self.signature.fits(source.layout.updates, self._where())

    @property
    def sizes(self) -> Mapping[str, tuple[int, int, bool]]:
        return self.source.layout.sizes

    def _write_adapter(self, work: Path) -> None:
        write_bytes(work / CONFIG_FILE, (self.source.folder / CONFIG_FILE).read_bytes())
        self.source.write(PEFT_WEIGHTS, work)

    def _write_gates(self, target: Path, metadata: dict[str, str]) -> None:
        header = self.source.gates
        if isinstance(self.gates, Views) and header is not None and dict(header.metadata) == metadata:
            self.source.write(GATES_FILE, target.parent)
        else:
            super()._write_gates(target, metadata)


def packed_expert(
    name: str, source: Source, provenance: Mapping[str, Any], signature: DataSignature | None = None
) -> PackedExpert:
    gates = None if source.gates is None else Views(source, source.gates.items, source.gate)
    tensors = Views(source, source.layout.header.items, source.tensor)
    return PackedExpert(name, source.config, tensors, gates, provenance, source.folder, signature=signature)


@dataclass(frozen=True, eq=False)
class Rows:
    """The low-rank rows of several experts at one module, in one place: A [R, d_in], B transposed [R, d_out], and the first row
    of each expert. Rows that none of them owns lie between."""

    A: Tensor
    B: Tensor
    starts: tuple[int, ...]
    file_bytes: int
    """The size of the file that they stand in, with all other modules'."""


def rows_in_place(experts: Sequence[Expert], path: str, dtype: torch.dtype) -> tuple[Rows | None, str]:
    """The rows of these experts, who all adapt this module, as they stand in a packed pool's file; or None and why they must be
    copied together: some are elsewhere, or in another dtype than `dtype`, or DoRA's, which the base's weight changes.

    The reason is "" where there are no rows at all.
    """
    starts, end = [], 0
    found: Pair | None = None
    file: StackFile | None = None
    for expert in experts:
        if not isinstance(expert, PackedExpert):
            if expert.updates[path].rank:
                moved = isinstance(expert.tensors, Views)  # packed, but placed on a model in another form
                why = "names this module otherwise, or is VeRA" if moved else "is not packed"
                return None, f"expert {expert.name!r} {why}"
            starts.append(0)
            continue
        source = expert.source
        template, pair = source.layout.updates[path], source.layout.pairs.get(path)
        if template.rank == 0:
            starts.append(0)
            continue
        if template.magnitude is not None:
            return None, f"expert {expert.name!r} is a DoRA, whose rows depend on the base's weight"
        if pair is None:
            two = template.A.dtype != template.B.dtype
            why = (
                "has A and B of two dtypes"
                if two
                else "has A and B that are computed from what its file holds"
            )
            return None, f"expert {expert.name!r} {why}"
        if pair.dtype != dtype:
            return None, f"expert {expert.name!r} is packed in {pair.dtype}, and {dtype} is wanted"
        if file is not None and source.file is not file:
            return None, f"expert {expert.name!r} is of another packed pool"
        file, found = source.file, pair
        starts.append(source.starts[pair.index])
        end = max(end, starts[-1] + pair.rank)
    if file is None or found is None:
        return None, ""
    return Rows(file.stacks[found.down][:end], file.stacks[found.up][:end], tuple(starts), file.bytes), ""

"""Experts of a packed pool: their rows and gates are views of the pool's file of stacks.

Nothing is read before it is used, and nothing is copied. `open.py` makes them from a pool's manifest, `pack.py`
writes the file; docs/experts-and-pools.md has the format.
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
from phatgoose.experts.expert import Expert
from phatgoose.experts.files.safetensors_file import Header, bytes_of
from phatgoose.experts.gates import checked_gates
from phatgoose.experts.names import CONFIG_FILE, GATES_FILE, HEADERS, PEFT_WEIGHTS, REST_FILE, check_name
from phatgoose.experts.packed.layout import Layout, Pair
from phatgoose.experts.packed.stack_file import StackFile
from phatgoose.files import write_bytes
from phatgoose.ops.update import Update

T = TypeVar("T")


def gate_stack(path: str) -> str:
    """The stack of a module's gates."""
    return f"{path}.gate"


@dataclass(frozen=True, eq=False)
class PackedSource:
    """The files of one expert in a packed pool, and where its tensors are in them."""

    file: StackFile
    folder: Path
    """Its own folder: config, record, headers, and the rest."""
    config: Mapping[str, Any]
    layout: Layout
    starts: Sequence[int]
    """The first row of each of its pairs."""
    gates: Header | None
    """The header that gates.safetensors had."""
    gate_index: Mapping[str, int]
    """Module path → number of its gate; gates that aren't here are in the rest."""
    gate_rows: Sequence[int]
    """The row of each gate in its stack."""
    hashes: Mapping[str, str]
    """sha256 of every file of the expert as it was before packing."""
    drop: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # Without the open file and what was read last.
        state = {key: value for key, value in vars(self).items() if key not in ("_rest", "_last")}
        return {**state, "folder": self.folder.absolute()}

    def rows(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """A [r, d_in] and B transposed [r, d_out], as views of the stacks."""
        start, stacks = self.starts[pair.index], self.file.stacks
        return stacks[pair.down].narrow(0, start, pair.rank), stacks[pair.up].narrow(0, start, pair.rank)

    def tensor(self, key: str) -> Tensor:
        """A tensor of the adapter, under PEFT's key."""
        if key not in self.layout.stacked:
            return self._from_rest(f"{PEFT_WEIGHTS}/{key}")
        pair, is_b = self.layout.stacked[key]
        a, b = self.rows(pair)
        return b.T if is_b else a

    def raw_gate(self, path: str) -> Tensor:
        """A gate as gates.safetensors had it, of whatever dtype."""
        if (index := self.gate_index.get(path)) is None:
            return self._from_rest(f"{GATES_FILE}/{path}")
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
        # The layers of a mixture's experts share their tensors, and are asked for in turn: the last ones are kept.
        keys = self.layout.keys[path]
        last = self.__dict__.get("_last")
        if last is None or last[0] != keys:
            tensors = {key: self.tensor(key) for key in keys}
            config = {**self.config, "modules_to_save": None}  # these were checked with the whole adapter
            last = keys, to_contents(config, tensors, str(self.folder), self.drop).updates
            self.__dict__["_last"] = last
        return last[1][path]

    def _from_rest(self, name: str) -> Tensor:
        found: Tensor = self._rest.get_tensor(name)
        return found

    @cached_property
    def _rest(self) -> Any:
        with self._missing_files():
            return safe_open(self.folder / REST_FILE, framework="pt")

    @contextlib.contextmanager
    def _missing_files(self) -> Iterator[None]:
        """Turns a missing file into an error that says why it may be missing."""
        try:
            yield
        except FileNotFoundError as cause:
            raise PoolError(
                f"{self.folder} was unpacked or removed since this pool was opened: load it again."
            ) from cause

    def original(self, name: str) -> Iterator[memoryview]:
        """The bytes that adapter_model.safetensors or gates.safetensors (`name`) had before packing, in pieces."""
        with self._missing_files():
            head = (self.folder / HEADERS[name]).read_bytes()
        yield memoryview(head)
        header = self.layout.header if name == PEFT_WEIGHTS else self.gates
        get = self.tensor if name == PEFT_WEIGHTS else self.raw_gate
        assert header is not None
        for key, _ in header.in_order():
            yield bytes_of(get(key))

    def check(self, name: str, digest: str) -> None:
        """Refuses a sha256 of `original(name)` that isn't the one in the pool's manifest."""
        if digest != self.hashes[name]:
            raise PoolError(
                f"{self.file.path}: the rows of {self.folder.name} are damaged or were changed: its {name} had sha256 "
                f"{self.hashes[name]}, and has {digest} now."
            )

    def write(self, name: str, folder: Path) -> None:
        """Writes adapter_model.safetensors or gates.safetensors as it was before packing, to the byte."""
        data = b"".join(self.original(name))
        self.check(name, hashlib.sha256(data).hexdigest())
        write_bytes(folder / name, data)

    def __deepcopy__(self, memo: object) -> PackedSource:
        return self


class LazyTensors(Mapping[str, T]):
    """Tensors or updates of a packed expert by name; each is made when it is looked up."""

    def __init__(self, source: PackedSource, names: Collection[str], get: Callable[[str], T]):
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
    """An expert of a packed pool. Config, records and headers were checked; the values only are by `pool verify`.

    `PackedPoolReader` makes it; experts that are derived from it (`with_gates`, `renamed`) share its file.
    """

    @property
    def source(self) -> PackedSource:
        assert isinstance(self.tensors, LazyTensors)
        return self.tensors.source

    def __post_init__(self) -> None:
        check_name(self.name)
        source = self.source
        object.__setattr__(self, "updates", LazyTensors(source, source.layout.updates, source.update))
        object.__setattr__(self, "base_copies", LazyTensors(source, source.layout.copies, source.base_copy))
        if self.gates is not None and not isinstance(self.gates, LazyTensors):
            object.__setattr__(self, "gates", checked_gates(self.gates, self.sizes, self._where()))
        if self.signature is not None:
            self.signature.check_fits(self.sizes, self._where())

    @property
    def sizes(self) -> Mapping[str, tuple[int, int, bool]]:
        return self.source.layout.sizes

    def _write_adapter(self, work: Path) -> None:
        write_bytes(work / CONFIG_FILE, (self.source.folder / CONFIG_FILE).read_bytes())
        self.source.write(PEFT_WEIGHTS, work)

    def _write_gates(self, target: Path, metadata: dict[str, str]) -> None:
        header = self.source.gates
        if isinstance(self.gates, LazyTensors) and header is not None and dict(header.metadata) == metadata:
            self.source.write(GATES_FILE, target.parent)
        else:
            super()._write_gates(target, metadata)


@dataclass(frozen=True, eq=False)
class PackedRows:
    """The rows of several experts at one module, as views of the file. Others' rows may be between them."""

    A: Tensor
    """[R, d_in]"""
    B: Tensor
    """Transposed: [R, d_out]."""
    starts: tuple[int, ...]
    """The first row of each expert."""
    file_bytes: int
    """The size of the whole file, with all other modules."""


def rows_in_place(experts: Sequence[Expert], path: str, dtype: torch.dtype) -> tuple[PackedRows | None, str]:
    """The rows at one module as views of a packed pool's file, or None and why the rows must be copied together.

    They must be if some are elsewhere, in another dtype than `dtype`, or DoRA's, which the base's weight changes.
    The reason is "" where there are no rows at all.

    Args:
        experts: all of them adapt this module.
    """
    starts, end = [], 0
    file: StackFile | None = None
    pair: Pair | None = None
    for expert in experts:
        found = _rows_of(expert, path, dtype)
        if isinstance(found, str):
            return None, f"expert {expert.name!r} {found}"
        if found is None:
            starts.append(0)
            continue
        source, pair = found
        if file is not None and source.file is not file:
            return None, f"expert {expert.name!r} is of another packed pool"
        file = source.file
        starts.append(source.starts[pair.index])
        end = max(end, starts[-1] + pair.rank)
    if file is None or pair is None:
        return None, ""
    stacks = file.stacks
    return PackedRows(stacks[pair.down][:end], stacks[pair.up][:end], tuple(starts), file.bytes), ""


def _rows_of(expert: Expert, path: str, dtype: torch.dtype) -> tuple[PackedSource, Pair] | str | None:
    """Where an expert's rows at a module are in a packed file; why they can't be used there; None if it has no rows."""
    if not isinstance(expert, PackedExpert):
        if not expert.updates[path].rank:
            return None
        is_renamed = isinstance(expert.tensors, LazyTensors)  # packed, but under a model's own names
        return "names this module otherwise, or is VeRA" if is_renamed else "is not packed"
    template, pair = expert.source.layout.updates[path], expert.source.layout.pairs.get(path)
    if template.rank == 0:
        return None
    if template.magnitude is not None:
        return "is a DoRA, whose rows depend on the base's weight"
    if pair is None and template.A.dtype != template.B.dtype:
        return "has A and B of two dtypes"
    if pair is None:
        return "has A and B that are computed from what its file holds"
    if pair.dtype != dtype:
        return f"is packed in {pair.dtype}, and {dtype} is wanted"
    return expert.source, pair

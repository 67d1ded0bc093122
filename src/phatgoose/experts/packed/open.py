"""Open a packed pool: every header, shape and row number is checked, and no tensor is read."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from phatgoose.errors import PoolError, brief
from phatgoose.experts.adapters.peft_rules import check_drop
from phatgoose.experts.data_signature import StoredSignature
from phatgoose.experts.files.safe_folder import SafeFolder
from phatgoose.experts.files.safetensors_file import Header, Item, parse_header, read_header
from phatgoose.experts.folder import RECORD_LIMIT_BYTES, parse_record
from phatgoose.experts.gates import FORMAT, check_made_for, check_vectors
from phatgoose.experts.names import (
    CONFIG_FILE,
    GATES_FILE,
    HEADERS,
    PEFT_WEIGHTS,
    RECORD_FILE,
    REST_FILE,
    SIGNATURE_FILE,
)
from phatgoose.experts.packed.expert import LazyTensors, PackedExpert, PackedSource, gate_stack
from phatgoose.experts.packed.layout import Layout, layout_of
from phatgoose.experts.packed.stack_file import StackFile

STACKS_FILE = re.compile(r"packed/stacks-[0-9]{1,9}\.safetensors")
SMALL_BYTES = 64 * 2**20
"""The largest config, record or header that is read."""


class _GateLayout(NamedTuple):
    """What the gates of experts with one layout have in common."""

    numbers: dict[str, int]
    """Module path → number of its gate among those in stacks."""
    last: list[int]
    """The last row that each of these may have."""
    rest: dict[str, Item]
    """The gates that are in no stack, by their names in the rest."""


class PackedPoolReader:
    """Makes experts of a packed pool's folder.

    Experts of one config and one header share their layout, so that opening hundreds takes no longer than reading their
    small files.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], *, verify: bool = True):
        self.folder, self.verify, self._where = folder, verify, f"{folder / 'pool.json'}: packed"
        index = manifest.get("packed")
        if not isinstance(index, dict) or not isinstance(index.get("used"), dict):
            raise PoolError(f"{self._where} lacks its file or the rows in use.")
        if not isinstance(index.get("file"), str) or not STACKS_FILE.fullmatch(index["file"]):
            raise PoolError(
                f"{self._where}: the file is {brief(index.get('file'))}, expected packed/stacks-N.safetensors."
            )
        path = folder / index["file"]
        if os.path.lexists(path) and not path.resolve().is_relative_to(folder.resolve()):
            raise PoolError(f"{path} is a link that leads out of the pool's folder; it is not followed.")
        self.file = StackFile(path)
        self.used: dict[str, int] = {}
        for name, rows in index["used"].items():
            if type(rows) is not int or not 0 <= rows <= self.file.capacity(name):
                raise PoolError(
                    f"{self._where}: {brief(rows)} rows of {brief(name)} are in use, of {self.file.capacity(name)}."
                )
            self.used[name] = rows
        self._headers: dict[bytes, Header] = {}
        self._layouts: dict[Any, tuple[Mapping[str, Any], Layout, list[int]]] = {}
        self._gate_layouts: dict[Any, _GateLayout] = {}

    def expert(self, folder: SafeFolder, entry: Mapping[str, Any]) -> PackedExpert:
        """The expert of one of the manifest's entries, with its folder."""
        packed = entry["packed"]
        if not isinstance(packed, dict) or not isinstance(packed.get("files"), dict):
            raise PoolError(f"{self._where}: expert {entry['name']!r} lacks its rows or its files' hashes.")
        hashes = {**entry["files"], **packed["files"]}
        provenance = self._record(folder, hashes).get("provenance", {})
        drop = check_drop(provenance.get("dropped", ()))
        rest = folder.read_header(REST_FILE)[1] if REST_FILE in hashes else None
        where = f"{self._where}: expert {entry['name']!r}"
        config, layout, last = self._layout(folder, hashes, rest, drop)
        starts = expand_runs(packed.get("rows"), last, f"{where}: rows")
        gates, found = self._gates(folder, hashes, layout, rest)
        gate_rows = expand_runs(packed.get("gates", []), found.last, f"{where}: gates")
        _check_rest(folder.path, {**layout.rest, **found.rest} if found.rest else layout.rest, rest)
        source = PackedSource(
            self.file,
            folder.path,
            config,
            layout,
            starts,
            gates,
            found.numbers,
            gate_rows,
            dict(entry["files"]),
            drop,
        )
        signature = None
        if SIGNATURE_FILE in hashes:
            path = folder.path / SIGNATURE_FILE
            header = read_header(path)[1]
            signature = StoredSignature(path, header, hashes[SIGNATURE_FILE], hashes.get(PEFT_WEIGHTS, ""))
        tensors = LazyTensors(source, layout.header.items, source.tensor)
        vectors = None if gates is None else LazyTensors(source, gates.items, source.gate)
        return PackedExpert(
            entry["name"], config, tensors, vectors, provenance, folder.path, signature=signature
        )

    def _layout(
        self, folder: SafeFolder, hashes: Mapping[str, str], rest: Header | None, drop: tuple[str, ...]
    ) -> tuple[Mapping[str, Any], Layout, list[int]]:
        """The config, the layout, and the last row at which each of its pairs may begin."""
        raw_config = self._read(folder, CONFIG_FILE, hashes)
        raw = self._read(folder, HEADERS[PEFT_WEIGHTS], hashes)
        unstacked = _unstacked(rest, PEFT_WEIGHTS)
        # Everything a layout depends on: hundreds of experts that were trained alike share one key.
        key = (raw_config, raw, unstacked, drop)
        if key not in self._layouts:
            config = SafeFolder(folder.path).parse_object(CONFIG_FILE, raw_config)
            header = parse_header(raw, str(folder.path / HEADERS[PEFT_WEIGHTS]), known=self._headers)
            layout = layout_of(config, header, unstacked, str(folder.path), drop)
            # The manifest's row numbers are a stranger's too: with these bounds none leads out of the rows in use.
            last = []
            for pair in layout.pairs.values():
                last.append(self._last_row(pair.down, pair.widths[0], pair.dtype, pair.rank))
                self._last_row(pair.up, pair.widths[1], pair.dtype, 0)
                if self.file.capacity(pair.up) != self.file.capacity(pair.down):
                    raise PoolError(f"{self.file.path}: {pair.up!r} and {pair.down!r} differ in rows.")
            self._layouts[key] = config, layout, last
        return self._layouts[key]

    def _gates(
        self, folder: SafeFolder, hashes: Mapping[str, str], layout: Layout, rest: Header | None
    ) -> tuple[Header | None, _GateLayout]:
        """The header that gates.safetensors had, and where its gates are."""
        if GATES_FILE not in hashes:
            return None, _GateLayout({}, [], {})
        path = folder.path / HEADERS[GATES_FILE]
        header = parse_header(self._read(folder, HEADERS[GATES_FILE], hashes), str(path), known=self._headers)
        check_made_for(FORMAT, header.metadata, folder.path / GATES_FILE, hashes.get(PEFT_WEIGHTS, ""))
        unstacked = _unstacked(rest, GATES_FILE)
        key = (id(header.items), id(layout), unstacked)
        if key not in self._gate_layouts:
            shapes = {name: item.shape for name, item in header.items.items()}
            check_vectors(shapes, layout.sizes, "gate", str(path))
            stacked = sorted(name for name in header.items if name not in unstacked)
            last = [
                self._last_row(gate_stack(n), header.items[n].shape[0], torch.float32, 1) for n in stacked
            ]
            beside = {f"{GATES_FILE}/{n}": item for n, item in header.items.items() if n in unstacked}
            self._gate_layouts[key] = _GateLayout({n: i for i, n in enumerate(stacked)}, last, beside)
        return header, self._gate_layouts[key]

    def _last_row(self, name: str, width: int, dtype: torch.dtype, rows: int) -> int:
        """The last row at which `rows` rows in use of a stack may begin; refuses a stack of another width or dtype."""
        stack = self.file.stacks.get(name)
        if stack is None or stack.shape[1] != width or stack.dtype != dtype:
            raise PoolError(
                f"{self.file.path}: expected a stack {name!r}, {width} wide in {dtype}; found "
                f"{'none' if stack is None else f'one {stack.shape[1]} wide in {stack.dtype}'}."
            )
        return self.used.get(name, 0) - rows

    def _record(self, folder: SafeFolder, hashes: Mapping[str, str]) -> dict[str, Any]:
        """expert.json, or {} if none is listed; its hashes must be those of the files that were packed."""
        data = self._read(folder, RECORD_FILE, hashes, RECORD_LIMIT_BYTES) if RECORD_FILE in hashes else b""
        if not data:
            return {}
        own = SafeFolder(folder.path)
        own.file(RECORD_FILE)  # refuses a link to another expert's record, which a pool's folder may hold
        record = parse_record(own, data)
        for key, name in _RECORDED.items():
            if key in record and record[key] != hashes.get(name):
                raise PoolError(
                    f"{folder.path / RECORD_FILE}: {key} is {brief(record[key])}, and the pool's manifest has "
                    f"{brief(hashes.get(name))}."
                )
        return record

    def _read(
        self, folder: SafeFolder, name: str, hashes: Mapping[str, str], limit: int = SMALL_BYTES
    ) -> bytes:
        """A small file, compared with its sha256 unless the caller asked not to verify."""
        if name not in hashes:
            raise PoolError(f"{folder.path}: the pool's manifest lists no {name}.")
        return folder.read_bytes(name, limit, hashes[name] if self.verify else None)


_RECORDED = {"adapter_sha256": PEFT_WEIGHTS, "gates_sha256": GATES_FILE, "signature_sha256": SIGNATURE_FILE}
"""Fields of expert.json with the sha256 of files beside it."""


def expand_runs(runs: Any, last: Sequence[int], where: str) -> list[int]:
    """Row numbers from their run lengths, [[row, n], …] → n times row, …: one for each of `last`."""
    found: list[int] = []
    listed: list[Any] = runs if isinstance(runs, list) else [runs]
    for run in listed:
        fits = isinstance(run, list) and len(run) == 2 and all(type(n) is int and n >= 0 for n in run)
        if not fits or len(found) + run[1] > len(last):
            raise PoolError(f"{where} are {brief(runs)}, expected [[row, times], …] for {len(last)} stacks.")
        found += [run[0]] * run[1]
    if len(found) != len(last):
        raise PoolError(f"{where} are {len(found)}, expected {len(last)}.")
    for row, most in zip(found, last, strict=True):
        if row > most:
            raise PoolError(f"{where} begin at {row}, where the last possible row in use is {most}.")
    return found


def to_runs(rows: list[int]) -> list[list[int]]:
    """The reverse of `expand_runs`."""
    return [[row, len(list(same))] for row, same in itertools.groupby(rows)]


def _unstacked(rest: Header | None, name: str) -> frozenset[str]:
    """The keys of adapter_model.safetensors or gates.safetensors (`name`) that are in the rest, not in a stack."""
    keys = rest.items if rest is not None else ()
    return frozenset(k.removeprefix(f"{name}/") for k in keys if k.startswith(f"{name}/"))


def _check_rest(place: Path, expected: Mapping[str, Item], rest: Header | None) -> None:
    """Refuses a rest that doesn't hold just the tensors that are in no stack, with their dtypes and shapes."""
    found = {} if rest is None else rest.items
    for key in expected.keys() | found.keys():
        one, other = expected.get(key), found.get(key)
        if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
            raise PoolError(f"{place / REST_FILE}: {key} is {other}, expected {one}.")

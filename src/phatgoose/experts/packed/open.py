"""Opening a packed pool: from its manifest to experts, with every header, shape and row checked and no value read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from phatgoose.errors import ExpertError, PoolError, brief
from phatgoose.experts.adapters.peft_rules import check_drop
from phatgoose.experts.data_signature import StoredSignature
from phatgoose.experts.files.safetensors_header import Header, Item, parse_header, read_header
from phatgoose.experts.folder import read_record
from phatgoose.experts.gates import check_gates_metadata
from phatgoose.experts.names import (
    CONFIG_FILE,
    GATES_FILE,
    HEADERS,
    PEFT_WEIGHTS,
    RECORD_FILE,
    REST_FILE,
    SIGNATURE_FILE,
)
from phatgoose.experts.packed.expert import PackedExpert, Source, gate_stack, packed_expert
from phatgoose.experts.packed.layout import Layout, layout_of
from phatgoose.experts.packed.stack_file import StackFile
from phatgoose.files import open_regular
from phatgoose.ops.update import sizes_agree
from phatgoose.strict_json import parse_json

STACKS_FILE = re.compile(r"packed/stacks-[0-9]{1,9}\.safetensors")
SMALL_BYTES = 64 * 2**20
"""What a file that is read whole has at most: a config, a record, a header."""


class PackedFolder:
    """A packed pool's folder. Experts that look alike share one layout, so that opening hundreds takes no longer than reading
    their small files.

    Raises:
        PoolError: the manifest's index, or the file of stacks, is not what it should be.
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
        self._gate_layouts: dict[Any, tuple[dict[str, int], list[int], dict[str, Item]]] = {}

    def expert(self, place: Path, entry: Mapping[str, Any]) -> PackedExpert:
        """The expert of one of the manifest's entries, whose folder is `place`.

        Raises:
            PoolError, ExpertError: naming the file, what was expected and what was found.
        """
        spots = entry["packed"]
        if not isinstance(spots, dict) or not isinstance(spots.get("files"), dict):
            raise PoolError(f"{self._where}: expert {entry['name']!r} lacks its rows or its files' hashes.")
        files = {**entry["files"], **spots["files"]}
        record = _record(place, files, self._small(place, RECORD_FILE, files))
        provenance = record.get("provenance", {})
        drop = check_drop(provenance.get("dropped", ()))
        rest = read_header(place / REST_FILE, PoolError)[1] if REST_FILE in files else None
        config, layout, last = self._layout(place, files, rest, drop)
        name = f"{self._where}: expert {entry['name']!r}"
        starts = expand(spots.get("rows"), last, f"{name}: rows")
        gates, gate_index, gate_last, gates_apart = self._gates(place, files, layout, rest)
        gate_rows = expand(spots.get("gates", []), gate_last, f"{name}: gates")
        _check_rest(place, {**layout.apart, **gates_apart} if gates_apart else layout.apart, rest)
        source = Source(
            self.file, place, config, layout, starts, gates, gate_index, gate_rows, dict(entry["files"]), drop
        )
        signature = None
        if SIGNATURE_FILE in files:
            path = place / SIGNATURE_FILE
            header = read_header(path)[1]
            signature = StoredSignature(path, header, files.get(PEFT_WEIGHTS, ""), files[SIGNATURE_FILE])
        return packed_expert(entry["name"], source, provenance, signature)

    def _layout(
        self, place: Path, files: Mapping[str, str], rest: Header | None, drop: tuple[str, ...]
    ) -> tuple[Mapping[str, Any], Layout, list[int]]:
        """The config, the layout, and the last row at which each of its pairs may begin."""
        raw_config = self._small(place, CONFIG_FILE, files)
        raw = self._small(place, HEADERS[PEFT_WEIGHTS], files)
        apart = _of_file(rest, PEFT_WEIGHTS)
        key = (raw_config, raw, apart, drop)
        if key not in self._layouts:
            try:
                config = parse_json(raw_config)
            except (ValueError, RecursionError) as cause:
                raise ExpertError(f"{place / CONFIG_FILE} is not readable as JSON: {cause}") from cause
            if not isinstance(config, dict):
                raise ExpertError(f"{place / CONFIG_FILE} holds {type(config).__name__}, expected an object.")
            header = parse_header(raw, str(place / HEADERS[PEFT_WEIGHTS]), known=self._headers)
            layout = layout_of(config, header, apart, str(place), drop)
            last = []
            for pair in layout.pairs.values():
                last.append(self._last_row(pair.down, pair.widths[0], pair.dtype, pair.rank))
                self._last_row(pair.up, pair.widths[1], pair.dtype, 0)
                if self.file.capacity(pair.up) != self.file.capacity(pair.down):
                    raise PoolError(f"{self.file.path}: {pair.up!r} and {pair.down!r} differ in rows.")
            self._layouts[key] = config, layout, last
        return self._layouts[key]

    def _gates(
        self, place: Path, files: Mapping[str, str], layout: Layout, rest: Header | None
    ) -> tuple[Header | None, dict[str, int], list[int], dict[str, Item]]:
        """The gates' header; of those in stacks, path → number and the last row each may have; and those apart."""
        if GATES_FILE not in files:
            return None, {}, [], {}
        path = place / HEADERS[GATES_FILE]
        header = parse_header(self._small(place, HEADERS[GATES_FILE], files), str(path), known=self._headers)
        check_gates_metadata(header.metadata, place / GATES_FILE, files.get(PEFT_WEIGHTS, ""))
        apart = _of_file(rest, GATES_FILE)
        key = (id(header.items), id(layout), apart)
        if key not in self._gate_layouts:
            check_gate_shapes(path, header, layout)
            stacked = sorted(name for name in header.items if name not in apart)
            last = [
                self._last_row(gate_stack(n), header.items[n].shape[0], torch.float32, 1) for n in stacked
            ]
            beside = {f"{GATES_FILE}/{n}": item for n, item in header.items.items() if n in apart}
            self._gate_layouts[key] = {n: i for i, n in enumerate(stacked)}, last, beside
        return header, *self._gate_layouts[key]

    def _last_row(self, name: str, width: int, dtype: torch.dtype, rows: int) -> int:
        """The last row of a stack at which `rows` rows in use may begin, once it is there in this width and dtype."""
        stack = self.file.stacks.get(name)
        if stack is None or stack.shape[1] != width or stack.dtype != dtype:
            raise PoolError(
                f"{self.file.path}: expected a stack {name!r}, {width} wide in {dtype}; found "
                f"{'none' if stack is None else f'one {stack.shape[1]} wide in {stack.dtype}'}."
            )
        return self.used.get(name, 0) - rows

    def _small(self, place: Path, name: str, files: Mapping[str, str]) -> bytes:
        """A file that is read whole; b"" if none is listed. Its sha256 is compared unless the caller said not to."""
        if name not in files:
            if name in (RECORD_FILE, GATES_FILE):
                return b""
            raise PoolError(f"{place}: the pool's manifest lists no {name}.")
        with open_regular(place / name, PoolError) as (file, size):
            if size > SMALL_BYTES:
                raise PoolError(
                    f"{place / name} is {size} bytes; a file of its kind has at most {SMALL_BYTES}."
                )
            data = file.read(SMALL_BYTES)
        if self.verify and (found := hashlib.sha256(data).hexdigest()) != files[name]:
            raise PoolError(
                f"{place / name} is damaged or was changed: expected sha256 {files[name]}, found {found}."
            )
        return data


def expand(runs: Any, last: Sequence[int], where: str) -> list[int]:
    """[[row, n], …] → n times row, …: a row number for each of `last`, and none beyond it."""
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


def runs(rows: list[int]) -> list[list[int]]:
    """The reverse of `expand`."""
    found: list[list[int]] = []
    for row in rows:
        if found and found[-1][0] == row:
            found[-1][1] += 1
        else:
            found.append([row, 1])
    return found


def _record(place: Path, files: Mapping[str, str], raw: bytes) -> dict[str, Any]:
    """expert.json, whose hashes must be those of the files that were packed."""
    if not raw:
        return {}
    record = read_record(place)
    written = (
        ("adapter_sha256", PEFT_WEIGHTS),
        ("gates_sha256", GATES_FILE),
        ("signature_sha256", SIGNATURE_FILE),
    )
    for key, name in written:
        if key in record and record[key] != files.get(name):
            raise PoolError(
                f"{place / RECORD_FILE}: {key} is {brief(record[key])}, and the pool's manifest has {brief(files.get(name))}."
            )
    return record


def _of_file(rest: Header | None, name: str) -> frozenset[str]:
    """The keys of adapter_model.safetensors or gates.safetensors that stand in the rest."""
    keys = rest.items if rest is not None else ()
    return frozenset(k.removeprefix(f"{name}/") for k in keys if k.startswith(f"{name}/"))


def check_gate_shapes(path: Path, header: Header, layout: Layout) -> None:
    """Refuses gates that aren't one vector for each adapted module, of its size."""
    if header.items.keys() != layout.sizes.keys():
        odd = sorted(header.items.keys() ^ layout.sizes.keys())[0]
        raise ExpertError(
            f"{path}: there must be a gate for every adapted module and none else; {odd} differs."
        )
    for name, item in header.items.items():
        d_in, d_out, embedding = layout.sizes[name]
        expected = d_out if embedding else d_in
        if len(item.shape) != 1 or not sizes_agree(item.shape[0], expected):
            raise ExpertError(f"{path}: gate of {name} has shape {list(item.shape)}, expected [{expected}].")


def _check_rest(place: Path, expected: Mapping[str, Item], rest: Header | None) -> None:
    """What stands in no stack stands in the rest, as it was; and nothing else does."""
    found = {} if rest is None else rest.items
    for key in expected.keys() | found.keys():
        one, other = expected.get(key), found.get(key)
        if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
            raise PoolError(f"{place / REST_FILE}: {key} is {other}, expected {one}.")

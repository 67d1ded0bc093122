"""Opening a packed pool: from its manifest to experts, with every header, shape and row checked and no value read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from phatgoose.errors import ExpertError, PoolError
from phatgoose.experts.expert import GATES_FILE, RECORD_FILE, check_gates_metadata, read_record
from phatgoose.experts.headers import Header, parse_header, read_header
from phatgoose.experts.layout import Layout, layout_of
from phatgoose.experts.packed import HEADERS, REST_FILE, PackedExpert, Source, gate_stack, packed_expert
from phatgoose.experts.peft import CONFIG_FILE, WEIGHTS_FILE
from phatgoose.experts.peft_rules import check_drop
from phatgoose.experts.stacks import StackFile
from phatgoose.experts.update import sizes_agree
from phatgoose.files import open_regular
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
                f"{self._where}: the file is {index.get('file')!r}, expected packed/stacks-N.safetensors."
            )
        path = folder / index["file"]
        if path.exists() and not path.resolve().is_relative_to(folder.resolve()):
            raise PoolError(f"{path} is a link that leads out of the pool's folder; it is not followed.")
        self.file = StackFile(path)
        self.used: dict[str, int] = {}
        for name, rows in index["used"].items():
            if type(rows) is not int or not 0 <= rows <= self.file.capacity(name):
                raise PoolError(
                    f"{self._where}: {rows!r} rows of {name!r} are in use, of {self.file.capacity(name)}."
                )
            self.used[name] = rows
        self._owned: dict[str, list[tuple[int, int]]] = {}
        self._headers: dict[bytes, Header] = {}
        self._layouts: dict[Any, tuple[Mapping[str, Any], Layout]] = {}
        self._gates_fit: set[tuple[int, int]] = set()

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
        drop = check_drop(record.get("provenance", {}).get("dropped", ()))
        rest = read_header(place / REST_FILE, PoolError)[1] if REST_FILE in files else None
        config, layout = self._layout(place, files, rest, drop)
        starts = expand(
            spots.get("rows"), len(layout.pairs), f"{self._where}: expert {entry['name']!r}: rows"
        )
        for start, pair in zip(starts, layout.pairs.values(), strict=True):
            self._claim(pair.down, start, pair.rank)
            for name, width in zip((pair.down, pair.up), pair.widths, strict=True):
                stack = self.file.stacks.get(name)
                if (
                    stack is None
                    or stack.shape[1] != width
                    or stack.dtype != pair.dtype
                    or start + pair.rank > len(stack)
                ):
                    raise PoolError(
                        f"{self.file.path}: {entry['name']!r} needs rows {start} to {start + pair.rank} of {name!r}, "
                        f"{width} wide in {pair.dtype}; found {'none' if stack is None else [*stack.shape]}."
                    )
        gates, gate_rows = self._gates(place, entry, files, layout, rest)
        _check_rest(place, layout, gates, gate_rows, rest)
        source = Source(
            self.file, place, config, layout, starts, gates, gate_rows, dict(entry["files"]), drop
        )
        return packed_expert(entry["name"], source, record.get("provenance", {}))

    def check_overlaps(self) -> None:
        """Refuses a pool in which two of the experts opened so far claim the same rows."""
        for name, owned in self._owned.items():
            owned.sort()
            for (start, rows), (following, _) in pairwise(owned):
                if start + rows > following:
                    raise PoolError(f"{self._where}: two experts claim row {following} of {name!r}.")

    def _layout(
        self, place: Path, files: Mapping[str, str], rest: Header | None, drop: tuple[str, ...]
    ) -> tuple[Mapping[str, Any], Layout]:
        raw_config = self._small(place, CONFIG_FILE, files)
        raw = self._small(place, HEADERS[WEIGHTS_FILE], files)
        apart = _of_file(rest, WEIGHTS_FILE)
        key = (raw_config, raw, apart, drop)
        if key not in self._layouts:
            try:
                config = parse_json(raw_config)
            except (ValueError, RecursionError) as cause:
                raise ExpertError(f"{place / CONFIG_FILE} is not readable as JSON: {cause}") from cause
            if not isinstance(config, dict):
                raise ExpertError(f"{place / CONFIG_FILE} holds {type(config).__name__}, expected an object.")
            header = parse_header(raw, str(place / HEADERS[WEIGHTS_FILE]), known=self._headers)
            self._layouts[key] = config, layout_of(config, header, apart, str(place), drop)
        return self._layouts[key]

    def _gates(
        self,
        place: Path,
        entry: Mapping[str, Any],
        files: Mapping[str, str],
        layout: Layout,
        rest: Header | None,
    ) -> tuple[Header | None, dict[str, int]]:
        if GATES_FILE not in files:
            return None, {}
        path = place / HEADERS[GATES_FILE]
        header = parse_header(self._small(place, HEADERS[GATES_FILE], files), str(path), known=self._headers)
        check_gates_metadata(header.metadata, place / GATES_FILE, files.get(WEIGHTS_FILE, ""))
        if (pair := (id(header.items), id(layout))) not in self._gates_fit:
            if header.items.keys() != layout.sizes.keys():
                odd = sorted(header.items.keys() ^ layout.sizes.keys())[0]
                raise ExpertError(
                    f"{path}: there must be a gate for every adapted module and none else; {odd} differs."
                )
            for name, item in header.items.items():
                d_in, d_out, embedding = layout.sizes[name]
                if len(item.shape) != 1 or not sizes_agree(item.shape[0], d_out if embedding else d_in):
                    raise ExpertError(
                        f"{path}: gate of {name} has shape {list(item.shape)}, expected [{d_out if embedding else d_in}]."
                    )
            self._gates_fit.add(pair)
        apart = _of_file(rest, GATES_FILE)
        stacked = sorted(name for name in header.items if name not in apart)
        rows = expand(
            entry["packed"].get("gates"), len(stacked), f"{self._where}: expert {entry['name']!r}: gates"
        )
        for name, row in zip(stacked, rows, strict=True):
            stack, item = self.file.stacks.get(gate_stack(name)), header.items[name]
            self._claim(gate_stack(name), row, 1)
            if (
                stack is None
                or stack.shape[1:] != item.shape
                or stack.dtype != item.dtype
                or row >= len(stack)
            ):
                raise PoolError(
                    f"{self.file.path}: {entry['name']!r} needs row {row} of {gate_stack(name)!r}, {item.shape[0]} wide in "
                    f"{item.dtype}; found {'none' if stack is None else [*stack.shape]}."
                )
        return header, dict(zip(stacked, rows, strict=True))

    def _claim(self, stack: str, start: int, rows: int) -> None:
        if start + rows > self.used.get(stack, 0):
            raise PoolError(
                f"{self._where}: rows {start} to {start + rows} of {stack!r} are claimed, and {self.used.get(stack, 0)} are in use."
            )
        self._owned.setdefault(stack, []).append((start, rows))

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


def expand(runs: Any, count: int, where: str) -> list[int]:
    """[[start, n], …] → n times start, …: `count` row numbers in all."""
    found: list[int] = []
    listed: list[Any] = runs if isinstance(runs, list) else [runs]
    for run in listed:
        fits = isinstance(run, list) and len(run) == 2 and all(type(n) is int and n >= 0 for n in run)
        if not fits or len(found) + run[1] > count:
            raise PoolError(f"{where} are {runs!r:.200}, expected [[row, times], …] for {count} stacks.")
        found += [run[0]] * run[1]
    if len(found) != count:
        raise PoolError(f"{where} are {len(found)}, expected {count}.")
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
    for key, name in (("adapter_sha256", WEIGHTS_FILE), ("gates_sha256", GATES_FILE)):
        if key in record and record[key] != files.get(name):
            raise PoolError(
                f"{place / RECORD_FILE}: {key} is {record[key]}, and the pool's manifest has {files.get(name)}."
            )
    return record


def _of_file(rest: Header | None, name: str) -> frozenset[str]:
    """The keys of adapter_model.safetensors or gates.safetensors that stand in the rest."""
    keys = rest.items if rest is not None else ()
    return frozenset(k.removeprefix(f"{name}/") for k in keys if k.startswith(f"{name}/"))


def _check_rest(
    place: Path, layout: Layout, gates: Header | None, gate_rows: Mapping[str, int], rest: Header | None
) -> None:
    """What stands in no stack stands in the rest, as it was; and nothing else does."""
    expected = {f"{WEIGHTS_FILE}/{k}": i for k, i in layout.header.items.items() if k not in layout.spots}
    if gates is not None:
        expected |= {f"{GATES_FILE}/{p}": i for p, i in gates.items.items() if p not in gate_rows}
    found = {} if rest is None else rest.items
    for key in expected.keys() | found.keys():
        one, other = expected.get(key), found.get(key)
        if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
            raise PoolError(f"{place / REST_FILE}: {key} is {other}, expected {one}.")

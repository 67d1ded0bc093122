"""Deterministic changes to a valid file: of its bytes, of its JSON, of its safetensors header."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib

import fuzz_json
from fuzz_json import Pairs, Raw

DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "U8", "BOOL", "F31", "C64", "f32"]
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_FLOATS = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e38, -1e38, 1e-45, 1.0]
_KEYS = [
    ".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight", ".ia3_l", ".lora_embedding_A", ".lora_embedding_B", ".base_layer.weight",
    ".weight", ".token_adapter.trainable_tokens_delta", "",
]  # fmt: skip


def mutated(rng: random.Random, name: str, raw: bytes, others: list[bytes]) -> bytes:
    """One to four changes to the file `name`; `others` are files to take pieces from."""
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 4])):
        if rng.random() < 0.25:
            raw = of_bytes(rng, raw, others)
        elif name.endswith((".safetensors", ".header")):
            raw = of_safetensors(rng, raw)
        elif name.endswith(".json"):
            raw = of_json(rng, raw)
        elif name.endswith((".pt", ".bin")):
            raw = of_zip(rng, raw)
        else:
            raw = of_bytes(rng, raw, others)
    return raw


def of_bytes(rng: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    if not raw:
        return rng.choice([b"", b"\x00" * 8, rng.choice(others)])
    kind, at = rng.randrange(9), rng.randrange(len(raw))
    length = min(rng.choice([1, 2, 4, 8, 16, 64, 512]), len(raw) - at)
    if kind == 0:
        return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]
    if kind == 1:
        return raw[:at] + rng.randbytes(length) + raw[at + length :]
    if kind == 2:
        return raw[:at]
    if kind == 3:
        return raw[:at] + raw[at + length :]
    if kind == 4:
        return raw[:at] + raw[at : at + length] * rng.choice([2, 3, 100]) + raw[at + length :]
    if kind == 5:
        other = rng.choice(others)
        cut = rng.randrange(len(other) + 1)
        return raw[:at] + other[cut : cut + rng.choice([8, 64, 10**6])] + raw[at + rng.choice([0, length]) :]
    if kind == 6:
        number = rng.choice([0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
        return raw[:at] + struct.pack("<Q", number) + raw[at + 8 :]
    if kind == 7:
        return fuzz_json.numbers_replaced(rng, raw)
    return raw + rng.randbytes(length)


def of_json(rng: random.Random, raw: bytes) -> bytes:
    try:
        return fuzz_json.written(fuzz_json.mutated(rng, fuzz_json.parsed(raw)))
    except (ValueError, RecursionError, MemoryError):  # it is no JSON any more
        return of_bytes(rng, raw, [raw])


def of_safetensors(rng: random.Random, raw: bytes) -> bytes:
    """A change to the header, its length, its tensors or both; half of them leave a file that is consistent."""
    try:
        return _of_safetensors(rng, raw)
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        RecursionError,
        struct.error,
    ):
        return of_bytes(rng, raw, [raw])  # an earlier change has left no header


def _of_safetensors(rng: random.Random, raw: bytes) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    header, data = fuzz_json.parsed(raw[8 : 8 + length]), raw[8 + length :]
    tensors = [
        i for i, (key, value) in enumerate(header) if key != "__metadata__" and isinstance(value, Pairs)
    ]
    kind = rng.randrange(9)
    if kind == 0 or not tensors:
        header = fuzz_json.mutated(rng, header)
    elif kind == 1:
        _field(rng, header, rng.choice(tensors))
    elif kind == 2:
        return (
            struct.pack(
                "<Q", rng.choice([0, 1, length - 1, length + 1, len(raw), 2**31, 2**40, 2**63, 2**64 - 1])
            )
            + raw[8:]
        )
    elif kind == 3:
        data = _values(rng, data)
    elif kind == 4:
        data = rng.choice([data[:-1], data + b"\x00", data[: len(data) // 2], data * 2, b""])
    elif kind == 5:
        _renamed(rng, header, rng.choice(tensors))
    else:
        header, data = _consistent(rng, header, data, tensors)
    text = fuzz_json.written(header)
    text += b" " * rng.choice([0, -len(text) % 8])
    return struct.pack("<Q", len(text)) + text + data


def _field(rng: random.Random, header: Pairs, i: int) -> None:
    entry = header[i][1]
    for j, (key, value) in enumerate(entry):
        if key == "dtype" and rng.random() < 0.4:
            entry[j] = (key, rng.choice(DTYPES))
        elif isinstance(value, list) and value and rng.random() < 0.6:
            value[rng.randrange(len(value))] = Raw(rng.choice(fuzz_json.NUMBERS))


def _renamed(rng: random.Random, header: Pairs, i: int) -> None:
    key, entry = header[i]
    stem = key
    for ending in sorted(_KEYS, key=len, reverse=True):
        if ending and key.endswith(ending):
            stem = key.removesuffix(ending)
            break
    if rng.random() < 0.3:
        stem = rng.choice(
            [
                stem.removeprefix("base_model.model."),
                f"{stem}.x",
                stem.upper(),
                "base_model.model." + "a." * 400,
                "",
            ]
        )
    header[i] = (stem + rng.choice(_KEYS), entry)


def _values(rng: random.Random, data: bytes) -> bytes:
    size = rng.choice([2, 4, 8])
    if len(data) < size:
        return data
    at = rng.randrange(len(data) // size) * size
    code = {2: "<e", 4: "<f", 8: "<d"}[size]
    try:
        return data[:at] + struct.pack(code, rng.choice(_FLOATS)) + data[at + size :]
    except OverflowError:
        return data[:at] + b"\xff\x7f" * (size // 2) + data[at + size :]


def _consistent(rng: random.Random, header: Pairs, data: bytes, tensors: list[int]) -> tuple[Pairs, bytes]:
    """Another shape, dtype or order of tensors, or one less or more, with offsets that fit."""
    chosen, kind = rng.choice(tensors), rng.randrange(6)
    rows = [(key, dict(entry)) for key, entry in header]
    shape = rows[chosen][1].get("shape", [])
    if kind == 0:
        shape = shape[::-1]
    elif kind == 1:
        shape = [*shape, 1] if rng.random() < 0.5 else shape[:-1] or [1]
    elif kind == 2 and shape:
        shape = list(shape)
        shape[rng.randrange(len(shape))] = rng.choice([0, 1, 2, 3, 5, 1000])
    elif kind == 3:
        rows[chosen][1]["dtype"] = rng.choice(list(_SIZES))
    elif kind == 4:
        rng.shuffle(rows)
        shape = None
    elif rng.random() < 0.5:
        del rows[chosen]
        shape = None
    else:
        rows.append((rows[chosen][0] + rng.choice(_KEYS), dict(rows[chosen][1])))
    if shape is not None:
        rows[chosen][1]["shape"] = shape
    made, at = Pairs(), 0
    for key, entry in rows:
        if key != "__metadata__" and isinstance(entry.get("shape"), list):
            size = _SIZES.get(str(entry.get("dtype")), 4)
            for n in entry["shape"]:
                size *= n if type(n) is int and 0 <= n < 10**5 else 1
            size = min(size, 10**6)
            entry["data_offsets"] = [at, at + size]
            at += size
        made.append((key, Pairs(entry.items())))
    return made, (data * (at // max(len(data), 1) + 1))[:at].ljust(at, b"\x00")


def of_zip(rng: random.Random, raw: bytes) -> bytes:
    """A change inside one member of a torch file (a zip archive of stored members), most often
    with a checksum that fits."""
    try:
        entries = zipfile.ZipFile(io.BytesIO(raw)).infolist()
        entry = rng.choice(
            [e for e in entries if e.filename.endswith(".pkl")] if rng.random() < 0.7 else entries
        )
        name, extra = struct.unpack_from("<HH", raw, entry.header_offset + 26)
    except (ValueError, IndexError, NotImplementedError, EOFError, zipfile.BadZipFile, struct.error):
        return of_bytes(rng, raw, [raw])
    begin, size = entry.header_offset + 30 + name + extra, entry.file_size
    body = raw[begin : begin + size]
    if not 0 < len(body) == size:
        return of_bytes(rng, raw, [raw])
    changed = _of_pickle(rng, body) if entry.filename.endswith(".pkl") else of_bytes(rng, body, [body])
    changed = changed[:size].ljust(size, b"\x00")
    raw = raw[:begin] + changed + raw[begin + size :]
    if rng.random() < 0.7:
        raw = raw.replace(struct.pack("<I", zlib.crc32(body)), struct.pack("<I", zlib.crc32(changed)))
    return raw


_TEXTS = [
    b"torch._utils\n_rebuild_tensor_v2\n", b"os\nsystem\n", b"torch\nFloatStorage\n", b"torch\nBFloat16Storage\n",
    b"torch\nDoubleStorage\n", b"builtins\nexec\n", b"torch\nSize\n", b"torch._utils\n_rebuild_parameter\n",
    b"collections\nOrderedDict\n",
]  # fmt: skip


def _of_pickle(rng: random.Random, body: bytes) -> bytes:
    """A change to a number (sizes, strides, offsets), a global or an opcode of a pickle."""
    kind = rng.randrange(4)
    if kind == 0 and (small := [i for i, b in enumerate(body[:-1]) if b == 0x4B]):  # BININT1
        at = rng.choice(small)
        return body[: at + 1] + bytes([rng.choice([0, 1, 2, 3, 4, 6, 16, 17, 255])]) + body[at + 2 :]
    if kind == 1 and (at := rng.randrange(len(body))) + 5 < len(body):
        number = rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
        return body[:at] + rng.choice([b"J", b"\x8a\x04"]) + struct.pack("<I", number) + body[at + 5 :]
    if kind == 2 and (places := [i for i in range(len(body)) if body[i : i + 6] == b"ctorch"]):
        at = rng.choice(places) + 1
        end = body.find(b"\n", body.find(b"\n", at) + 1)
        return body[:at] + rng.choice(_TEXTS) + body[max(end, at) + 1 :]
    return of_bytes(rng, body, [body])

"""Safetensors files of strangers: read as safetensors reads them, or refused before anything large is allocated."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from phatgoose.errors import ExpertError
from phatgoose.experts.files import safetensors_file as tensor_files
from phatgoose.experts.files.safetensors_file import read_tensor_file, write_tensors

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


def write(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(shape=(2,), begin=0, end=8, dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def test_reads_what_safetensors_reads(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        str(dtype): torch.randn(3, 5, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i, dtype in enumerate(DTYPES)
    }
    tensors |= {"scalar": torch.tensor(1.5), "odd.ü name": torch.ones(7, dtype=torch.float16)}
    save_file(tensors, path, {"a": "b"})
    found = read_tensor_file(path)
    expected = load_file(path)
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name].float(), tensor.float())
        assert found.tensors[name].shape == tensor.shape
    assert found.metadata == {"a": "b"}
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def odd_tensors():
    """Of every dtype, in no order: odd shapes, none, strides, shared memory, names that JSON must escape."""
    g = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (7,), (), (0, 4), (1, 1, 3), (2, 1))
    found = {
        f"{j}.{str(dtype)[-3:]}": torch.randn(shape, generator=g).to(dtype)
        for j, shape in enumerate(shapes)
        for dtype in reversed(DTYPES)
    }
    wide = torch.randn(4, 6, generator=g)
    found |= {"10": wide, "9": wide[1:3], "turned": wide.T, "Z": wide[:, ::2].requires_grad_()}
    return found | {
        name: torch.ones(3) for name in ('a"\\b', "tab\t", "é", "\U0001f40d", "\uffff", "\x7f", "")
    }


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"key é": 'a "b"\n\x01'}])
def test_files_are_those_of_safetensors_own_writer(tmp_path, metadata):
    tensors = odd_tensors()
    for some in (tensors, dict(list(tensors.items())[:1]), dict(reversed(tensors.items())), {}):
        write_tensors(tmp_path / "x", some, metadata)
        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in some.items()}
        assert (tmp_path / "x").read_bytes() == save(own, metadata)


def test_one_content_is_one_sequence_of_bytes(tmp_path):
    tensors, metadata = odd_tensors(), {str(i): "x" * i for i in range(20)}
    write_tensors(tmp_path / "x", tensors, metadata)
    write_tensors(
        tmp_path / "y", dict(reversed(tensors.items())), dict(sorted(metadata.items(), key=lambda kv: kv[1]))
    )
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in tensors.items())


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(
        ExpertError, match=r"x: tensor 'a' is in torch.int64, expected a floating point dtype"
    ):
        write_tensors(tmp_path / "x", {"a": torch.arange(3)})
    assert not list(tmp_path.iterdir())


def test_a_file_without_tensors(tmp_path):
    assert read_tensor_file(write(tmp_path / "x", {})).tensors == {}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(end=4)}, 4, "don't agree"),
        ({"a": entry(shape=[2**40, 2**40])}, 8, "don't agree"),
        ({"a": entry(shape=[2**63, 2], end=8)}, 8, "shape"),
        ({"a": entry(shape=[-1, -2])}, 8, "shape"),
        ({"a": entry(shape=[True, 2])}, 8, "shape"),
        ({"a": entry(shape=[2.0])}, 8, "shape"),
        ({"a": entry(shape=[1] * 9 + [2])}, 8, "shape"),
        ({"a": entry(shape=[2**62] * 200_000)}, 8, "shape"),
        ({"a": entry(shape=[0, 2**62], end=0)}, 0, "no values"),
        ({"a": entry(begin=-8, end=0)}, 8, "offsets"),
        ({"a": entry(begin=4, end=12)}, 12, "begins at 4, expected 0"),
        ({"a": entry(), "b": entry()}, 8, "begins at 0, expected 8"),
        ({"a": entry(), "b": entry(begin=4, end=12)}, 12, "begins at 4, expected 8"),
        ({"a": entry(), "b": entry(begin=12, end=20)}, 20, "begins at 12, expected 8"),
        ({"a": entry(shape=[2**40], end=2**42)}, 8, r"4398046511\d+ bytes expected, \d+ found"),
        ({"a": entry()}, 7, "bytes expected"),
        ({"a": entry()}, 9, "bytes expected"),
        ({"a": entry(dtype="I64")}, 8, "dtype 'I64', expected a floating point one"),
        ({"a": entry(dtype="F31")}, 8, "dtype 'F31'"),
        ({"a": entry(dtype=["F32"])}, 8, r"dtype \['F32'\]"),
        ({"a": entry(more=1)}, 8, "lacks a dtype, a shape or its offsets"),
        ({"a": []}, 8, "lacks"),
        ({"a": entry(), "__metadata__": {"k": 1}}, 8, "metadata"),
        ({"a": entry(), "__metadata__": []}, 8, "metadata"),
        ({"": entry()}, 8, "can't name a tensor"),
        ({"a\x1b[2J": entry()}, 8, r"'a\\x1b\[2J' can't name a tensor"),
        ({"a" * 1001: entry()}, 8, "can't name a tensor"),
        (b'{"a": {"dtype": "F32"}, "a": {}}', 8, "the key 'a' stands twice"),
        (b"[]", 0, "no object"),
        (b"[" * 100_000, 0, "nested deeper"),
        (b"", 0, "refused"),
        (b"\xff", 0, "refused"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_headers_that_lie_are_refused_before_reading(tmp_path, monkeypatch, header, data, message):
    monkeypatch.setattr(tensor_files.torch, "empty", None)  # nothing may be allocated for it
    with pytest.raises(ExpertError, match=rf"(?s)x\.safetensors.*{message}") as caught:
        read_tensor_file(write(tmp_path / "x.safetensors", header, bytes(data)))
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("length", [1, 10**6, 2**31, 2**60, 2**63, 2**64 - 1])
def test_a_header_that_is_longer_than_its_file(tmp_path, length):
    with pytest.raises(ExpertError, match=r"is not a whole safetensors file|refused"):
        read_tensor_file(write(tmp_path / "x", {"a": entry()}, bytes(8), length))


@pytest.mark.parametrize("size", range(0, 76, 5))
def test_every_cut_is_noticed(tmp_path, size):
    path = tmp_path / "x"
    path.write_bytes(save({"a": torch.ones(3)})[:size])
    with pytest.raises(ExpertError, match="is not a whole safetensors file"):
        read_tensor_file(path)


def test_a_terabyte_that_takes_no_room_is_refused(tmp_path):
    path = write(tmp_path / "x", {"a": entry(shape=[2**38], end=2**40)})
    os.truncate(path, path.stat().st_size + 2**40)  # a sparse file: the header tells the truth
    with pytest.raises(ExpertError, match=r"holds 1099511627776 bytes of tensors, and this machine has \d+"):
        read_tensor_file(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_counted(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(tensor_files, "_CHUNK", 2)
    tensor = torch.ones(7)
    tensor[1] = tensor[6] = float("nan")
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        tensor[5] = float("-inf")
    save_file({"a": torch.ones(2), "b": tensor.to(dtype)}, tmp_path / "x")
    with pytest.raises(ExpertError, match=r"'b' has [23] of 7 values that are NaN or infinite"):
        read_tensor_file(tmp_path / "x")


def test_a_file_that_is_cut_later_takes_nothing_with_it(tmp_path):
    code = (
        "import os, sys, torch; from phatgoose.experts.files.safetensors_file import read_tensor_file\n"
        "found = read_tensor_file(sys.argv[1]).tensors['a']; os.truncate(sys.argv[1], 100)\n"
        "assert float(found.sum()) == found.numel()"  # of a mapped file: SIGBUS, the end of the process
    )
    save_file({"a": torch.ones(2**20)}, tmp_path / "x")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=True)


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "x"
    save_file({"a": torch.ones(2**16), "b": torch.ones(2**16)}, path)
    real, size = torch.empty, path.stat().st_size

    def cut(*shape, **more):
        os.truncate(path, size // 2)
        return real(*shape, **more)

    monkeypatch.setattr(tensor_files.torch, "empty", cut)
    with pytest.raises(ExpertError, match="ends early; the file was cut short while it was read"):
        read_tensor_file(path)

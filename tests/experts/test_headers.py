"""Headers of safetensors files: read as the library reads them, remembered without their metadata,
written to be read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from phatgoose.errors import ExpertError
from phatgoose.experts.files.safetensors_file import DTYPES, Item, parse_header, read_header, write_header


@pytest.fixture
def file(tmp_path):
    """A file with every dtype, odd shapes and a scalar."""
    tensors = {f"{name}.x": torch.zeros(3, i + 1).to(d) for i, (name, d) in enumerate(DTYPES.items())}
    save_file(
        tensors | {"scalar": torch.tensor(2.0), "é": torch.zeros(1, 1, 5)}, tmp_path / "a", {"by": "me"}
    )
    return tmp_path / "a"


def test_what_it_says_is_what_the_library_says(file):
    raw, header = read_header(file)
    assert file.read_bytes().startswith(raw)
    with safe_open(file, framework="pt") as expected:
        assert header.metadata == expected.metadata()
        assert set(header.items) == set(expected.keys())
        for name, item in header.items.items():
            tensor = expected.get_tensor(name)
            assert (item.dtype, item.shape) == (tensor.dtype, tuple(tensor.shape))
            data = file.read_bytes()[len(raw) + item.begin : len(raw) + item.end]
            assert data == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert [name for name, _ in header.in_order()] == sorted(
        header.items, key=lambda n: header.items[n].begin
    )


def test_headers_that_differ_in_metadata_alone_are_parsed_once(file):
    raw, header = read_header(file)
    known = {}
    first = parse_header(raw, "here", known=known)
    text = raw[8:].replace(b'"me"', b'"you, at length"') + b"      "
    second = parse_header(len(text).to_bytes(8, "little") + text, "here", known=known)
    assert len(known) == 1
    assert second.items is first.items
    assert (first.metadata, second.metadata) == ({"by": "me"}, {"by": "you, at length"})
    bare = raw[8:].replace(b'"__metadata__":{"by":"me"},', b"")
    assert parse_header(len(bare).to_bytes(8, "little") + bare, "here", known=known).metadata == {}
    last = bare.rstrip()[:-1] + b',"__metadata__":{"by":"them"}}'
    for _ in range(2):  # metadata that doesn't come first is read as well, also from memory
        found = parse_header(len(last).to_bytes(8, "little") + last, "here", known=known)
        assert found.metadata == {"by": "them"}
        assert dict(found.items) == dict(header.items)


@given(
    st.dictionaries(
        st.text("abc.é", min_size=1, max_size=5), st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1
    )
)
def test_written_headers_are_read(shapes):
    items, end = {}, 0
    for i, (name, shape) in enumerate(shapes.items()):
        dtype = list(DTYPES.values())[i % len(DTYPES)]
        begin, end = end, end + shape[0] * shape[1] * dtype.itemsize
        items[name] = Item(dtype, shape, begin, end)
    raw = write_header(items, {"format": "x"}, align=4096)
    assert len(raw) % 4096 == 0
    found = parse_header(raw, "here")
    assert dict(found.items) == items
    assert found.data_bytes == end


@pytest.mark.parametrize("known", [None, {}])
@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b'{"__metadata__":{"a":1}}',
        b'{"__metadata__":{"a":"b"},"__metadata__":{"a":"c"}}',
        b'{"__metadata__":{"a":"b","a":"c"},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":3,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}',
        b'{"__metadata__":{"a":"b"}',
        b'{"__metadata__":{"a":"\xff"},"b":3}',
    ],
)
def test_refused(text, known):
    with pytest.raises(ExpertError, match="here: the"):
        parse_header(len(text).to_bytes(8, "little") + text, "here", known=known)
    with pytest.raises(ExpertError, match="not as long as it says"):
        parse_header(b"\x00" * 8 + text + b" ", "here", known=known)

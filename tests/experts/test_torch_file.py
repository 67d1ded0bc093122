"""Torch files are mapped, not read, and come without what could run.
What they may hold: test_reference_checkpoint.py."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from phatgoose.errors import ExpertError
from phatgoose.experts.files import torch_file
from phatgoose.experts.files.torch_file import map_torch_file


@pytest.fixture
def file(tmp_path):
    torch.save(
        {"a": torch.arange(12.0).view(3, 4).T, "b": torch.ones(5, dtype=torch.bfloat16)}, tmp_path / "a.pt"
    )
    return tmp_path / "a.pt"


def test_tensors_in_their_order(file):
    found = map_torch_file(file)
    assert list(found) == ["a", "b"]
    assert torch.equal(found["a"], torch.arange(12.0).view(3, 4).T)
    assert str(file) in Path("/proc/self/maps").read_text()


def test_a_parameter_is_a_tensor(tmp_path):
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "a.pt")
    assert not map_torch_file(tmp_path / "a.pt")["a"].requires_grad


def test_a_file_larger_than_memory_is_mapped_in_the_other_way(file, monkeypatch):
    """As Linux refuses a private mapping that it may have to keep."""
    before, load, ways = file.read_bytes(), torch.load, []

    def refusing(*arguments, **settings):
        ways.append(torch.serialization.get_default_mmap_options())
        if ways[-1] != mmap.MAP_SHARED:
            raise RuntimeError("unable to mmap 9 bytes from file </a.pt>: Cannot allocate memory (12)")
        return load(*arguments, **settings)

    monkeypatch.setattr(torch, "load", refusing)
    assert torch.equal(map_torch_file(file)["a"], torch.arange(12.0).view(3, 4).T)
    assert ways == [mmap.MAP_PRIVATE, mmap.MAP_SHARED]
    assert file.read_bytes() == before


def test_a_list_of_tensors_has_a_size_limit(file, monkeypatch):
    monkeypatch.setattr(torch_file, "INDEX_BYTES", 20)
    with pytest.raises(ExpertError, match=r"data.pkl' has \d+ bytes"):
        map_torch_file(file)

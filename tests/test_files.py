"""Atomic writes: whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import os

import pytest

from phatgoose import files
from phatgoose.errors import ExpertError, StorageError, UnknownName
from phatgoose.files import atomic_folder, read_json, sha256_json, write_bytes, write_json
from phatgoose.registry import lookup, unknown


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": [1, "ü"]})
    assert read_json(path, ExpertError) == {"a": [1, "ü"]}
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match=r"no space left to write .*file.json; nothing there was changed"):
        write_bytes(path, b"half")
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["file.json"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert path.read_bytes() == before


def test_folder_takes_its_place_in_one_step_or_not_at_all(tmp_path):
    target = tmp_path / "thing"
    for content in ("one", "two"):
        with atomic_folder(target) as work:
            (work / "file").write_text(content)
            assert work.parent == tmp_path
        assert (target / "file").read_text() == content
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as work:
        (work / "file").write_text("three")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "two"
    assert os.listdir(tmp_path) == ["thing"]


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file where a folder should be"):
        write_bytes(tmp_path / "file" / "below", b"")


def test_unreadable_json_is_named(tmp_path):
    path = tmp_path / "x.json"
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ExpertError, match=r"x.json is not readable as JSON"):
            read_json(path, ExpertError)
    with pytest.raises(ExpertError, match="does not exist"):
        read_json(tmp_path / "y.json", ExpertError)


def test_keys_do_not_depend_on_order():
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 1, "b": 3})


def test_unknown_names_come_with_suggestions():
    assert "did you mean 'tense'" in str(unknown("task", "tens", ["tense", "other"]))
    assert "known: other, tense" in str(unknown("task", "zzz", ["tense", "other"]))
    assert "there are 20 known names" in str(unknown("task", "zzz", [f"name{i:02}" for i in range(20)]))
    with pytest.raises(UnknownName, match="unknown router 'x'"):
        lookup("router", "x", {"phatgoose": "phatgoose.routers:PHATGOOSE"})
    assert lookup("router", "phatgoose", {"phatgoose": "phatgoose.routers:PHATGOOSE"}).__name__ == "PHATGOOSE"

"""Atomic writes: whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path

import pytest

from phatgoose import files
from phatgoose.errors import ExpertError, StorageError, UnknownName
from phatgoose.files import (
    atomic_folder,
    is_folder,
    read_json,
    sha256_file,
    sha256_json,
    write_bytes,
    write_json,
)
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


def mode(path):
    return oct(path.stat().st_mode & 0o777)


def test_what_is_rewritten_keeps_its_permissions(tmp_path, monkeypatch):
    path, folder = tmp_path / "secret.json", tmp_path / "folder"
    write_json(path, 1)
    with atomic_folder(folder) as work:
        write_json(work / "kept.json", 1)
    assert (mode(path), mode(folder), mode(folder / "kept.json")) == ("0o644", "0o755", "0o644")
    path.chmod(0o600)
    folder.chmod(0o700)
    (folder / "kept.json").chmod(0o640)
    write_json(path, 2)
    with atomic_folder(folder) as work:
        write_json(work / "kept.json", 2)
        write_json(work / "new.json", 2)
    assert (mode(path), mode(folder), mode(folder / "kept.json")) == ("0o600", "0o700", "0o640")
    assert mode(folder / "new.json") == "0o640"  # no more open than what is rewritten beside it
    (folder / "kept.json").chmod(0o444)
    with atomic_folder(tmp_path / "copy", like=folder) as work:
        write_json(work / "kept.json", 2)
        write_json(work / "new.json", 2)
    assert [mode(p) for p in (tmp_path / "copy", tmp_path / "copy" / "kept.json")] == ["0o700", "0o644"]
    monkeypatch.setattr(files, "_UMASK", 0o027)
    write_json(tmp_path / "new.json", 1)
    assert mode(tmp_path / "new.json") == "0o640"


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


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_that_is_replaced_is_never_missing(tmp_path, monkeypatch, in_one_step):
    target, missing = tmp_path / "thing", []
    with atomic_folder(target) as work:
        (work / "file").write_text("one")
    if not in_one_step:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda *a: (replace(*a), missing.append(not target.exists()))[0])
    with atomic_folder(target) as work:
        (work / "file").write_text("two")
    assert (target / "file").read_text() == "two"
    assert os.listdir(tmp_path) == ["thing"]
    if in_one_step and sys.platform == "linux":
        assert missing == []


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file where a folder should be"):
        write_bytes(tmp_path / "file" / "below", b"")


def test_what_the_system_refuses_is_an_error_of_ours(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    for name, why in (("n" * 300, "File name too long"), ("circle/below", "File exists")):
        with pytest.raises(StorageError, match=rf"can't write .*{name}: .*{why}"):
            write_bytes(tmp_path / name, b"")
        with pytest.raises(StorageError, match=why), atomic_folder(tmp_path / name):
            raise AssertionError("must not begin")
    assert os.listdir(tmp_path) == ["circle"]
    with pytest.raises(ConnectionResetError), atomic_folder(tmp_path / "new"):
        raise ConnectionResetError(
            errno.ECONNRESET, "Connection reset by peer"
        )  # a download's: not of this disk


def test_nothing_but_a_folder_is_replaced_by_a_folder(tmp_path):
    file, pipe, loose = tmp_path / "file", tmp_path / "pipe", tmp_path / "loose"
    file.write_text("x")
    os.mkfifo(pipe)
    loose.symlink_to(tmp_path / "gone")
    for target in (file, pipe, loose):
        with (
            pytest.raises(StorageError, match=rf"{target.name}: something that isn't a folder is there"),
            atomic_folder(target),
        ):
            raise AssertionError("must not begin")
    for target in (pipe, tmp_path):
        with pytest.raises(
            StorageError, match=rf"{target.name}: something that isn't an ordinary file is there"
        ):
            write_bytes(target, b"")
    assert file.read_text() == "x"
    assert pipe.is_fifo()
    assert loose.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["file", "loose", "pipe"]


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
    assert "there are 40 known names" in str(unknown("task", "zzz", [f"name{i:02}" for i in range(40)]))
    with pytest.raises(UnknownName, match="unknown router 'x'"):
        lookup("router", "x", {"phatgoose": "phatgoose.routers:PHATGOOSE"})
    assert lookup("router", "phatgoose", {"phatgoose": "phatgoose.routers:PHATGOOSE"}).__name__ == "PHATGOOSE"


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "socket", "loop", "zero byte", "proc"])
def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "x.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # opening one waits for a writer
    elif kind == "device":
        path.symlink_to("/dev/zero")  # says it has 0 bytes, and never ends
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "zero byte":
        path = tmp_path / "x\0.json"
    else:
        path = tmp_path / "nothing" / "x.json"
    for read in (read_json, sha256_file):
        with pytest.raises(ExpertError, match=r"x.*\.json (is not a file|can't be read|does not exist)"):
            read(path, ExpertError)


def test_sizes_are_checked_before_reading(tmp_path):
    path = tmp_path / "x.json"
    with open(path, "wb") as file:
        file.truncate(2**40)  # a sparse file: a terabyte that takes no room on disk
    with pytest.raises(ExpertError, match=r"x.json is 1099511627776 bytes; a file of its kind has at most"):
        read_json(path, ExpertError)
    path.write_text('"twelve bytes"')
    assert read_json(path, ExpertError, limit_bytes=14) == "twelve bytes"
    with pytest.raises(ExpertError, match="is 14 bytes; a file of its kind has at most 13"):
        read_json(path, ExpertError, limit_bytes=13)


def test_whether_a_folder_is_one_is_not_guessed(tmp_path, monkeypatch):
    assert is_folder(tmp_path, ExpertError)
    assert not is_folder(tmp_path / "none", ExpertError)

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(ExpertError, match="can't be read: Permission denied"):
        is_folder(tmp_path, ExpertError)

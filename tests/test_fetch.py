"""Fetching through the real pip, from an index that is a folder: no network."""

import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from phatgoose import fetch, locks
from phatgoose.errors import DownloadError, StorageError

NAME = "goosefeather-1.0.0-py3-none-any.whl"


def write_wheel(folder: Path, name: str, content: bytes) -> Path:
    file = folder / f"{name}-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        meta = f"{name}-1.0.0.dist-info"
        wheel.writestr(f"{name}/data.bin", content)
        wheel.writestr(f"{meta}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n")
        wheel.writestr(
            f"{meta}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{meta}/RECORD", "")
    return file


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder, "goosefeather", b"feathers")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PHATGOOSE_DOWNLOADS", raising=False)
    return folder


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def in_parts(index: Path) -> fetch.PinnedFile:
    """A file of three parts, each in a wheel of `index`."""
    contents = [b"fea", b"the", b"rs"]
    files = [write_wheel(index, f"goosepart{i}", content) for i, content in enumerate(contents, 1)]
    parts = [
        fetch.Part(fetch.PinnedPackage(f"{name}==1.0.0", sha(file), file.name), f"{name}/data.bin")
        for file in files
        for name in [file.name.partition("-")[0]]
    ]
    return fetch.PinnedFile("feathers", hashlib.sha256(b"feathers").hexdigest(), tuple(parts))


def no_pip(*_: object, **__: object) -> None:
    raise AssertionError("pip was run")


def left(tmp_path: Path) -> list[str]:
    return sorted(
        p.name for p in (tmp_path / "cache" / "downloads").iterdir() if not p.name.endswith(".lock")
    )


def test_fetches_once_and_finds_it_again(index, tmp_path, monkeypatch):
    digest = sha(index / NAME)
    path = fetch.PinnedPackage("goosefeather==1.0.0", digest, NAME).fetch()
    assert path == tmp_path / "cache" / "downloads" / NAME
    assert sha(path) == digest
    assert left(tmp_path) == [NAME]
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert fetch.PinnedPackage("goosefeather==1.0.0", digest, NAME).fetch() == path


def test_wrong_hash_is_refused_with_both_hashes_and_nothing_is_kept(index, tmp_path):
    with pytest.raises(DownloadError, match=f"expected {'0' * 64}, found {sha(index / NAME)}"):
        fetch.PinnedPackage("goosefeather==1.0.0", "0" * 64, NAME).fetch()
    assert left(tmp_path) == []


def test_a_damaged_cached_file_is_never_used(index, tmp_path):
    digest = sha(index / NAME)
    path = fetch.PinnedPackage("goosefeather==1.0.0", digest, NAME).fetch()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DownloadError, match="Delete it"):
        fetch.PinnedPackage("goosefeather==1.0.0", digest, NAME).fetch()


def test_own_folder_comes_first_and_is_checked_too(index, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_pip)
    monkeypatch.setenv("PHATGOOSE_DOWNLOADS", str(index))
    assert fetch.PinnedPackage("goosefeather==1.0.0", sha(index / NAME), NAME).fetch() == index / NAME
    with pytest.raises(DownloadError, match="PHATGOOSE_DOWNLOADS"):
        fetch.PinnedPackage("goosefeather==1.0.0", "0" * 64, NAME).fetch()


def test_no_network_says_how_to_do_it_by_hand(index, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(DownloadError, match=r"no network.*by hand.*PHATGOOSE_DOWNLOADS") as caught:
        fetch.PinnedPackage("goosefeather==1.0.0", "0" * 64, NAME).fetch()
    assert str(tmp_path / "cache" / "downloads") in str(caught.value)
    assert left(tmp_path) == []


def test_parts_are_fetched_once_joined_and_discarded(index, in_parts, tmp_path, monkeypatch, capfd):
    target, third = tmp_path / "feathers", index / "goosepart3-1.0.0-py3-none-any.whl"
    third.rename(tmp_path / third.name)
    with pytest.raises(DownloadError) as caught:
        in_parts.write(target, DownloadError)
    said = str(caught.value)
    assert "feathers comes in 3 parts, and part 3 can't be had: can't fetch goosepart3==1.0.0" in said
    assert "pip download --no-deps goosepart1==1.0.0 goosepart2==1.0.0 goosepart3==1.0.0" in said
    (tmp_path / third.name).rename(third)
    capfd.readouterr()
    in_parts.write(target, DownloadError)
    assert target.read_bytes() == b"feathers"
    assert capfd.readouterr().out.count("fetching goosepart") == 1  # the third; two were there
    in_parts.discard()
    assert left(tmp_path) == []
    monkeypatch.setenv("PHATGOOSE_DOWNLOADS", str(index))
    monkeypatch.setattr(subprocess, "run", no_pip)
    in_parts.write(target, DownloadError)
    in_parts.discard()
    assert third.is_file()


def test_a_wrong_part_and_a_wrong_whole_are_refused(index, in_parts, tmp_path):
    first, second, third = in_parts.parts
    wrong = replace(second, wheel=replace(second.wheel, sha256="0" * 64))
    with pytest.raises(
        DownloadError, match=f"part 2 can't be had.*expected {'0' * 64}, found {second.wheel.sha256}"
    ):
        replace(in_parts, parts=(first, wrong, third)).write(tmp_path / "feathers", DownloadError)
    with pytest.raises(DownloadError, match=f"feathers is not the pinned file.*expected {in_parts.sha256}"):
        replace(in_parts, parts=(first, third, second)).write(tmp_path / "feathers", DownloadError)


@pytest.mark.parametrize(
    ("said", "error", "match"),
    [
        ("/usr/bin/python: No module named pip", DownloadError, "ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", StorageError, "no space left"),
        ("ERROR: something odd", DownloadError, "pip failed"),
    ],
)
def test_causes_are_told_apart(index, tmp_path, monkeypatch, said, error, match):
    done = subprocess.CompletedProcess([sys.executable], 1, stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(error, match=match):
        fetch.PinnedPackage("goosefeather==1.0.0", "0" * 64, NAME).fetch()
    assert left(tmp_path) == []


def test_remains_of_a_killed_process_are_cleared(index, tmp_path):
    old = tmp_path / "cache" / "downloads" / f".{NAME}.abc.tmp"
    old.mkdir(parents=True)
    (old / "half").write_bytes(b"x" * 10)
    fetch.PinnedPackage("goosefeather==1.0.0", sha(index / NAME), NAME).fetch()
    assert left(tmp_path) == [NAME]


def test_the_lock_keeps_a_second_one_waiting_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "NOTICE_SECONDS", 0.05)
    order = []

    def second() -> None:
        with fetch.exclusive(tmp_path / "thing"):
            order.append("second")

    with fetch.exclusive(tmp_path / "thing"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    (told,) = [r for r in caplog.records if r.name == locks.__name__]
    assert "waiting until another process is done with" in told.getMessage()


@pytest.fixture(params=["a folder", "an index here", "an index over HTTP"])
def sdist(request, tmp_path, monkeypatch):
    """A source distribution whose setup.py leaves a mark, where pip finds it."""
    place = tmp_path / "simple" / "evil-goose"
    place.mkdir(parents=True)
    mark = tmp_path / "it was run"
    setup = f"open({str(mark)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='evil-goose', version='1.0')\n"
    with tarfile.open(place / "evil_goose-1.0.tar.gz", "w:gz") as archive:
        for name, text in (
            ("setup.py", setup),
            ("PKG-INFO", "Metadata-Version: 1.0\nName: evil-goose\nVersion: 1.0\n"),
        ):
            member = tarfile.TarInfo(f"evil_goose-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    (place / "index.html").write_text('<a href="evil_goose-1.0.tar.gz">evil_goose-1.0.tar.gz</a>')
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    for name in ("PIP_FIND_LINKS", "PHATGOOSE_DOWNLOADS"):
        monkeypatch.delenv(name, raising=False)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        match request.param:
            case "a folder":
                monkeypatch.setenv("PIP_NO_INDEX", "1")
                monkeypatch.setenv("PIP_FIND_LINKS", str(place))
            case "an index here":
                monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
            case _:
                monkeypatch.setenv("no_proxy", "127.0.0.1")
                monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        yield place / "evil_goose-1.0.tar.gz", mark
        server.shutdown()


@pytest.mark.slow(4)
def test_a_source_distribution_is_fetched_and_never_run(sdist, tmp_path):
    file, mark = sdist
    path = fetch.PinnedPackage("evil-goose==1.0", sha(file), file.name).fetch()
    assert path.read_bytes() == file.read_bytes()
    assert not mark.exists()
    assert left(tmp_path) == [file.name]
    with pytest.raises(
        DownloadError, match=r"no network.*the source distribution of evil-goose==\S+ on PyPI"
    ):
        fetch.PinnedPackage("evil-goose==2.0", sha(file), "evil_goose-2.0.tar.gz").fetch()
    path.unlink()
    with pytest.raises(DownloadError, match=f"expected {'0' * 64}, found {sha(file)}"):
        fetch.PinnedPackage("evil-goose==1.0", "0" * 64, file.name).fetch()
    assert left(tmp_path) == []
    assert not mark.exists()


def test_fetch_needs_no_torch():
    code = "import sys, phatgoose.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_is_built_once_and_whole(tmp_path):
    target, built = tmp_path / "thing", []
    left_over = tmp_path / ".thing.abc.tmp"
    left_over.mkdir()

    def build(work: Path) -> None:
        built.append(work)
        (work / "half").write_text("a")
        if len(built) == 1:
            raise KeyboardInterrupt
        (work / "whole").write_text("b")

    with pytest.raises(KeyboardInterrupt):
        fetch.build_once(target, build)
    assert not target.exists()
    assert not left_over.exists()
    assert fetch.build_once(target, build) == fetch.build_once(target, build) == target
    assert sorted(p.name for p in target.iterdir()) == ["half", "whole"]
    assert len(built) == 2
    (target / "whole").unlink()
    fetch.build_once(target, build, lambda folder: (folder / "whole").is_file())
    assert len(built) == 3

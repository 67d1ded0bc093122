"""A pool's folder that somebody else made: nothing in it leads out of it, waits, or takes more memory than there is."""

from __future__ import annotations

import os
import shutil
import threading

import pytest
from filelock import FileLock

from phatgoose import locks
from phatgoose.errors import ExpertError, PhatgooseError, PoolError
from phatgoose.experts import manifest
from phatgoose.experts.expert import Expert
from phatgoose.experts.packed.pack import pack, unpack
from phatgoose.experts.pool import Pool
from phatgoose.experts.pool_folder import add_to_folder, remove_from_folder
from phatgoose.files import read_json, write_json

FILES = ("adapter_config.json", "adapter_model.safetensors", "gates.safetensors", "expert.json")


@pytest.fixture
def saved(make_base, make_expert, tmp_path):
    base = make_base("llama")
    experts = [make_expert(base, n, rank=2, seed=i, targets=["q_proj"]) for i, n in enumerate("ab")]
    return experts, Pool(experts).save(tmp_path / "pool")


def changed(folder, change):
    manifest = read_json(folder / "pool.json", PoolError)
    change(manifest)
    write_json(folder / "pool.json", manifest)


ENTRIES = [
    (lambda e: e.update(name="../../up"), "can't name an expert"),
    (lambda e: e.update(name="a\x1b[2J"), r"'a\\x1b\[2J' can't name an expert"),
    (lambda e: e.update(name="x" * 10**6), "can't name an expert"),
    (lambda e: e.update(folder="experts/" + "x" * 300), "expected experts/NAME inside the pool"),
    (lambda e: e.update(folder="experts\\a"), "expected experts/NAME inside the pool"),
    (lambda e: e.update(folder="experts/a\n"), "expected experts/NAME inside the pool"),
    (lambda e: e.update(folder="C:/experts/a"), "expected experts/NAME inside the pool"),
    (lambda e: e.update(folder="experts/.."), "expected experts/NAME inside the pool"),
    (lambda e: e.update(folder="experts/b"), "two experts are at 'experts/b'"),
    (lambda e: e.update(name="b"), "two experts are at 'b'"),
    (lambda e: e["files"].update({"../expert.json": "0" * 64}), "lists a file '../expert.json', which no"),
    (lambda e: e["files"].update({"expert.json": 5}), "sha256 of expert.json is 5, expected 64 hex digits"),
    (lambda e: e["files"].update({"expert.json": "0" * 63}), "expected 64 hex digits"),
    (
        lambda e: e.update(packed={"files": {"rest.safetensors": ["0"] * 9999}}),
        "rest.safetensors is .* expected 64 hex",
    ),
]


@pytest.mark.parametrize(("change", "message"), ENTRIES, ids=[m[:30] for _, m in ENTRIES])
def test_entries_that_no_pool_of_ours_has(saved, change, message):
    (a, b), folder = saved
    changed(folder, lambda m: change(m["experts"][0]))
    before = sorted(map(str, folder.rglob("*")))
    for use in (
        lambda: Pool.load(folder),
        lambda: Pool.load(folder, verify=False),
        lambda: remove_from_folder(folder, "b"),
        lambda: add_to_folder(folder, a.renamed("c")),
        lambda: Pool([b]).save(folder),
    ):
        with pytest.raises(PoolError, match=message) as caught:
            use()
        assert len(str(caught.value)) < 2000
    assert sorted(map(str, folder.rglob("*"))) == before


@pytest.mark.parametrize("name", ["experts", ".lock", "packed"])
def test_own_parts_that_are_links_are_not_followed(saved, tmp_path, name):
    (a, b), folder = saved
    home = tmp_path / "home"
    (home / "years of work").mkdir(parents=True)
    (home / "thesis.txt").write_text("years of work")
    if name == "experts":
        for expert in ("a", "b"):
            shutil.move(folder / "experts" / expert, home / expert)
        (folder / "experts").rmdir()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(home / "thesis.txt" if name == ".lock" else home)
    before = sorted(home.iterdir())
    for use in (
        lambda: Pool.load(folder),
        lambda: remove_from_folder(folder, "a"),  # would sweep all folders that aren't experts
        lambda: add_to_folder(folder, a.renamed("c")),
        lambda: Pool([a, b]).save(folder),
    ):
        with pytest.raises(PoolError, match=rf"{name} is a link, which is not followed"):
            use()
    assert sorted(home.iterdir()) == before
    assert (home / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("target", ["outside", "nowhere", "circle", "/dev/zero"])
def test_links_out_of_an_expert_are_not_followed(saved, tmp_path, name, target):
    _, folder = saved
    place, outside = folder / "experts/a" / name, tmp_path / "outside"
    shutil.move(place, outside)
    place.symlink_to(
        {"outside": outside, "nowhere": tmp_path / "nowhere", "circle": place}.get(target, target)
    )
    for read in (
        lambda: Pool.load(folder),
        lambda: Pool.load(folder, verify=False),
        lambda: Expert.load(place.parent),
    ):
        with pytest.raises(PhatgooseError, match=r"leads out of|can't be read|is missing"):
            read()
    remove_from_folder(folder, "a")
    assert Pool.load(folder).names == ("b",)
    assert outside.exists()


def test_links_inside_an_experts_folder_and_the_hubs_cache_are_fine(saved, tmp_path):
    (a, _), folder = saved
    place = folder / "experts/a"
    (place / "expert.json").rename(place / "real.json")
    (place / "expert.json").symlink_to("real.json")
    assert Expert.load(place).equals(a)
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / ("0" * 40)
    for where in (cache / "blobs", snapshot):
        where.mkdir(parents=True)
    whole = a.save(tmp_path / "one")
    for name in FILES:
        shutil.copyfile(whole / name, cache / "blobs" / name.upper())
        (snapshot / name).symlink_to(f"../../blobs/{name.upper()}")
    assert Expert.load(snapshot).equals(a)


@pytest.mark.parametrize("name", [*FILES, "../../pool.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_pipes_and_folders_are_refused_at_once(saved, name, kind):
    _, folder = saved
    place = folder / "experts/a" / name
    place.unlink()
    os.mkfifo(place) if kind == "pipe" else place.mkdir()
    for read in (
        lambda: Pool.load(folder),
        lambda: Pool.load(folder, verify=False),
        *([lambda: Expert.load(place.parent)] if name in FILES else []),
    ):
        with pytest.raises(PhatgooseError, match=r"is not a file that can be read"):
            read()


def test_a_terabyte_that_takes_no_room_is_not_hashed(saved):
    _, folder = saved
    os.truncate(folder / "experts/a/gates.safetensors", 2**40)
    with pytest.raises(PoolError, match=r"gates.safetensors is 1099511627776 bytes; at most \d+ can be read"):
        Pool.load(folder)


def test_shards_and_pickles_are_refused_by_name(saved):
    _, folder = saved
    place = folder / "experts/a"
    (place / "adapter_model.safetensors").rename(place / "adapter_model-00001-of-00002.safetensors")
    write_json(place / "adapter_model.safetensors.index.json", {"weight_map": {"a": "/etc/passwd"}})
    with pytest.raises(ExpertError, match=r"weights in several files .*: an index can name any file"):
        Expert.load(place)
    (place / "adapter_model.safetensors.index.json").unlink()
    (place / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ExpertError, match=r"adapter_model.bin, a pickle, which is refused"):
        Expert.load(place)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ([], None),
        (5, "the recorded base is not a fingerprint"),
        ({"spec": 5, "architecture": {}, "samples": {}}, "expected a spec, an architecture and samples"),
        (
            {"spec": "x", "architecture": {}, "samples": {"embedding": ["nan"]}},
            "'embedding' are not finite numbers",
        ),
        (
            {"spec": "x", "architecture": {}, "samples": {"embedding": "12"}},
            "'embedding' are not finite numbers",
        ),
        (
            {"spec": "x", "architecture": {}, "samples": {"embedding": [True]}},
            "'embedding' are not finite numbers",
        ),
        (
            {"spec": "x", "architecture": {}, "samples": {"embedding": [1e300]}},
            "'embedding' are not finite numbers",
        ),
    ],
)
def test_recorded_bases(saved, base, message):
    _, folder = saved
    path = folder / "experts/a/expert.json"
    record = read_json(path, ExpertError)
    record["provenance"]["base"] = base
    write_json(path, record)
    if message is None:
        assert Expert.load(path.parent).base is None
        return
    with pytest.raises(ExpertError, match=message):
        Expert.load(path.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ["a"]}, "can't name an expert"),
        ({"name": "../b"}, "can't name an expert"),
        ({"version": [1]}, "format version"),
        ({"version": "1" * 10**6}, "format version"),
        ({"provenance": []}, "provenance is not an object"),
        ({"provenance": {"dropped": 5}}, "what to leave out of an adapter is 5"),
        ({"provenance": {"dropped": [[]]}}, "can't be left out of an adapter"),
        ({"adapter_sha256": ["0"]}, "is damaged or was changed"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_records_of_another_kind(saved, change, message):
    _, folder = saved
    path = folder / "experts/a/expert.json"
    write_json(path, read_json(path, ExpertError) | change)
    with pytest.raises(ExpertError, match=message) as caught:
        Expert.load(path.parent)
    assert len(str(caught.value)) < 1000


def test_a_pool_of_nothing_but_damage_gives_a_short_list(saved):
    _, folder = saved
    changed(
        folder,
        lambda m: m.update(
            experts=[{"name": f"e{i}", "folder": f"experts/e{i}", "files": {}} for i in range(9999)]
        ),
    )
    with pytest.raises(PoolError, match="50 or more experts") as caught:
        Pool.load(folder)
    assert len(str(caught.value)) < 50_000


def test_a_pool_that_another_process_holds(saved, monkeypatch):
    (a, _), folder = saved
    monkeypatch.setattr(manifest, "LOCK_SECONDS", 0.2)
    with manifest.lock(folder), pytest.raises(PoolError, match=r"held by another process for 0.2 seconds"):
        add_to_folder(folder, a.renamed("c"))
    add_to_folder(folder, a.renamed("c"))
    assert Pool.load(folder).names == ("a", "b", "c")


def test_a_folder_without_permission_is_refused_in_a_word(saved, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.is_symlink", refuse)
    with pytest.raises(PoolError, match="pool can't be read: Permission denied"):
        Pool.load(saved[1])


def test_who_waits_for_a_pools_lock_is_told_once_and_then_goes_on(saved, monkeypatch, caplog):
    (a, _), folder = saved
    monkeypatch.setattr(locks, "NOTICE_SECONDS", 0.05)
    other = FileLock(folder / ".lock", thread_local=False)
    other.acquire()
    threading.Timer(0.5, other.release).start()
    add_to_folder(folder, a.renamed("c"))
    assert Pool.load(folder).names == ("a", "b", "c")
    (told,) = [r for r in caplog.records if r.name == locks.__name__]
    assert "waiting until another process is done with the pool" in told.getMessage()
    assert str(folder / ".lock") in told.getMessage()


def test_a_lock_that_is_never_given_back_is_an_error(saved, monkeypatch):
    _, folder = saved
    monkeypatch.setattr(locks, "NOTICE_SECONDS", 0.05)
    monkeypatch.setattr(manifest, "LOCK_SECONDS", 0.2)
    with (
        FileLock(folder / ".lock"),
        pytest.raises(PoolError, match=r"held by another process for 0\.2 seconds"),
    ):
        remove_from_folder(folder, "a")


@pytest.mark.parametrize("change", [lambda f: remove_from_folder(f, "a"), pack, unpack])
def test_a_pool_that_is_not_there_is_refused_and_not_made(tmp_path, change):
    with pytest.raises(PoolError, match=r"nowhere is not a folder; expected a pool made by"):
        change(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())

"""Packing and unpacking: the same bytes come back, nothing but the new rows is written,
a kill leaves the old pool or the new."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import files_of
from packing_fixtures import adapter, make_plain, make_zoo, pool_of
from phatgoose import Expert, Pool
from phatgoose.errors import PhatgooseError, PoolError
from phatgoose.experts.packed import pack as packing
from phatgoose.experts.packed.expert import PackedExpert
from phatgoose.experts.packed.pack import pack, unpack
from phatgoose.experts.pool_folder import add_to_folder, remove_from_folder, verify_folder
from phatgoose.files import read_json, sha256_file, write_json

DATA = Path(__file__).parent.parent / "data" / "adapterhub"


@pytest.fixture
def zoo(make_base, tmp_path):
    base = make_base("llama")
    return base, make_zoo(base, tmp_path / "made")


@pytest.fixture
def plain(make_base, tmp_path):
    base = make_base("llama")
    return base, make_plain(base, tmp_path / "made")


def stacks_of(folder):
    (path,) = (folder / "packed").iterdir()
    return path


def damage(folder, item, data, at=0):
    """Writes into the rows of one module."""
    file = stacks_of(folder)
    with open(file, "r+b") as rows:
        rows.seek(items_of(file)[item].begin + at)
        rows.write(data)


def test_every_kind_comes_back_to_the_byte(zoo, tmp_path):
    _, experts = zoo
    folder = pool_of(experts, tmp_path / "pool")
    before = files_of(folder)
    assert pack(folder) == {}
    assert not list(folder.rglob("adapter_model.safetensors"))
    assert not list(folder.rglob("gates.safetensors"))
    verify_folder(folder)
    loaded = Pool.load(folder)
    assert all(type(e) is PackedExpert for e in loaded.experts)
    assert loaded.names == tuple(e.name for e in experts)
    for expert, packed in zip(experts, loaded.experts, strict=True):
        assert packed.equals(expert)
        assert packed.hash == expert.hash
        assert dict(packed.sizes) == dict(expert.sizes)
        assert packed.base_copies.keys() == expert.base_copies.keys()
        assert all(torch.equal(t, expert.base_copies[k]) for k, t in packed.base_copies.items())
    pack(folder, spare=0)  # again, over itself
    verify_folder(folder)
    unpack(folder)
    assert files_of(folder) == before
    assert not (folder / "packed").exists()


def test_foreign_headers_and_gates_of_other_dtypes_come_back(plain, tmp_path):
    """Keys in another order, other metadata, spaces at the end of the header, gates in float16."""
    _, (a, b, *_) = plain
    folder = pool_of([a, b], tmp_path / "pool")
    place = folder / "experts" / a.name
    tensors = load_file(place / "adapter_model.safetensors")
    save_file(
        dict(reversed(tensors.items())), place / "adapter_model.safetensors", {"made": 'by\n”somebody"'}
    )
    raw = (place / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    (place / "adapter_model.safetensors").write_bytes(
        (length + 16).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * 16 + raw[8 + length :]
    )
    gates = {k: v.half() for k, v in load_file(place / "gates.safetensors").items()}
    weights_hash = sha256_file(place / "adapter_model.safetensors")
    metadata = {"adapter_sha256": weights_hash, "format": "phatgoose-gates", "version": "1"}
    save_file(gates, place / "gates.safetensors", metadata)
    (place / "expert.json").unlink()
    manifest = read_json(folder / "pool.json", PoolError)
    names = ("adapter_config.json", "adapter_model.safetensors", "gates.safetensors")
    manifest["experts"][0]["files"] = {n: sha256_file(place / n) for n in names}
    write_json(folder / "pool.json", manifest)
    before, hashes = files_of(folder), [e.hash for e in Pool.load(folder).experts]
    pack(folder)
    loaded = Pool.load(folder)
    assert [e.hash for e in loaded.experts] == hashes
    assert all(g.dtype == torch.float32 for g in loaded.experts[0].gates.values())
    unpack(folder)
    assert files_of(folder) == before


def test_a_packed_pool_saved_elsewhere_is_the_unpacked_one(zoo, tmp_path):
    _, experts = zoo
    folder = pool_of(experts, tmp_path / "pool")
    before = files_of(folder)
    pack(folder)
    Pool.load(folder).save(tmp_path / "other")
    assert files_of(tmp_path / "other") == before
    with pytest.raises(PoolError, match="is packed and can't be written as a whole"):
        Pool.load(folder).save(folder)


def test_adding_writes_only_the_new_rows_and_removing_only_the_manifest(plain, tmp_path):
    base, experts = plain
    folder = pool_of(experts[:3], tmp_path / "pool")
    pack(folder)
    file = stacks_of(folder)
    inode, old = file.stat().st_ino, file.read_bytes()
    early = Pool.load(folder)
    used = read_json(folder / "pool.json", PoolError)["packed"]["used"]
    add_to_folder(folder, experts[3])
    assert stacks_of(folder) == file
    assert file.stat().st_ino == inode
    for name, item in items_of(file).items():
        row = item.shape[1] * item.dtype.itemsize
        kept = used[name.replace(".lora_B.", ".lora_A.")] * row
        assert file.read_bytes()[item.begin : item.begin + kept] == old[item.begin : item.begin + kept]
    assert [e.hash for e in verify_folder(folder).experts] == [e.hash for e in experts]
    changed = file.read_bytes()
    stamp = file.stat().st_mtime_ns
    remove_from_folder(folder, experts[0].name)
    assert file.read_bytes() == changed
    assert file.stat().st_mtime_ns == stamp
    assert [e.hash for e in verify_folder(folder).experts] == [e.hash for e in experts[1:]]
    # Rows of a removed expert aren't used again: whoever opened the pool before still reads them.
    add_to_folder(folder, adapter(base, "plain", tmp_path / "made" / "late", seed=9))
    assert [e.hash for e in early.experts] == [e.hash for e in experts[:3]]
    unpack(folder)
    assert Pool.load(folder).names == (*(e.name for e in experts[1:]), "late")


def items_of(path):
    """The items of a file of stacks, with offsets from the file's beginning."""
    from dataclasses import replace

    from phatgoose.experts.files.safetensors_file import read_header

    raw, header = read_header(path)
    return {n: replace(i, begin=i.begin + len(raw), end=i.end + len(raw)) for n, i in header.items.items()}


def test_a_full_pack_is_packed_again_with_more_room(plain, tmp_path):
    base, experts = plain
    folder = pool_of(experts[:1], tmp_path / "pool")
    pack(folder, spare=0)
    files, hashes = set(), [experts[0].hash]
    for number in range(3):  # 24 rows each, of 64
        new = adapter(base, "tall", tmp_path / "made" / f"more-{number}", seed=30 + number)
        add_to_folder(folder, new)
        hashes.append(new.hash)
        files.add(stacks_of(folder).name)
    assert files == {"stacks-1.safetensors", "stacks-2.safetensors"}
    assert [e.hash for e in verify_folder(folder).experts] == hashes
    head = adapter(base, "embedding", tmp_path / "made" / "head", seed=99)  # modules that no stack is for
    add_to_folder(folder, head)
    assert stacks_of(folder).name == "stacks-3.safetensors"
    assert verify_folder(folder)["head"].hash == head.hash


def test_a_pool_of_which_all_was_removed_takes_experts_again(plain, tmp_path):
    _, experts = plain
    folder = pool_of(experts[:1], tmp_path / "pool")
    pack(folder)
    remove_from_folder(folder, experts[0].name)
    with pytest.raises(PoolError, match="empty pool"):
        Pool.load(folder)
    add_to_folder(folder, experts[1])
    assert verify_folder(folder).experts[0].hash == experts[1].hash
    remove_from_folder(folder, experts[1].name)
    with pytest.raises(PoolError, match="no expert that can be packed"):
        pack(folder)
    unpack(folder)
    assert read_json(folder / "pool.json", PoolError)["experts"] == []


@pytest.mark.parametrize("action", ["pack", "add", "unpack", "add to a full one"])
def test_a_kill_before_the_manifest_leaves_the_old_pool(plain, tmp_path, action, monkeypatch):
    _, experts = plain
    folder = pool_of(experts[:3], tmp_path / "pool")
    if action != "pack":
        pack(folder, spare=0 if "full" in action else 0.5)
        if "full" in action:
            manifest = read_json(folder / "pool.json", PoolError)
            manifest["packed"]["used"] = dict.fromkeys(manifest["packed"]["used"], 64)
            write_json(folder / "pool.json", manifest)
    work = {"pack": lambda: pack(folder), "unpack": lambda: unpack(folder)}.get(
        action, lambda: add_to_folder(folder, experts[3])
    )
    manifest = (folder / "pool.json").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_json", killed)  # nothing is cleaned up after it
        with pytest.raises(KeyboardInterrupt):
            work()
    assert (folder / "pool.json").read_bytes() == manifest
    assert [e.hash for e in verify_folder(folder).experts] == [e.hash for e in experts[:3]]
    work()
    there = experts if action.startswith("add") else experts[:3]
    assert [e.hash for e in verify_folder(folder).experts] == [e.hash for e in there]
    assert ("packed" in read_json(folder / "pool.json", PoolError)) == (action != "unpack")
    assert len(list((folder / "experts").iterdir())) == len(there)


def test_a_refused_add_leaves_everything_as_it_was(plain, make_base, tmp_path):
    _, experts = plain
    folder = pool_of(experts[:3], tmp_path / "pool")
    pack(folder)
    before = files_of(folder)
    stranger = adapter(make_base("llama", seed=5), "plain", tmp_path / "made" / "stranger")
    for expert in (experts[0], stranger):
        with pytest.raises(PhatgooseError, match=r"are named|expected the base"):
            add_to_folder(folder, expert)
    assert files_of(folder) == before


def test_a_full_disk_leaves_everything_as_it_was(plain, tmp_path, monkeypatch):
    from phatgoose.errors import StorageError

    _, experts = plain
    folder = pool_of(experts[:3], tmp_path / "pool")
    before = files_of(folder)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match="no space left"):
            pack(folder)
    assert files_of(folder) == before
    pack(folder)
    before = files_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match="no space left"):
            add_to_folder(folder, experts[3])
    assert files_of(folder) == before


def test_damaged_rows_are_found_by_verify_and_not_unpacked(plain, tmp_path):
    _, experts = plain
    folder = pool_of(experts, tmp_path / "pool")
    pack(folder)
    row = 48 * 4 * 4  # row 4: the second expert's
    damage(folder, "model.layers.1.mlp.down_proj.lora_A.float32", b"\x00\x00\x80\x3f", at=row)
    Pool.load(folder)  # values aren't read here
    damaged = r"the rows of plain-1 are damaged or were changed: its adapter_model.safetensors had sha256"
    with pytest.raises(PoolError, match=damaged):
        verify_folder(folder)
    before = files_of(folder)
    with pytest.raises(PoolError, match=damaged):
        unpack(folder)
    with pytest.raises(PoolError, match=damaged):
        pack(folder)
    with pytest.raises(PoolError, match=damaged):
        Pool.load(folder).save(tmp_path / "other")
    assert files_of(folder) == before
    remove_from_folder(folder, "plain-1")
    pack(folder)
    assert [e.hash for e in verify_folder(folder).experts] == [experts[i].hash for i in (0, 2, 3)]


def test_all_damaged_experts_are_named_at_once(plain, tmp_path):
    _, experts = plain
    folder = pool_of(experts, tmp_path / "pool")
    pack(folder)
    damage(folder, "model.layers.0.self_attn.q_proj.gate", bytes(32 * 4 * 2))
    with pytest.raises(PoolError, match="2 experts of") as caught:
        verify_folder(folder)
    assert [name in str(caught.value) for name in ("plain-0", "plain-1", "wide")] == [True, True, False]


def test_values_that_are_not_finite_are_found_by_verify(plain, tmp_path):
    """In a pool that says itself that they belong there."""
    import hashlib

    _, experts = plain
    folder = pool_of(experts[:1], tmp_path / "pool")
    pack(folder)
    damage(folder, "model.layers.0.self_attn.q_proj.lora_B.float32", b"\x00\x00\xc0\x7f")
    manifest = read_json(folder / "pool.json", PoolError)
    source = Pool.load(folder, verify=False).experts[0].source
    digest = hashlib.sha256(b"".join(source.original("adapter_model.safetensors"))).hexdigest()
    entry = manifest["experts"][0]
    entry["files"] = {
        "adapter_config.json": entry["files"]["adapter_config.json"],
        "adapter_model.safetensors": digest,
    }
    del entry["packed"]["files"]["gates.header"], entry["packed"]["gates"]
    write_json(folder / "pool.json", manifest)
    with pytest.raises(PhatgooseError, match=r"lora_B.weight has 1 of \d+ values that are NaN"):
        verify_folder(folder)


def adapterhub_expert(base, folder):
    """A bottleneck adapter in AdapterHub's format, widened to the base's sizes."""
    shutil.copytree(DATA / "llama" / "houlsby", folder)
    width = base.model.config.hidden_size
    tensors = {
        k: torch.randn([width if n == 8 else n for n in t.shape])
        for k, t in load_file(folder / "adapter.safetensors").items()
    }
    save_file(tensors, folder / "adapter.safetensors")
    config = read_json(folder / "adapter_config.json", PoolError)
    write_json(folder / "adapter_config.json", config | {"hidden_size": width})
    return Expert.from_adapterhub(folder, name=folder.name, provenance={"base": base.fingerprint.to_json()})


def test_what_cannot_be_packed_stays_beside_it(plain, make_base, tmp_path):
    base, experts = plain
    folder = pool_of(experts[:2], tmp_path / "pool")
    bottleneck = adapterhub_expert(base, tmp_path / "made" / "houlsby")
    add_to_folder(folder, bottleneck)
    before = files_of(folder)
    assert pack(folder) == {"houlsby": "is an adapter in AdapterHub's format, which has no low-rank rows"}
    loaded = verify_folder(folder)
    assert [type(e) is PackedExpert for e in loaded.experts] == [True, True, False]
    assert loaded["houlsby"].hash == bottleneck.hash
    add_to_folder(folder, bottleneck.renamed("again"))
    assert Pool.load(folder).names == (*loaded.names, "again")
    remove_from_folder(folder, "again")
    unpack(folder)
    assert files_of(folder) == before
    Pool([bottleneck]).save(tmp_path / "alone")
    with pytest.raises(PoolError, match="no expert that can be packed"):
        pack(tmp_path / "alone")


def test_other_refusals(plain, tmp_path):
    _, experts = plain
    folder = pool_of(experts[:1], tmp_path / "pool")
    with pytest.raises(PoolError, match="is not packed"):
        unpack(folder)
    with pytest.raises(PoolError, match="spare is -1"):
        pack(folder, spare=-1)
    (folder / "experts" / experts[0].name / "adapter_model.safetensors").write_bytes(b"damaged")
    before = files_of(folder)
    with pytest.raises(PhatgooseError, match="not a whole safetensors file"):
        pack(folder)
    assert files_of(folder) == before


def test_a_pool_that_was_unpacked_meanwhile_says_so(zoo, tmp_path):
    _, experts = zoo
    folder = pool_of(experts, tmp_path / "pool")
    pack(folder)
    opened = Pool.load(folder)
    unpack(folder)

    def read_all():
        for expert in opened.experts:
            for path in expert.sizes:
                assert expert.updates[path] is not None

    with pytest.raises(PoolError, match="was unpacked or removed since this pool was opened: load it again"):
        read_all()


@pytest.mark.parametrize("name", ["pack", "unpack", "verify_folder"])
def test_the_old_module_still_has_what_the_docs_named(name):
    from phatgoose.experts import packing, pool_folder
    from phatgoose.experts.packed import pack

    with pytest.deprecated_call(match=rf"{name} now"):
        found = getattr(packing, name)
    assert found is getattr(pool_folder if name == "verify_folder" else pack, name)
    with pytest.raises(AttributeError, match="no attribute 'others'"):
        packing.others  # noqa: B018

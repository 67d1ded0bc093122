"""Pools on disk: round trips, incremental changes, damage and crafted manifests."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

from phatgoose.errors import BaseModelError, PoolError, UnknownName
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.experts.pool_folder import add_to_folder, remove_from_folder
from phatgoose.files import read_json, write_json


@pytest.fixture
def three(make_base, make_expert):
    base = make_base("llama")
    return base, [
        make_expert(base, n, rank=r, seed=i) for i, (n, r) in enumerate([("a", 2), ("b", 3), ("c", 4)])
    ]


def files_of(folder):
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_round_trip_add_and_remove_leave_the_rest_alone(three, tmp_path):
    base, (a, b, c) = three
    folder = Pool([a, b]).save(tmp_path / "pool")
    before = files_of(folder)
    add_to_folder(folder, c)
    loaded = Pool.load(folder)
    assert loaded.names == ("a", "b", "c")
    assert [e.hash for e in loaded.experts] == [e.hash for e in (a, b, c)]
    assert loaded.base == base.fingerprint
    after = files_of(folder)
    assert all(after[name] == before[name] for name in before if name.startswith("experts/"))
    remove_from_folder(folder, "a")
    assert Pool.load(folder).names == ("b", "c")
    assert not (folder / "experts/a").exists()
    loaded = Pool.load(folder)
    loaded.save(folder)  # nothing is written again
    assert {k: v for k, v in files_of(folder).items() if k.startswith("experts/")} == {
        k: v for k, v in after.items() if k.startswith("experts/") and not k.startswith("experts/a/")
    }


def test_replacing_an_expert_under_its_name(three, tmp_path):
    _, (a, b, _) = three
    folder = Pool([a, b]).save(tmp_path / "pool")
    changed = a.with_gates({p: g * 2 + 1 for p, g in a.gates.items()})
    Pool([changed, b]).save(folder)
    assert Pool.load(folder)["a"].hash == changed.hash
    assert sorted(p.name for p in (folder / "experts").iterdir()) == ["a.2", "b"]


def test_a_kill_before_the_manifest_leaves_the_old_pool(three, tmp_path, monkeypatch):
    import phatgoose.experts.pool_folder as module

    _, (a, b, c) = three
    folder = Pool([a, b]).save(tmp_path / "pool")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        add_to_folder(folder, c)
    monkeypatch.undo()
    assert Pool.load(folder).names == ("a", "b")
    add_to_folder(folder, c)
    assert Pool.load(folder).names == ("a", "b", "c")


def test_a_kill_during_the_first_save_can_be_followed_by_another(three, tmp_path, monkeypatch):
    import phatgoose.experts.pool as module

    _, (a, b, _) = three

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        Pool([a, b]).save(tmp_path / "pool")
    monkeypatch.undo()
    Pool([a, b]).save(tmp_path / "pool")
    assert Pool.load(tmp_path / "pool").names == ("a", "b")
    assert sorted(os.listdir(tmp_path / "pool" / "experts")) == ["a", "b"]  # written once


def test_experts_that_stand_where_a_pool_comes_are_taken_as_they_are_and_others_left_alone(three, tmp_path):
    (_, (a, b, c)), proj = three, tmp_path / "proj"
    for expert in (a, b, c):
        expert.save(proj / "experts" / expert.name)
    notes = proj / "experts" / "notes"
    notes.mkdir()
    (notes / "log.txt").write_text("mine")
    before = files_of(proj)
    pool = Pool([Expert.load(proj / "experts" / n) for n in "ab"]).save(proj)
    assert Pool.load(pool).names == ("a", "b")
    remove_from_folder(pool, "a")
    left = files_of(proj)
    assert {k: v for k, v in before.items() if not k.startswith("experts/a/")} == {
        k: v for k, v in left.items() if k.startswith("experts/")
    }
    changed = b.with_gates({p: g + 1 for p, g in b.gates.items()})
    Pool([changed, c.renamed("notes")]).save(pool)  # whose names are taken
    assert sorted(os.listdir(proj / "experts")) == ["b.2", "c", "notes", "notes.2"]
    assert (notes / "log.txt").read_text() == "mine"


def _add(folder, expert, barrier):
    barrier.wait()
    add_to_folder(folder, expert)


def test_two_who_add_the_first_expert_both_do(three, tmp_path):
    _, (a, b, _) = three
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=_add, args=(tmp_path / "pool", e, barrier)) for e in (a, b)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(Pool.load(tmp_path / "pool").names) == ["a", "b"]
    with pytest.raises(PoolError, match="is a pool already"):
        Pool([a]).save(tmp_path / "pool", replace=False)


def test_refusals_in_memory(three, make_base, make_expert):
    _, (a, b, _) = three
    with pytest.raises(PoolError, match="at least one expert"):
        Pool([])
    with pytest.raises(PoolError, match="two experts are named 'a'"):
        Pool([a, b.renamed("a")])
    with pytest.raises(UnknownName, match="did you mean"):
        Pool([a.renamed("past-tense"), b])["past_tense"]
    with pytest.raises(BaseModelError, match="'a' and 'stranger'"):
        Pool([a, make_expert(make_base("llama", seed=3), "stranger", seed=7)])
    other = make_base("gpt2")
    with pytest.raises((PoolError, BaseModelError)):
        Pool([a, make_expert(other, "gpt", seed=8)])


def test_damage_is_named(three, tmp_path):
    _, (a, b, _) = three
    folder = Pool([a, b]).save(tmp_path / "pool")
    weights = folder / "experts/b/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        PoolError, match=r"experts/b/adapter_model.safetensors is damaged or was changed: expected sha256"
    ):
        Pool.load(folder)
    weights.write_bytes(whole)
    (folder / "experts/a/gates.safetensors").unlink()
    with pytest.raises(PoolError, match=r"experts/a/gates.safetensors is missing"):
        Pool.load(folder)
    remove_from_folder(folder, "a")  # a damaged expert can be removed
    assert Pool.load(folder).names == ("b",)


@pytest.mark.parametrize(
    "place", ["../outside", "/etc", "experts/../../x", "experts/.hidden", "elsewhere/b", "experts/a/b"]
)
def test_paths_out_of_the_folder_are_refused(three, tmp_path, place):
    _, (a, _, _) = three
    folder = Pool([a]).save(tmp_path / "pool")
    manifest = read_json(folder / "pool.json", PoolError)
    manifest["experts"][0]["folder"] = place
    write_json(folder / "pool.json", manifest)
    with pytest.raises(PoolError, match="expected experts/NAME inside the pool"):
        Pool.load(folder)


def test_links_out_of_the_folder_are_refused(three, tmp_path):
    _, (a, _, _) = three
    folder = Pool([a]).save(tmp_path / "pool")
    outside = a.save(tmp_path / "outside")
    for name in os.listdir(folder / "experts/a"):
        (folder / "experts/a" / name).unlink()
    (folder / "experts/a").rmdir()
    (folder / "experts/a").symlink_to(outside)
    with pytest.raises(PoolError, match="a link that leads out of the pool"):
        Pool.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "format version 2"),
        (lambda m: m.pop("format"), "not a pool's manifest"),
        (lambda m: m.update(experts={}), "experts is not a list"),
        (lambda m: m["experts"].append({"name": "x"}), "expert 1 lacks"),
        (lambda m: m["experts"][0]["files"].update({"../../x": "0"}), "which no expert has"),
        (lambda m: m["experts"][0]["files"].pop("gates.safetensors"), "not listed in the pool's manifest"),
        (lambda m: m.update(experts=[]), "empty pool"),
    ],
)
def test_crafted_manifests(three, tmp_path, change, message):
    _, (a, _, _) = three
    folder = Pool([a]).save(tmp_path / "pool")
    manifest = read_json(folder / "pool.json", PoolError)
    change(manifest)
    write_json(folder / "pool.json", manifest)
    with pytest.raises(PoolError, match=message):
        Pool.load(folder)


def test_folders_of_other_things_are_not_touched(three, tmp_path):
    _, (a, _, _) = three
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(PoolError, match="something else than a pool"):
        Pool([a]).save(tmp_path / "home")
    with pytest.raises(PoolError, match="is not a folder"):
        Pool.load(tmp_path / "nowhere")
    assert os.listdir(tmp_path / "home") == ["letter.txt"]


def test_warnings_say_what_a_user_should_know(make_base, make_expert):
    base = make_base("llama")
    a = make_expert(base, "a", targets=["q_proj", "v_proj"])
    flat = a.with_gates({p: torch.ones_like(g) for p, g in a.gates.items()}).renamed("flat")
    lonely = make_expert(base, "lonely", targets=["layers.1.mlp.up_proj"], gates=False, seed=2)
    found = "\n".join(Pool([a, flat, lonely]).warnings())
    assert "flat: its gate is constant, so it says nothing, at 4 modules" in found
    assert "lonely: has no gates" in found
    assert "lonely: the only expert at 1 modules (first: model.layers.1.mlp.up_proj)" in found
    assert "a and flat: the same adapter twice" in found
    assert Pool([a]).warnings() == []


def test_all_damaged_experts_are_named_at_once(three, tmp_path):
    _, experts = three
    folder = Pool(experts).save(tmp_path / "pool")
    for name in (experts[0].name, experts[2].name):
        (folder / "experts" / name / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(PoolError, match="2 experts of") as caught:
        Pool.load(folder)
    assert all(f"experts/{e.name}/" in str(caught.value) for e in (experts[0], experts[2]))
    assert f"experts/{experts[1].name}/" not in str(caught.value)

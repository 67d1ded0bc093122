"""A packed pool routes as its folders do, with the rows where they stand in the file."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from conftest import relative
from packing_fixtures import adapter, make_plain, make_zoo, pool_of
from phatgoose import PHATGOOSE, Pool, route, unroute
from phatgoose.experts.packed.pack import pack
from phatgoose.experts.packed.stack_file import writing
from phatgoose.experts.pool_folder import remove_from_folder
from phatgoose.models.attach import site as routed
from phatgoose.models.attach.attach import routing_of
from phatgoose.routers import Single, Uniform


def batch(base):
    ids = torch.randint(2, 300, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def poison(folder, name):
    """Overwrites an expert's rows with NaN."""
    source = Pool.load(folder)[name].source
    with writing(source.file.path) as put:
        for pair in source.layout.pairs.values():
            for stack, width in zip((pair.down, pair.up), pair.widths, strict=True):
                put(stack, source.starts[pair.index], torch.full((pair.rank, width), torch.nan))


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("router", [PHATGOOSE(2), PHATGOOSE(9), Uniform(), Single(1)], ids=repr)
def test_it_equals_the_unpacked_pool(make_base, tmp_path, router, backend):
    base = make_base("llama")
    folder = pool_of(make_plain(base, tmp_path / "made"), tmp_path / "pool")
    plain = Pool.load(folder)
    expected = logits(route(base, plain, router, backend_name=backend), batch(base))
    pack(folder)
    found = logits(route(base, Pool.load(folder), router, backend_name=backend), batch(base))
    assert relative(found, expected) < 1e-6
    assert routing_of(base).copied == {}
    poison(folder, "plain-1")
    remove_from_folder(folder, "plain-1")  # now there are rows that nobody owns
    few = Pool([e for e in plain.experts if e.name != "plain-1"])
    expected = logits(route(base, few, router, backend_name=backend), batch(base))
    found = logits(route(base, Pool.load(folder), router, backend_name=backend), batch(base))
    assert relative(found, expected) < 1e-6


def test_the_rows_are_the_files_own(make_base, tmp_path):
    base = make_base("llama")
    folder = pool_of(make_plain(base, tmp_path / "made"), tmp_path / "pool")
    pack(folder)
    pool = Pool.load(folder)
    route(base, pool)
    before = {
        site.path: (site.stack.A.data_ptr(), site.stack.B.data_ptr()) for site in routing_of(base).sites
    }
    logits(base.model, batch(base))
    stacks = pool.experts[0].source.file.stacks
    for site in routing_of(base).sites:
        pointers = tuple(stacks[f"{site.path}.lora_{part}.float32"].data_ptr() for part in "AB")
        assert (site.stack.A.data_ptr(), site.stack.B.data_ptr()) == before[site.path] == pointers
    # Gates that were let go of are read again.
    assert torch.equal(pool.experts[0].gates[site.path], Pool.load(folder).experts[0].gates[site.path])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_kind_of_adapter(make_base, tmp_path, dtype):
    """All in one pool; where rows must be copied, it is said."""
    base = make_base("llama")
    experts = [e for e in make_zoo(base, tmp_path / "made") if e.name != "ungated"]
    folder = pool_of(experts, tmp_path / "pool")
    expected = logits(route(base, Pool.load(folder), PHATGOOSE(3), dtype=dtype), batch(base))
    pack(folder)
    found = logits(route(base, Pool.load(folder), PHATGOOSE(3), dtype=dtype), batch(base))
    assert relative(found, expected) < 1e-6
    copied = routing_of(base).copied
    assert "is packed in torch." in copied["model.layers.0.self_attn.q_proj"]
    assert ("model.embed_tokens" in copied) == (dtype == torch.float64)
    plain = logits(unroute(base), batch(base))
    assert not torch.allclose(plain, found)


def test_in_bfloat16_on_a_bfloat16_base_nothing_is_copied(make_base, tmp_path):
    base = make_base("llama", dtype=torch.bfloat16)
    experts = [
        adapter(base, "plain", tmp_path / "made" / n, torch.bfloat16, seed=i) for i, n in enumerate("abc")
    ]
    folder = pool_of(experts, tmp_path / "pool")
    expected = logits(route(base, Pool.load(folder)), batch(base))
    pack(folder)
    assert torch.equal(logits(route(base, Pool.load(folder)), batch(base)), expected)
    assert routing_of(base).copied == {}
    route(base, Pool.load(folder), dtype=torch.float32)
    assert len(routing_of(base).copied) == 14


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_file_that_memory_may_not_hold_is_read_ahead(make_base, tmp_path, backend, monkeypatch):
    base = make_base("llama")
    folder = pool_of(make_plain(base, tmp_path / "made"), tmp_path / "pool")
    pack(folder)
    expected = logits(route(base, Pool.load(folder), backend_name=backend), batch(base))
    assert not any(site.stack.prefetch for site in routing_of(base).sites)
    size = Pool.load(folder).experts[0].source.file.bytes
    monkeypatch.setattr(routed, "available_bytes", lambda: 2 * size - 2)
    assert torch.equal(logits(route(base, Pool.load(folder), backend_name=backend), batch(base)), expected)
    assert all(site.stack.prefetch for site in routing_of(base).sites)
    route(base, Pool(Pool.load(folder).experts), dtype=torch.bfloat16)  # copied rows are in memory
    assert not any(site.stack.prefetch for site in routing_of(base).sites)


@pytest.mark.parametrize("made", [make_plain, make_zoo])
def test_a_routed_model_can_be_copied_and_pickled(make_base, tmp_path, made, monkeypatch):
    base = make_base("llama")
    folder = pool_of(made(base, tmp_path / "made"), tmp_path / "pool")
    pack(folder)
    monkeypatch.chdir(tmp_path)
    model = route(base.model, Pool.load("pool"), Uniform())
    expected = logits(model, batch(base))
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    monkeypatch.chdir("/")
    for twin in twins:
        assert torch.equal(logits(twin, batch(base)), expected)
        route(twin, routing_of(twin).pool, Uniform())  # reads the pool's files again
        assert torch.equal(logits(twin, batch(base)), expected)

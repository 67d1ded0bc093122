"""Whole models whose pool has less of the device than it needs, against the same pool resident."""

from __future__ import annotations

import copy

import pytest
import torch
from test_routed import PHATGOOSE, Pool, batch_of, logits, mixed, relative, route, routing_of, trace, unroute

from packing_fixtures import adapter, make_plain, pool_of
from phatgoose.errors import RoutingError
from phatgoose.experts.packed.pack import pack
from phatgoose.models.attach.attach import cache_use
from phatgoose.models.attach.options import parse_bytes
from phatgoose.ops.offload.experts import OffloadedExperts
from phatgoose.routers import Arrow, Uniform
from phatgoose.routers.masked import Masked, Switches

__all__ = ["mixed"]  # a fixture


def budget_of(base, share):
    """The least that is needed, and this share of what all would take beside it. Routes the base."""
    route(base, routing_of(base).pool, routing_of(base).router, device_memory="1TB", backend_name="torch")
    use, budget = cache_use(base), routing_of(base).budget
    least = budget.resident + sum(one.bytes(one.min_capacity) for one in budget.offloaded)
    return least + int(share * (use.resident_bytes + use.pool_bytes - least))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_logits_are_the_resident_pools(mixed, family, share):
    base, pool = mixed(family)
    batch = batch_of(base)
    route(base, pool)
    expected = logits(base, batch)
    budget = budget_of(base, share)
    route(base, pool, device_memory=budget)
    for _ in range(2):
        assert relative(logits(base, batch), expected) < 1e-6
    use = cache_use(base)
    assert use.resident_bytes + use.cache_bytes <= use.budget_bytes == budget
    assert use.cache_bytes <= use.pool_bytes
    assert use.experts.misses > 0
    assert (use.experts.evictions == 0) == (share == 1)
    there = [one._state for one in routing_of(base).budget.offloaded]
    arenas = [t for one in there for t in (*one.rows.on_device, *one.gates.on_device)]
    assert sum(t.numel() * t.element_size() for t in arenas) == use.cache_bytes
    unroute(base)
    assert cache_use(base) is None


def test_bfloat16_generation_with_a_cache_and_beams(mixed):
    base, pool = mixed("llama", dtype=torch.bfloat16)
    batch = base.tokenizer(["the quick brown", "yes"], return_tensors="pt", padding=True, padding_side="left")
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    route(base, pool, backend_name="reference")
    expected = base.model.generate(**batch, **settings)
    route(base, pool, backend_name="reference", device_memory=budget_of(base, 0.3))
    assert torch.equal(base.model.generate(**batch, **settings), expected)
    assert cache_use(base).experts.hits > 0


def test_a_packed_pool_stays_where_it_is(make_base, tmp_path):
    base = make_base("llama")
    folder = pool_of(make_plain(base, tmp_path / "experts"), tmp_path / "pool")
    pack(folder)
    pool, batch = Pool.load(folder), batch_of(base)
    route(base, pool)
    expected = logits(base, batch)
    route(base, pool, device_memory=budget_of(base, 0.2))
    assert relative(logits(base, batch), expected) < 1e-6
    assert routing_of(base).copied == {}
    copied = copy.deepcopy(base.model)
    with torch.no_grad():
        assert relative(copied(**batch, use_cache=False).logits, expected) < 1e-6


def test_traces_with_margins_see_the_same(mixed):
    base, pool = mixed("llama")
    batch, seen = batch_of(base), []
    for memory in (None, 0.0):
        route(base, pool, device_memory=memory if memory is None else budget_of(base, memory))
        with trace(base, margins=True) as one:
            logits(base, batch)
        seen.append(one)
    for a, b in zip(seen[0].choices, seen[1].choices, strict=True):
        assert torch.equal(a.experts, b.experts)
        assert torch.allclose(a.weights.float(), b.weights.float(), atol=1e-3)
        assert torch.allclose(a.margins.float(), b.margins.float(), atol=2e-3, equal_nan=True)
    assert all(site.router.gates.is_cpu for site in routing_of(base).sites)


def test_what_cannot_be_cached_stays_and_is_counted(make_base, tmp_path):
    base = make_base("llama")
    kinds = ("plain", "bias", "dora", "ia3", "embedding")
    pool = Pool([adapter(base, k, tmp_path / k, seed=i) for i, k in enumerate(kinds)])
    batch = batch_of(base)
    route(
        base, pool, backend_name="reference"
    )  # padding ties all scores here, and torch's topk leaves open which comes first
    expected = logits(base, batch)
    route(base, pool, backend_name="torch", device_memory=budget_of(base, 0.1))
    assert relative(logits(base, batch), expected) < 1e-6
    whole = [site for site in routing_of(base).sites if not isinstance(site.fused, OffloadedExperts)]
    assert [site.path for site in whole] == ["model.embed_tokens"]
    kept = whole[0].stack
    tensors = (kept.A, kept.B, whole[0].router.gates)
    assert cache_use(base).resident_bytes > sum(t.numel() * t.element_size() for t in tensors)


def test_compiled_and_offloaded(mixed, tmp_path):
    from accelerate import cpu_offload

    base, pool = mixed("llama", layers=1)
    batch = batch_of(base)
    route(base, pool)
    expected = logits(base, batch)
    budget = budget_of(base, 0.2)
    route(base, pool, device_memory=budget)
    torch._dynamo.reset()
    compiled = torch.compile(base.model, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            assert relative(compiled(**batch, use_cache=False).logits, expected) < 1e-5
    unroute(base)
    cpu_offload(base.model)
    route(base.model, pool, any_base=True, device_memory=budget)
    assert relative(logits(base, batch), expected) < 1e-5


def test_refusals_leave_the_model_as_it_was(mixed):
    base, pool = mixed("llama")
    batch = batch_of(base)
    plain = logits(base, batch)
    for bad in ("much", "8 pounds", "-1", 0, True, "", "0.2B"):
        with pytest.raises(RoutingError, match="device_memory is"):
            route(base, pool, device_memory=bad)
    with pytest.raises(
        RoutingError, match=r"needs ([\d,]+) at least.*one expert at each of 14 modules"
    ) as refused:
        route(base, pool, device_memory=1000)
    for router in (Arrow(), Uniform(), PHATGOOSE(ungated="weights")):
        pools = pool if router != PHATGOOSE(ungated="weights") else ungated(pool)
        with pytest.raises(RoutingError, match=rf"{type(router).__name__} doesn't choose by gates"):
            route(base, pools, router, device_memory="1GB")
    assert torch.equal(logits(base, batch), plain)
    least = int(str(refused.value).split("needs ")[1].split(" at least")[0].replace(",", ""))
    with pytest.raises(RoutingError, match="at least"):
        route(base, pool, device_memory=least - 1)
    route(base, pool, device_memory=least)
    with pytest.raises(RoutingError, match="no backward pass"):
        base.model(
            **batch, labels=batch["input_ids"], use_cache=False
        ) if base.model.requires_grad_() else None


def ungated(pool):
    from dataclasses import replace

    return Pool([replace(pool.experts[0], gates=None), *pool.experts[1:]])


def test_switched_off_experts_are_refused(mixed):
    base, pool = mixed("llama")
    switches = Switches()
    route(base, pool, Masked(PHATGOOSE(), switches), device_memory="1GB")
    logits(base, batch_of(base))
    switches.allowed = torch.ones(1, len(pool), dtype=torch.bool)
    with pytest.raises(RoutingError, match="can't be switched off"):
        logits(base, batch_of(base))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1, 1),
        ("17", 17),
        ("8GB", 8 * 10**9),
        ("1.5 gib", 3 * 2**29),
        ("2M", 2 * 10**6),
        (" 3tb ", 3 * 10**12),
    ],
)
def test_bytes_as_people_write_them(text, expected):
    assert parse_bytes(text) == expected

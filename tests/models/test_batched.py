"""Tokens of one pass on different routes come out as if each had had a model of its own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

from conftest import hooked, make_tokenizer
from encoder_fixtures import make_encoder, signed
from phatgoose.errors import RoutingError, UnknownName
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import prompted, route, unroute
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.base import Base
from phatgoose.models.batched.attach import MultiRouter
from phatgoose.models.batched.plan import BatchPlan
from phatgoose.models.batched.version import PoolVersion, Route
from phatgoose.models.trace.record import trace
from phatgoose.ops import backend
from phatgoose.routers import PHATGOOSE, Random, Retrieval, Router, Single, SoftCentroid, Uniform, WeightOnly
from phatgoose.routers.router import BoundRouter


def pools(base, make_expert, targets=None):
    experts = [
        make_expert(base, name, rank=2 + i, seed=i, targets=targets[i] if targets else None)
        for i, name in enumerate(["a", "b", "c", "d"])
    ]
    return Pool(experts[:3]), Pool(experts[1:])


def inputs(base, rows=8, length=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 300, (rows, length), generator=generator)
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out["attention_mask"][1, :4] = 0
    if base.is_encoder_decoder:
        out["decoder_input_ids"] = ids[:, :5]
    return out


def run(base, batch):
    with torch.no_grad():
        return base.model(**batch).logits


def assert_rows(found, wanted, dtype):
    error = (found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
    if dtype == torch.float32:
        assert error.max() < 1e-4
    else:  # another batch rounds otherwise, which tips the odd choice, and with it what follows
        assert error.sort().values[1] < 0.02


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_goes_its_own_way(make_base, make_expert, family, dtype):
    base = make_base(family, dtype=dtype)
    first, second = pools(base, make_expert)
    batch = inputs(base)
    asked = [
        (first, PHATGOOSE()), None, (second, PHATGOOSE(top_k=1)), (first, Single("c")), (first, Single("a")),
        (second, Uniform()), (first, Random(seed=3)), (second, PHATGOOSE(top_k=2)),
    ]  # fmt: skip
    versions = {id(pool): PoolVersion(base, pool) for pool in (first, second)}
    multi_router = MultiRouter(base.model)
    for version in versions.values():
        multi_router.attach(version)
    plan = BatchPlan([None if one is None else Route(versions[id(one[0])], one[1]) for one in asked])
    with multi_router.following(plan):
        found = run(base, batch)
    for version in versions.values():
        multi_router.detach(version)
    bare = run(base, batch)
    assert torch.equal(found[1], bare[1])
    for row, one in enumerate(asked):
        if one is None:
            continue
        route(base, *one)
        assert_rows(found[row], run(base, batch)[row], dtype)
        assert (found[row] - bare[row]).abs().max() > 0.1
        unroute(base)


def test_one_way_for_all_is_what_route_gives(make_base, make_expert):
    base = make_base("llama")
    pool, _ = pools(base, make_expert)
    batch = inputs(base)
    version, multi_router = PoolVersion(base, pool), MultiRouter(base.model)
    multi_router.attach(version)
    with multi_router.following(BatchPlan([Route(version, PHATGOOSE())] * 8)):
        found = run(base, batch)
    assert torch.equal(run(base, batch), run(copy.copy(base), batch))  # without a plan: the base
    multi_router.detach(version)
    assert not hooked(base.model)
    assert torch.equal(found, run(type(base)(route(base, pool), base.tokenizer, "x"), batch))


def test_the_backend_is_that_of_the_device_that_offloaded_weights_run_on(make_base, make_expert):
    base = make_base("llama")
    pool, _ = pools(base, make_expert)
    cpu_offload(base.model)
    assert base.model.device.type == "meta"
    assert base.device.type == "cpu"
    version, resident = PoolVersion(base, pool), backend("auto", "cpu")
    assert version.ops is resident
    assert set(Route(version, PHATGOOSE()).fused) == (set(version.sites) if resident.fuse else set())


@pytest.mark.parametrize("router", [PHATGOOSE(), Uniform(), PHATGOOSE(top_k=1), WeightOnly()])
def test_experts_that_are_off_are_as_if_the_pool_lacked_them(make_base, make_expert, router):
    base = make_base("llama")
    targets = [None, ["q_proj", "up_proj"], ["q_proj"]]
    experts = [make_expert(base, n, seed=i, targets=targets[i]) for i, n in enumerate("abc")]
    pool, batch = Pool(experts), inputs(base)
    version, multi_router = PoolVersion(base, pool), MultiRouter(base.model)
    chosen_route = Route(version, router, off=["b"])
    if chosen_route.needs_reference:
        chosen_route.calibrate()
    multi_router.attach(version)
    with multi_router.following(BatchPlan([chosen_route, None] * 4)):
        found = run(base, batch)
    multi_router.detach(version)
    route(base, pool.remove("b"), router)
    assert_rows(found[::2], run(base, batch)[::2], torch.float32)


@torch.no_grad()
def test_residual_streams_of_bottlenecks_follow_their_rows():
    zoo = Path(__file__).parent.parent / "data" / "adapterhub"
    model = AutoModelForCausalLM.from_pretrained(zoo / "llama").eval()
    expert = Expert.from_adapterhub(zoo / "llama" / "houlsby")
    ids = torch.randint(2, model.config.vocab_size, (3, 7), generator=torch.Generator().manual_seed(0))
    base = Base(model, make_tokenizer(), "zoo")
    bare = model(ids).logits
    version, multi_router = PoolVersion(base, Pool([expert]), RouteOptions(any_base=True)), MultiRouter(model)
    multi_router.attach(version)
    chosen_route = Route(version, Single(0))
    with multi_router.following(BatchPlan([None, chosen_route, chosen_route])):
        found = model(ids).logits
    with multi_router.following(BatchPlan([None, chosen_route, chosen_route], lengths=[7, 7, 7])):
        model(ids.reshape(1, -1))  # packed: the streams of its rows run as one, which mustn't raise
    multi_router.detach(version)
    assert not hooked(model)
    wanted = route(model, Pool([expert]), Single(0), any_base=True)(ids).logits
    assert torch.equal(found[0], bare[0])
    assert_rows(found[1:], wanted[1:], torch.float32)
    assert (found[1:] - bare[1:]).abs().max() > 0.01


def packed(base, rows):
    """The rows' tokens in one row, and the mask that keeps them apart."""
    lengths = [len(row) for row in rows]
    owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths))
    before = torch.arange(len(owner))
    open_ = (owner[:, None] == owner) & (before[:, None] >= before)
    mask = torch.zeros(open_.shape).masked_fill(~open_, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": torch.cat(rows)[None], "attention_mask": mask[None, None], "position_ids": positions}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_packed_sequences_go_their_own_ways_also_where_few_logits_are_asked(make_base, make_expert):
    base = make_base("llama")
    targets = ["q_proj", "down_proj", "lm_head"]
    pool = Pool([make_expert(base, n, seed=i, targets=targets) for i, n in enumerate("abc")])
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, 300, (n,), generator=generator) for n in (5, 1, 7, 1)]
    routers = [PHATGOOSE(), None, Random(seed=5), Single("b")]
    version, multi_router = PoolVersion(base, pool), MultiRouter(base.model)
    multi_router.attach(version)
    last = torch.tensor([4, 5, 12, 13])
    plan = BatchPlan([None if r is None else Route(version, r) for r in routers], [5, 1, 7, 1], kept=last)
    with multi_router.following(plan), torch.no_grad():
        found = base.model(**packed(base, rows), logits_to_keep=last).logits[0]
    with multi_router.following(BatchPlan(plan.routes, plan.lengths)), torch.no_grad():
        whole = base.model(**packed(base, rows)).logits[0, last]
    multi_router.detach(version)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    for i, (row, router) in enumerate(zip(rows, routers, strict=True)):
        model = unroute(base) if router is None else route(base, pool, router)
        with torch.no_grad():
            assert_rows(found[i], model(row[None]).logits[0, -1], torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_routers_that_read_text_are_told_it(make_base, make_expert, tmp_path, family):
    folder = make_encoder(tmp_path / "encoder", max_tokens=60)
    base = make_base(family)
    experts = [signed(make_expert(base, f"e{i}", seed=i, scale=0.4), folder, seed=i) for i in range(3)]
    pool = Pool(experts)
    routers = [Retrieval(str(folder)), None, SoftCentroid(str(folder)), Single("e1"), Retrieval(str(folder))]
    batch = inputs(base, rows=5)
    prompts = [
        tuple(row[mask.bool()].tolist())
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    version, multi_router = PoolVersion(base, pool), MultiRouter(base.model)
    multi_router.attach(version)
    made = {r: Route(version, r) for r in routers if r is not None}
    routes = [None if r is None else made[r] for r in routers]
    cut = 0 if base.is_encoder_decoder else 3  # the last tokens count as written
    told = [(p[: len(p) - cut], ()) for p in prompts]
    with multi_router.following(BatchPlan(routes, texts=told)):
        found = base.model(**batch).logits
    if family == "llama":  # the same, packed, and with what was read before
        rows = [torch.tensor(p) for p in prompts]
        lengths = [len(r) for r in rows]
        with multi_router.following(BatchPlan(routes, lengths, texts=told)):
            flat = base.model(**packed(base, rows)).logits[0].split(lengths)
        for row, mask in enumerate(batch["attention_mask"].bool()):
            torch.testing.assert_close(found[row][mask], flat[row], rtol=1e-4, atol=1e-4)
    with multi_router.following(BatchPlan(routes)), pytest.raises(RoutingError, match="is unknown"):
        base.model(**batch)
    multi_router.detach(version)
    for row, router in enumerate(routers):
        if router is None:
            continue
        route(base, pool, router)
        with prompted(base, [p for p, _ in told]):
            wanted = base.model(**batch).logits[row]
        unroute(base)
        real = slice(None) if base.is_encoder_decoder else batch["attention_mask"][row].bool()
        assert_rows(found[row][real], wanted[real], torch.float32)


@pytest.mark.parametrize("skip", [None, [2, 0, 0, 3, 0, 0, 0, 0]])
def test_loads_are_what_a_trace_sums_up(make_base, make_expert, skip):
    base = make_base("llama")
    targets = [None, ["q_proj", "up_proj"], ["q_proj"]]
    pool = Pool([make_expert(base, n, seed=i, targets=targets[i]) for i, n in enumerate("abc")])
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, 300, (5,), generator=generator) for _ in range(8)]
    version, multi_router = PoolVersion(base, pool), MultiRouter(base.model)
    multi_router.attach(version)
    routes = [
        Route(version, PHATGOOSE()),
        None,
        Route(version, Single("c")),
        Route(version, PHATGOOSE(top_k=1)),
    ] * 2
    plan = BatchPlan(routes, [5] * 8, count_loads=True, skip=skip)
    with multi_router.following(plan):
        watched = run(base, packed(base, rows))
    with multi_router.following(BatchPlan(routes, [5] * 8)):
        assert torch.equal(run(base, packed(base, rows)), watched)  # watching changes nothing
    multi_router.detach(version)
    weight, times = plan.summed_loads()[id(version)]
    assert times[1] == 0
    assert weight[1].sum() == 0
    for i in (0, 2, 3, 4):
        route(base, pool, routes[i].router)
        with trace(base) as recorded:
            run(base, {"input_ids": rows[i][None]})
        unroute(base)
        left_out = skip[i] if skip else 0
        wanted = torch.zeros(3, dtype=torch.float64)
        for choices in recorded.choices:
            real = choices.experts[left_out:].long()
            for e in range(3):
                wanted[e] += choices.weights[left_out:].double()[real == e].sum()
        torch.testing.assert_close(
            weight[i], wanted, atol=1e-2, rtol=1e-3
        )  # a trace's weights are half precision
        assert times[i] == (5 - left_out) * len(recorded.choices)


def test_what_cannot_be_is_refused(make_base, make_expert):
    base = make_base("llama")
    pool, _ = pools(base, make_expert)
    version, multi_router = PoolVersion(base, pool), MultiRouter(base.model)
    with pytest.raises(UnknownName, match="'e'"):
        Route(version, PHATGOOSE(), off=["e"])
    with pytest.raises(RoutingError, match="every expert is switched off"):
        Route(version, PHATGOOSE(), off=["a", "b", "c"])
    with pytest.raises(RoutingError, match="'a' is switched off"):
        Route(version, Single("a"), off=["a"])
    with pytest.raises(RoutingError, match="doesn't choose by scores"):
        Route(version, Random(), off=["a"])
    multi_router.attach(version)
    chosen_route = Route(version, PHATGOOSE())
    with (
        multi_router.following(BatchPlan([chosen_route, None, None])),
        pytest.raises(RoutingError, match="batch of 3 rows"),
    ):
        run(base, inputs(base))
    with (
        multi_router.following(BatchPlan([chosen_route, None], [3, 4])),
        pytest.raises(RoutingError, match="7 packed"),
    ):
        run(base, inputs(base))
    multi_router.detach(version)
    route(base, pool)
    with pytest.raises(RoutingError, match="routed already"):
        MultiRouter(base.model)


class Fussy(Router):
    """Chooses the first expert, and fails where the tokens it is shown hold a 77."""

    def __init__(self, error=IndexError):
        self.error = error

    def bind(self, candidates):
        return _Fussy(self.error)


class _Fussy(BoundRouter):
    def __init__(self, error):
        self.error = error

    def __call__(self, u, context, ops):
        if (context.tokens().ids == 77).any():
            raise self.error("fussy")
        return torch.zeros(len(u), 1, dtype=torch.long), torch.ones(len(u), 1)


@torch.no_grad()
def test_an_item_that_fails_goes_by_the_base_and_the_others_their_way(make_base, make_expert):
    base = make_base("llama")
    pool, _ = pools(base, make_expert)
    version, multi_router = PoolVersion(base, pool), MultiRouter(base.model)
    multi_router.attach(version)
    fussy, other = Route(version, Fussy()), Route(version, PHATGOOSE())
    batch = inputs(base, rows=5)
    batch["attention_mask"][:] = 1
    batch["input_ids"][batch["input_ids"] == 77] = 78
    routes = [fussy, fussy, other, None, fussy]
    with multi_router.following(BatchPlan(routes)):
        whole = run(base, batch)
    bare = run(base, batch)
    batch["input_ids"][1, 4] = 77
    bare_now = run(base, batch)
    rows = list(batch["input_ids"])
    for lengths in (None, [11] * 5):
        plan = BatchPlan(routes, lengths, failed={})
        with multi_router.following(plan):
            if lengths is None:
                found = run(base, batch)
            else:
                found = torch.stack(base.model(**packed(base, rows)).logits[0].split(lengths))
        assert list(plan.failed) == [1]
        assert str(plan.failed[1]) == "fussy"
        torch.testing.assert_close(found[1], bare_now[1], atol=1e-4, rtol=1e-4)
        for row in (0, 2, 3, 4):
            torch.testing.assert_close(found[row], whole[row], atol=1e-4, rtol=1e-4)
    assert (whole[0] - bare[0]).abs().max() > 0.01
    with (
        multi_router.following(BatchPlan(routes)),
        pytest.raises(IndexError, match="fussy"),
    ):  # nobody collects it
        run(base, batch)
    lost = BatchPlan([Route(version, Fussy(MemoryError))] * 5, failed={})
    with multi_router.following(lost), pytest.raises(MemoryError):
        run(base, batch)
    # All of a pass, by a kernel that takes it whole.
    for path in other.fused:
        other.fused[path] = lambda *_: 1 // 0
    alone = BatchPlan([other] * 5, failed={})
    with multi_router.following(alone):
        found = run(base, batch)
    assert sorted(alone.failed) == ([0, 1, 2, 3, 4] if other.fused else [])
    if other.fused:
        torch.testing.assert_close(found, bare_now)


def test_versions_come_and_go_while_others_stay(make_base, make_expert):
    base = make_base("llama")
    first, second = pools(base, make_expert)
    batch, multi_router = inputs(base), MultiRouter(base.model)
    old, new = PoolVersion(base, first), PoolVersion(base, second)
    multi_router.attach(old)
    chosen_route = Route(old, PHATGOOSE())
    with multi_router.following(BatchPlan([chosen_route] * 8)):
        before = run(base, batch)
    multi_router.attach(new)
    with multi_router.following(BatchPlan([chosen_route, Route(new, PHATGOOSE())] * 4)):
        both = run(base, batch)
    assert_rows(both[::2], before[::2], torch.float32)
    multi_router.detach(old)
    with multi_router.following(BatchPlan([Route(new, PHATGOOSE()), None] * 4)):
        after = run(base, batch)
    assert_rows(
        after[::2],
        run(Base(route(copy.deepcopy(base.model), second, any_base=True), base.tokenizer, "x"), batch)[::2],
        torch.float32,
    )
    multi_router.detach(new)
    assert not hooked(base.model)

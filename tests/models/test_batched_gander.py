"""Gander in passes of several requests, against a plain reference (tests/gander_oracle.py) and `route` alone."""

from __future__ import annotations

import pytest
import torch
from test_batched import packed, run

from gander_oracle import Oracle
from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.batched.attach import MultiRouter
from phatgoose.models.batched.plan import BatchPlan, SequenceMemory
from phatgoose.models.batched.version import PoolVersion, Route
from phatgoose.routers import PHATGOOSE, Gander, Single
from phatgoose.routers.masked import Masked, Switches
from phatgoose.routers.router import BoundRouter

GANDER = Gander(half_life=4)


def assert_rows(found, wanted, dtype=torch.float32):
    """Another expert on a token makes an error of about 1."""
    error = (found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
    assert error.max() < (1e-3 if dtype == torch.float32 else 0.1)


def ids_of(length, seed):
    return torch.randint(2, 300, (length,), generator=torch.Generator().manual_seed(seed))


def batch_of(base, rows):
    """The rows, padded on the left."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    if base.is_encoder_decoder:
        more = {"decoder_input_ids": torch.tensor([[0, 40, 50]] * len(rows))}
    else:
        more = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return {"input_ids": ids, "attention_mask": mask, **more}


@pytest.fixture
def made(make_base, make_expert):
    def make(family="llama", targets=None, names="abcd", **kwargs):
        base = make_base(family, layers=4, **kwargs)
        return base, [
            make_expert(base, n, rank=1 + i, seed=i, scale=0.6, targets=targets and targets[i])
            for i, n in enumerate(names)
        ]

    return make


@pytest.fixture
def attached():
    """Attaches pools to a base, and makes routes through them."""
    multi_routers = []

    def attach(base, *pools):
        multi_routers.append(multi_router := MultiRouter(base.model))
        versions = [PoolVersion(base, pool) for pool in pools]

        def make(router, pool=pools[0], **more):
            made = Route(versions[pools.index(pool)], router, **more)
            if made.needs_reference:
                made.calibrate()
            return made

        found = [make, multi_router]
        for version in versions:
            multi_router.attach(version)
        return found

    yield attach
    for one in multi_routers:
        one.close()


def memories(n):
    return [SequenceMemory() for _ in range(n)]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_goes_its_own_way(made, attached, family, dtype):
    base, experts = made(family, dtype=dtype)
    first, second = Pool(experts[:3]), Pool(experts[1:])
    rows = [ids_of(n, n) for n in (5, 9, 2, 12, 7, 9, 3, 8)]
    batch = batch_of(base, rows)
    asked = [
        (GANDER, first), None, (GANDER, second), (PHATGOOSE(), first), (GANDER, first), (Single("b"), second),
        (Gander(top_k=2), second), (GANDER, second),
    ]  # fmt: skip
    make, multi_router = attached(base, first, second)
    routes = {one: make(*one) for one in asked if one is not None}
    plan = BatchPlan([one and routes[one] for one in asked], memories=memories(8))
    with multi_router.following(plan):
        found = run(base, batch)
    multi_router.close()
    oracles = {pool: Oracle(base, pool, half_life=4) for pool in (first, second)}
    for i, (row, one) in enumerate(zip(rows, asked, strict=True)):
        real = slice(None) if base.is_encoder_decoder else batch["attention_mask"][i].bool()
        unroute(base) if one is None else route(base, one[1], one[0])
        if dtype == torch.float32 or one is None or isinstance(one[0], Gander):  # PHATGOOSE has near-ties
            assert_rows(found[i][real], run(base, batch)[i][real], dtype)
        if dtype == torch.float32:
            assert_rows(found[i][real], run(base, batch_of(base, [row]))[0], dtype)
        unroute(base)
        if one is not None and one[0] == GANDER and dtype == torch.float32:
            decoder = [0, 40, 50] if base.is_encoder_decoder else None
            assert_rows(found[i][real], oracles[one[1]].logits(row.tolist(), decoder), dtype)


@torch.no_grad()
def test_packed_rows_of_any_length_and_few_logits(made, attached):
    """Items of the same length of which the last layers see different tokens are no group."""
    base, experts = made(targets=[["v_proj", "down_proj", "lm_head"]] * 4)
    pool = Pool(experts)
    rows = [ids_of(n, n + i) for i, n in enumerate((5, 1, 5, 5, 9))]
    lengths = [len(row) for row in rows]
    make, multi_router = attached(base, pool)
    gander = make(GANDER)
    routes = [gander, gander, gander, None, gander]
    told = memories(5)
    plan = BatchPlan(routes, lengths, memories=told)
    with multi_router.following(plan):
        whole = run(base, packed(base, rows))[0]
    plan.keep_memories()
    oracle = Oracle(base, pool, half_life=4)
    for row, way, found, kept in zip(rows, routes, whole.split(lengths), told, strict=True):
        if way is not None:
            assert_rows(found, oracle.logits(row.tolist()))
            torch.testing.assert_close(
                kept.state[:4].double(), oracle.evidence(row.tolist())[-1], rtol=1e-3, atol=1e-3
            )
            assert kept.state.untyped_storage().nbytes() == kept.state.nbytes  # its own, not the pass's
        assert kept.tokens == (0 if way is None else len(row))
    places = torch.tensor([1, 3, 5, 6, 9, 12, 20, 23])
    with multi_router.following(BatchPlan(routes, lengths, kept=places, memories=memories(5))):
        some = base.model(**packed(base, rows), logits_to_keep=places).logits[0]
    torch.testing.assert_close(some, whole[places], atol=1e-4, rtol=1e-4)
    batch = batch_of(base, rows)
    with multi_router.following(BatchPlan(routes, memories=memories(5))):  # as generate() asks for them
        last = base.model(**batch, logits_to_keep=1).logits[:, -1]
    ends = torch.tensor(lengths).cumsum(0) - 1
    torch.testing.assert_close(last, whole[ends], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_passes_continue_and_begin_again(made, attached, family):
    base, experts = made(family)
    pool, rows = Pool(experts), [ids_of(n, n) for n in (9, 4, 9)]
    make, multi_router = attached(base, pool)
    gander, told = make(GANDER), memories(3)
    ids = torch.stack([ids_of(9, 5), ids_of(9, 6), ids_of(9, 7)])

    def passes(sizes):
        """Logits of all tokens, read in pieces, of which the encoder's text is no part."""
        cache, encoded, found = None, None, []
        for piece in ids.split(list(sizes), dim=1):
            given = {"input_ids": piece, "past_key_values": cache}
            if base.is_encoder_decoder:
                given = {"decoder_input_ids": piece, "past_key_values": cache}
                given |= {"encoder_outputs": encoded} if encoded else batch_of(base, rows)
                given["decoder_input_ids"] = piece
            plan = BatchPlan([gander, None, gander], memories=told)
            with multi_router.following(plan):
                out = base.model(**given, use_cache=True)
            plan.keep_memories()
            cache = out.past_key_values
            if base.is_encoder_decoder:
                encoded = (out.encoder_last_hidden_state,)
                given["attention_mask"] = batch_of(base, rows)["attention_mask"]
            found.append(out.logits)
        return torch.cat(found, 1)

    if base.is_encoder_decoder:
        rows = [ids_of(9, n) for n in range(5, 8)]  # no padding: the mask isn't given again
    first, again, single = (passes(sizes) for sizes in ((4, 1, 1, 3), (9,), (1,) * 9))
    multi_router.close()
    oracle = Oracle(base, pool, half_life=4)
    for i in (0, 2):
        text, decoder = (rows[i], ids[i].tolist()) if base.is_encoder_decoder else (ids[i], None)
        wanted = oracle.logits(text.tolist(), decoder)
        for found in (first, again, single):
            assert_rows(found[i], wanted)


class Fails(BoundRouter):
    """A bound router that fails where a 77 is read."""

    def __init__(self, inner):
        self.inner, self.acts = inner, inner.acts

    def __call__(self, u, context, ops):
        if (context.tokens().ids == 77).any():
            raise IndexError("fussy")
        return self.inner(u, context, ops)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("lengths", [None, [6, 6, 6, 6, 4]])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_an_item_that_fails_leaves_the_others_their_evidence(made, attached, family, lengths, block):
    """Those of a group that are tried again alone run together later, each with its own."""
    base, experts = made(family)
    if lengths and base.is_encoder_decoder:
        pytest.skip("encoder–decoders aren't packed")
    pool, rows = Pool(experts), [ids_of(6, n) for n in range(7, 12)]
    rows = [row.where(row != 77, 78) for row in rows]
    if lengths:
        rows[4] = rows[4][:4]
    rows[1][2] = 77
    make, multi_router = attached(base, pool)
    gander = make(GANDER)
    where = f"encoder.block.{block}." if base.is_encoder_decoder else f"layers.{block}."
    path = next(p for p in gander.bound if where in p and p.endswith((".v", "v_proj")))
    gander.bound[path] = Fails(gander.bound[path])
    told = memories(5)
    plan = BatchPlan([gander] * 5, lengths, memories=told, failed={})
    with multi_router.following(plan):
        out = run(base, packed(base, rows) if lengths else batch_of(base, rows))
    plan.keep_memories()
    found = out[0].split(lengths) if lengths else out
    multi_router.close()
    assert list(plan.failed) == [1]
    assert told[1].state is None
    oracle, decoder = Oracle(base, pool, half_life=4), [0, 40, 50] if base.is_encoder_decoder else None
    assert len({int(oracle.choice(row.tolist())[-1]) for row in rows}) > 1
    for i in (0, 2, 3, 4):
        assert_rows(found[i], oracle.logits(rows[i].tolist(), decoder))
        torch.testing.assert_close(
            told[i].state[:4].double(), oracle.evidence(rows[i].tolist())[-1], rtol=1e-3, atol=1e-3
        )


@torch.no_grad()
def test_a_request_whose_past_is_unknown_fails_alone(made, attached):
    base, experts = made()
    pool = Pool(experts)
    make, multi_router = attached(base, pool)
    gander, ids = make(GANDER), torch.stack([ids_of(8, n) for n in range(3)])
    told = memories(3)
    plan = BatchPlan([gander] * 3, memories=told)
    with multi_router.following(plan):
        cache = base.model(input_ids=ids[:, :5], use_cache=True).past_key_values
    plan.keep_memories()
    told[1].tokens = 4
    plan = BatchPlan([gander] * 3, memories=told, failed={})
    with multi_router.following(plan):
        found = base.model(input_ids=ids[:, 5:], past_key_values=cache).logits
    assert "hasn't read" in str(plan.failed.pop(1))
    assert not plan.failed
    with (
        multi_router.following(BatchPlan([gander] * 3)),
        pytest.raises(RoutingError, match="has read before is unknown"),
    ):
        base.model(input_ids=ids)
    multi_router.close()
    oracle = Oracle(base, pool, half_life=4)
    for i in (0, 2):
        assert_rows(found[i], oracle.logits(ids[i].tolist())[5:])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("off", [["a"], ["b", "d"], ["a", "b", "c"]])
def test_experts_that_are_off_are_as_if_the_pool_lacked_them(made, attached, family, off):
    """Also where experts adapt different modules, so that the best of all has nothing at some."""
    names = {"llama": [["v_proj"], ["q_proj", "v_proj"], ["v_proj", "up_proj"], ["down_proj"]]}
    targets = names.get(family, [["v"], ["q", "v"], ["v", "wo"], ["wo"]])
    base, experts = made(family, targets=targets)
    pool, rows = Pool(experts), [ids_of(n, n) for n in (9, 4, 7, 8)]
    make, multi_router = attached(base, pool)
    whole, less = make(GANDER), make(GANDER, off=off)
    told, batch = memories(4), batch_of(base, rows)
    plan = BatchPlan([less, whole, None, less], memories=told, count_loads=True)
    with multi_router.following(plan):
        found = run(base, batch)
    multi_router.close()
    ((weight, times),) = plan.summed_loads().values()
    assert weight[0][[e.name in off for e in experts]].sum() == 0
    assert 0 < weight[0].sum() < times[0]
    kept = Pool([expert for expert in experts if expert.name not in off])
    for i, own in ((0, kept), (1, pool), (3, kept)):
        real = slice(None) if base.is_encoder_decoder else batch["attention_mask"][i].bool()
        decoder = [0, 40, 50] if base.is_encoder_decoder else None
        wanted = Oracle(base, own, half_life=4).logits(rows[i].tolist(), decoder)
        assert_rows(found[i][real], wanted)
        route(base, own, GANDER)
        assert_rows(found[i][real], run(base, batch)[i][real])
        unroute(base)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_doubt_is_that_of_a_pool_of_those_that_are_on(made, attached, family):
    """What stands out among four experts is more than among two."""
    base, experts = made(family)
    pool, router, rows = Pool(experts), Gander(half_life=4, doubt=True), [ids_of(9, n) for n in range(12)]
    batch, sets = batch_of(base, rows), ["abcd", "ab", "bcd", "d"] * 3
    make, multi_router = attached(base, pool)
    routes = {on: make(router, off=[n for n in "abcd" if n not in on]) for on in sets}
    with multi_router.following(BatchPlan([routes[on] for on in sets], memories=memories(12))):
        found = run(base, batch)
    multi_router.close()
    bare = run(base, batch)
    switches = Switches(torch.tensor([[n in on for n in "abcd"] for on in sets]))
    route(base, pool, Masked(router, switches))
    masked = run(base, batch)
    changed = 0
    for on in routes:
        route(base, Pool([expert for expert in experts if expert.name in on]), router)
        wanted = run(base, batch)
        for i in (i for i, own in enumerate(sets) if own == on):
            assert_rows(found[i], wanted[i])
            assert_rows(masked[i], wanted[i])
            changed += int((wanted[i] != bare[i]).any())
    assert changed > 0


def test_experts_whose_absence_would_change_what_is_read_stay_on(made, make_expert, attached):
    base, experts = made(names="ab")
    late = [make_expert(base, n, seed=9, layers_to_transform=[1, 2, 3]) for n in "xy"]
    make, multi_router = attached(base, Pool([*experts, *late]))
    router = Gander(layers=2)
    make(router, off=["a"])
    make(router, off=["x", "y"])
    with pytest.raises(RoutingError, match=r"would read other blocks.*Make a pool without"):
        make(router, off=["a", "b"])
    multi_router.close()
    switches = Switches()
    model = route(base, Pool([*experts, *late]), Masked(router, switches))
    ids = torch.stack([ids_of(5, 1)] * 2)
    switches.allowed = torch.tensor([[True, False, True, True], [False, True, False, False]])
    model(input_ids=ids)
    switches.allowed = torch.tensor([[True, False, True, True], [False, False, False, True]])
    with pytest.raises(RoutingError, match="would read other blocks"):
        model(input_ids=ids)
    with pytest.raises(RoutingError, match="expected one row"):
        route(base, Pool([*experts, *late]), Masked(router, Switches(torch.ones(2, 3).bool())))(input_ids=ids)


def test_an_encoder_that_nobody_adapts_leaves_nothing_to_read(made, attached):
    base, experts = made("t5", targets=[["EncDecAttention.q"]] * 4)
    make, multi_router = attached(base, Pool(experts))
    with pytest.raises(RoutingError, match="no numbered block of the encoder"):
        make(GANDER)
    multi_router.close()
    with pytest.raises(RoutingError, match="no numbered block of the encoder"):
        route(base, Pool(experts), GANDER)

"""Tokens of one pass on different routes, inside a mixture's experts."""

from __future__ import annotations

import pytest
import torch
from test_batched import assert_rows, packed, run

from conftest import hooked, make_tokenizer
from moe_fixtures import ids, make, peft_adapter, per_expert, with_gates
from phatgoose import Expert, Pool, Random, Single, Uniform, route, unroute
from phatgoose.errors import RoutingError
from phatgoose.models.base.base import Base
from phatgoose.models.batched.attach import MultiRouter
from phatgoose.models.batched.plan import BatchPlan
from phatgoose.models.batched.version import PoolVersion, Route
from phatgoose.models.trace.record import trace
from phatgoose.routers import PHATGOOSE, Gander, Retrieval
from phatgoose.routers.router import BoundRouter


@pytest.fixture
def base():
    return Base(make("qwen3_moe"), make_tokenizer(), "qwen3_moe")


@pytest.fixture
def pools(base, tmp_path):
    names = ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
    for i in range(2):
        peft_adapter(base.model, tmp_path / str(i), i, r=2 + i, target_parameters=names)
    per_expert(base.model, "qwen3_moe", tmp_path / "2", 2, router=True)
    found = [with_gates(Expert.from_peft(tmp_path / str(i), name=str(i)), i) for i in range(3)]
    return Pool(found[:2]), Pool(found)  # the second mixes old and new names


def test_each_row_and_each_packed_sequence_goes_its_own_way(base, pools):
    first, second = pools
    asked = [
        (first, PHATGOOSE()), None, (second, PHATGOOSE(top_k=1)), (first, Single("1")), (second, Single("2")),
        (second, Uniform()), (first, Random(seed=3)), (second, PHATGOOSE()), (second, Single("0")),
    ]  # fmt: skip
    x = ids(len(asked), 11)
    batch = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    batch["attention_mask"][0, :4] = 0
    versions = {id(pool): PoolVersion(base, pool) for pool in (first, second)}
    multi_router = MultiRouter(base.model)
    for version in versions.values():
        multi_router.attach(version)
    routes = [None if one is None else Route(versions[id(one[0])], one[1]) for one in asked]
    with multi_router.following(BatchPlan(routes)):
        found = run(base, batch)
    rows = [x[i, i:] for i in range(len(asked))]
    with multi_router.following(BatchPlan(routes, lengths=[len(row) for row in rows])):
        together = run(base, packed(base, rows))[0].split([len(row) for row in rows])
    off = Route(versions[id(second)], PHATGOOSE(), off=["0"])
    with multi_router.following(BatchPlan([off] * len(asked))):
        without = run(base, batch)
    for router in (Retrieval(), Gander()):
        with pytest.raises(RoutingError, match=f"{type(router).__name__} can't tell requests apart"):
            Route(versions[id(second)], router)
    for version in versions.values():
        multi_router.detach(version)
    assert not hooked(base.model)
    for row, one in enumerate(asked):
        if one is not None:
            route(base, *one)
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        assert_rows(found[row], run(base, alone)[0], torch.float32)
        assert_rows(together[row], run(base, {"input_ids": rows[row][None]})[0], torch.float32)
        unroute(base)
    route(base, Pool(second.experts[1:]))
    assert_rows(without[2], run(base, {"input_ids": x[2:3]})[0], torch.float32)


def _loads(base, pool, row, skip=0):
    """Weights of each expert by a trace, over all modules and the tokens from `skip` on."""
    with torch.no_grad(), trace(base) as seen:
        base.model(input_ids=row[None])
    wanted = torch.zeros(len(pool), dtype=torch.float64)
    for choices in seen.choices:
        new = choices.tokens.positions >= skip
        acted, weights = choices.experts[new].long(), choices.weights[new].double()
        wanted.index_add_(0, acted[acted >= 0], weights[acted >= 0])
    return wanted


def test_loads_and_failures_inside_experts(base, pools):
    _, pool = pools
    version, multi_router, x = PoolVersion(base, pool), MultiRouter(base.model), ids(4, 9)
    multi_router.attach(version)
    good, bad = Route(version, PHATGOOSE()), Route(version, PHATGOOSE())

    class Broken(BoundRouter):
        def __call__(self, u, context, ops):
            raise RuntimeError("broken")

    bad.fused.clear()
    for path in bad.bound:
        if ".2." in path:
            bad.bound[path] = Broken()
    plan = BatchPlan([good, bad, None, good], count_loads=True, failed={})
    with multi_router.following(plan):
        found = run(base, {"input_ids": x})
    assert list(plan.failed) == [1]
    skipped = BatchPlan([good] * 4, lengths=[9] * 4, count_loads=True, skip=[2, 0, 5, 8])
    with multi_router.following(skipped):
        run(base, packed(base, list(x)))
    multi_router.close()
    assert not hooked(base.model)
    assert_rows(found[2], run(base, {"input_ids": x[2:3]})[0], torch.float32)
    sums = [one.summed_loads()[id(version)][0] for one in (plan, skipped)]
    route(base, pool)
    for row in (0, 3):
        assert_rows(found[row], run(base, {"input_ids": x[row : row + 1]})[0], torch.float32)
        torch.testing.assert_close(sums[0][row], _loads(base, pool, x[row]), atol=0.02, rtol=1e-3)
    for row, skip in enumerate(skipped.skip):
        torch.testing.assert_close(sums[1][row], _loads(base, pool, x[row], skip), atol=0.02, rtol=1e-3)


def test_gander_refuses_to_read_where_only_some_tokens_come(base, tmp_path):
    for i in range(2):
        peft_adapter(base.model, tmp_path / str(i), i, target_parameters=["experts.down_proj"])
    pool = Pool([Expert.from_peft(tmp_path / str(i), name=str(i)) for i in range(2)])
    with pytest.raises(RoutingError, match="inside a mixture's experts and sees some tokens only"):
        route(base, pool, Gander(layers=1))
    assert not hooked(base.model)

"""Controls: what each lacks, and that it has all else."""

from __future__ import annotations

import pytest
import torch

from phatgoose import PHATGOOSE, Pool, route
from phatgoose.errors import PoolError, RoutingError
from phatgoose.ops import backend
from phatgoose.routers import FixedRandom, ShuffledGates, parse_router
from phatgoose.routers.router import Candidates
from phatgoose.workflows.experiment.systems import padded


def candidates(members=(0, 1, 2, 3), path="a.b", d=6):
    gates = tuple(
        None if m < 0 else torch.randn(d, generator=torch.Generator().manual_seed(m)) for m in members
    )
    return Candidates(path, ("a", "b", "c", "d"), members, gates, d)


def choices(router, which, u=None):
    u = torch.randn(50, 6, generator=torch.Generator().manual_seed(9)) if u is None else u
    return router.bind(which)(u, None, backend("reference"))


def test_one_pair_for_all_tokens_and_modules():
    chosen, weights = choices(FixedRandom(3), candidates())
    assert len(set(map(tuple, chosen.tolist()))) == 1
    assert len(set(chosen[0].tolist())) == 2
    assert (weights == 0.5).all()
    assert torch.equal(chosen, choices(FixedRandom(3), candidates(path="c"))[0])
    assert len({tuple(choices(FixedRandom(s), candidates())[0][0].tolist()) for s in range(30)}) > 3
    pair = {"abcd"[i] for i in chosen[0].tolist()}
    some = candidates(members=(2, 0))
    acting, weights = choices(FixedRandom(3), some)
    assert {some.names[some.members[i]] for i in acting[0].tolist()} == pair & {"a", "c"}
    assert (weights == 0.5).all()  # an absent partner's half is lost, not given to the other
    assert choices(FixedRandom(3, top_k=9), candidates())[1][0].tolist() == [0.25] * 4


def test_shuffled_gates_are_the_same_gates_in_other_hands():
    given = candidates(members=(0, 1, 2, 3, -1))
    plain, weights = choices(PHATGOOSE(2), given)
    seen = set()
    for seed in range(40):
        chosen, mixed = choices(ShuffledGates(seed), given)
        renamed = {}
        for old, new in zip(plain.flatten().tolist(), chosen.flatten().tolist(), strict=True):
            assert renamed.setdefault(old, new) == new  # a permutation of the experts
        assert renamed.get(4, 4) == 4  # the null candidate keeps its place
        assert torch.allclose(weights, mixed)
        seen.add(tuple(sorted(renamed.items())))
    assert len(seen) > 8
    assert torch.equal(choices(ShuffledGates(1), given)[0], choices(ShuffledGates(1), given)[0])
    assert parse_router("shuffled-gates:seed=4,top_k=3") == ShuffledGates(4, 3)
    assert parse_router("fixed-random:seed=4") == FixedRandom(4)
    for bad in (FixedRandom, ShuffledGates):
        with pytest.raises(RoutingError, match="top_k"):
            bad(top_k=0)


def test_padding_has_the_size_of_real_experts(make_base, make_expert):
    base = make_base("llama")
    real = Pool([make_expert(base, "one", rank=3), make_expert(base, "two", rank=5, seed=1, gates=True)])
    pool = padded(real, 3, seed=5)
    assert pool.names == ("one", "two", "random-1", "random-2", "random-3")
    for mine, theirs in (("random-1", "one"), ("random-2", "two"), ("random-3", "one")):
        for key, tensor in pool[theirs].tensors.items():
            found = pool[mine].tensors[key]
            assert found.shape == tensor.shape
            assert not torch.equal(found, tensor)
            assert 0.6 < float(found.std() / tensor.std()) < 1.6
        assert pool[mine].base == real.base
    assert not torch.equal(*(pool[n].gates["model.layers.0.mlp.up_proj"] for n in ("random-1", "random-3")))
    assert padded(real, 3, seed=5)["random-2"].hash == pool["random-2"].hash
    assert padded(real, 0).names == real.names
    route(base, pool, PHATGOOSE(2))
    with pytest.raises(PoolError):
        padded(real, -1)
    with pytest.raises(PoolError, match="named 'random-1'"):
        padded(pool, 1)

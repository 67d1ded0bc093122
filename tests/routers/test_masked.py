from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.trace.record import trace
from phatgoose.routers import (
    LAG,
    PHATGOOSE,
    Arrow,
    FixedRandom,
    Gander,
    Random,
    Single,
    SpectR,
    Uniform,
    WeightOnly,
)
from phatgoose.routers.masked import Masked, Switches
from phatgoose.routers.router import BoundRouter, ByScores, Router

SETS = [s for n in range(5) for s in itertools.combinations(range(4), n)]


@pytest.fixture
def mixed(make_base, make_expert):
    """A base and four experts; two of them adapt some modules only, so that dropping one moves where
    nothing is offered."""

    def make(family):
        base = make_base(family)
        some = {"llama": (["q_proj", "v_proj"], ["q_proj", "up_proj"]), "t5": (["q", "k"], ["q", "wo"])}[
            family
        ]
        return base, [
            make_expert(base, "a", seed=1),
            make_expert(base, "b", seed=2, rank=3),
            make_expert(base, "c", seed=3, targets=some[0]),
            make_expert(base, "d", seed=4, targets=some[1]),
        ]

    return make


def logits(base, ids):
    extra = {"decoder_input_ids": ids[:, :5]} if base.is_encoder_decoder else {}
    with torch.no_grad():
        return base.model(input_ids=ids, use_cache=False, **extra).logits


@pytest.mark.slow(3)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "router",
    [
        PHATGOOSE(2), PHATGOOSE(1), PHATGOOSE(4), Arrow(2), SpectR(3), LAG(1, 1), LAG(2, 2), WeightOnly(2),
        PHATGOOSE(2, "weights"), Uniform(), Gander(half_life=3), Gander(half_life=3, top_k=3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_each_row_is_routed_as_in_a_pool_of_its_experts(mixed, family, router, backend):
    base, experts = mixed(family)
    sets = SETS if router == PHATGOOSE(2) else [(), (0,), (2, 3), (1, 2), (0, 2, 3), (0, 1, 2, 3)]
    ids = torch.randint(2, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    switches = Switches(torch.tensor([[e in s for e in range(4)] for s in sets]))
    route(base, Pool(experts), Masked(router, switches), backend_name=backend)
    found = logits(base, ids.expand(len(sets), -1))
    for row, members in enumerate(sets):
        if members:
            route(base, Pool([experts[e] for e in members]), router, backend_name=backend)
        else:
            unroute(base)
        expected = logits(base, ids)[0]
        assert float((found[row] - expected).norm() / expected.norm()) < 1e-5, members


def test_single(mixed):
    base, experts = mixed("llama")
    ids = torch.randint(2, 300, (1, 9))
    plain = logits(base, ids)
    switches = Switches(torch.tensor([[True, False, False, False], [False, True, True, True]]))
    route(base, Pool(experts), Masked(Single("a"), switches))
    found = logits(base, ids.expand(2, -1))
    route(base, Pool(experts), Single("a"))
    assert torch.allclose(found[:1], logits(base, ids), atol=1e-5)
    assert torch.allclose(found[1:], plain, atol=1e-6)


def test_without_switches_nothing_changes_and_a_trace_sees_the_same(mixed):
    base, experts = mixed("llama")
    ids = torch.randint(2, 300, (2, 7))
    route(base, Pool(experts), PHATGOOSE(2))
    expected = logits(base, ids)
    switches = Switches()
    route(base, Pool(experts), Masked(PHATGOOSE(2), switches))
    assert torch.equal(logits(base, ids), expected)
    switches.allowed = torch.tensor([[True] * 4, [False, True, True, True]])
    with trace(base) as t:
        logits(base, ids)
    for c in t.choices:
        assert (c.experts[c.rows == 1] != 0).all()
        margins = c.margins[~c.margins.isnan()]
        assert (margins >= 0).all()
    assert any((c.experts[c.rows == 0] == 0).any() for c in t.choices)


def test_beams_have_their_rows_switches(mixed):
    base, experts = mixed("llama")
    ids = torch.randint(2, 300, (2, 7), generator=torch.Generator().manual_seed(1))
    table = torch.tensor([[True, False, False, False], [False, True, True, False]])
    route(base, Pool(experts), Masked(PHATGOOSE(2), Switches(table)))
    settings = {
        "num_beams": 3,
        "max_new_tokens": 5,
        "do_sample": False,
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
    }
    both = base.model.generate(input_ids=ids, **settings)
    settings["attention_mask"] = torch.ones(1, 7, dtype=torch.long)
    for row in range(2):
        kept = [e for e, on in zip(experts, table[row], strict=True) if on]
        route(base, Pool(kept), PHATGOOSE(2))
        alone = base.model.generate(input_ids=ids[row : row + 1], **settings)
        assert torch.equal(both[row, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("router", [Random(), FixedRandom()])
def test_routers_that_compare_nothing_are_refused(mixed, router):
    base, experts = mixed("llama")
    with pytest.raises(RoutingError, match="can't be switched off"):
        route(base, Pool(experts), Masked(router))


@pytest.mark.parametrize("shape", [(2, 3), (3, 4), (0, 4)])
def test_a_table_that_doesnt_fit_is_refused(mixed, shape):
    base, experts = mixed("llama")
    route(base, Pool(experts), Masked(PHATGOOSE(2), Switches(torch.ones(shape, dtype=torch.bool))))
    with pytest.raises(RoutingError, match="expected one row"):
        logits(base, torch.randint(2, 300, (2, 5)))


class Norms(BoundRouter):
    """A router as the contract describes one that chooses by itself; its scores are for traces alone."""

    def __call__(self, u, context, ops):
        return torch.zeros(len(u), 1, dtype=torch.long), torch.ones(len(u), 1)

    def scores(self, u, context, ops):
        return u.norm(dim=-1, keepdim=True).expand(-1, 4)


class NoTopK(ByScores):
    def __init__(self):
        pass

    def scores(self, u, context, ops):
        return u[:, :4]


class First(ByScores):
    """Compares the module's first inputs."""

    def scores(self, u, context, ops):
        return u[:, : self.experts].float()


@dataclass(frozen=True)
class Theirs(Router):
    kind: str

    def bind(self, candidates):
        if self.kind != "First":
            return {"Norms": Norms, "NoTopK": NoTopK}[self.kind]()
        bound = First(2)
        bound.experts = len(candidates.members)
        return bound


def test_a_router_written_by_the_contract_is_masked_or_refused_by_name(mixed):
    base, experts = mixed("llama")
    experts = experts[:2]
    ids = torch.randint(2, 300, (1, 7))
    for kind, says in (
        ("Norms", "Theirs doesn't choose by scores"),
        ("NoTopK", "NoTopK doesn't say how many"),
    ):
        route(base, Pool(experts), Theirs(kind))
        with pytest.raises(RoutingError, match=says):
            route(base, Pool(experts), Masked(Theirs(kind)))
    route(base, Pool(experts), Masked(Theirs("First"), Switches(torch.tensor([[True, False]]))))
    found = logits(base, ids)
    route(base, Pool(experts[:1]), Theirs("First"))
    assert torch.allclose(found, logits(base, ids), atol=1e-5)

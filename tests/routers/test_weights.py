"""Routers by weights: each against its paper's formula, and scores of both kinds against exchangeability."""

from __future__ import annotations

import pytest
import torch

from phatgoose.errors import RoutingError
from phatgoose.experts.weight_signature import signature, signatures
from phatgoose.ops import backend
from phatgoose.ops.reference import standardise
from phatgoose.ops.update import Update
from phatgoose.routers import LAG, PHATGOOSE, Arrow, SpectR, WeightOnly, parse_router, weights
from phatgoose.routers.context import RoutingContext
from phatgoose.routers.router import Candidates
from phatgoose.routers.weights import ProjectionNorms

OPS = backend("reference")
CONTEXT = RoutingContext("m", 1, 1, None)
D, OUT = 63, 40
KINDS = (torch.float32, torch.bfloat16)


def update(seed, rank=5, d=D, dtype=torch.float32, scale=0.5):
    g = torch.Generator().manual_seed(seed)
    return Update(
        torch.randn(rank, d, generator=g).to(dtype), torch.randn(OUT, rank, generator=g).to(dtype), scale
    )


def candidates(updates, gates=None, d=D, members=None):
    members = tuple(range(len(updates))) if members is None else members
    names = tuple(f"e{i}" for i in range(max(members) + 1))
    return Candidates("m", names, members, tuple(gates or [None] * len(updates)), d, tuple(updates))


def whole(u):
    return torch.linalg.svd(u.scale * (u.B.double() @ u.A.double()), full_matrices=False)


def route(router, found, u, ops=OPS):
    return router.bind(found)(u, CONTEXT, ops)


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arrow_is_its_formula(name, dtype):
    updates = [update(s, rank, dtype=dtype) for s, rank in enumerate((5, 1, 16, 3))]
    u = torch.randn(50, D, dtype=dtype)
    chosen, weights = route(Arrow(top_k=2), candidates(updates), u, backend(name))
    for token in range(50):
        scores = torch.stack([(whole(x)[2][0] @ u[token].double()).abs() for x in updates])
        expected = scores.topk(2)
        assert chosen[token].tolist() == expected.indices.tolist()
        torch.testing.assert_close(weights[token].double(), expected.values.softmax(0), rtol=1e-4, atol=1e-5)


def test_spectr_is_the_size_of_what_the_update_does():
    updates = [
        update(s, rank, scale=scale) for s, (rank, scale) in enumerate(((5, 0.5), (1, -2.0), (16, 0.1)))
    ]
    u = torch.randn(50, D)
    chosen, weights = route(SpectR(top_k=3), candidates(updates), u)
    for token in range(50):
        scores = torch.stack([(x.weight().double() @ u[token].double()).norm() for x in updates])
        expected = scores.topk(3)
        assert chosen[token].tolist() == expected.indices.tolist()
        torch.testing.assert_close(weights[token].double(), expected.values.softmax(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("first", "top_k"), [(2, 1), (3, 2), (1, 3), (20, 1)])
def test_lag_is_arrow_and_then_the_length_in_the_basis(first, top_k):
    updates = [update(s, rank) for s, rank in enumerate((5, 5, 16, 3))]
    u = torch.randn(80, D)
    chosen, weights = route(LAG(first=first, top_k=top_k), candidates(updates), u)
    k = min(top_k, first, 4)
    assert chosen.shape == weights.shape == (80, k)
    for token in range(80):
        arrows = torch.stack([(whole(x)[2][0] @ u[token].double()).abs() for x in updates])
        left = arrows.topk(min(first, 4)).indices.tolist()
        lengths = {
            e: float((whole(updates[e])[2][: updates[e].rank] @ u[token].double()).norm()) for e in left
        }
        assert chosen[token].tolist() == sorted(left, key=lambda e: -lengths[e])[:k]
    assert torch.allclose(weights.sum(-1), torch.ones(80))


def test_one_expert_is_always_chosen_and_more_than_there_are_means_all():
    u = torch.randn(3, D)
    for router in (Arrow(top_k=5), SpectR(), LAG()):
        chosen, weights = route(router, candidates([update(0)]), u)
        assert (chosen.tolist(), weights.tolist()) == ([[0]] * 3, [[1.0]] * 3)


def comparable(updates, gates, reference, router=None, **more):
    bound = (router or PHATGOOSE(ungated="weights")).bind(candidates(updates, gates, **more))
    assert bound.needs_reference
    for part in reference.split(97):  # in pieces, as a model may be given them
        bound.observe(part, OPS)
    return bound


def test_comparable_scores_are_their_formula():
    updates, gates = (
        [update(0), update(1, 1), update(2), update(3, 16)],
        [torch.randn(D), None, torch.randn(D), None],
    )
    reference, u = torch.randn(400, D) + 2, torch.randn(30, D) + 2
    bound = comparable(updates, gates, reference)

    def raw(x):
        bar = standardise(x).double()
        by_gate = [None if g is None else bar @ standardise(g.double()) / D**0.5 for g in gates]
        by_weights = [(bar @ signature(e).vectors.T).norm(dim=-1) ** (2 / 3) for e in updates]
        return torch.stack([w if g is None else g for g, w in zip(by_gate, by_weights, strict=True)], -1)

    known = raw(reference)
    scores = (raw(u) - known.mean(0)) / known.std(0, correction=0)
    expected = scores.topk(2)
    for name in ("reference", "torch"):
        chosen, weights = bound(u, CONTEXT, backend(name))
        assert torch.equal(chosen, expected.indices)
        torch.testing.assert_close(weights.double(), expected.values.softmax(-1), rtol=1e-4, atol=1e-4)


def activations(n, d, seed, kind):
    """Inputs that have nothing to do with any expert: isotropic, or with a mean, few loud directions
    and heavy tails."""
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(n, d, generator=g)
    if kind == "isotropic":
        return u
    loud = torch.logspace(0.7, -0.7, d)[torch.randperm(d, generator=torch.Generator().manual_seed(d))]
    mean = 2 * torch.randn(d, generator=torch.Generator().manual_seed(d + 1))
    return (u * loud + mean) * torch.randn(n, 1, generator=g).exp()


@pytest.mark.parametrize("kind", ["isotropic", "anisotropic"])
@pytest.mark.parametrize(("experts", "gated"), [(2, 1), (4, 2), (4, 1), (12, 6)])
@pytest.mark.parametrize(("d", "ranks"), [(64, (1,)), (100, (1, 4, 50))])
def test_unrelated_tokens_go_to_each_kind_as_often_as_chance(kind, experts, gated, d, ranks):
    """Nothing tells the experts apart, so each must be first 1/E of the time, gates or not, whatever their ranks.

    The shares are means over many draws of all vectors: one draw of a few experts favours some of them, as any
    vectors do.
    """
    shares = []
    for draw in range(20):
        g = torch.Generator().manual_seed(draw)
        updates = [update(100 * draw + e, ranks[e % len(ranks)], d) for e in range(experts)]
        gates = [torch.randn(d, generator=g) if e < gated else None for e in range(experts)]
        bound = comparable(updates, gates, activations(600, d, 2 * draw, kind), d=d)
        chosen, _ = bound(activations(600, d, 2 * draw + 1, kind), CONTEXT, OPS)
        shares.append(torch.bincount(chosen[:, 0], minlength=experts) / 600)
    mean = torch.stack(shares).mean(0)
    of_gated = mean[:gated].sum().item()
    assert of_gated == pytest.approx(gated / experts, abs=0.05)
    # The cube root makes ranks as low as 1 nearly normal: single experts are within a tenth of their share.
    error = torch.stack(shares).std(0) / len(shares) ** 0.5
    assert ((mean * experts - 1).abs() < 0.12 + 4 * error * experts).all()


def test_scores_as_they_are_would_favour_the_weights():
    """What the standardising is for: |v₁ᵀū| of one kind against v̄ᵀū/√d of the other, both unrelated to the token."""
    d, of_weights = 64, []
    for draw in range(20):
        g = torch.Generator().manual_seed(draw)
        u = standardise(activations(400, d, draw, "isotropic"))
        arrow = (u @ signature(update(draw, d=d)).arrow.float()).abs()
        gate = u @ standardise(torch.randn(d, generator=g)) / d**0.5
        of_weights.append((arrow > gate).float().mean().item())
    assert sum(of_weights) / 20 > 0.7


@pytest.mark.parametrize("related", range(4))
def test_related_tokens_go_to_their_expert_whatever_its_kind(related):
    d = 100
    updates = [update(e, 8, d) for e in range(4)]
    g = torch.Generator().manual_seed(5)
    gates = [torch.randn(d, generator=g), torch.randn(d, generator=g), None, None]
    bound = comparable(updates, gates, activations(500, d, 0, "anisotropic"), d=d)
    noise = activations(200, d, 1, "anisotropic")
    if related < 2:
        towards = gates[related].expand(200, d)
    else:  # somewhere in what the expert reads, to either side
        towards = torch.randn(200, 8, generator=g) @ signature(updates[related]).vectors.float()
    u = noise + 2 * noise.norm(dim=1, keepdim=True) * towards / towards.norm(dim=1, keepdim=True)
    chosen, weights = bound(u, CONTEXT, OPS)
    assert (chosen[:, 0] == related).float().mean() > 0.95
    assert weights[:, 0].mean() > 0.8


def test_weight_only_leaves_gates_aside():
    updates, reference, u = [update(e, 4) for e in range(3)], torch.randn(300, D), torch.randn(40, D)
    gates = [torch.randn(D) for _ in updates]
    one = comparable(updates, gates, reference, WeightOnly())
    other = comparable(updates, [None] * 3, reference)
    for a, b in zip(one(u, CONTEXT, OPS), other(u, CONTEXT, OPS), strict=True):
        assert torch.equal(a, b)


def test_a_pool_of_gated_experts_is_the_papers_router():
    gates, u = [torch.randn(D) for _ in range(3)], torch.randn(20, D)
    found = candidates([update(e) for e in range(3)], gates)
    bound = PHATGOOSE(ungated="weights").bind(found)
    assert not bound.needs_reference
    for a, b in zip(bound(u, CONTEXT, OPS), route(PHATGOOSE(), found, u), strict=True):
        assert torch.equal(a, b)


def test_the_null_candidate_stands_at_zero():
    updates, reference = [update(0, 8)], torch.randn(500, D)
    bound = comparable([*updates, None], [None, None], reference, members=(0, -1))
    inside = signature(updates[0]).vectors[:1].float()
    outside = torch.linalg.svd(signature(updates[0]).vectors.float())[2][-1:]
    chosen, weights = bound(torch.cat([inside, outside]), CONTEXT, OPS)
    assert chosen[:, 0].tolist() == [0, 1]
    assert weights[:, 0].min() > 0.6


def test_an_update_of_zeros_is_chosen_for_no_reason():
    idle = Update(update(0).A, update(0).B * 0, 1.0)
    u, reference = torch.randn(100, D), torch.randn(300, D)
    for router in (Arrow(top_k=1), SpectR(top_k=1), LAG()):
        assert (route(router, candidates([idle, update(1)]), u)[0] == 1).all()
    bound = comparable([idle, update(1)], [None, None], reference)
    chosen, weights = bound(u, CONTEXT, OPS)
    assert weights.isfinite().all()
    assert 0.3 < (chosen[:, 0] == 0).float().mean() < 0.7  # 0, like a gate that says nothing


def test_signatures_of_many_are_those_of_each():
    updates = [update(s, rank, dtype=dtype) for s, rank in enumerate((5, 1, 5, 3, 1, 5)) for dtype in KINDS]
    padded = update(9, 4)
    padded.B[:, 2:] = 0
    for one, found in zip([*updates, padded], signatures(iter([*updates, padded])), strict=True):
        values, right = whole(one)[1:]
        rank = 2 if one is padded else one.rank
        torch.testing.assert_close(found.values, values[:rank])
        torch.testing.assert_close(found.vectors.T @ found.vectors, right[:rank].T @ right[:rank])


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (5, 1, 0, 5, 3, 1)])
@pytest.mark.parametrize("products", [1, 40, 1 << 20])
def test_lengths_in_directions_are_those_of_each_expert_however_many_are_computed_at_a_time(
    monkeypatch, ranks, products
):
    monkeypatch.setitem(weights._AT_A_TIME, "cpu", products)
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randn(D, rank, generator=g, dtype=torch.float64) for rank in ranks]
    rows = [torch.linalg.qr(m).Q.T for m in drawn]
    inputs, u = (
        torch.randn(200, D, generator=g) * torch.linspace(0.1, 3, D) + 1,
        torch.randn(7, D, generator=g),
    )
    norms = ProjectionNorms(rows)
    wanted = torch.stack([(u.double() @ m.T).norm(dim=-1) for m in rows], 1)
    torch.testing.assert_close(norms(u).double(), wanted, rtol=1e-4, atol=1e-4)
    x = inputs.double()
    c = torch.cov(x.T)
    values, q = torch.linalg.eigh(c + 0.3 * c.trace() / D * torch.eye(D, dtype=c.dtype))
    root = q @ torch.diag(values**-0.5) @ q.T
    spans = [torch.linalg.qr(root @ m.T).Q for m in rows]
    wanted = torch.stack([((u.double() - x.mean(0)) @ root @ span).norm(dim=-1) for span in spans], 1)
    torch.testing.assert_close(norms.whitened(inputs)(u).double(), wanted, rtol=1e-4, atol=1e-4)


def test_rows_in_16_bits_are_kept_once_and_exact_ones_stay_so():
    g = torch.Generator().manual_seed(0)
    rows, u = [torch.randn(3, D, generator=g)], torch.randn(7, D, generator=g)
    narrow = ProjectionNorms(rows)
    narrow(u.bfloat16(), torch.bfloat16)
    assert narrow.rows is narrow._used
    exact = ProjectionNorms(rows)
    wanted = exact(u)
    exact(u.bfloat16(), torch.bfloat16)
    assert torch.equal(exact(u), wanted)


def test_what_is_refused():
    scaled = Update(torch.zeros(0, D), torch.zeros(OUT, 0), input_scale=torch.ones(D))
    for router in (Arrow(), SpectR(), LAG(), WeightOnly(), PHATGOOSE(ungated="weights")):
        with pytest.raises(
            RoutingError, match=r"expert 'e1' has no signature in its weights at m, .*\(IA\)³.*--generated"
        ):
            router.bind(candidates([update(0), scaled]))
    with pytest.raises(RoutingError, match=r"expert 'e0' has no gates.*ungated=weights"):
        PHATGOOSE().bind(candidates([update(0)]))
    with_gate = candidates([update(0), scaled], [None, torch.randn(D)])
    assert PHATGOOSE(ungated="weights").bind(with_gate).needs_reference  # (IA)³ with a gate is fine
    with pytest.raises(RoutingError, match="was not shown the reference text"):
        route(WeightOnly(), candidates([update(0), update(1)]), torch.randn(3, D))
    for wrong in (
        lambda: Arrow(top_k=0),
        lambda: LAG(first=0),
        lambda: SpectR(top_k=True),
        lambda: LAG(top_k=1.5),
    ):
        with pytest.raises(RoutingError, match="expected a whole number of at least 1"):
            wrong()
    with pytest.raises(RoutingError, match="ungated is 'norms', expected one of: refuse, weights"):
        PHATGOOSE(ungated="norms")


def test_text_forms():
    assert parse_router("arrow") == Arrow()
    assert parse_router("Arrow:top_k=1") == Arrow(1)
    assert parse_router("lag:first=5,top_k=2") == LAG(5, 2)
    assert parse_router("weight-only") == WeightOnly()
    assert parse_router("phatgoose:ungated=weights,top_k=3") == PHATGOOSE(3, "weights")
    with pytest.raises(RoutingError, match="ungated is 'yes'"):
        parse_router("phatgoose:ungated=yes")
    assert PHATGOOSE().describe() == {"router": "PHATGOOSE", "top_k": 2}
    assert PHATGOOSE(ungated="weights").describe() == {
        "router": "PHATGOOSE",
        "top_k": 2,
        "ungated": "weights",
    }
    assert LAG().describe() == {"router": "LAG", "first": 20, "top_k": 1}

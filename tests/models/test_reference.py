"""The reference text, and pools whose experts don't all have gates, in whole models."""

from __future__ import annotations

import pytest
import torch

from conftest import FAMILIES
from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.experts.weight_signature import signature
from phatgoose.models.attach.attach import route, routing_of, unroute
from phatgoose.models.attach.reference_text import PIECE, TEXT, _pieces, show_reference
from phatgoose.models.trace.record import trace
from phatgoose.ops.reference import standardise
from phatgoose.routers import LAG, PHATGOOSE, Arrow, SpectR, WeightOnly

MIXED = PHATGOOSE(ungated="weights")


def batch(base):
    ids = torch.tensor([base.tokenizer("the quick brown fox jumps")["input_ids"]])
    return (
        {"input_ids": ids, "decoder_input_ids": ids[:, :4]} if base.is_encoder_decoder else {"input_ids": ids}
    )


def inputs_of(base, paths, run):
    """What each module sees while `run` runs: [N, d] float64."""
    seen, handles = {}, []
    for path in paths:

        def keep(module, args, output, path=path):
            seen[path] = args[0].reshape(-1, args[0].shape[-1]).clone()

        handles.append(base.model.get_submodule(path).register_forward_hook(keep))
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return {path: u.double() for path, u in seen.items()}


def reference_inputs(base):
    ids = _pieces(base.tokenizer)
    more = {}
    if base.is_encoder_decoder:
        start = torch.full((len(ids), 1), base.model.config.decoder_start_token_id)
        more["decoder_input_ids"] = torch.cat([start, ids[:, :-1]], 1)
    return lambda: base.model(input_ids=ids, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_pool_chooses_by_the_formula(make_base, make_expert, family):
    base = make_base(family)
    pool = Pool([make_expert(base, f"e{i}", rank=2 + i, seed=i, gates=i % 2 == 0) for i in range(4)])
    known = inputs_of(base, pool.modules, reference_inputs(base))
    route(base, pool, MIXED)
    with trace(base) as recorded:
        seen = inputs_of(base, pool.modules, lambda: base.model(**batch(base)))
    assert {c.path for c in recorded.choices} == set(pool.modules)
    for choice in recorded.choices:
        path = choice.path

        def raw(u, path=path):
            bar = standardise(u)
            return torch.stack(
                [
                    (bar @ signature(e.updates[path]).vectors.T).norm(dim=-1) ** (2 / 3)
                    if e.gates is None
                    else bar @ standardise(e.gates[path].double()) / u.shape[1] ** 0.5
                    for e in pool.experts
                ],
                -1,
            )

        reference = raw(known[path])
        top = ((raw(seen[path]) - reference.mean(0)) / reference.std(0, correction=0)).topk(2)
        assert torch.equal(choice.experts.long(), top.indices)
        torch.testing.assert_close(choice.weights.double(), top.values.softmax(-1), rtol=0, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_taking_it_off_leaves_the_base_as_it_was(make_base, make_expert, family):
    base = make_base(family)
    pool = Pool([make_expert(base, f"e{i}", seed=i, gates=False) for i in range(3)])
    with torch.no_grad():
        before = base.model(**batch(base)).logits
        found = {}
        for router in (MIXED, WeightOnly(), Arrow(), SpectR(), LAG()):
            route(base, pool, router)
            found[router] = base.model(**batch(base)).logits
            route(base, pool, router)  # again, over itself: the reference is read without it
            assert torch.equal(base.model(**batch(base)).logits, found[router])
            assert not torch.equal(found[router], before)
            unroute(base)
            assert torch.equal(base.model(**batch(base)).logits, before)
    assert torch.equal(found[MIXED], found[WeightOnly()])


def test_an_expert_without_some_modules_meets_the_null_candidate(make_base, make_expert):
    base = make_base("llama")
    pool = Pool([make_expert(base, "a", gates=False), make_expert(base, "b", targets=["q_proj"], gates=True)])
    route(base, pool, MIXED)
    with trace(base) as recorded, torch.no_grad():
        base.model(**batch(base))
    alone = [c for c in recorded.choices if c.path.endswith("v_proj")]
    assert {int(e) for c in alone for e in c.experts.unique()} == {-1, 0}


def test_the_text_is_read_in_pieces_and_training_mode_comes_back(make_base):
    base = make_base("llama")
    pieces = _pieces(base.tokenizer)
    assert pieces.shape[1] == PIECE
    ids = base.tokenizer(TEXT)["input_ids"]
    assert pieces.reshape(-1).tolist() == ids[: pieces.numel()]
    assert len(ids) - pieces.numel() < PIECE
    base.model.train()
    seen = []
    module = base.model.model.layers[0].mlp.up_proj
    show_reference(base.model, base.tokenizer, [(module, False, seen.append), (module, True, seen.append)])
    assert [tuple(u.shape) for u in seen] == [(pieces.numel(), 32), (pieces.numel(), 48)]
    assert base.model.training
    assert not module._forward_hooks


def test_what_is_refused_leaves_an_earlier_routing(make_base, make_expert):
    base = make_base("llama")
    pool = Pool([make_expert(base, "a", gates=False), make_expert(base, "b", seed=1)])
    route(base, pool, Arrow())
    earlier = routing_of(base)
    with torch.no_grad():
        before = base.model(**batch(base)).logits
    with pytest.raises(RoutingError, match="expert 'a' has no gates"):
        route(base, pool, PHATGOOSE())
    norm = base.model.model.norm
    weight = base.model.model.layers[1].input_layernorm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] = float("nan")
    with pytest.raises(RoutingError, match="aren't finite on the reference text"):
        route(base, pool, MIXED, any_base=True)
    with torch.no_grad():
        weight.copy_(kept)
        assert routing_of(base) is earlier
        assert torch.equal(base.model(**batch(base)).logits, before)
    assert not norm._forward_hooks
    unroute(base)
    base.model.__dict__.pop("_phatgoose_base")
    with pytest.raises(RoutingError, match="it needs the tokenizer: pass the Base"):
        route(base.model, pool, MIXED)
    assert routing_of(base) is None

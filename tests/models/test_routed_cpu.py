"""Whole models routed by the compiled kernel: the reference's logits, hooks of others, traces, copies,
compilers, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from test_routed import (
    FAMILIES,
    PHATGOOSE,
    TEXTS,
    Pool,
    Random,
    Single,
    batch_of,
    logits,
    mixed,
    relative,
    route,
    routing_of,
    trace,
)

from phatgoose.errors import RoutingError
from phatgoose.models.attach.attach import unroute

__all__ = ["mixed"]  # a fixture


@pytest.mark.parametrize("router", [PHATGOOSE(), PHATGOOSE(top_k=3), Random(), Single("e1")], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_references(mixed, family, router):
    base, pool = mixed(family)
    batch = batch_of(base)
    route(base, pool, router, backend_name="reference")
    expected = logits(base, batch)
    route(base, pool, router, backend_name="cpu")
    assert relative(logits(base, batch), expected) < 1e-5


def test_bfloat16_is_as_near_to_float32_as_the_references_bfloat16(mixed):
    base, pool = mixed("llama")
    batch = batch_of(base)
    real = batch["attention_mask"].bool()
    route(base, pool, backend_name="reference")
    wide = logits(base, batch)
    base.model.to(torch.bfloat16)
    errors = {}
    for name in ("reference", "cpu"):
        route(base, pool, backend_name=name)
        errors[name] = relative(logits(base, batch)[real], wide[real])
    assert 0 < errors["cpu"] < max(1.5 * errors["reference"], 0.02)


def test_what_earlier_hooks_have_seen_stays_as_it_was(mixed):
    base, pool = mixed("llama")
    batch = batch_of(base)
    module = base.model.model.layers[0].mlp.up_proj
    seen = []
    handle = module.register_forward_hook(lambda m, a, o: seen.append((o, o.clone())))
    route(base, pool, backend_name="cpu")
    logits(base, batch)
    assert torch.equal(seen[0][0], seen[0][1])
    handle.remove()
    everything = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda m, a, o: everything.append((o, copy.deepcopy(o)))
    )
    try:
        logits(base, batch)
    finally:
        handle.remove()
    tensors = [(o, c) for o, c in everything if isinstance(o, torch.Tensor)]
    assert tensors
    assert all(torch.equal(o, c) for o, c in tensors)


def test_a_trace_changes_nothing_and_sees_the_references_choices(mixed):
    base, pool = mixed("llama")
    batch = batch_of(base)
    route(base, pool, backend_name="reference")
    with trace(base) as expected:
        logits(base, batch)
    route(base, pool, backend_name="cpu")
    plain = logits(base, batch)
    with trace(base) as found:
        assert torch.equal(logits(base, batch), plain)
    for a, b in zip(expected.choices, found.choices, strict=True):
        assert torch.equal(a.experts, b.experts)
        assert torch.allclose(a.weights.float(), b.weights.float(), atol=1e-3)


def test_generation_and_copies(mixed):
    base, pool = mixed("llama")
    base.tokenizer.padding_side = "left"
    batch = base.tokenizer(TEXTS, return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    route(base, pool, backend_name="reference")
    expected = base.model.generate(**batch, **settings)
    route(base, pool, backend_name="cpu")
    copied = copy.deepcopy(base.model)
    assert torch.equal(base.model.generate(**batch, **settings), expected)
    unroute(base)
    del base
    assert torch.equal(copied.generate(**batch, **settings), expected)


def test_a_compiler_takes_the_whole_routed_model(mixed):
    base, pool = mixed("llama")
    ids = base.tokenizer(TEXTS[0], return_tensors="pt").input_ids
    route(base, pool, backend_name="cpu")
    with torch.no_grad():
        expected = base.model(ids, use_cache=False).logits
        compiled = torch.compile(base.model, backend="eager", fullgraph=True)(ids, use_cache=False).logits
    assert torch.allclose(compiled, expected, atol=1e-5)


def test_gradients_are_refused_by_name_and_auto_gives_them(mixed):
    base, pool = mixed("llama")
    ids = base.tokenizer("the quick brown fox", return_tensors="pt").input_ids
    route(base, pool, backend_name="cpu")
    with pytest.raises(RoutingError, match=r"no backward pass.*inference_mode"):
        base.model(ids, labels=ids)
    route(base, pool)
    base.model(ids, labels=ids).loss.backward()
    assert base.model.get_input_embeddings().weight.grad.isfinite().all()


def test_it_is_really_the_kernel_that_runs(mixed):
    base, pool = mixed("llama")
    route(base, pool)
    sites = routing_of(base).sites
    assert all(site.fused is not None for site in sites)
    calls = []
    for site in sites:
        run = site.fused.calls._library_run
        site.fused.calls._library_run = lambda *args, run=run: calls.append(1) or run(*args)
    logits(base, batch_of(base))
    assert len(calls) == len(sites)


def test_half_precision_is_refused_when_attached_and_auto_takes_torch(make_base, make_expert):
    base = make_base("llama", dtype=torch.float16)
    pool = Pool([make_expert(base, "a"), make_expert(base, "b", seed=1)])
    with pytest.raises(RoutingError, match=r"float32 and bfloat16, not in torch\.float16"):
        route(base, pool, backend_name="cpu")
    assert routing_of(base) is None
    route(base, pool)
    assert all(site.fused is None for site in routing_of(base).sites)
    assert logits(base, batch_of(base)).isfinite().all()

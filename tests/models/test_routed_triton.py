"""Whole models routed by the Triton kernels, interpreted: the reference's logits, traces, the moving of stacks."""

from __future__ import annotations

import pytest
import torch
from test_routed import PHATGOOSE, Pool, Random, batch_of, logits, mixed, relative, route, routing_of, trace

from phatgoose.ops import Stack
from phatgoose.ops.triton import launch as triton_launch

pytest.importorskip("triton")
__all__ = ["mixed"]  # a fixture


@pytest.mark.slow(35)
@pytest.mark.parametrize(("family", "router"), [("t5", PHATGOOSE()), ("llama", Random())], ids=str)
def test_logits_equal_the_references(mixed, family, router, monkeypatch):
    base, pool = mixed(family, layers=1)  # interpreted kernels are slow
    batch = batch_of(base)
    route(base, pool, router, backend_name="reference")
    expected = logits(base, batch)
    route(base, pool, router, backend_name="triton")
    monkeypatch.setattr(triton_launch, "FEW_TOKENS", 0 if family == "t5" else 64)
    assert relative(logits(base, batch), expected) < 1e-5


@pytest.mark.slow(5)
def test_a_trace_sees_the_choice_and_changes_nothing(make_base, make_expert):
    base = make_base("llama", layers=1)
    pool = Pool([make_expert(base, f"e{i}", rank=2 + i, seed=i) for i in range(3)])
    ids = {"input_ids": torch.arange(2, 7)[None]}
    route(base, pool, backend_name="triton")
    expected = logits(base, ids)
    with trace(base) as seen:
        assert torch.equal(logits(base, ids), expected)
    route(base, pool, backend_name="reference")
    with trace(base) as plain:
        logits(base, ids)
    assert all(torch.equal(a.experts, b.experts) for a, b in zip(seen.choices, plain.choices, strict=True))


def test_a_stack_and_what_was_made_of_it_go_where_their_module_computes(make_base, make_expert, monkeypatch):
    base = make_base("llama", layers=1)
    route(base, Pool([make_expert(base, f"e{i}", seed=i) for i in range(2)]), backend_name="triton")
    site = routing_of(base).sites[0]
    u, y = torch.randn(3, site.stack.A.shape[1]), torch.randn(3, site.stack.B.shape[1])
    expected, here = site.hook(site.module, (u,), {}, y.clone()), site.stack
    elsewhere = here.to(torch.device("meta"))
    site.stack, site._stack_for = elsewhere, (elsewhere.A.device, y.dtype)
    site.prepare()
    monkeypatch.setattr(Stack, "to", lambda stack, device: {elsewhere: here}[stack])
    assert torch.equal(site.hook(site.module, (u,), {}, y.clone()), expected)
    assert site.stack is here
    assert site.fused.gates.device == here.A.device

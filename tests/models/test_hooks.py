"""Models that torch.compile compiles: what is attached later acts, and what is taken off doesn't,
whoever compiled what and when."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import CompileConfig

from phatgoose.analysis.activations import mean_inputs
from phatgoose.errors import BaseModelError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, routing_of, unroute
from phatgoose.models.base.base import Base
from phatgoose.models.batched.attach import MultiRouter
from phatgoose.models.batched.plan import BatchPlan
from phatgoose.models.batched.version import PoolVersion, Route
from phatgoose.models.trace.record import trace
from phatgoose.records import Example, Task
from phatgoose.routers import PHATGOOSE, Arrow, Random, Single
from phatgoose.training.config import GateConfig
from phatgoose.training.gate import train_gate

IDS = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def whole(model):
    model.compile(backend="eager")


def forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")


def layers_replaced(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")


WAYS = (whole, forward, layers, layers_replaced)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    before = logging.root.manager.disable
    logging.disable(
        logging.CRITICAL
    )  # pytest takes in all that the compiler has to say, which takes most of the time
    yield
    logging.disable(before)
    torch._dynamo.reset()


@pytest.fixture
def made(make_base, make_expert):
    """Two bases with the same weights, and a pool."""
    base, targets = make_base("llama", layers=1), ["q_proj", "down_proj"]
    pool = Pool([make_expert(base, f"e{i}", rank=2 + i, seed=i, targets=targets) for i in range(3)])
    return base, make_base("llama", layers=1), pool


@torch.no_grad()
def logits(base):
    model = base.model if isinstance(base, Base) else base
    return model(input_ids=IDS, use_cache=False).logits


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow(11)
@pytest.mark.parametrize("compiled", WAYS)
def test_what_was_compiled_and_run_before_is_routed_rerouted_and_unrouted(made, compiled):
    base, plain, pool = made
    compiled(base.model)
    close(logits(base), logits(plain))
    for router in (Single("e1"), PHATGOOSE(top_k=2)):
        route(base, pool, router)
        close(logits(base), logits(route(plain, pool, router)))
    unroute(base)
    close(logits(base), logits(unroute(plain)))


@pytest.mark.slow(27)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_routed_and_then_compiled_every_router_is_the_same(made, dtype, backend):
    base, _, pool = made
    base.model.to(dtype)
    compiled = torch.compile(base.model, backend="eager")
    for router in (Single("e1"), PHATGOOSE(top_k=2), Arrow(), Random(seed=1)):
        route(base, pool, router, backend_name=backend)
        expected = logits(base)
        torch.testing.assert_close(
            logits(compiled), expected, atol=2e-2 if dtype.itemsize == 2 else 1e-5, rtol=1e-5
        )


@pytest.mark.slow(5)
def test_a_compiled_model_is_routed_as_the_one_inside(made):
    base, plain, pool = made
    compiled = torch.compile(base.model, backend="eager")
    logits(compiled)
    assert route(compiled, pool) is compiled
    assert routing_of(compiled) is routing_of(base.model) is not None
    expected = logits(route(plain, pool))
    close(logits(compiled), expected)
    with trace(compiled) as recorded:
        close(logits(compiled), expected)
    assert len(recorded.choices) == len(pool.modules)
    assert unroute(compiled) is compiled
    assert Base(compiled, base.tokenizer, spec="tiny").model is base.model
    close(logits(compiled), logits(unroute(plain)))


@pytest.mark.slow(5)
def test_generation_that_transformers_compiles_follows_the_routing(made):
    base, plain, pool = made
    how = CompileConfig(backend="eager", fullgraph=False)
    how._compile_all_devices = True
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def compiled():
        return base.model.generate(IDS, cache_implementation="static", compile_config=how, **settings)

    first = compiled()
    for router in (PHATGOOSE(), Random(seed=2)):
        route(base, pool, router)
        route(plain, pool, router)
        assert torch.equal(compiled(), plain.model.generate(IDS, **settings))
    unroute(base)
    assert torch.equal(compiled(), first)


@pytest.mark.slow(13)
@pytest.mark.parametrize("router", [PHATGOOSE(top_k=2), Single("e1")], ids=repr)
def test_a_compiled_model_is_traced_as_any(made, router):
    base, plain, pool = made
    route(base, pool, router)
    route(plain, pool, router)
    base.model.compile(backend="eager")
    logits(base)
    for margins in (True, False):
        with trace(plain, margins=margins) as expected:
            logits(plain)
        with trace(base, margins=margins) as found:
            logits(base)
        logits(base)
        for one, other in zip(found.choices, expected.choices, strict=True):
            assert one.path == other.path
            assert torch.equal(one.experts, other.experts)
            torch.testing.assert_close(one.weights, other.weights)
            assert torch.equal(one.tokens.positions, other.tokens.positions)


@pytest.mark.slow(4)
@pytest.mark.parametrize("compiled", [whole, layers])
def test_a_compiled_model_serves_several_ways(made, compiled):
    base, plain, pool = made
    compiled(base.model)
    found = []
    for one in (base, plain):
        logits(one)
        multi_router, version = MultiRouter(one.model), PoolVersion(one, pool)
        multi_router.attach(version)
        routes = [Route(version, Single("e1")), Route(version, PHATGOOSE()), None]
        for pair in (routes[:2], routes[1:]):
            with multi_router.following(BatchPlan(pair)):
                found.append(logits(one))
        multi_router.close()
        found.append(logits(one))
    for one, other in zip(found[:3], found[3:], strict=True):
        close(one, other)


@pytest.mark.slow(11)
def test_whatever_else_listens_to_a_compiled_model_hears(made):
    base, plain, pool = made
    base.model.compile(backend="eager")
    logits(base)
    heard, expected = (mean_inputs(one, pool.modules, ["the quick brown fox"]) for one in (base, plain))
    assert heard.keys() == expected.keys()
    for path in heard:
        close(heard[path], expected[path])
    rows = tuple(Example(f"{i} plus {i}", ("yes",)) for i in range(4))
    task, found = Task("t", train=rows, validation=rows, test=rows), []
    config = GateConfig(rows_per_step=2, rows_per_batch=2, steps=2, validate_every=2, validation_rows=2)
    for one in (base, plain):
        found.append(train_gate(one, pool.experts[0], task, config).gates)
        logits(one)
    for path in found[0]:
        close(found[0][path], found[1][path])
    close(logits(base), logits(plain))


def test_what_nothing_can_be_attached_to_is_refused_by_name(made):
    base, _, pool = made
    model = base.model
    exported = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False})
    for bad, message in (
        (exported, "ExportedProgram holds a fixed computation"),
        (exported.module(), "GraphModule holds a fixed computation"),
        (torch.nn.DataParallel(model), "its .module"),
        (torch.jit.script(torch.nn.Linear(2, 2)), "holds a fixed computation"),
        (torch.nn.Linear(2, 2), "got Linear"),
    ):
        with pytest.raises(BaseModelError, match=message):
            route(bad, pool)
        with pytest.raises(BaseModelError, match=message):
            unroute(bad)

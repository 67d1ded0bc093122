"""Layers as vLLM has them, merged and split over ranks, against `route` on the model's own modules."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from layers_fixtures import MERGED, Ranks, linears

from conftest import write_base
from phatgoose.errors import RoutingError
from phatgoose.experts.packed.pack import pack
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route
from phatgoose.ops.cpu import build
from phatgoose.routers import parse_router
from phatgoose.vllm.check import check
from phatgoose.vllm.layers import Layers
from phatgoose.vllm.settings import Settings

pytestmark = pytest.mark.skipif(build.reason() is not None, reason="the CPU kernel can't be compiled here")


@pytest.fixture
def pool_of(make_expert, tmp_path):
    """A pool of four experts, unlike in rank, alpha and modules, on disk."""

    def make(base):
        experts = [
            make_expert(base, "a", rank=4),
            make_expert(base, "b", rank=2, alpha=3, seed=1),
            make_expert(base, "c", rank=6, targets=["q_proj", "v_proj", "down_proj"], seed=2),
            make_expert(base, "d", rank=1, targets=["k_proj", "o_proj", "gate_proj"], seed=3),
        ]
        return Pool(experts).save(tmp_path / "pool")

    return make


@pytest.fixture
def saved(make_base, tmp_path):
    """A tiny Llama in a folder, as vLLM is given it."""

    def save(dtype=torch.float32):
        base = make_base("llama", dtype=dtype)
        return base, write_base(base, tmp_path / "base")

    return save


def opened(settings, checked, model, rank, ranks):
    """Every layer of one rank with its slices, as vLLM builds a model: all ask, then all are made."""
    layers = Layers(settings, checked, lambda path: path, lambda: 16, "cpu")
    return layers, [(*found, layers.take(found[0], MERGED)) for found in linears(model, rank, ranks)]


@pytest.mark.parametrize("router", ["phatgoose:top_k=2", "phatgoose:top_k=7", "shuffled-gates:seed=3"])
@pytest.mark.parametrize(
    ("ranks", "dtype", "tolerance"),
    [
        (1, torch.float32, 2e-6), (1, torch.bfloat16, 1e-2), (2, torch.float32, 2e-6),
        (2, torch.bfloat16, 1e-2), (4, torch.float32, 2e-6),
    ],
)  # fmt: skip
def test_merged_and_split_layers_compute_what_route_does(saved, pool_of, router, ranks, dtype, tolerance):
    base, folder = saved(dtype)
    settings = Settings(str(pool_of(base)), router)
    checked = check(settings, folder)
    threads = Ranks(ranks)
    built = [opened(settings, checked, base.model, rank, ranks) for rank in range(ranks)]
    made = [
        [
            (linear, weight, modules, layers.make(linear, parts, weight.data, threads.all_reduce(rank)))
            for linear, weight, modules, parts in found
        ]
        for rank, (layers, found) in enumerate(built)
    ]
    model = route(base, Pool.load(settings.pool), parse_router(router), backend_name="reference")
    del model
    for layer in zip(*made, strict=True):  # one layer, on every rank
        linear, modules = layer[0][0], layer[0][2]
        u = (torch.randn(7, linear.d_in, generator=torch.Generator().manual_seed(1)) * 2 + 0.5).to(dtype)
        inputs = u.chunk(ranks, 1) if linear.splits_input else [u] * ranks
        calls = [
            lambda part=part, x=x: (y := F.linear(x, part[1]), part[3](x[None], y[None])[0])
            for part, x in zip(layer, inputs, strict=True)
        ]
        results = threads.run(calls)
        with torch.no_grad():
            expected = [m(u) for m in modules]  # routed
            plain = [F.linear(u, m.weight) for m in modules]
        if linear.splits_input:
            added = sum(after - before for before, after in results)
            found = [plain[0] + added]
        else:
            found, begin = [], 0
            for i, whole in enumerate(expected):
                width, copies = linear.held_out[i], linear.replicas[i]
                found.append(torch.cat([r[1][:, begin : begin + width] for r in results[::copies]], 1))
                begin += width
                assert found[-1].shape == whole.shape
        for one, other, before in zip(found, expected, plain, strict=True):
            assert (other - before).norm() > 0.05 * before.norm()  # the experts do something
            assert (one - other).norm() < tolerance * other.norm()


@pytest.fixture
def alone(saved, pool_of):
    """alone() → the layers of one rank of one, as `opened`."""
    base, folder = saved()
    settings = Settings(str(pool_of(base)))
    return lambda: opened(settings, check(settings, folder), base.model, 0, 1)


def first_layer(alone, *rows):
    """The first routed layer of a whole model, inputs for it, and its base's outputs."""
    layers, found = alone()
    linear, weight, _, parts = found[0]
    made = layers.make(linear, parts, weight.data, torch.clone)
    u = torch.randn(*rows, linear.d_in)
    return made, u, F.linear(u, weight).detach()


def test_the_operator_is_all_that_a_compiler_sees(alone):
    made, u, y = first_layer(alone, 2, 5)
    targets = []

    def backend(graph, inputs):
        targets.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(made, backend=backend, fullgraph=True)(u, y)
        assert torch.equal(compiled, made(u, y))
    assert sum("routed_update" in t for t in targets) == 3


def test_more_choices_than_are_fused(alone):
    made, u, y = first_layer(alone, 5)
    with torch.no_grad():
        expected = made(u, y)
        for part in made.parts:
            part.fused = False
        torch.testing.assert_close(made(u, y), expected, rtol=1e-5, atol=1e-5)


def test_a_pool_that_changes_meanwhile(saved, pool_of):
    base, folder = saved()
    settings = Settings(str(pool_of(base)))
    checked = check(settings, folder)
    del checked.samples["model.layers.1.mlp.up_proj"]
    with pytest.raises(RoutingError, match=r"changed while vLLM started: model.layers.1.mlp.up_proj is new"):
        Layers(settings, checked, lambda path: path, lambda: 16, "cpu")


def test_a_pool_is_let_go_after_the_last_layer(alone):
    layers, found = alone()
    for linear, weight, _, parts in found:
        assert layers._pool is not None
        layers.make(linear, parts, weight.data, torch.clone)
    assert layers._pool is None


def test_a_packed_pool_is_served_as_it_is(saved, pool_of):
    base, folder = saved()
    settings = Settings(str(pool_of(base)))
    u, outputs = torch.randn(3, 32), []
    for packed in (False, True):
        if packed:
            pack(settings.pool)
        layers, found = opened(settings, check(settings, folder), base.model, 0, 1)
        linear, weight, _, parts = found[2]
        y = F.linear(u, weight).detach()
        outputs.append(layers.make(linear, parts, weight.data, torch.clone)(u, y))
    assert torch.equal(*outputs)


def test_a_module_that_no_layer_takes_is_refused(saved, pool_of):
    base, folder = saved()
    settings = Settings(str(pool_of(base)))
    layers = Layers(settings, check(settings, folder), lambda path: path, lambda: 16, "cpu")
    for linear, _, _ in list(linears(base.model, 0, 1))[:-1]:
        layers.take(linear, MERGED)
    with pytest.raises(RoutingError, match=r"1 modules .* model.layers.1.mlp.down_proj among"):
        layers.check_taken()


def test_reordered_weights_are_refused(alone):
    layers, found = alone()
    linear, weight, _, parts = found[0]
    swapped = weight.data[[*range(16, 32), *range(16), *range(32, 64)]]  # heads in another order
    with pytest.raises(RoutingError, match=r"isn't the base's model.layers.0.self_attn.q_proj, row by row"):
        layers.make(linear, parts, swapped, torch.clone)


def test_another_size_is_refused(alone):
    layers, found = alone()
    linear, weight, _, parts = found[0]
    wider = [dataclasses.replace(p, d_out=p.d_out + 8) for p in parts]
    with pytest.raises(RoutingError, match="32 → 32 in the pool and 32 → 40 in vLLM"):
        layers.make(linear, wider, weight.data, torch.clone)

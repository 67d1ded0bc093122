from __future__ import annotations

import numpy as np
import pytest
import torch

from phatgoose.analysis.activations import mean_inputs, parallel_gates
from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool

TEXTS = ["yes no maybe", "the quick brown fox jumps"]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_mean_inputs_are_the_mean_of_what_the_modules_read(make_base, family):
    base = make_base(family)
    path = {"llama": "model.layers.1.mlp.up_proj", "t5": "encoder.block.1.layer.0.SelfAttention.q"}[family]
    seen = []
    module = dict(base.model.named_modules())[path]
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].double().numpy()))
    found = mean_inputs(base, [path], TEXTS)
    handle.remove()
    u = np.concatenate(seen)
    assert len(u) == sum(len(base.tokenizer(text)["input_ids"]) for text in TEXTS)
    standard = (u - u.mean(1, keepdims=True)) / np.sqrt(u.var(1, keepdims=True) + 1e-5)
    assert np.allclose(found[path], standard.mean(0), atol=1e-5)
    assert not module._forward_hooks


def test_an_embedding_gives_its_output(make_base):
    base = make_base("llama")
    found = mean_inputs(base, ["model.embed_tokens"], TEXTS)
    assert found["model.embed_tokens"].shape == (32,)


def test_a_gate_along_the_mean_is_found(make_base, make_expert):
    base = make_base("llama")
    pool = Pool([make_expert(base, "plain", seed=1), make_expert(base, "caught", seed=2)])
    path = "model.layers.0.mlp.down_proj"
    means = mean_inputs(base, pool.modules, TEXTS)
    expert = pool.experts[1]
    caught = expert.with_gates({**expert.gates, path: 3 * means[path] + 0.7}, {"kind": "test"})
    pool = Pool([pool.experts[0], caught])
    (name, where, cosine), *rest = parallel_gates(pool, means, above=0.8)
    assert (name, where) == ("caught", path)
    assert cosine == pytest.approx(1, abs=1e-3)
    assert not rest
    everything = parallel_gates(pool, means, above=-2)
    assert len(everything) == 2 * len(pool.modules)
    v, m = pool.experts[0].gates[path].double(), means[path].double()
    expected = float((v - v.mean()) @ m / ((v - v.mean()).norm() * m.norm()))
    assert next(c for e, p, c in everything if (e, p) == ("plain", path)) == pytest.approx(expected, abs=1e-3)


def test_refusals(make_base):
    base = make_base("llama")
    with pytest.raises(RoutingError, match="no module nowhere"):
        mean_inputs(base, ["nowhere"], TEXTS)
    with pytest.raises(RoutingError, match="never ran on the 0 texts"):
        mean_inputs(base, ["model.layers.0.mlp.up_proj"], [])
    assert torch.is_grad_enabled()

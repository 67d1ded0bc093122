"""Values that are finite in an expert and not in the dtype a module computes in are refused by name,
before anything is attached."""

from __future__ import annotations

import pytest
import torch

from phatgoose import Pool, Uniform, route, unroute
from phatgoose.errors import RoutingError
from phatgoose.experts.expert import Expert

UP = "model.layers.1.mlp.up_proj"


def changed(expert, part, change):
    tensors = {k: t.clone() for k, t in expert.tensors.items()}
    change(tensors[f"base_model.model.{UP}.{part}"])
    return Expert("odd", expert.adapter_config, tensors, expert.gates, expert.provenance)


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight"])
def test_values_too_large_for_half_precision(make_base, make_expert, part):
    base = make_base("llama", dtype=torch.float16)
    plain = make_expert(base, "plain", seed=1)
    odd = changed(make_expert(base, "odd", seed=2), part, lambda t: t[0, 0].fill_(1e5))
    with pytest.raises(RoutingError, match=rf"{UP}: odd: values that aren't finite in torch.float16"):
        route(base, Pool([plain, odd]), Uniform())
    assert not any(m._forward_hooks for m in base.model.modules())
    route(base, Pool([plain, odd]), Uniform(), dtype=torch.float32)
    unroute(base)
    large = changed(make_expert(base, "odd", seed=2), part, lambda t: t[0, 0].fill_(6e4))
    route(base, Pool([plain, large]), Uniform())


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed", "ignore:Adapter 'default'")
def test_a_bias_that_overflows_when_it_is_scaled(make_base, make_expert):
    base = make_base("llama")
    expert = make_expert(base, "odd", alpha=4000, rank=4, lora_bias=True)
    odd = changed(expert, "lora_B.bias", lambda t: t[3].fill_(3e38))
    with pytest.raises(RoutingError, match=rf"{UP}: odd: values that aren't finite in torch.float32"):
        route(base, Pool([odd]), Uniform())


def test_a_dora_of_a_row_of_zeros(make_base, make_expert):
    base = make_base("llama")
    odd = changed(make_expert(base, "odd", use_dora=True), "lora_B.weight", lambda t: t[5].zero_())
    route(base, Pool([odd]), Uniform())
    unroute(base)
    with torch.no_grad():
        base.model.get_submodule(UP).weight[5].zero_()
    with pytest.raises(RoutingError, match=rf"{UP}: odd: values .* a DoRA divides by a row of zeros"):
        route(base, Pool([odd]), Uniform(), any_base=True)

from __future__ import annotations

import math

import pytest
import torch

from phatgoose.analysis.measures import effective_number, expert_shares, layer_and_kind
from phatgoose.models.trace import Choices, Trace


def choices(path, experts, weights):
    n = len(experts)
    return Choices(
        path,
        torch.tensor(experts, dtype=torch.int16),
        torch.tensor(weights, dtype=torch.float16),
        torch.zeros(n, dtype=torch.long),
        torch.arange(n),
        None,
    )


def test_expert_shares_count_every_decision_alike():
    t = Trace(("a", "b", "c"))
    t.choices.append(choices("x", [[0, 1], [1, -1], [1, 0]], [[0.75, 0.25], [0.5, 0.5], [1, 0]]))
    t.choices.append(choices("y", [[1, 0]], [[0.5, 0.5]]))
    assert expert_shares(t) == {"a": 1.25 / 4, "b": 2.25 / 4, "c": 0}
    assert expert_shares(Trace(("a",))) == {"a": 0}


@pytest.mark.parametrize("n", [1, 2, 7])
def test_effective_number_of_alike_experts_is_their_number(n):
    assert math.isclose(effective_number([0.1] * n + [0.0] * 3), n)
    assert effective_number([]) == effective_number([0, 0]) == 0


def test_effective_number_is_exp_of_entropy():
    assert math.isclose(effective_number([0.9, 0.1]), 0.9**-0.9 * 0.1**-0.1)


def test_layer_and_kind():
    assert layer_and_kind(
        ["model.layers.12.self_attn.q_proj", "lm_head", "transformer.h.0.mlp.c_fc"][:2]
    ) == [
        (12, "self_attn.q_proj"),
        (None, "lm_head"),
    ]
    both = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.3.layer.1.EncDecAttention.k"]
    assert layer_and_kind(both) == [
        (0, "encoder layer.0.SelfAttention.q"),
        (3, "decoder layer.1.EncDecAttention.k"),
    ]

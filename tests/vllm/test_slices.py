"""Which rows of which module a rank of vLLM holds."""

from __future__ import annotations

import pytest

from phatgoose.errors import RoutingError
from phatgoose.vllm.slices import Linear, Slice, columns, slices

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def qkv(rank, ranks, heads=4, kv_heads=2, size=8):
    copies = max(1, ranks // kv_heads)
    own, kv = heads // ranks * size, max(1, kv_heads // ranks) * size
    return Linear("m.0.qkv_proj", 32, rank, ranks, 32, (own, kv, kv), (1, copies, copies))


def test_alone_every_slice_is_a_whole_module():
    assert slices(qkv(0, 1), MERGED) == [
        Slice("m.0.q_proj", 0, 32, (range(32),), 32),
        Slice("m.0.k_proj", 32, 48, (range(16),), 16),
        Slice("m.0.v_proj", 48, 64, (range(16),), 16),
    ]


def test_each_rank_has_its_heads():
    q, k, v = slices(qkv(1, 2), MERGED)
    assert (q.begin, q.end, q.rows, q.d_out) == (0, 16, (range(16, 32),), 32)
    assert (k.begin, k.end, k.rows, k.d_out) == (16, 24, (range(8, 16),), 16)
    assert (v.begin, v.end, v.rows, v.d_out) == (24, 32, (range(8, 16),), 16)


@pytest.mark.parametrize("rank", range(4))
def test_ranks_share_keys_where_there_are_fewer_keys_than_ranks(rank):
    q, k, v = slices(qkv(rank, 4), MERGED)
    assert q.rows == (range(rank * 8, rank * 8 + 8),)
    assert k.rows == v.rows == (range(rank // 2 * 8, rank // 2 * 8 + 8),)
    assert (q.d_out, k.d_out, v.d_out) == (32, 16, 16)


def test_one_module_in_a_layer_of_three_parts_keeps_its_own_rows():
    layer = Linear("h.0.c_attn", 32, 1, 2, 32, (16, 16, 16), (1, 1, 1))
    assert slices(layer, {}) == [
        Slice("h.0.c_attn", 0, 48, (range(16, 32), range(48, 64), range(80, 96)), 96)
    ]
    assert slices(layer, {"c_attn": ["c_attn"]}) == slices(layer, {})


def test_a_layer_split_over_its_input():
    layer = Linear("m.0.down_proj", 48, 2, 3, 16, (32,), (1,))
    assert layer.splits_input
    assert columns(layer) == range(32, 48)
    assert slices(layer, MERGED) == [Slice("m.0.down_proj", 0, 32, (range(32),), 32)]


def test_parts_that_nobody_can_name_are_refused():
    layer = Linear("m.0.gate_up_proj", 32, 0, 1, 32, (16, 16, 16), (1, 1, 1))
    with pytest.raises(RoutingError, match="gate_proj, up_proj, but in 3 parts"):
        slices(layer, MERGED)

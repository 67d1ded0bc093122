"""Experts brought to a device when they are needed: the same choices, weights and outputs as with all of them there."""

from __future__ import annotations

import copy
import random
import threading

import pytest
import torch
from test_backends import NAMES, general, problem

from conftest import relative
from phatgoose.errors import RoutingError
from phatgoose.ops import Layer, backend, make_stack, quantized_gates, reference
from phatgoose.ops.offload import experts as offload
from phatgoose.ops.offload import slots as slots_module
from phatgoose.ops.offload.experts import Capacity, OffloadedExperts
from phatgoose.ops.offload.slots import Slots
from phatgoose.ops.quantized_gates import quantize, standardised

CPU = torch.device("cpu")


def gates_of(kind, experts, d, g):
    raw = torch.randn(experts, d, generator=g)
    if kind == "near":  # closer together than 8 bits can tell
        raw = torch.randn(d, generator=g) + 1e-4 * raw
    elif kind == "spiky":  # 8 bits keep little but the largest value
        raw[:, 0] = 300.0
    elif kind == "null":
        raw[experts // 2] = 0
    return reference.standardise(raw.double()).float()


@pytest.mark.parametrize("kind", ["random", "near", "spiky", "null"])
@pytest.mark.parametrize(("experts", "d"), [(1, 5), (63, 100), (300, 577), (40, 3000)])
def test_leaders_are_never_without_the_best(kind, experts, d):
    g = torch.Generator().manual_seed(experts)
    gates = gates_of(kind, experts, d, g)
    u = torch.randn(37, d, generator=g) * 2 + 50 * torch.rand(37, 1, generator=g)
    kept = quantize(gates, 1)  # and inputs along what 8 bits have lost, which is the worst there can be
    u[::2] = (gates - kept.codes[0] * kept.steps[0][:, None])[torch.arange(19) % experts] * 1000 + 7
    x = standardised(u)
    exact = reference.gate_scores(u.double(), gates.double())
    for planes in (1, 2):
        kept = quantize(gates, planes)
        doubt = (exact - kept.scores(x.float())).abs().amax(0) - kept.rounding(CPU)
        assert doubt.le(kept.error).all()
        for k in {1, min(2, experts), experts}:
            leaders = kept.leaders(x, k)
            assert leaders.gather(1, exact.topk(k).indices).all()
            assert leaders.sum(1).ge(k).all()
    few = quantize(gates).leaders(x, 1).sum(1).float().mean()
    if kind == "random" and experts > 60:
        assert few < 0.2 * experts  # or they would all be fetched


def test_wide_gates_are_kept_more_finely():
    g = torch.Generator().manual_seed(0)
    assert [quantize(gates_of("random", 20, d, g)).codes.shape[0] for d in (64, 576, 4096)] == [1, 1, 2]
    assert quantize(gates_of("random", 20, 4096, g)).error.max() < 0.01
    assert quantize(torch.zeros(0, 8)).codes.shape == (1, 0, 8)


def test_blocks_of_experts_change_nothing(monkeypatch):
    g = torch.Generator().manual_seed(0)
    gates, x = gates_of("random", 50, 64, g), torch.randn(9, 64, generator=g)
    whole = quantize(gates)
    monkeypatch.setattr(quantized_gates, "CHUNK_VALUES", 500)
    parts = quantize(gates)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.error, parts.error)
    assert torch.allclose(whole.scores(x), parts.scores(x), atol=1e-6)


def test_products_that_torch_rounds_are_doubted_more():
    kept = quantize(gates_of("random", 20, 64, torch.Generator().manual_seed(0)))
    before, exact = torch.backends.mkldnn.matmul.fp32_precision, kept.rounding(CPU)
    try:
        for precision, unit in (("tf32", 2**-10), ("bf16", 2**-8), ("ieee", 0)):
            torch.backends.mkldnn.matmul.fp32_precision = precision
            assert kept.rounding(CPU) == pytest.approx(exact + 1.1 * 8 * unit)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("ragged", [False, True])
def test_slots_hold_what_was_asked_for(ragged):
    draw = random.Random(0)
    counts = [draw.choice([1, 2, 5, 9]) if ragged else 4 for _ in range(30)]
    starts = [sum(counts[:e]) + e for e in range(30)]  # with a row between that nobody owns
    a, b = torch.randn(sum(counts) + 30, 7), torch.randn(sum(counts) + 30, 3).bfloat16()
    slots = Slots([a, b], starts, counts, 21, CPU)
    parts_seen, asked = [], 0
    for _ in range(300):
        wanted = sorted(draw.sample(range(30), draw.randint(0, 12)))
        asked += len(wanted)
        found = []
        for part, rows in slots.visit(wanted):
            owned = [r for e, row in zip(part, rows, strict=True) for r in range(row, row + counts[e])]
            assert len(owned) == len(set(owned))
            for e, row in zip(part, rows, strict=True):
                for matrix, there in zip((a, b), slots.on_device, strict=True):
                    assert torch.equal(
                        there[row : row + counts[e]], matrix[starts[e] : starts[e] + counts[e]]
                    )
            assert part == sorted(part)
            found += part
            parts_seen.append(len(part))
        assert sorted(found) == wanted
    c = slots.counts
    assert c.hits + c.misses == asked
    assert c.misses - c.evictions == len(slots._at)
    assert c.evictions > 100
    assert c.hits > 100
    assert max(parts_seen) > 1
    if not ragged:
        assert c.bytes_copied == c.misses * 4 * (7 * 4 + 3 * 2)


def test_the_expert_used_last_stays():
    slots = Slots([torch.randn(5, 2)], range(5), [1] * 5, 3, CPU)
    for wanted in ([0], [1], [2], [0], [3]):
        list(slots.visit(wanted))
    assert list(slots._at) == [2, 0, 3]
    assert (slots.counts.hits, slots.counts.misses, slots.counts.evictions) == (1, 4, 1)
    [(part, _), (rest, _)] = slots.visit([0, 1, 3, 4])  # what is there comes first, and stays for its part
    assert (part, rest) == ([0, 1, 3], [4])


def test_a_copy_that_fails_leaves_the_room_free(monkeypatch):
    slots = Slots([torch.randn(4, 2)], range(4), [1] * 4, 1, CPU)
    slots.matrices = (torch.randn(4, 3),)  # doesn't fit
    for _ in range(3):
        with pytest.raises(RuntimeError):
            list(slots.visit([2]))
    slots.matrices = (torch.randn(4, 2),)
    assert [part for part, _ in slots.visit([2])] == [[2]]


def test_mapped_rows_are_asked_for_before_they_are_copied(tmp_path, monkeypatch):
    a, asked = torch.randn(3000, 3), []
    (tmp_path / "a").write_bytes(a.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "a"), shared=False, size=9000).view(3000, 3)
    real = slots_module.will_need
    monkeypatch.setattr(slots_module, "will_need", lambda rows: (asked.append(len(rows)), real(rows)))
    for ahead in (True, False):
        some = Slots([mapped], (0, 7, 2000), (7, 0, 900), 1000, CPU, ahead)
        for _ in range(2):
            [(_, rows)] = some.visit([0, 1, 2])
            assert torch.equal(some.on_device[0][rows[2] : rows[2] + 900], a[2000:2900])
        assert asked == [7, 0, 900]
    monkeypatch.setattr(slots_module, "_madvise", lambda: None)
    real(mapped)


RANKS = [(4,) * 40, tuple(1 + e * 7 % 11 for e in range(40)), (0, 3, 0, 5, 2), (6,)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", RANKS, ids=["equal", "ragged", "null", "one"])
def test_forwards_are_those_of_the_resident_pool(name, dtype, ranks):
    _, _, _, stack, gates = problem(1, ranks, dtype=dtype)
    ops, layer = backend(name), None
    least = Capacity(1, max(ranks))
    rooms = [least, Capacity(min(7, len(ranks)), max(3 * max(ranks), sum(ranks) // 5)), None]
    if name == "triton":  # which is interpreted: slow
        rooms = rooms[1:]
    ways = [OffloadedExperts(gates, 2, stack, layer, ops.mix, "here", room) for room in rooms]
    for seed in range(12 if name != "triton" else 2):
        g = torch.Generator().manual_seed(seed)
        n = [1, 3, 63, 8][seed % 4]
        u = (torch.randn(n, 48, generator=g) * 2 + 3).to(dtype)
        y = torch.randn(n, 40, generator=g).to(dtype)
        chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
        expected = ops.mix(u, y, stack, chosen, weights)
        for way, room in zip(ways, rooms, strict=True):
            out, who, shares = way.with_choice(u, y)
            assert torch.equal(who, chosen)
            assert torch.allclose(shares, weights, atol=1e-6)
            assert out.dtype == y.dtype
            # All in one go it is the same sum, in the same order; in parts it is rounded once, too.
            bound = 1e-6 if dtype == torch.float32 else 1e-2
            assert relative(out, expected) < bound, room
            again, *_ = way.with_choice(u, y)
            assert torch.equal(again, out) or room is not None
    all_of_them = ways[-1].counts[0]
    assert all_of_them.evictions == 0
    assert all_of_them.misses <= sum(r > 0 for r in ranks)
    if len(ranks) == 40 and name != "triton":
        small, middle = ways[0].counts[0], ways[1].counts[0]
        assert small.evictions > middle.evictions > 0
        assert small.hits < middle.hits < all_of_them.hits


def test_parts_are_rounded_once():
    _, u, y, stack, gates = problem(30, (4,) * 60, dtype=torch.bfloat16, seed=3)
    wide = reference.mix(
        u.double(), y.double(), stack, *reference.choose(reference.gate_scores(u, gates), 50)
    )
    errors = [
        relative(OffloadedExperts(gates, 50, stack, None, reference.mix, "here", room)(u, y), wide)
        for room in (None, Capacity(3, 4))  # 50 parts, each with one expert
    ]
    assert errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("k", [1, 5, 99])
def test_more_choices_than_experts(k):
    _, u, y, stack, gates = problem(7, (3, 4, 2))
    expected = reference.choose(reference.gate_scores(u, gates), k)
    out, *choice = OffloadedExperts(gates, k, stack, None, reference.mix, "here", Capacity(1, 4)).with_choice(
        u, y
    )
    assert torch.equal(choice[0], expected[0])
    assert torch.allclose(choice[1], expected[1], atol=1e-6)
    assert relative(out, reference.mix(u, y, stack, *expected)) < 1e-6


def test_of_equal_scores_the_lower_index_is_chosen():
    _, u, y, stack, gates = problem(9, (4,) * 6)
    twins = gates[[0, 0, 0, 0, 0, 0]]
    for room in (None, Capacity(2, 8)):
        _, chosen, weights = OffloadedExperts(twins, 2, stack, None, reference.mix, "here", room).with_choice(
            u, y
        )
        assert chosen.tolist() == [[0, 1]] * 9
        assert torch.allclose(weights, torch.full((9, 2), 0.5))


def test_padding_of_zeros_fetches_nothing_more():
    _, u, y, stack, gates = problem(9, (4,) * 60)
    way = OffloadedExperts(gates, 2, stack, None, reference.mix, "here")
    u[3] = 0
    _, chosen, weights = way.with_choice(u, y)
    expected = reference.choose(reference.gate_scores(u, gates), 2)
    assert torch.equal(chosen, expected[0])
    assert torch.allclose(weights, expected[1], atol=1e-6)
    assert chosen[3].tolist() == [0, 1]
    assert way.counts[1].misses < 55


def test_long_inputs_are_chosen_for_in_pieces(monkeypatch):
    _, u, y, stack, gates = problem(50, (4,) * 20)
    whole = OffloadedExperts(gates, 2, stack, None, reference.mix, "here", Capacity(5, 20)).with_choice(u, y)
    monkeypatch.setattr(offload, "CHUNK_VALUES", 48 * 7)
    pieces = OffloadedExperts(gates, 2, stack, None, reference.mix, "here", Capacity(5, 20)).with_choice(u, y)
    assert torch.equal(whole[1], pieces[1])
    assert torch.allclose(whole[0], pieces[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_and_shapes(dtype):
    _, u, y, stack, gates = problem(12, (4,) * 6, dtype=dtype)
    ops = backend("torch")
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    way = OffloadedExperts(gates, 2, stack, None, ops.mix, "here", Capacity(2, 9))
    out, _, shares = way.with_choice(u.view(3, 4, 48), y.view(3, 4, 40))
    assert out.shape == (3, 4, 40)
    assert shares.dtype == weights.dtype
    expected = ops.mix(u, y, stack, chosen, weights)
    assert relative(out.view(12, 40), expected) < (1e-12 if dtype == torch.float64 else 2e-3)
    none = way.with_choice(u[:0], y[:0])
    assert [t.shape for t in none] == [(0, 40), (0, 2), (0, 2)]
    apart = torch.cat([u, u], 1)[:, :48]  # not contiguous
    assert torch.allclose(way(apart, y), way(u, y))


def test_vectors_act_as_they_do_on_the_resident_pool():
    parts, w, b = general()
    parts = [None if p is None or p.bottleneck is not None else p for p in parts]
    u = torch.randn(33, w.shape[1], generator=torch.Generator().manual_seed(3))
    y = torch.nn.functional.linear(u, w, b)
    stack, layer = make_stack(parts, *w.shape[::-1], torch.float32), Layer(b, lambda x: x @ w.T)
    gates = gates_of("random", len(parts), w.shape[1], torch.Generator().manual_seed(4))
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 3)
    expected = reference.mix(u, y, stack, chosen, weights, layer)
    for room in (None, Capacity(2, 4)):
        found = OffloadedExperts(gates, 3, stack, layer, backend("torch").mix, "here", room)(u, y)
        assert relative(found, expected) < 1e-6


def test_what_it_refuses(monkeypatch):
    _, u, y, stack, gates = problem(4, (3, 4, 2))
    way = OffloadedExperts(gates, 2, stack, None, reference.mix, "mlp.up_proj", Capacity(1, 4))
    expected = way(u, y)
    for bad in (torch.nan, torch.inf):
        broken = u.clone()
        broken[2, 7] = bad
        with pytest.raises(RoutingError, match=r"mlp\.up_proj: its input isn't finite"):
            way(broken, y)
    with pytest.raises(RoutingError, match="no backward pass"):
        way(u.clone().requires_grad_(), y)
    with torch.no_grad():
        assert torch.allclose(way(u.clone().requires_grad_(), y), expected, atol=1e-5)
    monkeypatch.setattr(offload, "_is_capturing", lambda y: True)
    with pytest.raises(RoutingError, match="CUDA graph"):
        way(u, y)
    with pytest.raises(RoutingError, match="low-rank rows and vectors"):
        OffloadedExperts(
            gates, 2, make_stack(general()[0], 24, 20, torch.float32), None, reference.mix, "here"
        )
    monkeypatch.undo()
    assert torch.allclose(way(u, y), expected, atol=1e-5)  # refusals leave nothing behind


def test_inference_mode_may_come_and_go():
    _, u, y, stack, gates = problem(20, (3,) * 12)
    way = OffloadedExperts(gates, 2, stack, None, backend("torch").mix, "here", Capacity(2, 7))
    with torch.inference_mode():
        expected = way(u, y)
    assert torch.allclose(way(u, y), expected, atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(way(u, y), expected, atol=1e-5)


def test_copies_begin_empty_and_threads_wait_for_one_another():
    _, _, _, stack, gates = problem(1, (3,) * 30)
    way = OffloadedExperts(gates, 2, stack, None, backend("torch").mix, "here", Capacity(4, 9))
    other = copy.deepcopy(way)
    assert other.capacity == way.capacity
    inputs = [problem(5, (3,), seed=s)[1:3] for s in range(24)]
    expected = [other(u, y) for u, y in inputs]
    assert way.counts[0].misses == 0
    found = [None] * len(inputs)

    def work(which):
        for i in which:
            found[i] = way(*inputs[i])

    threads = [threading.Thread(target=work, args=(range(t, 24, 3),)) for t in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_what_is_where_goes_along_with_the_device():
    _, u, y, stack, gates = problem(4, (3, 4, 2))
    way = OffloadedExperts(gates, 2, stack, None, reference.mix, "here")
    here = way._state_on(CPU)
    assert way._state_on(CPU) is here
    there = way._state_on(torch.device("meta"))
    assert {
        t.device.type for t in (there.quantized.codes, there.rows.on_device[0], there.gates.on_device[0])
    } == {"meta"}
    assert way.gates.is_cpu
    assert way.stack.A.is_cpu
    assert way(u, y).is_cpu

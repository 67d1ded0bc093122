"""The compiled kernel: every instruction set this processor has, fused calls, what it refuses,
and compilers carrying it."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import math
import subprocess
import threading
import time

import pytest
import torch
from kernel_problems import hard_gates, problem, routed_update

from conftest import relative
from phatgoose.errors import RoutingError
from phatgoose.ops import BACKENDS, CpuRouting, auto_is, backend, fast, make_stack, reference
from phatgoose.ops.cpu import backend as cpu
from phatgoose.ops.cpu import build
from phatgoose.ops.fused import Choice
from phatgoose.ops.operands import kernel_operands
from phatgoose.ops.quantized_gates import kernel_gates
from phatgoose.ops.update import Update

VARIANTS = build.library().variants
BOTH = [torch.float32, torch.bfloat16]


def by_variant(index, fused, u, y, chosen=None, weights=None):
    """`fused` run with one instruction set, on outputs poisoned with NaN."""
    out = torch.full_like(y, torch.nan)
    n, k = len(u), fused.top_k
    chosen = torch.full((n, k), -7) if chosen is None else chosen
    weights = torch.full((n, k), torch.nan) if weights is None else weights
    pointers = [t.data_ptr() for t in (u, y, out)]
    kinds = cpu._DTYPE_CODES[u.dtype, y.dtype]
    code = build.library().run(
        index, fused.calls.site_address, *pointers, n, chosen.data_ptr(), weights.data_ptr(), kinds
    )
    assert code == 0
    return out, chosen, weights


SHAPES = [
    (1, (4,), 48, 40), (1, (16,) * 40, 577, 33), (5, tuple(range(1, 40)), 31, 130), (16, (16,) * 33, 96, 64),
    (17, (16,) * 33, 96, 64), (63, (2, 9, 0, 1), 33, 31), (100, tuple(range(60)), 65, 130),
    (300, (16,) * 3, 64, 200), (1100, (3,) * 20, 40, 17), (40, (200, 16, 70), 96, 100),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=VARIANTS)
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize(("tokens", "ranks", "d_in", "d_out"), SHAPES)
def test_every_instruction_set_chooses_and_mixes_like_the_reference(index, dtype, tokens, ranks, d_in, d_out):
    u, y, stack, gates = problem(tokens, ranks, d_in, d_out, dtype)
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    expected = reference.mix(u, y, stack, chosen, weights)
    found = by_variant(index, CpuRouting(gates, 2, stack), u, y)
    assert torch.equal(found[1], chosen)
    assert torch.allclose(found[2], weights, atol=2e-6)
    limit = 2e-6 if dtype == torch.float32 else 1e-2
    assert relative(found[0], expected, y.double()) < limit


@pytest.mark.parametrize("u_dtype", BOTH, ids=str)
@pytest.mark.parametrize("w_dtype", BOTH, ids=str)
@pytest.mark.parametrize("y_dtype", BOTH, ids=str)
@pytest.mark.parametrize("tokens", [3, 70])
def test_dtypes_mix(u_dtype, w_dtype, y_dtype, tokens):
    u, y, stack, gates = problem(tokens, (4,) * 20, dtype=u_dtype, weights=w_dtype)
    y = y.to(y_dtype)
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 3)
    expected = reference.mix(u, y, stack, chosen, weights)
    found = CpuRouting(gates, 3, stack)(u, y)
    assert found.dtype == y_dtype
    assert relative(found, expected, y.double()) < (
        1e-2 if torch.bfloat16 in (u_dtype, w_dtype, y_dtype) else 2e-6
    )


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 6, 1), (0,), (3, 0), (2, 3, 1)])
def test_a_call_that_tells_its_choice_is_the_same_call(shape, dtype):
    tokens = math.prod(shape)
    u, y, stack, gates = problem(tokens, (4,) * 20, dtype=dtype)
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    fused = CpuRouting(gates, 2, stack)
    wide_u = torch.stack([u, u], -1)[..., 0].view(*shape, 48)  # not contiguous
    kept = y.clone().view(*shape, 40)
    done, found, found_weights = fused.with_choice(wide_u, kept)
    assert done.shape == kept.shape
    assert torch.equal(done, fused(wide_u, kept))
    assert torch.equal(kept, y.view(kept.shape))
    assert torch.equal(found, chosen)
    assert torch.allclose(found_weights, weights, atol=2e-6)


@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=VARIANTS)
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_the_choice_is_that_of_float32_gates_however_near_they_are(index, dtype, offset):
    gates = hard_gates(50, 64)
    u = (torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) + offset).to(dtype)
    exact = reference.gate_scores(u.double(), gates.double())
    stack = problem(1, (1,) * 50, 64, 8, dtype)[2]
    for rows in (u, u[:9]):
        _, chosen, weights = by_variant(
            index, CpuRouting(gates, 2, stack), rows, torch.zeros(len(rows), 8, dtype=dtype)
        )
        true = exact[: len(rows)]
        best = true.topk(2).values
        assert (best - true.gather(1, chosen)).abs().max() < 2e-5 * (1 + offset)
        assert torch.allclose(weights.double(), best.softmax(-1), atol=1e-5 * (1 + offset))
        assert (chosen[:, 0] != chosen[:, 1]).all()


def swallowing(d):
    """An input of one huge value and many small ones, and gates that are their own 8-bit codes.

    Summed in float32, small products added after the huge one are lost. The first gate's score has many such;
    the second's has one that is not lost, and is lower. No other gate is near.
    """
    huge, small, half = 2.0**20 * 130 / 128, 7.5, (d - 2) // 2
    u = torch.tensor([huge] + [small] * half + [-small] * half + [1.1 * 2 * half * small])
    codes = torch.ones(32, d).where(torch.rand(32, d, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0)
    codes[:2, 0], codes[:2, -1] = 127, torch.tensor([0.0, 1.0])
    codes[0, 1:-1] = torch.tensor([1.0] * half + [-1.0] * half)
    codes[1, 1:-1] = torch.tensor([1.0, -1.0]).repeat(half)
    codes[:2, 1:64] -= 1  # of equal and opposite inputs the same, and then one more, so that the means are 0
    codes[:2, 1 + half : 64 + half] -= 1
    codes[0, 64] -= 1
    codes[1, [64, 64 + half]] -= 1
    return u, reference.standardise(codes.double()).float()


@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=VARIANTS)
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_rounding_in_the_scan_doesn_t_change_the_choice(index, dtype, tokens):
    u, gates = swallowing(4096)
    rows = u.to(dtype).repeat(tokens, 1)
    exact = reference.gate_scores(rows[:1].double(), gates.double())[0]
    assert exact.argmax() == 0
    assert exact[0] - exact[1] > 1e-3
    _, chosen, _ = by_variant(
        index,
        CpuRouting(gates, 1, problem(1, (1,) * 32, 4096, 8, dtype)[2]),
        rows,
        torch.zeros(tokens, 8, dtype=dtype),
    )
    assert not chosen.any()


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("tokens", [2, 77])
def test_mix_takes_choices_made_elsewhere(dtype, tokens):
    u, y, stack, _ = problem(tokens, (3, 0, 70, 16, 1), dtype=dtype)
    g = torch.Generator().manual_seed(2)
    chosen = torch.randint(-1, 5, (tokens, 4), generator=g)
    chosen[0] = torch.tensor([2, 2, 2, -1])  # chosen thrice: weights add up
    weights = torch.randn(tokens, 4, generator=g, dtype=torch.float64)
    expected = reference.mix(u, y, stack, chosen, weights)
    found = backend("cpu").mix(u, y, stack, chosen.T.contiguous().T, weights)
    assert relative(found, expected, y.double()) < (2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_threads_don_t_change_the_result(threads, tokens):
    u, y, stack, gates = problem(tokens, (16,) * 50, 256, 300)
    fused, before = CpuRouting(gates, 2, stack), torch.get_num_threads()
    expected = fused(u, y)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(fused(u, y), expected)
    finally:
        torch.set_num_threads(before)


def test_threads_of_python_may_share_it():
    fused = []
    for seed in range(4):
        u, y, stack, gates = problem(20, (4,) * 20, seed=seed)
        fused.append((CpuRouting(gates, 2, stack), u, y))
    expected = [f(u, y) for f, u, y in fused]
    wrong = []

    def work(shift):
        for i in range(200):
            f, u, y = fused[(i + shift) % 4]
            if not torch.equal(f(u, y), expected[(i + shift) % 4]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_that_mix_first_share_what_is_kept(monkeypatch):
    """What one of them made was put in the place of another's, which its kernel still read."""
    u, y, stack, gates = problem(4, (1,) * 9)
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    made, real = [], cpu._site
    monkeypatch.setattr(
        cpu, "_site", lambda *given: time.sleep(0.05) or made.append(real(*given)) or made[-1]
    )
    together, found = threading.Barrier(4), []

    def work():
        together.wait()
        found.append(cpu.mix(u, y, stack, chosen, weights))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = reference.mix(u, y, stack, chosen, weights)
    assert [relative(f, expected) < 1e-6 for f in found] == [True] * 4
    assert len(made) == 1
    kept = kernel_operands(stack).tensors
    assert all(one is other for one, other in zip(made[0].tensors, kept, strict=True))


@pytest.mark.parametrize("tokens", [2, 30])
def test_a_struct_keeps_what_it_points_into(tokens):
    u, y, stack, gates = problem(tokens, (3, 2, 4, 1))
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    expected = cpu.mix(u, y, stack, chosen, weights)
    for name in ("_known_operands", "_known_scales"):
        del stack.__dict__[name]
    spoilt = [torch.full((4,), 7.0) for _ in range(100)]
    assert torch.equal(cpu.mix(u, y, stack, chosen, weights), expected)
    del spoilt


def test_tensors_elsewhere_are_refused():
    u, y, stack, gates = problem(6, (3, 2, 4))
    with pytest.raises(RoutingError, match="CPUs only"):
        CpuRouting(gates, 2, stack)(u.to("meta"), y)


MISFITS = [
    ((3, 47), (3, 40)),
    ((3, 96), (3, 40)),
    ((3, 48), (3, 20)),
    ((3, 48), (2, 40)),
    ((0, 48), (3, 40)),
    ((2, 24), (1, 40)),
    ((48,), (2, 40)),
]


@pytest.mark.parametrize(("of_u", "of_y"), MISFITS)
def test_inputs_of_another_shape_are_refused(of_u, of_y):
    """They are read by address: what isn't theirs would be read, and written."""
    u, y, stack, gates = problem(3, (3, 2, 4, 1))
    fused, bare = CpuRouting(gates, 2, stack), torch.zeros(3, 2)
    fused(u, y)  # which shapes it knows to fit
    wrong = torch.zeros(of_u), torch.zeros(of_y)
    rows = kernel_operands(stack).tensors
    operands = (*wrong, bare.long(), bare, rows, 0)
    for call in (
        lambda: fused(*wrong),
        lambda: fused(*wrong, True),
        lambda: fused.with_choice(*wrong),
        lambda: cpu.mix(*wrong, stack, bare.long(), bare),
        lambda: torch.ops.phatgoose.routed_update(*wrong, fused.gate_operands, rows, 2, 4),
        lambda: torch.ops.phatgoose.routed_mix(*operands),
    ):
        with pytest.raises(RoutingError, match=r"must be \[..., 48\] and its output \[..., 40\]"):
            call()
    assert fused(torch.zeros(0, 48), torch.zeros(0, 40)).shape == (0, 40)
    assert fused(u[0], y[0]).shape == (40,)


@pytest.mark.parametrize("tokens", [3, 30])
def test_choices_that_don_t_fit_are_refused(tokens):
    u, y, stack, _ = problem(tokens, (3, 2, 4, 1))
    chosen, weights = torch.zeros(tokens, 2, dtype=torch.int64), torch.ones(tokens, 2)
    wrong = [
        (chosen[1:], weights[1:]),
        (chosen, weights[:, :1]),
        (chosen.int(), weights),
        (chosen, weights.int()),
        (chosen[:, 0], weights[:, 0]),
    ]
    beyond, below = chosen.clone(), chosen.clone()
    beyond[-1, 1], below[-1, 1] = 4, -5
    operator, rows = torch.ops.phatgoose.routed_mix, kernel_operands(stack).tensors
    for call in (
        lambda *choice: cpu.mix(u, y, stack, *choice),
        lambda *choice: operator(u, y, *choice, rows, 0),
    ):
        for choice in wrong:
            with pytest.raises(RoutingError, match=r"the chosen experts must be int64 \[\d+, k\]"):
                call(*choice)
        with pytest.raises(RoutingError, match="that there isn't: there are 4"):
            call(beyond, weights)
        assert torch.equal(call(below, weights), call(below.clamp(min=-1), weights))


def test_gates_and_stacks_that_don_t_fit_are_refused():
    u, y, stack, gates = problem(3, (3, 2, 4, 1))
    for wrong, top_k, what in (
        (gates, 0, "top_k is 0"),
        (gates, -1, "top_k is -1"),
        (gates[:3], 2, r"float32 \[4, 48\], and they are float32 \[3, 48\]"),
        (gates[:, :40], 2, r"they are float32 \[4, 40\]"),
        (gates.long(), 2, "they are int64"),
    ):
        with pytest.raises(RoutingError, match=what):
            CpuRouting(wrong, top_k, stack)
    for change, what in (
        ({"B": stack.B[:9]}, "as many rows"),
        ({"B": stack.B.bfloat16()}, "one dtype"),
        ({"starts": (0, 3, 5, 10)}, "rows 10 to 11 of expert 3 aren't in a stack of 10 rows"),
        ({"starts": (-1, 3, 5, 9)}, "rows -1 to 2 of expert 0"),
        ({"scales": (1.0,)}, "4 starts and 1 scales"),
    ):
        with pytest.raises(RoutingError, match=what):
            CpuRouting(gates, 2, dataclasses.replace(stack, **change))
    rows, by_gates = kernel_operands(stack).tensors, CpuRouting(gates, 2, stack).gate_operands
    for place, name in enumerate(("gates", "codes", "facts", "a", "b", "owners", "scales")):
        operands = [*by_gates, *rows]
        operands[place] = operands[place].double() if name == "gates" else operands[place][..., :-1]
        with pytest.raises(RoutingError):
            torch.ops.phatgoose.routed_update(u, y, operands[:3], operands[3:], 2, 4)


def test_gates_in_other_dtypes_are_those_gates_in_float32():
    u, y, stack, gates = problem(20, (3, 2, 4, 1))
    narrow = gates.bfloat16()
    assert torch.equal(CpuRouting(narrow, 2, stack)(u, y), CpuRouting(narrow.float(), 2, stack)(u, y))
    assert torch.equal(CpuRouting(gates.double(), 2, stack)(u, y), CpuRouting(gates, 2, stack)(u, y))


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "triton"])
def test_routed_update_is_score_choose_mix(name):
    u, y, stack, gates = problem(9, (3, 2, 4, 1))
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    expected = reference.mix(u, y, stack, chosen, weights)
    assert relative(routed_update(backend(name), u, y, gates, stack, 2), expected) < 1e-6


def test_compilers_carry_it_as_one_operator():
    u, y, stack, gates = problem(5, (3, 2, 4, 1))
    fused = CpuRouting(gates, 2, stack)

    def function(u, y):
        return fused(u * 2, y) + 1

    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend=keep)(u, y)
    assert torch.equal(compiled, function(u, y))
    assert sum("routed_update" in str(node.target) for node in graphs[0].graph.nodes) == 1
    tensors = kernel_operands(stack).tensors
    torch.library.opcheck(
        torch.ops.phatgoose.routed_update.default, (u, y, fused.gate_operands, tensors, 2, 4),
        test_utils=("test_schema", "test_faketensor")
    )  # fmt: skip


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_choices_made_elsewhere_are_mixed_by_an_operator(dtype, tokens):
    u, y, stack, gates = problem(tokens, (3, 2, 0, 1), dtype=dtype)
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 3)
    chosen[::2, 1] = -1
    expected = reference.mix(u, y, stack, chosen, weights)
    arguments = (u, y, chosen, weights, kernel_operands(stack).tensors, 0)
    before = y.clone()
    found = torch.ops.phatgoose.routed_mix.default(*arguments)
    assert torch.equal(y, before)
    if tokens:
        assert relative(found, expected) < (1e-6 if dtype == torch.float32 else 5e-3)
    torch.library.opcheck(
        torch.ops.phatgoose.routed_mix.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_the_scan_holds_what_it_promises():
    gates = hard_gates(37, 65)
    _, codes, facts = kernel_gates(gates)
    step, sums, lost = facts
    assert codes.shape == (3, 65, 16)
    codes = codes.transpose(1, 2).reshape(48, 65).double()
    assert torch.equal(codes.sum(1).float(), sums)
    rest = gates.double() - step[:37, None].double() * codes[:37]
    assert (rest.norm(dim=1) <= lost[:37]).all()
    assert (lost[:37] < 0.2 * 65**0.5).all()
    assert lost[36] == 0
    assert (lost[37:] == torch.inf).all()
    assert not codes[37:].any()


def test_a_struct_is_as_long_as_the_kernels():
    assert ctypes.sizeof(cpu.Site) == 17 * 8
    assert ctypes.sizeof(cpu.Prefetch) == 3 * 8


@pytest.fixture
def ahead(monkeypatch):
    """What was asked for, of a memory that holds 100,000 bytes."""
    one = cpu.Prefetch(100_000, 0, 1)
    monkeypatch.setattr(cpu, "shared_prefetch", lambda: one)
    return one


def in_a_file(stack, folder):
    """The same stack, its rows mapped, beginning in the middle of a page."""
    matrices = []
    for name in ("A", "B"):
        matrix = getattr(stack, name)
        (folder / name).write_bytes(bytes(100) + matrix.view(torch.uint8).numpy().tobytes() + bytes(36))
        flat = torch.from_file(
            str(folder / name), shared=False, size=matrix.numel() + 136 // matrix.itemsize, dtype=matrix.dtype
        )
        matrices.append(flat[100 // matrix.itemsize :][: matrix.numel()].view(matrix.shape))
    return dataclasses.replace(stack, A=matrices[0], B=matrices[1], prefetch=True)


@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_file_are_asked_for_once(tokens, dtype, tmp_path, ahead):
    u, y, stack, gates = problem(tokens, (3, 0, 5, 2, 70), dtype=dtype)
    mapped = in_a_file(stack, tmp_path)
    fused = CpuRouting(gates, 2, mapped)
    expected, chosen, _ = CpuRouting(gates, 2, stack).with_choice(u, y)
    for _ in range(2):
        assert torch.equal(fused(u, y), expected)
        who = set(chosen.flatten().tolist())
        assert ahead.bytes == sum(stack.ranks[e] for e in who) * (48 + 40) * dtype.itemsize
    everyone = torch.arange(5).repeat(tokens, 1)
    assert torch.equal(*(cpu.mix(u, y, s, everyone, torch.ones(tokens, 5)) for s in (mapped, stack)))
    assert ahead.bytes == 80 * (48 + 40) * dtype.itemsize  # shared with what only mixes
    assert ahead.epoch == 1


def test_what_was_read_long_ago_is_asked_for_again(tmp_path, ahead):
    u, y, stack, gates = problem(1, (30, 30))
    fused = CpuRouting(gates, 2, in_a_file(stack, tmp_path))
    ahead.limit = 2 * 30 * 88 * 4
    fused(u, y)
    assert (ahead.bytes, ahead.epoch) == (ahead.limit, 1)
    ahead.limit -= 1  # and so it doesn't fit any more
    ahead.epoch += 1
    ahead.bytes = 0
    fused(u, y)
    assert (ahead.bytes, ahead.epoch) == (0, 3)
    copy.deepcopy(fused)(u, y)  # of rows in memory: asking for those does nothing


READING = """
#include <stdio.h>
#include <sys/mman.h>
static int asked(void* start, size_t bytes, int) { return printf("%zu %zu\\n", size_t(start) >> 20, bytes); }
#define madvise asked
#include "update.cpp"
int main() {
    char* const at = reinterpret_cast<char*>(1 << 20);
    Reading near, far;
    near.add(at, 10000), near.add(at + 100000, 10000), near.add(at + 50000, 10000), near.ask();
    far.add(at, 10000), far.add(at + (1 << 20), 10), far.add(at, 20), far.ask();
}
"""


def test_what_is_asked_for_once_is_not_forgotten(tmp_path):
    """A piece within what was merged already used to be its new end."""
    (tmp_path / "it.cpp").write_text(READING)
    options = ["-std=c++17", "-fopenmp", "-w", "-DVARIANT=portable", f"-I{build.SOURCES}"]
    subprocess.run(
        [*build.compiler(), *options, tmp_path / "it.cpp", "-o", tmp_path / "it"],
        check=True,
        capture_output=True,
    )
    done = subprocess.run([tmp_path / "it"], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["1 110000", "1 10000", "2 10", "1 20"]


def test_auto_says_what_it_is():
    kind, why = auto_is()
    assert kind == "cpu"
    assert VARIANTS[0] in why
    assert fast.choose is backend("auto").choose


def test_another_default_dtype_changes_nothing():
    """vLLM makes models under its model's dtype, and experts with them."""
    gates = reference.standardise(torch.randn(21, 40, generator=torch.Generator().manual_seed(3)))
    u = torch.randn(9, 40, generator=torch.Generator().manual_seed(4)).bfloat16()
    parts = [Update(torch.randn(3, 40).bfloat16(), torch.randn(24, 3).bfloat16(), 0.7) for _ in range(21)]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            facts = kernel_gates(gates)[2]
            stack = make_stack(parts, 40, 24, torch.bfloat16)
            fused = backend("cpu").fuse(gates, 2, stack, None)
            found.append((facts, *fused.with_choice(u, torch.zeros(9, 24, dtype=torch.bfloat16))))
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_choice_on_another_device_is_left_to_mix():
    """The kernel would read addresses of that device as its own."""
    u, y, stack, gates = problem(4, (1, 2, 3))
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    mix = cpu.given(stack)
    assert relative(mix(u, y, Choice(chosen, weights)), reference.mix(u, y, stack, chosen, weights)) < 1e-6
    assert mix(u, y, Choice(chosen.to("meta"), weights.to("meta"))) is None

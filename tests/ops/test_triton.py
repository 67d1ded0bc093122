"""The Triton kernels, in Triton's interpreter: what they choose and add, what they refuse, what never happens
on the way.

With TRITON_INTERPRET=0 and a GPU the same tests run on it.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phatgoose.errors import RoutingError
from phatgoose.ops import BACKENDS, Layer, auto_is, backend, fast, make_stack, reference
from phatgoose.ops.operands import kernel_operands
from phatgoose.ops.triton import backend as triton_backend
from phatgoose.ops.triton import launch as triton_launch
from phatgoose.ops.triton.backend import TritonRouting
from phatgoose.ops.update import Update

pytest.importorskip("triton")
DEVICE = "cpu" if triton_launch.kernels().INTERPRETED else "cuda"
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """New memory holds NaN, or numbers that are no expert."""

    def poison(make):
        def made(*args, **kwargs):
            new = make(*args, **kwargs)
            return (
                new.fill_(torch.nan if new.is_floating_point() else -(2**30))
                if new.dtype != torch.int8
                else new
            )

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def relative(found, expected, without=0.0):
    """Error of the change, not of the whole: a missing update must not hide behind y."""
    found, expected = found.double() - without, expected.double() - without
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def problem(tokens, ranks, d_in=48, d_out=40, dtype=torch.float32, weights=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    parts = [
        Update(torch.randn(r, d_in, generator=g), torch.randn(d_out, r, generator=g), 0.5 + i % 3)
        for i, r in enumerate(ranks)
    ]
    u = (torch.randn(tokens, d_in, generator=g) * 3 + 1).to(DEVICE, dtype)
    y = torch.randn(tokens, d_out, generator=g).to(DEVICE, dtype)
    gates = reference.standardise(torch.randn(len(ranks), d_in, generator=g).double()).float()
    return u, y, make_stack(parts, d_in, d_out, weights or dtype).to(torch.device(DEVICE)), gates.to(DEVICE)


SHAPES = [
    (1, (4,), 48, 40), (2, (16,) * 41, 577, 33), (5, tuple(range(1, 20)), 31, 130), (17, (16,) * 20, 96, 64),
    (65, (2, 9, 0, 1), 33, 31), (80, (*range(1, 20), 40), 65, 130), (3, (0, 0), 48, 40), (70, (0, 0, 0), 48, 40),
]  # fmt: skip


@pytest.mark.slow(5)
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(("tokens", "ranks", "d_in", "d_out"), SHAPES)
def test_it_chooses_and_mixes_like_the_reference(dtype, tokens, ranks, d_in, d_out):
    u, y, stack, gates = problem(tokens, ranks, d_in, d_out, dtype)
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    expected = reference.mix(u, y, stack, chosen, weights)
    found = TritonRouting(gates, 2, stack).with_choice(u, y)
    assert torch.equal(found[1], chosen)
    assert torch.allclose(found[2], weights, atol=2e-6)
    assert found[0].dtype == dtype
    assert relative(found[0], expected, y.double()) < LIMIT[dtype]
    if dtype == torch.bfloat16:
        assert torch.equal(backend("triton").routed_update(u, y, gates, stack, 2), found[0])


@pytest.mark.parametrize("few", [0, 1000], ids=["grouped", "few"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_ways_take_choices_made_elsewhere(few, dtype, monkeypatch):
    monkeypatch.setattr(triton_launch, "FEW_TOKENS", few)
    u, y, stack, _ = problem(19, (3, 0, 35, 16, 1), dtype=dtype)
    g = torch.Generator().manual_seed(2)
    chosen = torch.randint(-1, 5, (19, 4), generator=g).to(DEVICE)
    chosen[0] = torch.tensor([2, 2, 2, -1])  # chosen thrice: weights add up
    chosen[1] = -1
    weights = torch.randn(19, 4, generator=g, dtype=torch.float64).to(DEVICE)
    for k in (1, 2, 4):
        expected = reference.mix(u, y, stack, chosen[:, :k], weights[:, :k])
        found = backend("triton").mix(u, y, stack, chosen.T.contiguous().T[:, :k], weights[:, :k])
        assert relative(found, expected, y.double()) < LIMIT[dtype]
        assert torch.equal(found[1], y[1])


@pytest.mark.parametrize("u_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("few", [0, 64], ids=["grouped", "few"])
def test_dtypes_mix(u_dtype, w_dtype, few, monkeypatch):
    monkeypatch.setattr(triton_launch, "FEW_TOKENS", few)
    u, y, stack, gates = problem(5, (4,) * 6, dtype=u_dtype, weights=w_dtype)
    for y_dtype in (torch.float32, torch.bfloat16):
        own = y.to(y_dtype)
        chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
        expected = reference.mix(u, own, stack, chosen, weights)
        found = TritonRouting(gates, 2, stack)(u, own)
        assert found.dtype == y_dtype
        wide = u_dtype == w_dtype == y_dtype == torch.float32
        assert relative(found, expected, own.double()) < (2e-6 if wide else 1e-2)


@pytest.mark.parametrize("k", [1, 2, 5, 19, 40])
def test_any_number_of_choices(k):
    u, y, stack, gates = problem(3, (2,) * 33)
    chosen, weights = reference.choose(reference.gate_scores(u, gates), k)
    _, found, found_weights = TritonRouting(gates, k, stack).with_choice(u, y)
    assert torch.equal(found, chosen)
    assert torch.allclose(found_weights, weights, atol=2e-6)


def test_more_choices_than_it_makes_are_torchs():
    u, y, stack, gates = problem(3, (1,) * 70)
    assert backend("triton").fuse(gates, 66, stack, None) is None
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 66)
    expected = reference.mix(u, y, stack, chosen, weights)
    assert relative(backend("triton").routed_update(u, y, gates, stack, 66), expected, y.double()) < 2e-6


@pytest.mark.slow(3)
@pytest.mark.parametrize("processors", [1, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_scores_are_float32s_however_near_gates_are_and_however_experts_are_dealt_out(
    processors, dtype, offset, monkeypatch
):
    monkeypatch.setattr(triton_launch, "_processors", lambda device: processors)
    g = torch.Generator().manual_seed(0)
    raw = torch.randn(1, 64, generator=g) + 1e-4 * torch.randn(50, 64, generator=g)
    raw[:16] = torch.randn(16, 64, generator=g)
    raw[16:25, 5] = 100.0
    gates = reference.standardise(raw.double()).float().to(DEVICE)
    gates[-1] = 0
    u = (torch.randn(19, 64, generator=torch.Generator().manual_seed(1)) + offset).to(DEVICE, dtype)
    exact = reference.gate_scores(u.double(), gates.double())
    _, y, stack, _ = problem(19, (1,) * 50, 64, 8, dtype)
    for n in (2, 19):
        _, chosen, weights = TritonRouting(gates, 3, stack).with_choice(u[:n], y[:n])
        best = exact[:n].topk(3).values
        assert (best - exact[:n].gather(1, chosen)).abs().max() < 2e-5 * (1 + offset)
        assert torch.allclose(weights.double(), best.softmax(-1), atol=1e-5 * (1 + offset))
        assert (chosen.sort(1).values.diff(dim=1) != 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets
@pytest.mark.parametrize(("tokens", "few"), [(3, 64), (17, 0)])
def test_nan_and_infinity_stay_where_they_are(tokens, few, monkeypatch):
    monkeypatch.setattr(triton_launch, "FEW_TOKENS", few)
    u, y, stack, gates = problem(tokens, (4,) * 20)
    clean = TritonRouting(gates, 2, stack)(u, y)
    u[1, 3], u[2, 0] = torch.nan, torch.inf
    found, chosen, _ = TritonRouting(gates, 2, stack).with_choice(u, y)
    assert not found[1:3].isfinite().all(1).any()
    rest = [n for n in range(tokens) if n not in (1, 2)]
    assert torch.equal(found[rest], clean[rest])
    assert ((chosen >= 0) & (chosen < 20)).all()


@pytest.mark.parametrize("tokens", [2, 20])
def test_equal_scores_choose_the_lower_index(tokens):
    _, y, stack, gates = problem(tokens, (4,) * 40)
    _, chosen, weights = TritonRouting(gates, 3, stack).with_choice(torch.zeros(tokens, 48, device=DEVICE), y)
    assert torch.equal(chosen.cpu(), torch.arange(3).expand(tokens, 3))
    assert torch.allclose(weights, torch.tensor(1 / 3, device=DEVICE))


def test_scores_all_negative_don_t_choose_what_fills_up_a_block():
    u, y, stack, _ = problem(30, (2,) * 17, d_in=64)
    up = reference.standardise(u[:1])
    gates = reference.standardise(-up + 0.3 * torch.randn(17, 64).to(DEVICE))
    rows = (u[:1] + 0.1 * torch.randn(30, 64).to(DEVICE)).contiguous()
    assert reference.gate_scores(rows, gates).max() < 0
    chosen = reference.choose(reference.gate_scores(rows, gates), 2)[0]
    for n in (2, 30):
        assert torch.equal(TritonRouting(gates, 2, stack).with_choice(rows[:n], y[:n])[1], chosen[:n])


def test_layouts_and_writing_in_place(monkeypatch):
    u, y, stack, gates = problem(6, (4,) * 20)
    for few in (64, 0):
        monkeypatch.setattr(triton_launch, "FEW_TOKENS", few)
        fused, before = TritonRouting(gates, 2, stack), y.clone()
        expected = fused(u, y)
        assert torch.equal(y, before)
        assert torch.equal(fused(u.T.contiguous().T, y.T.contiguous().T), expected)
        assert torch.equal(fused(u.view(2, 3, 48), y.view(2, 3, 40)), expected.view(2, 3, 40))
        own = y.clone()
        assert fused(u, own, into_y=True) is own
        assert torch.equal(own, expected)
        assert fused(u[:0], y[:0]).shape == (0, 40)


def test_rows_that_nobody_owns_may_hold_anything():
    u, y, stack, gates = problem(65, (3, 4, 2))
    nan = torch.full((2, 48), torch.nan, device=DEVICE), torch.full((2, 40), torch.nan, device=DEVICE)
    wider = dataclasses.replace(
        stack,
        A=torch.cat([nan[0], stack.A[:3], nan[0], stack.A[3:], nan[0]]),
        B=torch.cat([nan[1], stack.B[:3], nan[1], stack.B[3:], nan[1]]),
        starts=(2, 7, 11),
    )
    for n in (65, 3):
        assert torch.equal(
            TritonRouting(gates, 2, wider)(u[:n], y[:n]), TritonRouting(gates, 2, stack)(u[:n], y[:n])
        )


def test_other_parts_of_an_update_are_added():
    torch.manual_seed(0)
    w, b = torch.randn(20, 24).to(DEVICE), torch.randn(20).to(DEVICE)
    parts = [
        Update(torch.randn(3, 24), torch.randn(20, 3), 0.5, bias=torch.randn(20)),
        None,
        Update(torch.zeros(0, 24), torch.zeros(20, 0), input_scale=torch.rand(24)),
        Update(torch.randn(2, 24), torch.randn(20, 2), 2.0, output_scale=torch.rand(20), covers_bias=False),
    ]
    stack, layer = (
        make_stack(parts, 24, 20, torch.float32).to(torch.device(DEVICE)),
        Layer(b, lambda x: x @ w.T),
    )
    u = torch.randn(9, 24).to(DEVICE)
    y, gates = u @ w.T + b, reference.standardise(torch.randn(4, 24)).to(DEVICE)
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    expected = reference.mix(u, y, stack, chosen, weights, layer)
    assert relative(TritonRouting(gates, 2, stack, layer)(u, y), expected, y.double()) < 1e-5


class Watch(TorchDispatchMode):
    """Notes the largest new tensor, and anything for which a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.largest, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "nonzero",
            "bincount",
            "_unique2",
            "masked_select",
            "_to_copy",
        ):
            self.waits.append(func)
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("tokens", [6, 90])
def test_nothing_waits_for_the_gpu_and_scores_are_never_written(tokens, monkeypatch):
    u, y, stack, gates = problem(tokens, (1,) * 400, d_in=16, d_out=8)
    fused = TritonRouting(gates, 2, stack)
    fused(u[:1], y[:1])  # prepares what is kept
    grids = []
    monkeypatch.setattr(
        triton_launch, "launch", lambda kernel, grid, *_, **constants: grids.append((grid, constants))
    )
    for inputs in (u, torch.zeros_like(u)):
        with Watch() as watch:
            fused(inputs, y)
        assert not watch.waits
        assert watch.largest < tokens * 400 / 3
    assert grids[: len(grids) // 2] == grids[len(grids) // 2 :]  # they depend on sizes alone
    grids.clear()
    with Watch() as watch:
        backend("triton").mix(u, y, stack, torch.zeros(tokens, 2, dtype=torch.int64), torch.ones(tokens, 2))
    assert not watch.waits


@pytest.mark.parametrize("chosen", ["one", "all", "none"])
def test_worst_cases_fit_their_grids(chosen):
    n, experts = 97, 30
    u, y, stack, _ = problem(n, (1,) * experts, d_in=16, d_out=16)
    choice = {
        "one": torch.full((n,), 7),
        "all": torch.arange(n) % (experts + 1) - 1,
        "none": torch.full((n,), -1),
    }
    choice = torch.stack([choice[chosen], choice["all"]], 1).to(DEVICE)
    weights = torch.rand(n, 2).to(DEVICE)
    expected = reference.mix(u, y, stack, choice, weights)
    assert relative(backend("triton").mix(u, y, stack, choice, weights), expected, y.double()) < 2e-6


def test_what_it_can_t_do_is_an_error_by_name_and_auto_does_it_in_torch():
    u, y, stack, gates = problem(6, (3, 2, 4))
    x = u.clone().requires_grad_()
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    strict, auto = BACKENDS["triton"], backend("auto", "cuda")
    for call in (
        lambda: TritonRouting(gates, 2, stack)(x, y),
        lambda: strict.mix(x, y, stack, chosen, weights),
    ):
        with pytest.raises(RoutingError, match=r"no backward pass.*torch.no_grad"):
            call()
        with torch.no_grad():
            assert relative(call(), reference.mix(u, y, stack, chosen, weights)) < 1e-6
    assert auto.fuse(gates, 2, stack, None)(x, y) is None
    assert auto.mix(x, y, stack, chosen, weights).requires_grad
    assert auto.routed_update(x, y, gates, stack, 2).requires_grad
    double = make_stack([Update(torch.randn(2, 48), torch.randn(40, 2))] * 3, 48, 40, torch.float64)
    double = double.to(torch.device(DEVICE))
    with pytest.raises(RoutingError, match=r"not in torch.float64"):
        strict.mix(u.double(), y.double(), double, chosen, weights)
    assert auto.mix(u.double(), y.double(), double, chosen, weights).dtype == torch.float64
    with pytest.raises(RoutingError, match="this is on meta"):
        strict.mix(u.to("meta"), y, stack, chosen, weights)


def test_what_doesn_t_fit_is_refused():
    u, y, stack, gates = problem(3, (3, 2, 4))
    chosen, weights = torch.zeros(3, 2, dtype=torch.int64, device=DEVICE), torch.ones(3, 2, device=DEVICE)
    fused, mix = TritonRouting(gates, 2, stack), backend("triton").mix
    for call in (
        lambda: fused(u[:, :40], y),
        lambda: fused(u, y[:2]),
        lambda: fused.with_choice(u[:2], y),
        lambda: mix(u, y[:, :20], stack, chosen, weights),
        lambda: mix(u, y, stack, chosen[:2], weights[:2]),
        lambda: mix(u, y, stack, chosen.int(), weights),
        lambda: TritonRouting(gates[:2], 2, stack),
        lambda: TritonRouting(gates, 0, stack),
    ):
        with pytest.raises(RoutingError, match=r"must be"):
            call()
    assert torch.equal(TritonRouting(gates.double(), 2, stack)(u, y), fused(u, y))


def test_without_triton_or_a_gpu_it_says_so(monkeypatch):
    why = "Triton can't be imported (No module named 'triton')"
    monkeypatch.setattr(triton_backend, "reason", lambda: why)
    assert auto_is("cuda") == ("torch", why)
    assert backend("auto", "cuda").name == "torch"
    with pytest.raises(RoutingError, match="can't be imported"):
        backend("triton")
    assert auto_is("xpu")[0] == "torch"


def test_auto_on_gpus_is_triton():
    kind, why = auto_is("cuda")
    assert kind == "triton"
    assert why.startswith("Triton 3")
    assert backend("auto", "cuda").mix is not fast.mix


def test_copies_work_on_their_own():
    u, y, stack, gates = problem(5, (3, 2, 4, 1))
    fused = TritonRouting(gates, 2, stack)
    copied = copy.deepcopy(fused)
    expected = fused(u, y)
    del fused, stack, gates
    assert torch.equal(copied(u, y), expected)


def test_compilers_carry_it_as_one_operator():
    u, y, stack, gates = problem(5, (3, 2, 4, 1))
    fused, graphs = TritonRouting(gates, 2, stack), []
    chosen, weights = (
        torch.tensor([[0, 1], [1, -1], [3, 3], [2, 0], [-1, -1]], device=DEVICE),
        torch.rand(5, 2, device=DEVICE),
    )

    def function(u, y):
        return fused(u * 2, y) + backend("triton").mix(u, y, stack, chosen, weights)

    def keep(graph, example):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = function(u, y)
        assert torch.equal(torch.compile(function, fullgraph=True, backend=keep)(u, y), expected)
    called = [str(node.target) for node in graphs[0].graph.nodes]
    assert (
        sum("routed_update" in name for name in called) == sum("routed_mix" in name for name in called) == 1
    )
    rows, tests = kernel_operands(stack).tensors, ("test_schema", "test_faketensor")
    ops = torch.ops.phatgoose
    torch.library.opcheck(ops.routed_update.default, (u, y, [gates], rows, 2, 4), test_utils=tests)
    torch.library.opcheck(ops.routed_mix.default, (u, y, chosen, weights, rows, 4), test_utils=tests)


@pytest.mark.slow(6)
def test_the_compiler_takes_every_kernel(tmp_path):
    """All of them, for an H100 or H200, without one: types, shapes of products, shared memory.
    Not a word about speed."""
    script = Path(__file__).parent / "compile_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = {line.split()[0] for line in done.stdout.splitlines()}
    assert kernels == {
        "score",
        "shrink_few",
        "expand_few",
        "finish",
        "plan",
        "shrink_grouped",
        "expand_grouped",
    }
    spilled = [line for line in done.stdout.splitlines() if line.split()[1] != "0"]
    assert not spilled

"""The Triton kernels, in Triton's interpreter: what they choose and add, what they refuse, what never happens
on the way.

With TRITON_INTERPRET=0 and a GPU the same tests run on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_problems import hard_gates, poison_new_memory, routed_update, triton_device
from kernel_problems import problem as problem_on
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import relative
from phatgoose.errors import RoutingError
from phatgoose.ops import auto_is, backend, fast, reference
from phatgoose.ops.operands import kernel_operands
from phatgoose.ops.triton import backend as triton_backend
from phatgoose.ops.triton import launch as triton_launch
from phatgoose.ops.triton.backend import TritonRouting

pytest.importorskip("triton")
DEVICE = triton_device()
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

problem = partial(problem_on, device=DEVICE)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


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
        assert torch.equal(routed_update(backend("triton"), u, y, gates, stack, 2), found[0])


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


def test_more_choices_than_it_makes_are_torchs():
    u, y, stack, gates = problem(3, (1,) * 70)
    assert backend("triton").fuse(gates, 66, stack, None) is None
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 66)
    expected = reference.mix(u, y, stack, chosen, weights)
    assert relative(routed_update(backend("triton"), u, y, gates, stack, 66), expected, y.double()) < 2e-6


@pytest.mark.slow(3)
@pytest.mark.parametrize("processors", [1, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_scores_are_float32s_however_near_gates_are_and_however_experts_are_dealt_out(
    processors, dtype, offset, monkeypatch
):
    monkeypatch.setattr(triton_launch, "_processors", lambda device: processors)
    gates = hard_gates(50, 64).to(DEVICE)
    u = (torch.randn(19, 64, generator=torch.Generator().manual_seed(1)) + offset).to(DEVICE, dtype)
    exact = reference.gate_scores(u.double(), gates.double())
    _, y, stack, _ = problem(19, (1,) * 50, 64, 8, dtype)
    for n in (2, 19):
        _, chosen, weights = TritonRouting(gates, 3, stack).with_choice(u[:n], y[:n])
        best = exact[:n].topk(3).values
        assert (best - exact[:n].gather(1, chosen)).abs().max() < 2e-5 * (1 + offset)
        assert torch.allclose(weights.double(), best.softmax(-1), atol=1e-5 * (1 + offset))
        assert (chosen.sort(1).values.diff(dim=1) != 0).all()


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


def test_tensors_elsewhere_are_refused():
    u, y, stack, _ = problem(6, (3, 2, 4))
    chosen, weights = torch.zeros(6, 2, dtype=torch.int64, device=DEVICE), torch.ones(6, 2, device=DEVICE)
    with pytest.raises(RoutingError, match="this is on meta"):
        backend("triton").mix(u.to("meta"), y, stack, chosen, weights)


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

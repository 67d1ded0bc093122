"""What the CPU's kernel and Triton's both promise. With TRITON_INTERPRET=0, Triton's are tested on a GPU."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
import torch
from kernel_problems import poison_new_memory, problem, routed_update, triton_device

from conftest import relative
from phatgoose.errors import RoutingError
from phatgoose.ops import BACKENDS, CpuRouting, Layer, backend, make_stack, reference
from phatgoose.ops.triton import launch as triton_launch
from phatgoose.ops.triton.backend import TritonRouting
from phatgoose.ops.update import Update

KERNELS = ["cpu", "triton"]
WAYS = ["cpu", "triton few", "triton grouped"]
"""Triton has a way for few tokens and one that groups them by expert."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel: its fused call, where it runs here, and the device that `auto` takes it for."""

    name: str
    routing: type
    device: str
    meant_for: str

    @property
    def problem(self):
        return partial(problem, device=self.device)


@pytest.fixture
def kernel(request, monkeypatch):
    name, _, way = request.param.partition(" ")
    if name == "cpu":
        return Kernel("cpu", CpuRouting, "cpu", "cpu")
    pytest.importorskip("triton")
    poison_new_memory(monkeypatch)
    if way:
        monkeypatch.setattr(triton_launch, "FEW_TOKENS", {"few": 64, "grouped": 0}[way])
    return Kernel("triton", TritonRouting, triton_device(), "cuda")


on = partial(pytest.mark.parametrize, indirect=["kernel"])


@on(
    ("kernel", "tokens", "experts", "k"),
    [("cpu", n, 64, k) for n in (4, 90) for k in (1, 2, 7, 8, 9, 19, 40, 64, 70)]
    + [("triton", 3, 33, k) for k in (1, 2, 5, 19, 40)],
)
def test_any_number_of_choices(kernel, tokens, experts, k):
    u, y, stack, gates = kernel.problem(tokens, (2,) * experts)
    chosen, weights = reference.choose(reference.gate_scores(u, gates), k)
    _, found, found_weights = kernel.routing(gates, k, stack).with_choice(u, y)
    assert torch.equal(found, chosen)
    assert torch.allclose(found_weights, weights, atol=2e-6)


@on("kernel", KERNELS)
def test_scores_all_negative_don_t_choose_what_fills_up_a_block(kernel):
    u, y, stack, _ = kernel.problem(30, (2,) * 17, d_in=64)
    up = reference.standardise(u[:1])
    gates = reference.standardise(-up + 0.3 * torch.randn(17, 64).to(kernel.device))
    rows = (u[:1] + 0.1 * torch.randn(30, 64).to(kernel.device)).contiguous()
    assert reference.gate_scores(rows, gates).max() < 0
    chosen = reference.choose(reference.gate_scores(rows, gates), 2)[0]
    for n in (2, 30):
        assert torch.equal(kernel.routing(gates, 2, stack).with_choice(rows[:n], y[:n])[1], chosen[:n])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets Triton's
@on(
    ("kernel", "tokens", "experts"),
    [("cpu", 3, 40), ("cpu", 40, 40), ("triton few", 3, 20), ("triton grouped", 17, 20)],
)
def test_nan_and_infinity_stay_where_they_are(kernel, tokens, experts):
    u, y, stack, gates = kernel.problem(tokens, (4,) * experts)
    clean = kernel.routing(gates, 2, stack)(u, y)
    u[1, 3], u[2, 0] = torch.nan, torch.inf
    found, chosen, _ = kernel.routing(gates, 2, stack).with_choice(u, y)
    assert not found[1:3].isfinite().all(1).any()
    rest = [n for n in range(tokens) if n not in (1, 2)]
    assert torch.equal(found[rest], clean[rest])
    assert ((chosen >= 0) & (chosen < experts)).all()


@on(("kernel", "tokens"), [("cpu", 4), ("cpu", 50), ("triton", 2), ("triton", 20)])
def test_constant_inputs_and_equal_scores_choose_the_lower_index(kernel, tokens):
    _, y, stack, gates = kernel.problem(tokens, (4,) * 40)
    constant = torch.zeros(tokens, 48, device=kernel.device)
    _, chosen, weights = kernel.routing(gates, 3, stack).with_choice(constant, y)
    assert torch.equal(chosen.cpu(), torch.arange(3).expand(tokens, 3))
    assert torch.allclose(weights, torch.tensor(1 / 3, device=kernel.device))


@on("kernel", WAYS)
def test_layouts_and_writing_in_place(kernel):
    u, y, stack, gates = kernel.problem(6, (4,) * 20)
    fused, before = kernel.routing(gates, 2, stack), y.clone()
    expected = fused(u, y)
    assert torch.equal(y, before)
    assert torch.equal(fused(u.T.contiguous().T, y.T.contiguous().T), expected)
    assert torch.equal(fused(u.view(2, 3, 48), y.view(2, 3, 40)), expected.view(2, 3, 40))
    assert fused(u, y, into_y=True) is y
    assert torch.equal(y, expected)
    assert fused(u[:0], y[:0]).shape == (0, 40)


@on(("kernel", "tokens"), [("cpu", 40), ("triton", 65)])
def test_rows_that_nobody_owns_may_hold_anything(kernel, tokens):
    u, y, stack, gates = kernel.problem(tokens, (3, 4, 2))
    a, b = (torch.full((2, width), torch.nan, device=kernel.device) for width in (48, 40))
    wider = dataclasses.replace(
        stack,
        A=torch.cat([a, stack.A[:3], a, stack.A[3:], a]),
        B=torch.cat([b, stack.B[:3], b, stack.B[3:], b]),
        starts=(2, 7, 11),
    )
    for n in (tokens, 3):
        expected = kernel.routing(gates, 2, stack)(u[:n], y[:n])
        assert torch.equal(kernel.routing(gates, 2, wider)(u[:n], y[:n]), expected)


@on("kernel", KERNELS)
def test_other_parts_of_an_update_are_added(kernel):
    torch.manual_seed(0)
    w, b = torch.randn(20, 24).to(kernel.device), torch.randn(20).to(kernel.device)
    parts = [
        Update(torch.randn(3, 24), torch.randn(20, 3), 0.5, bias=torch.randn(20)),
        None,
        Update(torch.zeros(0, 24), torch.zeros(20, 0), input_scale=torch.rand(24)),
        Update(torch.randn(2, 24), torch.randn(20, 2), 2.0, output_scale=torch.rand(20), covers_bias=False),
    ]
    stack = make_stack(parts, 24, 20, torch.float32).to(torch.device(kernel.device))
    layer = Layer(b, lambda x: x @ w.T)
    u = torch.randn(9, 24).to(kernel.device)
    y, gates = u @ w.T + b, reference.standardise(torch.randn(4, 24)).to(kernel.device)
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    expected = reference.mix(u, y, stack, chosen, weights, layer)
    fused = kernel.routing(gates, 2, stack, layer)
    assert relative(fused(u, y), expected, y.double()) < 1e-5
    assert relative(fused(u.view(3, 3, 24), y.view(3, 3, 20)).view(9, 20), expected, y.double()) < 1e-5


@on("kernel", KERNELS)
def test_what_has_no_gradient_is_an_error_by_name_and_auto_does_it_in_torch(kernel):
    u, y, stack, gates = kernel.problem(6, (3, 2, 4))
    x = u.clone().requires_grad_()
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    strict, auto = BACKENDS[kernel.name], backend("auto", kernel.meant_for)
    for call in (
        lambda: kernel.routing(gates, 2, stack)(x, y),
        lambda: strict.mix(x, y, stack, chosen, weights),
    ):
        with pytest.raises(RoutingError, match=r"no backward pass.*torch.no_grad"):
            call()
        with torch.no_grad():
            assert relative(call(), reference.mix(u, y, stack, chosen, weights)) < 1e-6
    assert auto.fuse(gates, 2, stack, None)(x, y) is None
    assert auto.mix(x, y, stack, chosen, weights).requires_grad
    assert routed_update(auto, x, y, gates, stack, 2).requires_grad


@on(
    ("kernel", "dtype", "says"),
    [
        ("cpu", torch.float16, "float32 and bfloat16, not in torch.float16"),
        ("triton", torch.float64, "not in torch.float64"),
    ],
)
def test_a_dtype_it_lacks_is_an_error_by_name_and_auto_does_it_in_torch(kernel, dtype, says):
    u, y, _, gates = kernel.problem(6, (3, 2, 4))
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    other = make_stack([Update(torch.randn(2, 48), torch.randn(40, 2))] * 3, 48, 40, dtype)
    asked = (u.to(dtype), y.to(dtype), other.to(torch.device(kernel.device)), chosen, weights)
    with pytest.raises(RoutingError, match=says):
        BACKENDS[kernel.name].mix(*asked)
    assert backend("auto", kernel.meant_for).mix(*asked).dtype == dtype


@on("kernel", KERNELS)
def test_copies_work_on_their_own(kernel):
    u, y, stack, gates = kernel.problem(5, (3, 2, 4, 1))
    fused = kernel.routing(gates, 2, stack)
    copied = copy.deepcopy(fused)
    expected = fused(u, y)
    del fused, stack, gates
    assert torch.equal(copied(u, y), expected)

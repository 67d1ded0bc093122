"""Every backend against the reference, and the reference against the formula in float64."""

from __future__ import annotations

import dataclasses
import math
from importlib.util import find_spec

import pytest
import torch

from conftest import relative
from phatgoose.errors import RoutingError, UnknownName
from phatgoose.experts.weight_signature import why_no_signature
from phatgoose.ops import BACKENDS, Layer, backend, fast, make_stack, reference
from phatgoose.ops.bottleneck import Bottleneck
from phatgoose.ops.update import Projections, SharedUpdate, Update

DIFFERENTIABLE = ["torch", "auto"]
NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton isn't installed")
NAMES = [pytest.param(name, marks=NO_TRITON) if name == "triton" else name for name in BACKENDS]


def problem(tokens, ranks, d_in=48, d_out=40, dtype=torch.float32, k=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    parts = [
        Update(
            torch.randn(r, d_in, generator=g),
            torch.randn(d_out, r, generator=g),
            float(torch.rand(1, generator=g)) + 0.5,
        )
        for r in ranks
    ]
    u = torch.randn(tokens, d_in, generator=g) * 3 + 1
    y = torch.randn(tokens, d_out, generator=g)
    gates = reference.standardise(torch.randn(len(ranks), d_in, generator=g))
    return parts, u.to(dtype), y.to(dtype), make_stack(parts, d_in, d_out, dtype), gates


SHAPES = [
    (0, (4, 4)), (1, (4,)), (1, (16,) * 100), (3, (3, 0, 5)), (7, (16,) * 80), (8, (1,) * 5),
    (63, (2, 9, 4, 1)), (100, (16,) * 90), (100, tuple(range(1, 60))), (5, (0, 0)), (2, (0,)),
]  # fmt: skip


@pytest.mark.slow(3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "ranks"), SHAPES)
def test_mix_equals_the_sum_in_float64(name, dtype, tokens, ranks):
    parts, u, y, stack, gates = problem(tokens, ranks, dtype=dtype)
    ops = backend(name)
    chosen, weights = ops.choose(ops.gate_scores(u, gates), 2)
    assert chosen.shape == weights.shape == (tokens, min(2, len(ranks)))
    expected = y.double().clone()
    for n in range(tokens):
        for e, w in zip(chosen[n].tolist(), weights[n].double(), strict=True):
            a, b, s = parts[e].A.to(dtype), parts[e].B.to(dtype), parts[e].scale  # what is stored is rounded
            expected[n] += w * s * (b.double() @ (a.double() @ u[n].double()))
    found = ops.mix(u, y, stack, chosen, weights)
    assert found.dtype == y.dtype
    assert found.shape == y.shape
    assert relative(found, expected) < (1e-6 if dtype == torch.float32 else 2e-2)


METHODS = [fast.dense, fast.gather, fast.grouped, fast.loop]


@pytest.mark.parametrize("way", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_agrees_with_the_reference(way, dtype):
    _, u, y, stack, gates = problem(17, (8,) * 7, dtype=dtype)
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 3)
    chosen[4, 1] = -1  # nothing chosen there
    expected = reference.mix(u, y, stack, chosen, weights)
    assert relative(way(u, y, stack, chosen, weights), expected) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("way", [fast.dense, fast.gather, fast.loop])
def test_what_overflows_at_an_expert_that_nobody_chose_changes_nothing(way):
    _, u, y, stack, _ = problem(6, (8,) * 5, dtype=torch.float16)
    stack.A[:8], u[:] = 6e4, u.abs()
    chosen = torch.tensor([[1, 2], [3, -1]]).repeat(3, 1)
    weights = torch.full((6, 2), 0.5)
    assert not stack.hidden(u)[:, :8].isfinite().any()
    expected = reference.mix(u, y, stack, chosen, weights)
    assert expected.isfinite().all()
    assert relative(way(u, y, stack, chosen, weights), expected) < 1e-2


@pytest.mark.parametrize("way", METHODS)
def test_every_way_has_the_references_gradient(way):
    _, u, y, stack, gates = problem(9, (8,) * 5)
    found = []
    for mix in (reference.mix, way):
        x = u.clone().requires_grad_()
        chosen, weights = reference.choose(reference.gate_scores(x, gates), 2)
        mix(x, y, stack, chosen, weights).square().sum().backward()
        found.append(x.grad)
    assert relative(found[1], found[0]) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "ranks", "dtype", "gaps", "way"),
    [
        (1, (8,) * 100, torch.bfloat16, False, fast.gather),
        (50, (8,) * 100, torch.bfloat16, False, fast.dense),
        (50, (8,) * 100, torch.bfloat16, True, fast.gather),
        (50, (8,) * 200, torch.bfloat16, False, fast.gather),
        (70, (8,) * 200, torch.bfloat16, False, fast.grouped),
        (70, (8,) * 200, torch.bfloat16, True, fast.loop),
        (70, (3,) * 600, torch.bfloat16, False, fast.loop),
        (70, (8, 16) * 70, torch.bfloat16, False, fast.loop),
        (50, (8,) * 10, torch.float32, False, fast.grouped),
        (3, (8,) * 10, torch.float32, False, fast.loop),
        (50, (3, 4), torch.float32, False, fast.loop),
    ],
)
def test_the_method_taken(tokens, ranks, dtype, gaps, way):
    _, u, y, stack, _ = problem(tokens, ranks, dtype=dtype)
    if gaps:
        stack = dataclasses.replace(stack, A=stack.A.repeat(2, 1), B=stack.B.repeat(2, 1))
    assert fast.low_rank_method(stack, tokens, 2) is way
    choice = torch.zeros(tokens, 2, dtype=torch.long), torch.ones(tokens, 2)
    assert torch.equal(fast.mix(u, y, stack, *choice), way(u, y, stack, *choice))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_chosen_changes_nothing(name):
    _, u, y, stack, _ = problem(5, (3, 4))
    ops = backend(name)
    none = torch.full((5, 2), -1)
    assert torch.equal(ops.mix(u, y, stack, none, torch.ones(5, 2)), y)
    empty = torch.zeros(5, 0, dtype=torch.long)
    assert torch.equal(ops.mix(u, y, stack, empty, torch.zeros(5, 0)), y)


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_chosen_twice_acts_with_the_sum_of_its_weights(name):
    _, u, y, stack, _ = problem(4, (3, 4))
    ops = backend(name)
    twice = ops.mix(u, y, stack, torch.ones(4, 2, dtype=torch.long), torch.full((4, 2), 0.25))
    once = reference.mix(u, y, stack, torch.ones(4, 1, dtype=torch.long), torch.full((4, 1), 0.5))
    assert relative(twice, once) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [5, 64, 577])
def test_scores_equal_the_formula_in_float64(name, dtype, d):
    g = torch.Generator().manual_seed(1)
    u = (torch.randn(9, d, generator=g) * 2 + 5).to(dtype)  # a mean far from zero
    raw = torch.randn(6, d, generator=g) + 1
    gates = reference.standardise(raw.double()).float()
    x, v = u.double(), raw.double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = x @ v.T / math.sqrt(d)
    found = backend(name).gate_scores(u, gates)
    assert found.dtype == torch.float32
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 2, 5, 50])
def test_choose_is_softmax_over_all_then_top_k_then_renormalised(name, k):
    scores = torch.randn(31, 5, generator=torch.Generator().manual_seed(2))
    chosen, weights = backend(name).choose(scores, k)
    values, order = scores.softmax(-1).sort(-1, descending=True)
    expected = values[:, :k] / values[:, :k].sum(-1, keepdim=True)
    assert torch.equal(chosen, order[:, :k])
    assert torch.allclose(weights, expected, atol=1e-6)


def test_reference_breaks_ties_by_order():
    chosen, weights = reference.choose(torch.zeros(2, 4), 2)
    assert chosen.tolist() == [[0, 1], [0, 1]]
    assert weights.tolist() == [[0.5, 0.5]] * 2


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_reach_the_input_and_equal_the_references(name):
    _, u, y, stack, gates = problem(6, (3, 2, 4))
    found = []
    for ops in (backend("reference"), backend(name)):
        x = u.clone().requires_grad_()
        chosen, weights = ops.choose(ops.gate_scores(x, gates), 2)
        ops.mix(x, y, stack, chosen, weights).square().sum().backward()
        found.append(x.grad)
    assert relative(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_routed_update_works_for_one_more_release(name):
    _, u, y, stack, gates = problem(5, (3, 2, 4))
    with pytest.warns(DeprecationWarning, match="call what fuse makes, or gate_scores, choose and mix"):
        found = backend(name).routed_update(u, y, gates, stack, 2)
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    assert relative(found, reference.mix(u, y, stack, chosen, weights)) < 1e-5


def test_names():
    assert backend("auto").name in ("auto", "torch")
    with pytest.raises(UnknownName, match="did you mean 'torch'"):
        backend("troch")


def general(seed=0, d_in=24, d_out=20, dtype=torch.float32):
    """One expert of every kind, all kinds in one, and the null candidate; the layer's weight and bias."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    def rows(r):
        return randn(r, d_in) * 0.3, randn(d_out, r) * 0.3

    none = (torch.zeros(0, d_in), torch.zeros(d_out, 0))
    narrow = Bottleneck(
        randn(5, d_out), randn(d_out, 5) * 0.2, randn(5), randn(d_out), activation="gelu", scale=0.7
    )
    norm = (1 + 0.2 * randn(d_out), randn(d_out))
    stream = dataclasses.replace(narrow, residual="norm", norm_weight=norm[0], norm_bias=norm[1])
    parallel = dataclasses.replace(narrow, residual="norm", reads_output=False, scale=-1.3)
    parts = [
        Update(*rows(3), 0.5),
        Update(*rows(2), 1.5, bias=randn(d_out)),
        Update(torch.zeros(0, 0), torch.zeros(d_out, 0), output_scale=1 + 0.3 * randn(d_out)),
        Update(torch.zeros(0, d_in), torch.zeros(0, 0), input_scale=1 + 0.3 * randn(d_in)),
        None,
        Update(*rows(4), 2.0, output_scale=1 + 0.3 * randn(d_out), covers_bias=False),
        Update(*none, bottleneck=narrow),
        Update(*none, bottleneck=stream),
        Update(*none, bottleneck=parallel),
        Update(
            *rows(1), 0.9, randn(d_out), 1 + 0.2 * randn(d_out), True, 1 + 0.2 * randn(d_in), None, narrow
        ),
    ]
    return parts, randn(d_out, d_in) * 0.3, randn(d_out)


def delta_in_float64(part, u, w, b, h):
    """Δ(u) of one expert for one token, straight from the definition; h is the residual stream."""
    if part is None:
        return torch.zeros(w.shape[0], dtype=torch.float64)
    y = w @ u + (0 if b is None else b)
    out = torch.zeros_like(y)
    if part.rank:
        out = out + part.scale * part.B.double() @ (part.A.double() @ u)
    if part.bias is not None:
        out = out + part.scale * part.bias.double()
    if part.output_scale is not None:
        out = out + (part.output_scale.double() - 1) * (y if part.covers_bias else w @ u)
    if part.input_scale is not None:
        out = out + w @ ((part.input_scale.double() - 1) * u)
    if part.bottleneck is not None:
        n = part.bottleneck
        x = y * n.reads_output + (0 if n.residual is None else h)
        if n.norm_weight is not None:
            x = (x - x.mean()) / (
                x.var(correction=0) + 1e-5
            ).sqrt() * n.norm_weight.double() + n.norm_bias.double()
        hidden = torch.nn.functional.gelu(n.down.double() @ x + n.down_bias.double())
        out = out + n.scale * (n.up.double() @ hidden + n.up_bias.double())
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 63])
@pytest.mark.parametrize("way", ["dense", "loop"])
def test_every_kind_of_update_mixes_with_every_other(name, with_bias, tokens, way, monkeypatch):
    if way == "dense":
        monkeypatch.setattr(fast, "low_rank_method", lambda stack, tokens, k: fast.dense)
    parts, w, b = general()
    b = b if with_bias else None
    u = torch.randn(tokens, w.shape[1], generator=torch.Generator().manual_seed(3)) * 2 + 1
    y = torch.nn.functional.linear(u, w, b)
    stack = make_stack(parts, w.shape[1], w.shape[0], torch.float32)
    layer = Layer(b, lambda x: x @ w.T)
    h = torch.randn(tokens, w.shape[0], generator=torch.Generator().manual_seed(6))
    stack.residual.value = h[None]  # as it flows through a model: [rows, tokens, d]
    chosen = torch.randint(-1, len(parts), (tokens, 3), generator=torch.Generator().manual_seed(4))
    weights = torch.rand(tokens, 3, generator=torch.Generator().manual_seed(5))
    found = backend(name).mix(u, y, stack, chosen, weights, layer)
    bias = None if b is None else b.double()
    for n in range(tokens):
        wd, ud = w.double(), u[n].double()
        expected = wd @ ud + (0 if bias is None else bias)
        for e, weight in zip(chosen[n].tolist(), weights[n].double(), strict=True):
            if e >= 0:
                expected = expected + weight * delta_in_float64(parts[e], ud, wd, bias, h[n].double())
        assert relative(found[n], expected) < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_module_run_by_itself_has_no_residual_stream(name):
    narrow = Bottleneck(torch.randn(2, 6), torch.randn(6, 2), residual="norm")
    stack = make_stack([Update(torch.zeros(0, 4), torch.zeros(6, 0), bottleneck=narrow)], 4, 6, torch.float32)
    with pytest.raises(RoutingError, match="run by itself"):
        backend(name).mix(
            torch.randn(3, 4),
            torch.randn(3, 6),
            stack,
            torch.zeros(3, 1, dtype=torch.int64),
            torch.ones(3, 1),
        )


@pytest.mark.parametrize("name", NAMES)
def test_an_embedding_reads_columns(name):
    parts = [Update(torch.randn(r, 11), torch.randn(6, r), 0.5, embedding=True) for r in (2, 3)]
    stack = make_stack(parts, 11, 6, torch.float32)
    ids, y = torch.tensor([3, 10, 0, 3]), torch.randn(4, 6)
    chosen, weights = torch.tensor([[0, 1], [1, -1], [0, 0], [1, 0]]), torch.rand(4, 2)
    expected = y.double().clone()
    for n in range(4):
        for e, weight in zip(chosen[n].tolist(), weights[n].double(), strict=True):
            if e >= 0:
                one_hot = torch.nn.functional.one_hot(ids[n], 11).double()
                expected[n] += weight * 0.5 * parts[e].B.double() @ (parts[e].A.double() @ one_hot)
    assert relative(backend(name).mix(ids, y, stack, chosen, weights), expected) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_nobody_owns_are_never_used(name):
    _parts, u, y, stack, gates = problem(9, (3, 4, 2))
    wider = dataclasses.replace(
        stack,
        A=torch.cat([stack.A[:3], torch.full((2, 48), torch.nan), stack.A[3:]]),
        B=torch.cat([stack.B[:3], torch.full((2, 40), torch.nan), stack.B[3:]]),
        starts=(0, 5, 9),
    )
    chosen, weights = reference.choose(reference.gate_scores(u, gates), 2)
    expected = backend(name).mix(u, y, stack, chosen, weights)
    assert torch.allclose(backend(name).mix(u, y, wider, chosen, weights), expected, atol=1e-5)


ONE_FIELD = {
    "scale": 2.0,
    "bias": torch.ones(6),
    "output_scale": torch.full((6,), 2.0),
    "covers_bias": False,
    "input_scale": torch.full((4,), 2.0),
    "magnitude": torch.ones(6),
    "bottleneck": Bottleneck(torch.ones(1, 6), torch.ones(6, 1), torch.ones(1), torch.ones(6)),
    "embedding": True,
    "shared": SharedUpdate(torch.ones(6), torch.ones(1), Projections(seed=0)),
}
"""Field of an update → a value that isn't its default. A new field needs one."""
PLAIN = ("scale", "covers_bias")  # without an output_scale, covers_bias says nothing
UNSTACKED = ("magnitude", "shared")  # these are resolved and placed before


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Update) if f.name not in ("A", "B")])
def test_no_field_of_an_update_is_dropped_silently(name):
    plain = Update(torch.ones(2, 4), torch.ones(6, 2))
    update = dataclasses.replace(plain, **{name: ONE_FIELD[name]})
    assert (plain.fields_set(), plain.is_low_rank) == (set(), True)
    assert (update.fields_set(), update.is_low_rank) == ({name}, name in PLAIN)
    assert str(update.numbers()) != str(plain.numbers()) or len([*update.parts()]) > 2  # the hash covers it
    if name in UNSTACKED:
        with pytest.raises(RoutingError, match=f"with its {name}"):
            make_stack([plain, None, update], 4, 6, torch.float32)
        return
    stack = make_stack([plain, None, update], 4, 6, torch.float32)
    assert stack.low_rank_only == (update.is_low_rank or name == "embedding")
    assert stack.embedding == (name == "embedding")
    w, b, u = torch.arange(24.0).reshape(6, 4) / 9, torch.arange(6.0), torch.tensor([[1.0, -2, 3, 0.5]])
    layer = Layer(b, lambda x: x @ w.T)
    if name == "embedding":
        u = torch.tensor([3])
    chosen, weights, y = torch.tensor([[2]]), torch.ones(1, 1), torch.arange(6.0)[None] - 2
    mixed = [reference.mix(u, y, stack, c, weights, layer) for c in (chosen, torch.tensor([[0]]))]
    assert torch.equal(*mixed) == (name in ("covers_bias", "embedding"))


@dataclasses.dataclass(frozen=True, eq=False)
class NewUpdate(Update):
    """An update with parts that nobody knows."""

    tensor: torch.Tensor | None = None
    number: float = 1.0


@pytest.mark.parametrize("new", [{"tensor": torch.ones(6)}, {"number": 3.0}])
def test_a_field_that_nobody_knows_is_refused(new):
    update = NewUpdate(torch.ones(2, 4), torch.ones(6, 2), **new)
    assert not update.is_low_rank
    assert why_no_signature(update) is not None
    assert NewUpdate(update.A, update.B).is_low_rank
    assert new.keys() & (update.numbers().keys() | dict(update.parts()).keys()) == new.keys()
    with pytest.raises(RoutingError, match=f"with its {next(iter(new))}"):
        make_stack([update], 4, 6, torch.float32)

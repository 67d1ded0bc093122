"""What a pool warns of: experts and gates that are wildly off, and nothing of experts that were trained alike."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import TARGETS
from phatgoose.experts import health
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.modules import weight_norms
from phatgoose.ops.bottleneck import Bottleneck
from phatgoose.ops.update import Projections, SharedUpdate, Update, no_rows


@pytest.fixture
def base(make_base):
    return make_base("llama")


@pytest.fixture
def four(base, make_expert):
    """Experts that differ in rank, alpha and size by what is ordinary."""
    return [
        make_expert(base, name, rank=rank, alpha=alpha, seed=i, scale=scale)
        for i, (name, rank, alpha, scale) in enumerate(
            [("a", 2, 4, 0.1), ("b", 3, 8, 0.15), ("c", 4, 8, 0.2), ("d", 8, 4, 0.25)]
        )
    ]


def scaled(expert, factor):
    config = {**expert.adapter_config, "lora_alpha": expert.adapter_config["lora_alpha"] * factor}
    return Expert(expert.name, config, expert.tensors, expert.gates, expert.provenance)


def test_nothing_is_said_of_ordinary_experts(four, base):
    assert Pool(four).warnings() == []
    assert Pool(four).warnings(weight_norms(base.model, Pool(four).modules)) == []


@pytest.mark.parametrize("factor", [1000, 0.001])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_an_update_of_another_size_is_named(four, size, factor):
    pool = [*four[1:size], scaled(four[0], factor)]
    found = Pool(pool).warnings()
    if size == 2 and factor < 1:
        assert [f.partition(":")[0] for f in found] == ["b"]  # of two, the larger one
        return
    assert len(found) == 1
    assert found[0].startswith("a: its update's norm is ")
    assert "times the median of the experts' at model.layers." in found[0]
    assert "more modules" in found[0]


def test_one_module_is_enough(four):
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    odd = Expert(
        "a", four[0].adapter_config, {**four[0].tensors, key: four[0].tensors[key] * 1e4}, four[0].gates
    )
    found = health.find_outliers([odd, *four[1:]])
    assert len(found) == 1
    assert found[0].endswith("at model.layers.1.mlp.up_proj; is its scale right?")


def test_gates_that_are_off_constant_or_parallel_are_named(four):
    a, b, c, d = four
    up = "model.layers.1.mlp.up_proj"
    large = a.with_gates({p: g * 1000 for p, g in a.gates.items()})
    assert health.find_outliers([large, b, c, d])[0].startswith("a: its gate's norm is ")
    flat = a.with_gates({**a.gates, up: torch.full_like(a.gates[up], 3.0)})
    assert health.find_outliers([flat, b, c, d]) == [
        f"a: its gate is constant, so it says nothing, at 1 modules (first: {up})."
    ]
    nearly = a.with_gates(
        {**a.gates, up: 1e4 + 1e-3 * a.gates[up]}
    )  # 1 part in 10^7: rounding is all there is
    assert len(health.find_outliers([nearly, b, c, d])) == 1
    same = a.with_gates({p: 2 * g + 0.5 + 0.01 * torch.randn(g.shape) for p, g in b.gates.items()})
    assert health.find_outliers([same, b, c, d]) == [
        "a and b: their gates are nearly parallel, so wherever one is chosen, the other is as well."
    ]
    opposite = a.with_gates({p: -g for p, g in b.gates.items()})
    assert health.find_outliers([opposite, b, c, d]) == []


def test_an_update_larger_than_the_weight_is_named_if_the_base_is_there(four, base):
    norms = weight_norms(base.model, Pool(four).modules)
    direct = {p: float(base.model.get_submodule(p).weight.detach().norm()) for p in Pool(four).modules}
    assert norms == pytest.approx(direct)
    alone = Pool([scaled(four[0], 1000)])
    assert alone.warnings() == []
    (text,) = alone.warnings(norms)
    assert text.startswith("a: its update's norm is ")
    assert "times the base's own weight's" in text


def test_an_update_of_zero_and_one_beyond_measure(four):
    zero = {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in four[0].tensors.items()}
    found = health.find_outliers([Expert("a", four[0].adapter_config, zero, four[0].gates), *four[1:]])
    assert found[0].startswith("a: its update is zero, so it does nothing, at 14 modules (first: ")
    assert len(found) == 1
    (text,) = health.find_outliers([scaled(four[0], 1e9)])
    assert text.startswith("a: the norm of its update is above 1e+06")


def test_different_names_of_bases_are_told_unless_fingerprints_say_that_they_are_one(four):
    names = ["meta-llama/Llama-2-7b-hf", "unsloth/llama-2-7b/", "unsloth/llama-2-7b"]
    named = [
        Expert(
            e.name, {**e.adapter_config, "base_model_name_or_path": name}, e.tensors, e.gates, e.provenance
        )
        for e, name in zip(four, names, strict=False)
    ]
    assert Pool(named).warnings() == []
    plain = [Expert(e.name, e.adapter_config, e.tensors, e.gates) for e in named]
    for pool in (plain, [*plain[:1], *named[1:]], [*named[:1], *plain[1:]]):
        (text,) = (w for w in Pool(pool).warnings() if "different bases" in w)
        assert "'meta-llama/Llama-2-7b-hf' (a); 'unsloth/llama-2-7b' (b, c)" in text
    for pool in (plain[:1], plain[1:], [plain[1], *named]):
        pool = [e.renamed(f"{e.name}{i}") for i, e in enumerate(pool)]
        assert not any("different bases" in w for w in Pool(pool).warnings())


def test_parts_left_out_are_named(base, make_expert):
    expert = make_expert(base, "a")
    dropped = Expert(
        "a",
        expert.adapter_config,
        expert.tensors,
        expert.gates,
        {**expert.provenance, "dropped": ["modules_to_save"]},
    )
    assert "a: leaves out modules_to_save of its adapter" in "\n".join(Pool([dropped]).warnings())


def test_veras_vectors_are_compared_with_each_other():
    """Its matrices are the base's to cut; what an expert has of its own are two vectors."""
    update = Update(
        *no_rows(None, 2),
        shared=SharedUpdate(torch.tensor([3.0, 4]), torch.tensor([2.0]), Projections(seed=0)),
    )
    assert dict(health.part_norms(update)) == {"VeRA vectors": 10.0}
    assert (update.kind, update.width, update.d_in, update.d_out) == ("VeRA", 1, 0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strengths_are_the_norms_of_the_dense_updates(dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    low = Update(draw(3, 63), draw(100, 3), -0.7, bias=draw(100))
    assert dict(health.part_norms(low)) == pytest.approx(
        {
            "update": float((0.7 * (low.B.double() @ low.A.double())).norm()),
            "bias": 0.7 * float(low.bias.double().norm()),
        },
        rel=1e-9,
    )
    scales = Update(
        *no_rows(None, 5), output_scale=torch.tensor([1.0, 1, 2, 1, 1]), input_scale=torch.tensor([3.0])
    )
    assert dict(health.part_norms(scales)) == pytest.approx(
        {"output scale": math.sqrt(1 / 5), "input scale": 2.0}
    )
    of_product = Update(*no_rows(None, 5), output_scale=torch.full((5,), 3.0), covers_bias=False)
    assert dict(health.part_norms(of_product)) == {"output scale": 2.0}
    dora = Update(draw(3, 63), draw(100, 3), magnitude=torch.ones(100))
    assert dict(health.part_norms(dora))["DoRA magnitude"] == 10
    narrow = Bottleneck(torch.ones(2, 8), torch.ones(8, 2), scale=2.0)
    assert dict(health.part_norms(Update(*no_rows(None, 8), bottleneck=narrow))) == pytest.approx(
        {"bottleneck": 32}
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([5.0], []),
        ([1.0, 19.0], []),
        ([1.0, 21.0], [1]),
        ([0.0, 1.0, 1.0], []),
        ([1.0, 1.1, 0.9, 40.0], [3]),
        ([1.0, 1.1, 0.9, 0.01], [3]),
        ([1.0, 10.0, 100.0, 1000.0], []),  # a pool of all sizes has no outlier
        ([1.0, 1.0, 1.0, 1e30, 1e30], [3, 4]),
        ([1.0, 1.0, 1.0, math.inf], []),
    ],
)
def test_outliers(values, expected):
    found = health.outliers(dict(enumerate(values)))
    assert sorted(found) == expected
    assert all(ratio == pytest.approx(values[i] / 1.0, rel=0.2) for i, ratio in found.items())


def test_families_of_all_shapes_are_measured(make_base, make_expert):
    for family in ("gpt2", "t5"):
        other = make_base(family)
        expert = make_expert(other, family, targets=TARGETS[family][:2], scale=0.02)
        assert Pool([expert]).warnings(weight_norms(other.model, expert.updates)) == []

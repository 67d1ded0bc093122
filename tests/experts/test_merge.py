"""The average of a pool as one PEFT adapter: the same function as Uniform and as plain PEFT, or refused."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel

from conftest import save_adapter, with_random_adapter
from phatgoose import Expert, Pool, route
from phatgoose.errors import PoolError
from phatgoose.experts.merge import dare, merged, ties
from phatgoose.routers import Single, Uniform


def written(base, config, folder, seed):
    save_adapter(with_random_adapter(base.model, config, torch.Generator().manual_seed(seed)), folder)
    return Expert.from_peft(folder, name=f"e{seed}")


@torch.no_grad()
def logits(model):
    ids = torch.arange(2, 14).reshape(2, 6)
    return model(input_ids=ids).logits


def ia3(targets, inputs):
    return IA3Config(target_modules=targets, feedforward_modules=inputs, fan_in_fan_out=True)


def lora(targets, **settings):
    return LoraConfig(target_modules=targets, fan_in_fan_out=True, **settings)


@pytest.mark.parametrize(
    "configs",
    [
        (lora(["c_attn", "c_proj"], r=2), lora(["c_attn"], r=3, lora_bias=True), lora(["c_fc"], r=1, use_rslora=True)),
        (lora(["c_attn", "wte"], r=2), lora(["wte"], r=5, lora_alpha=1)),
        (ia3(["c_attn", "c_fc"], []), ia3(["c_attn"], [])),
        (ia3(["c_attn", "mlp.c_proj"], ["mlp.c_proj"]), ia3(["mlp.c_proj"], ["mlp.c_proj"])),
    ],
)  # fmt: skip
def test_it_is_uniform_and_plain_peft_agrees(configs, make_base, tmp_path):
    base = make_base("gpt2")
    pool = Pool([written(base, c, tmp_path / f"e{i}", i) for i, c in enumerate(configs)])
    one = merged(pool)
    expected = logits(route(base, pool, Uniform(), backend_name="reference"))
    found = logits(route(base, Pool([one]), Single(0)))
    assert torch.allclose(found, expected, atol=2e-4)
    plain = make_base("gpt2")
    peft = PeftModel.from_pretrained(plain.model, one.save(tmp_path / "merged")).eval()
    assert torch.allclose(logits(peft), expected, atol=2e-4)
    assert not torch.allclose(logits(make_base("gpt2").model), expected, atol=1e-2)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ((lora(["c_attn"]), ia3(["c_attn"], [])), r"kinds \(IA\)³, LoRA"),
        ((lora(["c_attn"]), lora(["c_attn"], use_dora=True)), "kinds DoRA, LoRA"),
        ((ia3(["c_fc"], ["c_fc"]), ia3(["c_fc"], [])), "some its output"),
    ],
)
def test_what_is_no_single_adapter_is_refused(configs, message, make_base, tmp_path):
    base = make_base("gpt2")
    pool = Pool([written(base, c, tmp_path / f"e{i}", i) for i, c in enumerate(configs)])
    with pytest.raises(PoolError, match=message):
        merged(pool)


def three_loras(make_base, make_expert):
    base = make_base("gpt2")
    return [make_expert(base, f"e{i}", rank=2 + i, alpha=3 + i, seed=i, targets=t) for i, t in enumerate(
        (["c_attn", "c_fc"], ["c_attn"], ["c_attn", "c_fc"]))]  # fmt: skip


def deltas(experts, path):
    shapes = [u.weight().shape for e in experts if (u := e.updates.get(path))]
    return torch.stack(
        [
            e.updates[path].weight().double() if path in e.updates else torch.zeros(shapes[0]).double()
            for e in experts
        ]
    )


def ties_by_hand(stack, density):
    """Entry by entry, as the paper says it, for one matrix."""
    kept = torch.zeros_like(stack)
    for e, delta in enumerate(stack):
        order = delta.abs().flatten().argsort(descending=True)[: int(density * delta.numel())]
        kept[e].view(-1)[order] = delta.flatten()[order]
    out = torch.zeros_like(stack[0])
    for place in torch.cartesian_prod(torch.arange(out.shape[0]), torch.arange(out.shape[1])).tolist():
        values = kept[:, place[0], place[1]]
        sign = 1.0 if values.sum() >= 0 else -1.0
        agreeing = [float(v) for v in values if v * sign > 0]
        out[tuple(place)] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def test_ties_is_the_papers(make_base, make_expert):
    experts = three_loras(make_base, make_expert)
    one = ties(Pool(experts), density=0.3)
    assert one.provenance["experts"] == ["e0", "e1", "e2"]
    for path, update in one.updates.items():
        expected = ties_by_hand(deltas(experts, path), 0.3)
        assert torch.allclose(update.weight().double(), expected, atol=1e-6), path


def test_dare_keeps_a_share_and_is_right_on_average(make_base, make_expert):
    experts = three_loras(make_base, make_expert)
    pool, path = Pool(experts), "transformer.h.0.attn.c_attn"
    expected = deltas(experts, path).mean(0)
    many = torch.stack([dare(pool, 0.5, seed).updates[path].weight().double() for seed in range(400)])
    assert float((many.mean(0) - expected).norm() / expected.norm()) < 0.15
    assert torch.equal(dare(pool, 0.5, 3).updates[path].weight(), dare(pool, 0.5, 3).updates[path].weight())
    assert not torch.equal(many[0], many[1])
    alone = dare(Pool(experts[:1]), 0.25).updates[path].weight()
    kept = alone != 0
    assert 0.2 < float(kept.double().mean()) < 0.3
    assert torch.allclose(alone[kept], experts[0].updates[path].weight()[kept] * 4, atol=1e-5)
    assert torch.allclose(dare(pool, 1.0).updates[path].weight().double(), expected, atol=1e-6)


def dare_by_hand(stack, density, merged):
    """The draws that made `merged`, found entry by entry, and what they give: the mean of kept entries,
    each divided by density."""
    draws = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * len(stack))  # [2^E, E]
    means = torch.einsum("se,eij->sij", draws, stack) / (density * len(stack))
    found = (means - merged).abs().argmin(0)
    return means.gather(0, found[None])[0], draws[found].permute(2, 0, 1).bool()


def test_dare_is_the_papers(make_base, make_expert):
    """Every entry is the mean over experts of what independent draws kept, and no two experts or modules
    share their draws."""
    experts = three_loras(make_base, make_expert)
    density, masks = 0.4, {}
    for path, update in dare(Pool(experts), density, seed=7).updates.items():
        merged, stack = update.weight().double(), deltas(experts, path)
        there = (
            stack.abs().sum((1, 2)) > 0
        )  # an expert without the module counts as zero: its draws can't be seen
        kept, drawn = dare_by_hand(stack[there], density, merged * len(stack) / int(there.sum()))
        error = (kept * int(there.sum()) / len(stack) - merged).abs().max()
        assert float(error) < 1e-5 * float(stack.abs().max()), path
        masks |= {(path, int(e)): m for e, m in zip(there.nonzero(), drawn, strict=True)}
    for mask in masks.values():
        assert (
            abs(float(mask.double().mean()) - density) < 5 * (density * (1 - density) / mask.numel()) ** 0.5
        )
    pairs = [(a, b) for a in masks for b in masks if a < b and masks[a].shape == masks[b].shape]
    assert {a[0] == b[0] for a, b in pairs} == {True, False}
    chance = density**2 + (1 - density) ** 2  # of two independent draws to be alike
    for a, b in pairs:
        alike = float((masks[a] == masks[b]).double().mean())
        assert abs(alike - chance) < 5 * (chance * (1 - chance) / masks[a].numel()) ** 0.5, (a, b)


@pytest.mark.parametrize("merge", [ties, dare])
def test_dense_merges_refuse_what_they_are_not_defined_for(merge, make_base, make_expert, tmp_path):
    base = make_base("gpt2")
    with pytest.raises(PoolError, match="is DoRA at"):
        merge(Pool([written(base, lora(["c_attn"], use_dora=True), tmp_path / "e", 0)]))
    with pytest.raises(PoolError, match="density"):
        merge(Pool([make_expert(base)]), density=0.0)

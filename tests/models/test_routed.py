"""Routed models against the paper's formula in float64, plain PEFT, and themselves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import PeftModel

from conftest import FAMILIES, TARGETS, hooked, relative
from phatgoose.errors import BaseModelError, RoutingError, UnknownName
from phatgoose.experts.merge import merged
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, routing_of, unroute
from phatgoose.models.trace.record import trace
from phatgoose.routers import PHATGOOSE, Random, Single, Uniform

TEXTS = [
    "the quick brown fox",
    "yes",
    "0 1 2 3 4 5 6 7 8 9 plus minus times equals no",
    "lazy dog jumps over what",
]


def batch_of(base, side="left", texts=TEXTS):
    base.tokenizer.padding_side = side
    batch = dict(base.tokenizer(list(texts), return_tensors="pt", padding=True))
    if base.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.tensor([[0, 40, 50, 60, 70]] * len(texts))
    elif side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


def logits(base, batch):
    with torch.no_grad():
        return base.model(**batch, use_cache=False).logits


def formula_hooks(model, pool, top_k):
    """The paper's equations written down directly, in the dtype of the model: an implementation independent of ours."""
    handles = []
    for path, module in model.named_modules():
        members = [e for e in pool.experts if path in e.updates]
        if not members:
            continue

        def hook(module, args, output, path=path, members=members):
            u = args[0]
            d = u.shape[-1]
            bar = (u - u.mean(-1, keepdim=True)) / torch.sqrt(u.var(-1, unbiased=False, keepdim=True) + 1e-5)
            scores, deltas = [], []
            for e in members:
                v = e.gates[path].to(u.dtype)
                v = (v - v.mean()) / torch.sqrt(v.var(unbiased=False) + 1e-5)
                scores.append((bar * v).sum(-1) / math.sqrt(d))
                up = e.updates[path]
                deltas.append(up.scale * (u @ up.A.to(u.dtype).T @ up.B.to(u.dtype).T))
            if len(members) < len(pool.experts):  # null candidate
                scores.append(torch.zeros_like(scores[0]))
                deltas.append(torch.zeros_like(deltas[0]))
            s, best = torch.stack(scores, -1).topk(min(top_k, len(scores)), -1)
            w = s.softmax(-1)
            picked = torch.stack(deltas, -1).gather(
                -1, best[..., None, :].expand(*output.shape, best.shape[-1])
            )
            return output + (picked * w[..., None, :]).sum(-1)

        handles.append(module.register_forward_hook(hook))
    return handles


@pytest.fixture
def mixed(make_base, make_expert):
    """Base and a pool of four experts with mixed ranks, alphas and modules."""

    def make(family, **kwargs):
        base = make_base(family, **kwargs)
        every = TARGETS[family]
        specs = [(3, 6, every), (8, 4, every), (5, 20, every[:2]), (1, 1, [every[0], every[-1]])]
        experts = [
            make_expert(base, f"e{i}", rank=r, alpha=a, targets=t, seed=i)
            for i, (r, a, t) in enumerate(specs)
        ]
        return base, Pool(experts)

    return make


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("top_k", [1, 2, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_formula_in_float64(mixed, family, top_k, backend):
    base, pool = mixed(family)
    batch = batch_of(base)
    wide = copy.deepcopy(base.model).double()
    formula_hooks(wide, pool, top_k)
    with torch.no_grad():
        expected = wide(**batch, use_cache=False).logits
    plain = logits(base, batch)
    route(base, pool, PHATGOOSE(top_k=top_k), backend_name=backend)
    found = logits(base, batch)
    real = torch.ones_like(batch["attention_mask"], dtype=torch.bool)
    real = real if base.is_encoder_decoder else batch["attention_mask"].bool()
    pick = (lambda x: x) if base.is_encoder_decoder else (lambda x: x[real])
    assert relative(pick(found), pick(expected)) < 1e-5
    assert relative(pick(plain), pick(expected)) > 1e-2  # the experts do something


@pytest.mark.parametrize("family", FAMILIES)
def test_unroute_is_bit_identical_and_state_dict_untouched(mixed, family):
    base, pool = mixed(family)
    batch = batch_of(base)
    before, keys = logits(base, batch), list(base.model.state_dict())
    model = route(base, pool)
    assert model is base.model
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in base.model.named_parameters()]
    assert not torch.equal(logits(base, batch), before)
    assert unroute(model) is model
    assert torch.equal(logits(base, batch), before)
    assert not hooked(model)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_single_equals_plain_peft(make_base, make_expert, tmp_path, family, backend):
    base = make_base(family)
    expert = make_expert(
        base,
        "only",
        rank=5,
        alpha=7,
        rank_pattern={TARGETS[family][0]: 2},
        alpha_pattern={TARGETS[family][-1]: 3},
    )
    other = make_expert(base, "other", seed=1)
    batch = batch_of(base)
    peft = PeftModel.from_pretrained(copy.deepcopy(base.model), expert.folder).eval()
    with torch.no_grad():
        expected = peft(**batch, use_cache=False).logits
    for pool in (Pool([expert]), Pool([other, expert])):
        route(base, pool, Single("only"), backend_name=backend)
        assert relative(logits(base, batch), expected) < 1e-5
    route(base, Pool([expert]), PHATGOOSE())  # one expert: weight 1 on every token
    assert relative(logits(base, batch), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_equals_merged_equals_peft_of_merged(mixed, tmp_path, family):
    base, pool = mixed(family)
    batch = batch_of(base)
    route(base, pool, Uniform())
    uniform = logits(base, batch)
    expert = merged(pool)
    route(base, Pool([expert]), Single(0))
    assert relative(logits(base, batch), uniform) < 1e-5
    unroute(base)
    expert.save(tmp_path / "merged")
    peft = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / "merged").eval()
    with torch.no_grad():
        assert relative(peft(**batch, use_cache=False).logits, uniform) < 1e-5


@pytest.mark.slow(3)
@pytest.mark.parametrize("router", [PHATGOOSE(), Random(seed=3), Uniform(), Single("e2")], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_and_without_cache_and_padding_agree(mixed, family, router):
    base, pool = mixed(family)
    route(base, pool, router)
    settings = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    base.tokenizer.padding_side = "left"
    batch = base.tokenizer(TEXTS, return_tensors="pt", padding=True)
    cached = base.model.generate(**batch, **settings, use_cache=True)
    assert torch.equal(cached, base.model.generate(**batch, **settings, use_cache=False))
    for i, text in enumerate(TEXTS):  # alone, without padding
        alone = base.model.generate(**base.tokenizer([text], return_tensors="pt"), **settings)
        assert torch.equal(alone[0, -7:], cached[i, -7:])


@pytest.mark.parametrize("router", [PHATGOOSE(), Random()], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_agree_with_and_without_cache(mixed, family, router):
    base, pool = mixed(family)
    route(base, pool, router)
    base.tokenizer.padding_side = "left"
    batch = base.tokenizer(TEXTS[:3], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        base.model.generate(**batch, **settings, use_cache=True),
        base.model.generate(**batch, **settings, use_cache=False),
    )


@pytest.mark.parametrize("router", [PHATGOOSE(), Random(seed=1)], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_side_does_not_matter(mixed, family, router):
    base, pool = mixed(family)
    route(base, pool, router)
    left, right = batch_of(base, "left"), batch_of(base, "right")
    if base.is_encoder_decoder:
        # T5 has relative positions: padding on the left shifts nothing between real tokens.
        assert relative(logits(base, left), logits(base, right)) < 1e-5
    else:
        a = logits(base, left)[left["attention_mask"].bool()]
        b = logits(base, right)[right["attention_mask"].bool()]
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_as_the_formula_in_bfloat16(mixed, family):
    """Rounding the base to bf16 flips some choices; ours may be no further from fp32 than the plain formula in bf16."""
    base, pool = mixed(family)
    batch = batch_of(base)
    real = ... if base.is_encoder_decoder else batch["attention_mask"].bool()
    plain = copy.deepcopy(base.model).to(torch.bfloat16)
    formula_hooks(plain, pool, 2)
    route(base, pool)
    wide = logits(base, batch)
    with torch.no_grad():
        formula = relative(plain(**batch, use_cache=False).logits[real], wide[real])
    base.model.to(torch.bfloat16)
    for backend in ("reference", "torch"):
        route(base, pool, backend_name=backend)
        found = logits(base, batch)
        assert found.dtype == torch.bfloat16
        assert relative(found[real], wide[real]) < max(2 * formula, 0.05)


def test_training_loss_goes_through(mixed):
    base, pool = mixed("llama")
    route(base, pool)
    ids = base.tokenizer("the quick brown fox", return_tensors="pt").input_ids
    base.model(ids, labels=ids).loss.backward()
    assert torch.isfinite(base.model.get_input_embeddings().weight.grad).all()


def test_trace_is_the_formulas_choice(mixed):
    base, pool = mixed("llama")
    route(base, pool, PHATGOOSE(top_k=2))
    batch = batch_of(base)
    seen = {}
    handles = [
        m.register_forward_pre_hook(lambda m, a, p=p: seen.update({p: a[0]}))
        for p, m in base.model.named_modules()
        if p in pool.modules
    ]
    with trace(base) as t:
        logits(base, batch)
    for handle in handles:
        handle.remove()
    real = batch["attention_mask"].bool()
    assert [c.path for c in t.choices] == list(seen)
    for c in t.choices:
        members = [i for i, e in enumerate(pool.experts) if c.path in e.updates]
        u = seen[c.path][real].double()
        scores = torch.full((len(u), len(pool) + 1), -math.inf, dtype=torch.float64)
        if len(members) < len(pool):
            scores[:, -1] = 0
        for i in members:
            v = pool.experts[i].gates[c.path].double()
            v = (v - v.mean()) / (v.var(unbiased=False) + 1e-5).sqrt()
            scores[:, i] = (
                ((u - u.mean(-1, keepdim=True)) / (u.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt())
                @ v
                / math.sqrt(len(v))
            )
        best = scores.topk(2).indices
        best[best == len(pool)] = -1
        assert torch.equal(c.experts.long(), best)
        assert torch.equal(c.ids, batch["input_ids"][real])
        assert c.rows.tolist() == real.nonzero()[:, 0].tolist()
        assert c.positions.tolist() == batch["position_ids"][real].tolist()
    assert routing_of(base).recorder is None


def test_trace_tells_encoder_states_apart_in_cross_attention(mixed):
    base, pool = mixed("t5")
    route(base, pool)
    batch = batch_of(base)
    with trace(base) as t:
        logits(base, batch)
    lengths = {c.path: len(c.rows) for c in t.choices}
    encoder_tokens, decoder_tokens = int(batch["attention_mask"].sum()), batch["decoder_input_ids"].numel()
    assert lengths["decoder.block.0.layer.1.EncDecAttention.k"] == encoder_tokens
    assert lengths["decoder.block.0.layer.1.EncDecAttention.q"] == decoder_tokens
    assert lengths["encoder.block.1.layer.0.SelfAttention.q"] == encoder_tokens


def test_random_covers_all_experts_and_depends_on_its_seed(mixed):
    base, pool = mixed("llama")
    shares = []
    for seed in (0, 1):
        route(base, pool, Random(seed=seed, top_k=2))
        with trace(base) as t:
            logits(base, batch_of(base))
        shares.append(t)
    counts = torch.stack(list(shares[0].shares().values())).mean(0)
    present = torch.tensor(
        [sum(p in e.updates for p in pool.modules) / len(pool.modules) for e in pool.experts]
    )
    assert torch.allclose(
        counts, present.double() / 4, atol=0.06
    )  # each drawn in 2 of 4 places of weight 1/2
    assert any(
        not torch.equal(a.experts, b.experts)
        for a, b in zip(shares[0].choices, shares[1].choices, strict=True)
    )


def test_rerouting_replaces_and_refusals_leave_the_model_alone(mixed, make_base, make_expert):
    base, pool = mixed("llama")
    batch = batch_of(base)
    before = logits(base, batch)
    route(base, pool, Uniform())
    first = routing_of(base)
    with pytest.raises(UnknownName, match="did you mean 'e1'"):
        route(base, pool, Single("e11"))
    assert routing_of(base) is first
    ungated = make_expert(base, "ungated", gates=False, seed=9)
    with pytest.raises(RoutingError, match="'ungated' has no gates"):
        route(base, pool.add(ungated))
    other = make_base("llama", seed=5)
    with pytest.raises(BaseModelError):
        route(other, pool)
    with pytest.raises(BaseModelError):
        route(make_base("qwen"), pool)
    with pytest.raises(RoutingError, match=r"adapts a module this model lacks"):
        route(make_base("llama", layers=1), pool, any_base=True)
    unroute(base)
    assert torch.equal(logits(base, batch), before)
    for bad in (0, True, 1.5):
        with pytest.raises(RoutingError, match="top_k"):
            PHATGOOSE(top_k=bad)
    with pytest.raises(RoutingError, match="nothing to trace"), trace(base):
        pass


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_offloaded_bases_route_like_resident_ones(mixed, family, tmp_path):
    from accelerate import cpu_offload, disk_offload

    base, pool = mixed(family)
    batch = batch_of(base)
    route(base, pool)
    expected = logits(base, batch)
    unroute(base)
    for offload in (lambda m: cpu_offload(m), lambda m: disk_offload(m, tmp_path / "offload")):
        model = copy.deepcopy(base.model)
        offload(model)
        route(model, pool, any_base=True)
        with torch.no_grad():
            found = model(**batch, use_cache=False).logits
        assert relative(found, expected) < 1e-5


def test_attaching_twice_is_attaching_once(mixed):
    base, pool = mixed("llama")
    plain, batch = logits(base, batch_of(base)), batch_of(base)
    route(base, pool)
    expected, routing = logits(base, batch), routing_of(base)
    routing.attach()
    assert torch.equal(logits(base, batch), expected)
    routing.detach()
    assert torch.equal(logits(base, batch), plain)
    routing.attach()
    assert torch.equal(logits(base, batch), expected)


def test_hooks_of_others_stay(mixed):
    base, pool = mixed("llama")
    seen = []
    base.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, o: seen.append(o.shape))
    route(base, pool)
    logits(base, batch_of(base))
    unroute(base)
    logits(base, batch_of(base))
    assert len(seen) == 2


def test_saving_a_routed_model_saves_the_base(mixed, tmp_path):
    from safetensors.torch import load_file

    base, pool = mixed("gpt2")
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    route(base, pool)
    base.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved
    assert all(torch.equal(before[k], v) for k, v in saved.items())


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_an_error_while_hooks_are_put_on_leaves_none(make_base, make_expert, monkeypatch, kind):
    """Whichever hook it happens at, and the earlier routing comes back."""
    base = make_base("llama")
    pool = Pool([make_expert(base, "a", seed=1), make_expert(base, "b", seed=2)])
    plain = count_hooks(base.model)
    earlier = route(base, pool, Single(0)) and routing_of(base)
    earlier.detach()
    earlier.attach()  # its modules aren't watched a second time
    routed, put_on, put = count_hooks(base.model), getattr(torch.nn.Module, kind), []

    def put_on_some(module, *args, **kwargs):
        if len(put) == fails_at:
            monkeypatch.setattr(torch.nn.Module, kind, put_on)
            raise KeyboardInterrupt
        put.append(module)
        return put_on(module, *args, **kwargs)

    fails_at = 0
    while fails_at < 100:
        put.clear()
        monkeypatch.setattr(torch.nn.Module, kind, put_on_some)
        try:
            route(base, pool, PHATGOOSE())
            break
        except KeyboardInterrupt:
            assert routing_of(base) is earlier
            assert count_hooks(base.model) == routed
        fails_at += 1
    assert 5 < fails_at < 100
    unroute(base)
    assert count_hooks(base.model) == plain


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

"""Experts of ours inside the experts of a mixture, against PEFT, merged weights and the formula in float64."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import warnings

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Llama4ForCausalLM, Llama4TextConfig

from conftest import VOCABULARY, hooked, make_model, make_tokenizer
from moe_fixtures import (
    F_,
    FAMILIES,
    D,
    by_hand,
    change,
    fused_experts,
    ids,
    logits,
    make,
    peft_adapter,
    per_expert,
    with_gates,
    with_weights_added,
)
from phatgoose import (
    LAG,
    PHATGOOSE,
    Arrow,
    Expert,
    Pool,
    Random,
    Single,
    SpectR,
    Uniform,
    merged,
    route,
    unroute,
)
from phatgoose.errors import ExpertError, RoutingError
from phatgoose.experts.packed.pack import pack, unpack
from phatgoose.models.attach.modules import weight_norms
from phatgoose.models.base.base import Base
from phatgoose.models.base.without_weights import check_mixture
from phatgoose.models.moe.names import modules_by_path
from phatgoose.models.trace.record import trace
from phatgoose.routers.context import RoutingContext, Sequences
from phatgoose.routers.masked import Masked, Switches


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_is_pefts_model(tmp_path, family):
    model = make(family)
    plain, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    wrapped = peft_adapter(model, tmp_path / "a", 1)
    expert = Expert.from_peft(tmp_path / "a", name="a")
    experts = {p: u for p, u in expert.updates.items() if ".experts." in p}
    assert {p.rpartition(".")[2] for p in experts} == {"gate_up_proj", "down_proj"}
    route(model, Pool([expert]), Single(0))
    torch.testing.assert_close(logits(model), logits(wrapped), atol=1e-5, rtol=1e-4)
    # PEFT itself, merged by hand: W + ΔW of every expert.
    torch.testing.assert_close(
        logits(with_weights_added(make(family), expert)), logits(wrapped), atol=1e-5, rtol=1e-4
    )
    assert (logits(model) - plain).abs().max() > 0.1
    assert list(model.state_dict()) == list(state)
    unroute(model)
    assert torch.equal(logits(model), plain)
    assert not hooked(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# PEFT compares its patterns with modules, and its own conversion writes one for a parameter.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_an_adapter_of_transformers_4(tmp_path, family):
    """One linear layer an expert, as old checkpoints named them."""
    model = make(family)
    expert = Expert.from_peft(per_expert(model, family, tmp_path / "a", 1), name="a")
    route(model, Pool([expert]), Single(0))
    torch.testing.assert_close(
        logits(model), logits(with_weights_added(make(family), expert)), atol=1e-5, rtol=1e-4
    )
    wrapped = PeftModel.from_pretrained(make(family), tmp_path / "a").eval()
    torch.testing.assert_close(logits(model), logits(wrapped), atol=1e-5, rtol=1e-4)


def _phatgoose(experts, top_k=2):
    """The formula of docs/method.md at one layer."""

    def at(path, slot, u):
        y = slot.weight @ u + (0 if slot.bias is None else slot.bias)
        standard = lambda v: (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()  # noqa: E731
        scores = torch.stack(
            [standard(e.gates[path].double()) @ standard(u) / len(u) ** 0.5 for e in experts]
        )
        best = scores.topk(min(top_k, len(experts)))
        for w, e in zip(best.values.softmax(0), best.indices, strict=True):
            y = y + w * change(experts[int(e)].updates[path], u)
        return y

    return at


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "old qwen3_moe"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_phatgoose_is_the_formula(tmp_path, family, backend):
    family, old = family.removeprefix("old "), family.startswith("old")
    model = make(family, torch.float64)
    model.set_experts_implementation("eager")  # the others take no float64
    experts = []
    for i in range(3):
        if old:
            per_expert(model, family, tmp_path / str(i), i, rank=2 + i)
        else:
            peft_adapter(model, tmp_path / str(i), i, target_modules=[], r=2 + i, use_rslora=i == 1)
        experts.append(with_gates(Expert.from_peft(tmp_path / str(i), name=str(i)), i))
    wanted = logits(by_hand(copy.deepcopy(model), experts, _phatgoose(experts)))
    plain = logits(model)
    route(model, Pool(experts), backend_name=backend)
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-4)
    assert (plain - wanted).abs().max() > 0.05
    # A row's answer doesn't depend on what it is batched with, nor on the cache.
    x = ids()
    torch.testing.assert_close(logits(model, x[:1]), wanted[:1], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        first = model(x[:, :7], use_cache=True)
        rest = model(x[:, 7:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, wanted[:, 7:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_any_experts_implementation(tmp_path, implementation, dtype):
    model = make("qwen3_moe", dtype)
    wrapped = peft_adapter(model, tmp_path / "a", 1, target_modules=[])
    model.set_experts_implementation(implementation)
    plain = logits(model)
    expert = Expert.from_peft(tmp_path / "a", name="a")
    route(model, Pool([expert]), Single(0))
    tolerance = 3e-6 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits(model), logits(wrapped), atol=tolerance, rtol=0.05)
    generated = model.generate(ids(), max_new_tokens=4, do_sample=False, num_beams=2)
    assert generated.shape == (2, 15)
    unroute(model)
    assert torch.equal(logits(model), plain)


def test_a_copy_routes_by_itself(tmp_path):
    model = make("mixtral")
    peft_adapter(model, tmp_path / "a", 1)
    route(model, Pool([Expert.from_peft(tmp_path / "a", name="a")]), Single(0))
    wanted = logits(model)
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    unroute(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(logits(copied), wanted)
    assert torch.equal(logits(pickled), wanted)
    unroute(copied)
    assert not hooked(copied)


def test_pools_of_both_kinds_of_layers(tmp_path):
    """Attention by some, experts by others; the average of all is Uniform, also as one merged expert."""
    model = make("qwen3_moe")
    for i in range(2):
        peft_adapter(model, tmp_path / str(i), i, r=2 + i)
    attention = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(copy.deepcopy(model), attention).save_pretrained(tmp_path / "2")
    pool = Pool([Expert.from_peft(tmp_path / str(i), name=str(i)) for i in range(3)])
    wanted = logits(route(model, pool, Uniform()))
    torch.testing.assert_close(
        logits(route(model, Pool([merged(pool)]), Single(0))), wanted, atol=1e-5, rtol=1e-4
    )
    alone = logits(route(model, pool, Single("2")))
    direct = PeftModel.from_pretrained(make("qwen3_moe"), tmp_path / "2").eval()
    torch.testing.assert_close(alone, logits(direct), atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    model, plain = make("qwen3_moe"), logits(make("qwen3_moe"))
    wide = make("mixtral")  # whose experts are as large, and of another architecture

    def refused(folder, match, error=RoutingError, **changes):
        config = json.loads((folder / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(error, match=match):
            route(model, Pool([Expert.from_peft(folder, name="x")]), Single(0))
        assert not hooked(model)
        assert torch.equal(logits(model), plain)

    for i in range(4):
        peft_adapter(model, tmp_path / str(i), 1, target_modules=[])
    refused(tmp_path / "0", "of expert 5, and model.layers.0.mlp.experts has 5", r=1)
    refused(tmp_path / "0", "changes 3 experts in model.layers.0.mlp.experts.*has 5", r=5)
    refused(
        tmp_path / "1", "target_parameters names 'mlp.experts.bias'", ExpertError,
        target_parameters=["mlp.experts.bias"],
    )  # fmt: skip
    refused(tmp_path / "2", "tensors of 2 parameters", ExpertError, target_parameters=["experts.down_proj"])
    refused(
        tmp_path / "3", r"expected \[\d+, d_in\] for \d+ experts and the configured rank 4", ExpertError, r=4
    )
    per_expert(wide, "mixtral", tmp_path / "4", 1)
    refused(tmp_path / "4", "block_sparse_moe.experts.0.w1")
    llama = tmp_path / "5"
    peft_adapter(model, llama, 1, target_modules=[])
    expert = Expert.from_peft(llama, name="x")
    with pytest.raises(RoutingError, match="lacks"):
        route(make_model("llama"), Pool([expert]), Single(0))


def test_square_parameters_of_an_early_peft_are_refused(tmp_path):
    model = make("olmoe", width=16)  # 2 · 16 is the model's width
    peft_adapter(model, tmp_path / "a", 1, target_modules=[], target_parameters=["experts.gate_up_proj"])
    pool = Pool([Expert.from_peft(tmp_path / "a", name="a")])
    route(model, pool, Single(0))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    versions = {  # → whether it is refused
        None: True, "": True, "unknown": True, "0.18.1": True, "0.18rc1": True, "0.9.0": True,
        "0.18.2.dev0@1a2b3c": True, "0.19.0": False, "0.19rc1": False, "0.19.0.dev0@UNKNOWN": False, "0.100": False,
        "1": False, "1.0.0+local": False,
    }  # fmt: skip
    for version, refused in versions.items():
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"peft_version": version}))
        pool = Pool([Expert.from_peft(tmp_path / "a", name="a")])
        with pytest.raises(RoutingError, match=r"before 0\.19") if refused else contextlib.nullcontext():
            route(model, pool, Single(0))
    del config["peft_version"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RoutingError, match=r"before 0\.19"):
        route(model, Pool([Expert.from_peft(tmp_path / "a", name="a")]), Single(0))


def test_a_stand_in_says_what_it_stands_for():
    model = make("olmoe")
    paths = ["model.layers.0.mlp.experts.2.up_proj", "model.layers.0.mlp.gate"]
    one, router = (modules_by_path(model, paths)[path] for path in paths)
    assert repr(one) == f"ExpertLinear({D}, {F_}, index=2, part='up_proj')"
    assert (
        repr(router)
        == f"RouterLinear({D}, {router.out_features}, of {type(model.get_submodule(paths[1])).__name__})"
    )


def test_routers_inside_experts(tmp_path):
    """Random knows which tokens reach an expert: each gets the same draw whatever it is batched with."""
    base = Base(make("mixtral"), make_tokenizer(), "mixtral")
    for i in range(3):
        per_expert(base.model, "mixtral", tmp_path / str(i), i)
    pool = Pool([Expert.from_peft(tmp_path / str(i), name=str(i)) for i in range(3)])
    for router in (Random(seed=4), Arrow(), SpectR(), LAG()):
        route(base, pool, router)
        x = ids(3, 9)
        torch.testing.assert_close(
            logits(base.model, x)[1:2], logits(base.model, x[1:2]), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_router_chooses_as_pefts(tmp_path, family, dtype):
    model = make(family, dtype)
    plain = logits(model)
    name = "router.weight" if family == "gpt_oss" else "gate.weight"
    wrapped = peft_adapter(model, tmp_path / "a", 1, target_parameters=[f"mlp.{name}", "experts.down_proj"])
    expert = Expert.from_peft(tmp_path / "a", name="a")
    route(model, Pool([expert]), Single(0))
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model), logits(wrapped), atol=1e-5, rtol=1e-4)
        merged_by_hand = with_weights_added(make(family), expert)
        torch.testing.assert_close(logits(model), logits(merged_by_hand), atol=1e-5, rtol=1e-4)
    else:  # a rounding may send a token to another expert
        near = ((logits(model) - logits(wrapped)).abs() < 0.3).float().mean()
        assert near > 0.8
    unroute(model)
    assert torch.equal(logits(model), plain)
    assert not hooked(model)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_adapted_router_of_transformers_4(tmp_path, family):
    model = make(family)
    expert = Expert.from_peft(per_expert(model, family, tmp_path / "a", 1, router=True), name="a")
    route(model, Pool([expert]), Single(0))
    wrapped = PeftModel.from_pretrained(make(family), tmp_path / "a").eval()
    torch.testing.assert_close(logits(model), logits(wrapped), atol=1e-5, rtol=1e-4)
    copied = copy.deepcopy(model)
    route(model, Pool([expert, expert.renamed("b")]), Uniform())  # which takes the first routing off
    torch.testing.assert_close(logits(model), logits(wrapped), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(copied), logits(wrapped), atol=1e-5, rtol=1e-4)
    unroute(model)
    unroute(copied)
    assert not hooked(model)
    assert not hooked(copied)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_old_and_new_names_in_one_pool(tmp_path, family):
    """Experts that change the same weights are candidates for one choice, whatever they call them."""
    model = make(family, torch.float64)
    model.set_experts_implementation("eager")
    per_expert(model, family, tmp_path / "old", 1, router=True)
    names = ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
    peft_adapter(model, tmp_path / "new", 2, target_modules=[], target_parameters=names)
    old, new = (Expert.from_peft(tmp_path / name, name=name) for name in ("old", "new"))
    gates = {}
    generator = torch.Generator().manual_seed(7)
    for path, update in old.updates.items():
        gates[path] = torch.randn(update.d_in, generator=generator)
    old, new = old.with_gates(gates), with_gates(new, 8)
    for name in ("old", "new"):
        alone = logits(route(model, Pool([old, new]), Single(name)))
        by_itself = logits(route(model, Pool([{"old": old, "new": new}[name]]), Single(0)))
        torch.testing.assert_close(alone, by_itself, atol=1e-9, rtol=1e-9)
    average = logits(route(model, Pool([old, new]), Uniform()))
    single = logits(route(model, Pool([merged(Pool([old, new]))]), Single(0)))
    torch.testing.assert_close(single, average, atol=1e-5, rtol=1e-4)
    # What PHATGOOSE does: the new one's updates cut in two, under the old one's names.
    tensors, cut_gates = {}, {}
    for path, update in new.updates.items():
        name = path.rpartition(".")[2]
        parts = (
            {"gate_proj": update.B.chunk(2)[0], "up_proj": update.B.chunk(2)[1]}
            if name == "gate_up_proj"
            else {name: update.B}
        )
        for part, b in parts.items():
            place = f"{path.removesuffix(name)}{part}"
            if family == "mixtral":
                place = place.replace("mlp", "block_sparse_moe")
                for long, short in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
                    place = place.replace(long, short)
            key = f"base_model.model.{place}.lora"
            tensors |= {f"{key}_A.weight": update.A, f"{key}_B.weight": b.contiguous()}
            cut_gates[place] = new.gates[path]
    cut = Expert("new", {"peft_type": "LORA", "r": 3, "lora_alpha": 5}, tensors, cut_gates)
    wanted = logits(route(model, Pool([old, cut])))
    assert set(Pool([old, cut]).modules) == set(old.updates)
    torch.testing.assert_close(logits(route(model, Pool([old, new]))), wanted, atol=1e-9, rtol=1e-9)


def test_packed_pools_inside_experts(tmp_path):
    model = make("qwen3_moe")
    peft_adapter(model, tmp_path / "new", 1, r=2)
    per_expert(model, "qwen3_moe", tmp_path / "old", 5)
    for number, names in enumerate((["new"], ["old"], ["new", "old"])):
        experts = [with_gates(Expert.from_peft(tmp_path / n, name=n), i) for i, n in enumerate(names)]
        folder = tmp_path / str(number)
        wanted = logits(route(model, Pool(experts)))
        Pool(experts).save(folder)
        pack(folder)
        packed = Pool.load(folder)
        assert [e.hash for e in packed.experts] == [e.hash for e in experts]
        assert torch.equal(logits(route(model, packed)), wanted)
        unpack(folder)
        assert torch.equal(logits(route(model, Pool.load(folder))), wanted)


def test_a_base_whose_experts_run_in_another_way_is_refused_from_its_config(tmp_path):
    config = Llama4TextConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=F_, intermediate_size_mlp=48,
        num_hidden_layers=2, num_local_experts=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        interleave_moe_layer_step=1, pad_token_id=0,
    )  # fmt: skip
    Llama4ForCausalLM(config)
    (tmp_path / "llama4").mkdir()
    config.architectures = ["Llama4ForCausalLM"]
    config.save_pretrained(tmp_path / "llama4")
    target = "feed_forward.experts.down_proj"
    tensors = {
        f"base_model.model.model.layers.{layer}.feed_forward.experts.lora_{name}.weight": torch.ones(shape)
        for layer in range(2)
        for name, shape in (("A", (8, F_)), ("B", (D, 8)))
    }
    expert = Expert("x", {"peft_type": "LORA", "r": 2, "target_parameters": [target]}, tensors)
    with pytest.raises(RoutingError, match="a Llama4TextExperts, whose experts don't run"):
        check_mixture(str(tmp_path / "llama4"), Pool([expert]))
    model = make("qwen3_moe")
    peft_adapter(model, tmp_path / "a", 1)
    model.config.save_pretrained(tmp_path / "qwen")
    check_mixture(str(tmp_path / "qwen"), Pool([Expert.from_peft(tmp_path / "a", name="a")]))


@pytest.mark.parametrize("margins", [False, True])
def test_a_trace_inside_experts_knows_their_tokens(tmp_path, margins):
    """Every token that the base sends to an expert is recorded there, and no other; padding isn't."""
    base = Base(make("qwen3_moe"), make_tokenizer(), "qwen3_moe")
    for i in range(3):
        peft_adapter(base.model, tmp_path / str(i), i)
    experts = [with_gates(Expert.from_peft(tmp_path / str(i), name=str(i)), i) for i in range(3)]
    x, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    route(base, Pool(experts))
    sent = {}
    handles = [
        base.model.get_submodule(path).register_forward_pre_hook(
            lambda m, args, path=path: sent.update({path: args[1]}), prepend=True
        )
        for path in fused_experts(base.model)
    ]
    with torch.no_grad(), trace(base, margins=margins) as found:
        plain = base.model(x, attention_mask=mask).logits
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert torch.equal(base.model(x, attention_mask=mask).logits, plain)
    for path, index in sent.items():
        for j in range(index.max() + 1):
            wanted = {(r, t) for r in range(3) for t in range(9) if j in index[9 * r + t] and mask[r, t]}
            if not wanted:
                continue
            for name in ("gate_up_proj", "down_proj"):
                choices = found[f"{path}.{j}.{name}"]
                tokens = choices.tokens
                places = {
                    (r, p + 4 * (r == 1))
                    for r, p in zip(tokens.rows.tolist(), tokens.positions.tolist(), strict=True)
                }
                assert places == wanted
                assert [
                    int(x[place])
                    for place in zip(tokens.rows, tokens.positions + 4 * (tokens.rows == 1), strict=True)
                ] == tokens.ids.tolist()
                assert choices.experts.shape == (len(wanted), 2)
    with torch.no_grad(), trace(base, histogram=True) as sums:
        base.model(x, attention_mask=mask)
    for path, load in found.loads.items():
        torch.testing.assert_close(sums.loads[path].weight, load.weight, atol=0.01, rtol=0.01)


def test_what_a_router_knows_of_picked_tokens():
    seen = Sequences(torch.arange(6).view(2, 3), torch.arange(3).expand(2, 3), torch.ones(2, 3).bool())
    context = RoutingContext("m", 1, 3, seen, picked=torch.tensor([4, 0, 5]))
    assert context.tokens().ids.tolist() == [[4, 0, 5]]
    assert context.tokens().positions.tolist() == [[1, 0, 2]]
    assert context.spread(torch.tensor([[[7]], [[8]]])).tolist() == [[8], [7], [8]]  # of sequences
    assert context.spread(torch.arange(6).view(2, 3, 1)).tolist() == [[4], [0], [5]]  # of tokens


def test_dora_inside_experts(tmp_path):
    """DoRA as transformers 4's adapters have it: W' = m (W + sBA)/‖W + sBA‖, row by row."""
    model = make("qwen3_moe")
    per_expert(model, "qwen3_moe", tmp_path / "a", 1)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for key in [k for k in tensors if "lora_B" in k]:
        magnitude = torch.rand(tensors[key].shape[0], generator=generator) + 0.5
        tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = magnitude
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {"use_dora": True}
    expert = Expert("a", config, tensors)
    by_hand = make("qwen3_moe")
    modules = modules_by_path(by_hand, expert.updates)
    with torch.no_grad():
        for path, update in expert.updates.items():
            weight = modules[path].weight
            whole = weight + update.weight()
            weight.copy_(update.magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True))
    norms = weight_norms(model, expert.updates)
    for routed in (model, cpu_offload(copy.deepcopy(model), "cpu")):
        assert weight_norms(routed, expert.updates) == norms
        route(routed, Pool([expert]), Single(0))
        torch.testing.assert_close(logits(routed), logits(by_hand), atol=1e-5, rtol=1e-4)


def test_experts_are_switched_off_for_each_row(tmp_path):
    """Explaining an answer switches experts off row by row; inside experts every token keeps its row's switches."""
    model = make("qwen3_moe")
    for i in range(3):
        peft_adapter(model, tmp_path / str(i), i)
    experts = [with_gates(Expert.from_peft(tmp_path / str(i), name=str(i)), i) for i in range(3)]
    x, on = ids(3, 9), torch.tensor([[True, True, True], [False, True, True], [True, False, False]])
    found = logits(route(model, Pool(experts), Masked(PHATGOOSE(), Switches(on))), x)
    for row, which in enumerate(on.tolist()):
        pool = Pool([e for e, there in zip(experts, which, strict=True) if there])
        torch.testing.assert_close(
            found[row], logits(route(model, pool), x[row : row + 1])[0], atol=1e-5, rtol=1e-4
        )


def test_shared_experts_act_too(tmp_path):
    """transformers 4's adapters with shared experts: PEFT 0.21 leaves those out when it converts the rest,
    so it is no oracle here."""
    model = make("deepseek_v3")
    per_expert(model, "deepseek_v3", tmp_path / "a", 1)
    tensors, generator = (
        load_file(tmp_path / "a" / "adapter_model.safetensors"),
        torch.Generator().manual_seed(3),
    )
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ("shared_experts." in path or "layers.0.mlp" in path):
            key = f"base_model.model.{path}.lora"
            tensors[f"{key}_A.weight"] = torch.randn(4, module.in_features, generator=generator) * 0.2
            tensors[f"{key}_B.weight"] = torch.randn(module.out_features, 4, generator=generator) * 0.2
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    expert = Expert("a", config, tensors)
    route(model, Pool([expert]), Single(0))
    by_hand = with_weights_added(make("deepseek_v3"), expert)
    torch.testing.assert_close(logits(model), logits(by_hand), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_what_peft_converts_and_saves_again(tmp_path, family):
    """Bare parameter names, a doubled rank by a pattern, the router as a parameter, and linear layers beside them."""
    folder = per_expert(make(family), family, tmp_path / "old", 1, router=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for layer in range(2):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
        tensors[f"{key}_A.weight"] = torch.randn(4, D, generator=generator) * 0.2
        tensors[f"{key}_B.weight"] = torch.randn(D, 4, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"].append("q_proj")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    wrapped = PeftModel.from_pretrained(make(family), folder).eval()
    wrapped.save_pretrained(tmp_path / "new")
    model = make(family)
    for name in ("old", "new"):
        expert = Expert.from_peft(tmp_path / name, name=name)
        route(model, Pool([expert]), Single(0))
        torch.testing.assert_close(logits(model), logits(wrapped), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {r".*\.gate_up_proj": 9}},
        {"use_rslora": True, "rank_pattern": {"experts.gate_up_proj": 2}},
        {"target_parameters": ["experts.down_proj"]},
        {"target_parameters": ["gate_up_proj", "down_proj", "q_proj.weight"], "target_modules": ["k_proj"]},
    ],
)
def test_ranks_scales_and_names_of_parameters_are_pefts(tmp_path, family, settings):
    model = make(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of use_rslora beside patterns PEFT has much to say
        wrapped = peft_adapter(model, tmp_path / "a", 1, **settings)
    route(model, Pool([Expert.from_peft(tmp_path / "a", name="a")]), Single(0))
    torch.testing.assert_close(logits(model), logits(wrapped), atol=1e-5, rtol=1e-4)

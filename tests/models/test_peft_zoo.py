"""Every kind of adapter that PEFT writes: routed as a pool of one it equals plain PEFT, or it is refused by name."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from peft import (
    AdaLoraConfig,
    FrodConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    ShiraConfig,
    SupertuningConfig,
    VeraConfig,
)
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file

from conftest import TARGETS, relative, save_adapter, with_random_adapter
from phatgoose import PHATGOOSE, Expert, GateConfig, Pool, Task, route, train_gate, unroute
from phatgoose.errors import ExpertError, RoutingError
from phatgoose.experts.adapters.peft import to_contents
from phatgoose.experts.packed.pack import pack, unpack
from phatgoose.records import Example
from phatgoose.routers import Single, Uniform

ATTENTION = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
    "qwen": ["q_proj", "v_proj"],
}
LAST = {"llama": "down_proj", "gpt2": "c_proj", "t5": "wo", "qwen": "down_proj"}
LAYERS = {"llama": "layers", "qwen": "layers", "gpt2": "h", "t5": "block"}


def lora(family, **settings):
    defaults = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": TARGETS[family],
        "fan_in_fan_out": family == "gpt2",
    }
    return LoraConfig(**{**defaults, **settings})


def adalora(family, **settings):
    defaults = {
        "init_r": 5,
        "target_r": 3,
        "lora_alpha": 7,
        "total_step": 9,
        "target_modules": TARGETS[family],
    }
    return AdaLoraConfig(**{**defaults, "fan_in_fan_out": family == "gpt2", **settings})


def vera(family, **settings):
    defaults = {"r": 6, "target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about projections that aren't saved
        return VeraConfig(**{**defaults, **settings})


EXACT = {
    "plain": lambda f: lora(f),
    "rank 1": lambda f: lora(f, r=1),
    "rank above the width": lambda f: lora(f, r=40),
    "alpha 0.25": lambda f: lora(f, lora_alpha=0.25),
    "rank and alpha patterns": lambda f: lora(
        f, rank_pattern={LAST[f]: 7, rf"^.*0.*{ATTENTION[f][0]}": 2}, alpha_pattern={ATTENTION[f][0]: 11}
    ),
    "rslora": lambda f: lora(f, use_rslora=True),
    "rslora with patterns": lambda f: lora(f, use_rslora=True, rank_pattern={LAST[f]: 6}),
    "some modules": lambda f: lora(f, target_modules=ATTENTION[f]),
    "regular expression": lambda f: lora(f, target_modules=rf".*\.0\..*({'|'.join(ATTENTION[f])})$"),
    "all-linear": lambda f: lora(f, target_modules="all-linear"),
    "one layer": lambda f: lora(f, layers_to_transform=[1], layers_pattern=LAYERS[f]),
    "exclude": lambda f: lora(f, exclude_modules=[LAST[f]]),
    "lora_bias": lambda f: lora(f, lora_bias=True),
    "dora": lambda f: lora(f, use_dora=True),
    "dora, rslora, patterns": lambda f: lora(f, use_dora=True, use_rslora=True, rank_pattern={LAST[f]: 5}),
    "head": lambda f: lora(f, target_modules=[*TARGETS[f], "lm_head"]),
    "gaussian": lambda f: lora(f, init_lora_weights="gaussian"),
    "orthogonal": lambda f: lora(f, r=4, init_lora_weights="orthogonal"),
    "dropout": lambda f: lora(f, lora_dropout=0.3),
    "look-ahead": lambda f: lora(
        f,
        rank_pattern={rf"^(?!.*\.1\.).*{LAST[f]}": 6, r".*(?=v)v": 2},
        alpha_pattern={rf"(?<=\.){LAST[f]}": 9},
    ),
    "mica": lambda f: lora(f, init_lora_weights="mica"),
    "velora": lambda f: lora(f, velora_config=VeloraConfig(num_groups=4)),
    "monteclora": lambda f: lora(f, monteclora_config=MontecloraConfig()),
    "adalora": lambda f: adalora(f),
    "adalora, alpha 0": lambda f: adalora(f, lora_alpha=0),
    "vera": lambda f: vera(f),
    "vera from its seed": lambda f: vera(f, save_projection=False, projection_prng_key=5),
    "lora_only biases": lambda f: lora(f, bias="lora_only" if f != "gpt2" else "none"),
    "all biases": lambda f: lora(f, bias="all" if f != "gpt2" else "none"),
    "ia3": lambda f: IA3Config(
        target_modules=[*ATTENTION[f], LAST[f]], feedforward_modules=[LAST[f]], fan_in_fan_out=f == "gpt2"
    ),
    "ia3, outputs only": lambda f: IA3Config(
        target_modules=ATTENTION[f], feedforward_modules=[], fan_in_fan_out=f == "gpt2"
    ),
}
EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "qwen": "embed_tokens"}


def adapted(base, config, seed=0):
    """PEFT's model with random weights wherever it would train."""
    return with_random_adapter(base.model, config, torch.Generator().manual_seed(seed), 0.15)


def peft_model(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(base.model), folder).eval()


def batch(base, rows=3, length=7):
    ids = torch.randint(
        2, base.model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1)
    )
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # padding on the left
    inputs = {"input_ids": ids, "attention_mask": mask}
    if base.model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5]
    return inputs


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@pytest.fixture
def written(kind, family, make_base, tmp_path):
    """A base, the folder of an adapter of this kind, and PEFT's logits with both."""
    base = make_base(family)
    folder = save_adapter(adapted(base, EXACT[kind](family)), tmp_path / "adapter")
    return base, folder, logits(peft_model(base, folder), batch(base))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", EXACT)
def test_a_pool_of_one_equals_plain_peft(kind, family, written):
    base, folder, expected = written
    plain = logits(base.model, batch(base))
    pool = Pool([Expert.from_peft(folder)])
    for backend in ("torch", "reference"):
        found = logits(route(base, pool, Single(0), backend_name=backend), batch(base))
        assert relative(found, expected) < 1e-5
    assert relative(plain, expected) > 1e-3  # the adapter does something
    assert torch.equal(logits(unroute(base), batch(base)), plain)


@pytest.mark.slow(3)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", EXACT)
def test_in_bfloat16_it_is_as_close_as_peft_to_float32(kind, family, written, make_base):
    base, folder, exact = written
    half = make_base(family, dtype=torch.bfloat16)
    peft = logits(peft_model(half, folder), batch(base))
    ours = logits(route(half, Pool([Expert.from_peft(folder)]), Single(0)), batch(base))
    assert relative(ours, exact) < 2 * relative(peft, exact) + 1e-3  # our rows are rounded, PEFT's are not
    route(half, Pool([Expert.from_peft(folder)]), Single(0), dtype=torch.float32)
    assert relative(logits(half.model, batch(base)), exact) < 1.2 * relative(peft, exact) + 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_adapters_of_any_float_dtype(dtype, make_base, tmp_path):
    base = make_base("llama")
    model = adapted(base, lora("llama", lora_bias=True))
    for key, p in model.named_parameters():
        if "lora_" in key:
            p.data = p.data.to(dtype)
    folder = save_adapter(model, tmp_path / "adapter")
    expert = Expert.from_peft(folder)
    assert {u.A.dtype for u in expert.updates.values()} == {dtype}
    plain = peft_model(base, folder)
    for p in plain.parameters():
        p.data = p.data.float()
    found = logits(route(base, Pool([expert]), Single(0)), batch(base))
    assert relative(found, logits(plain, batch(base))) < 1e-5


@pytest.mark.parametrize("family", list(EMBEDDINGS))
def test_embeddings_and_the_copies_peft_saves_of_them(family, make_base, tmp_path):
    """Qwen's head is tied to its embedding: only the embedding is adapted, the head stays the base's."""
    base = make_base(family)
    config = lora(family, target_modules=[EMBEDDINGS[family], *ATTENTION[family]])
    folder = save_adapter(adapted(base, config), tmp_path / "adapter")
    expert = Expert.from_peft(folder)
    assert any(u.embedding for u in expert.updates.values())
    assert bool(expert.base_copies) == (family != "gpt2")  # PEFT doesn't save GPT-2's along
    expected = logits(peft_model(base, folder), batch(base))
    for backend in ("torch", "reference"):
        found = logits(route(base, Pool([expert]), Single(0), backend_name=backend), batch(base))
        assert relative(found, expected) < 1e-5
    if not expert.base_copies:
        return
    other = make_base(family, seed=1)
    with pytest.raises(RoutingError, match=r"brings its own .*which is not this model's"):
        route(other, Pool([expert]), Single(0))


def test_a_tied_head(make_base, tmp_path):
    base = make_base("qwen")
    folder = save_adapter(
        adapted(base, lora("qwen", target_modules=["lm_head", "q_proj"])), tmp_path / "adapter"
    )
    expected = logits(peft_model(base, folder), batch(base))
    found = logits(route(base, Pool([Expert.from_peft(folder)]), Single(0)), batch(base))
    assert relative(found, expected) < 1e-5


REFUSED = {
    "modules_to_save": (lambda f: lora(f, target_modules=ATTENTION[f], modules_to_save=["norm"]), "modules_to_save = "),
    "SHiRA": (lambda f: ShiraConfig(target_modules=ATTENTION[f], r=2), "peft_type is 'SHIRA'"),
    "Supertuning": (lambda f: SupertuningConfig(target_modules=ATTENTION[f]), "peft_type is 'SUPERTUNING'"),
    "FRoD": (lambda f: FrodConfig(target_modules=ATTENTION[f]), "peft_type is 'FROD'"),
    "trainable tokens": (lambda f: lora(f, trainable_token_indices=[3, 5]), "trainable_token_indices"),
    "pissa": (lambda f: lora(f, init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    "olora": (lambda f: lora(f, init_lora_weights="olora"), "init_lora_weights = 'olora'"),
    "activated LoRA": (
        lambda f: lora(f, task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]),
        "alora_invocation_tokens",
    ),
    "layer replication": (lambda f: lora(f, layer_replication=[(0, 2), (1, 2)]), "layer_replication"),
    "DoRA of an embedding": (lambda f: lora(f, use_dora=True, target_modules=["embed_tokens"]), "DoRA of an embedding"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind, make_base, tmp_path):
    base = make_base("llama")
    build, message = REFUSED[kind]
    folder = save_adapter(adapted(base, build("llama")), tmp_path / "adapter")
    with pytest.raises(ExpertError, match=message):
        Expert.from_peft(folder)


@pytest.mark.parametrize("family", ["gpt2", "qwen"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_retrained_biases_of_the_base_are_refused(family, bias, make_base, tmp_path):
    config = lora(family, bias=bias, target_modules=ATTENTION[family])
    folder = save_adapter(adapted(make_base(family), config), tmp_path / "adapter")
    with pytest.raises(ExpertError, match=f"bias = '{bias}', and the adapter holds the base's own biases"):
        Expert.from_peft(folder)


def test_adalora_keeps_the_ranks_that_its_pattern_says(make_base, tmp_path):
    base = make_base("llama")
    model = adapted(base, adalora("llama"))
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    masks = {q: [True, False, True, False, False], up: [False] * 5}
    model.peft_config["default"].rank_pattern = {f"{path}.lora_E": mask for path, mask in masks.items()}
    folder = save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = logits(peft_model(base, folder), batch(base))
    expert = Expert.load(Expert.from_peft(folder).save(tmp_path / "again"))
    assert expert.updates[q].rank == 2
    assert up not in expert.updates
    assert relative(logits(route(base, Pool([expert]), Single(0)), batch(base)), expected) < 1e-5
    config = {**expert.adapter_config, "rank_pattern": {f"{q}.lora_E": [True] * 5}}
    with pytest.raises(ExpertError, match=r"q_proj has lora_A \[2, 32\].* expected \[5, d_in\]"):
        to_contents(config, expert.tensors, "here")


def with_whole_modules(base, folder, change):
    """An adapter that saved embedding and head along, as `change` makes them."""
    config = lora("llama", target_modules=ATTENTION["llama"], modules_to_save=["embed_tokens", "lm_head"])
    file = save_adapter(adapted(base, config), folder) / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in tensors:
        if "embed_tokens" in key or "lm_head" in key:
            tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("rows", [320, 300])
def test_whole_modules_that_are_the_bases_own_change_nothing(rows, make_base, tmp_path):
    """Also without the last rows, which no token has: resize_token_embeddings(len(tokenizer))
    cuts a padded vocabulary."""
    base = make_base("llama")
    expected = logits(peft_model(base, with_whole_modules(base, tmp_path / "all", lambda t: t)), batch(base))
    folder = with_whole_modules(base, tmp_path / "adapter", lambda t: t[:rows])
    found = logits(route(base, Pool([Expert.from_peft(folder)]), Single(0)), batch(base))
    assert relative(found, expected) < 1e-5
    half = make_base("llama", dtype=torch.bfloat16)
    route(half, Pool([Expert.from_peft(folder)]), Single(0))


@pytest.mark.parametrize(
    "change", [lambda t: t + 0.1, lambda t: torch.cat([t, t[:4]]), lambda t: t[20:], lambda t: t[:0]]
)
def test_whole_modules_that_differ_are_refused_until_they_are_dropped(change, make_base, tmp_path):
    base = make_base("llama")
    folder = with_whole_modules(base, tmp_path / "adapter", change)
    with pytest.raises(
        (RoutingError, ExpertError), match=r"brings its own .*--drop modules_to_save|so no values"
    ):
        route(base, Pool([Expert.from_peft(folder)]), Single(0))
    same = with_whole_modules(base, tmp_path / "same", lambda t: t)
    expected = logits(route(base, Pool([Expert.from_peft(same)]), Single(0)), batch(base))
    dropped = Expert.load(Expert.from_peft(folder, drop=["modules_to_save"]).save(tmp_path / "again"))
    assert torch.equal(logits(route(base, Pool([dropped]), Single(0)), batch(base)), expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda k: k.replace("model.layers", "_orig_mod.model.layers"),
        lambda k: f"_orig_mod.{k}",
        lambda k: f"module.module.{k}",
        lambda k: k.replace("base_model.model.", "base_model.model.module."),
        lambda k: f"_fsdp_wrapped_module.{k}".replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
        lambda k: k.replace(".mlp", "._checkpoint_wrapped_module.mlp"),
        lambda k: f"base_model.model.{k}",
        lambda k: k.replace(".weight", ".default.weight").replace("magnitude_vector", "magnitude_vector.default"),
        lambda k: k.replace(".weight", ".tuned.weight").replace("magnitude_vector", "magnitude_vector.tuned"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_names_that_wrappers_left_in_the_keys_are_taken_off(wrap, packed, make_base, tmp_path):
    base = make_base("llama")
    folder = save_adapter(adapted(base, lora("llama", use_dora=True)), tmp_path / "adapter")
    expected = logits(peft_model(base, folder), batch(base))
    file = folder / "adapter_model.safetensors"
    tensors = {wrap(key): tensor for key, tensor in load_file(file).items()}
    assert tensors.keys() != load_file(file).keys()
    save_file(tensors, file, {"format": "pt"})
    pool = Pool([Expert.from_peft(folder)])
    if packed:
        pack(pool.save(tmp_path / "pool"))
        pool = Pool.load(tmp_path / "pool")
    assert relative(logits(route(base, pool, Single(0)), batch(base)), expected) < 1e-5


@pytest.mark.parametrize("kind", ["adalora", "vera", "vera from its seed", "mica", "velora"])
def test_packed_they_compute_the_same(kind, make_base, tmp_path):
    base = make_base("llama")
    expert = Expert.from_peft(save_adapter(adapted(base, EXACT[kind]("llama")), tmp_path / "adapter"))
    plain = Expert.from_peft(save_adapter(adapted(base, lora("llama"), 1), tmp_path / "plain"))
    pool = Pool([expert, plain])
    expected = logits(route(base, pool, Uniform()), batch(base))
    pack(pool.save(tmp_path / "pool"))
    assert torch.equal(logits(route(base, Pool.load(tmp_path / "pool"), Uniform()), batch(base)), expected)
    unpack(tmp_path / "pool")
    assert Pool.load(tmp_path / "pool").experts[0].equals(expert)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3, 5]}, "trainable_token_indices"),
    ],
)
def test_what_the_caller_drops_is_left_out_and_recorded(config, name, make_base, tmp_path):
    base = make_base("llama")
    model = adapted(base, lora("llama", target_modules=ATTENTION["llama"], **config))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "modules_to_save" in key or "trainable_tokens_delta" in key:
                p.add_(1.0)
    expert = Expert.from_peft(save_adapter(model, tmp_path / "adapter"), drop=[name])
    assert expert.provenance["dropped"] == [name]
    again = Expert.load(expert.save(tmp_path / "again"))
    assert again.provenance["dropped"] == [name]
    rest = copy.deepcopy(base.model)
    plain = adapted(base, lora("llama", target_modules=ATTENTION["llama"]))
    with torch.no_grad():
        for key, p in plain.named_parameters():
            if "lora_" in key:
                p.copy_(dict(model.named_parameters())[key])
    expected = logits(plain, batch(base))
    assert relative(logits(route(rest, Pool([again]), Single(0)), batch(base)), expected) < 1e-5
    with pytest.raises(ExpertError, match="can't be left out"):
        Expert.from_peft(tmp_path / "adapter", drop=["lora_A"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_mixed_pools_equal_the_sum_of_single_runs_at_one_module(family, make_base, tmp_path):
    """Σ w_e Δ_e with each Δ_e taken from PEFT's own module: all kinds in one pool, at every module they adapt."""
    base = make_base(family)
    kinds = ("plain", "rslora with patterns", "lora_bias", "dora", "ia3", "some modules", "adalora", "vera")
    models, experts = [], []
    for seed, kind in enumerate(kinds):
        models.append(adapted(base, EXACT[kind](family), seed))
        experts.append(Expert.from_peft(save_adapter(models[-1], tmp_path / f"a{seed}"), name=f"e{seed}"))
    pool = Pool(experts)
    for backend in ("torch", "reference"):
        route(base, pool, Uniform(), backend_name=backend)
        for path in pool.modules:
            module = base.model.get_submodule(path)
            u = torch.randn(2, 3, experts[0].updates[path].d_in, generator=torch.Generator().manual_seed(3))
            with torch.no_grad():
                routed = module(u)
                plain = module.forward(u)
                total = torch.zeros_like(plain)
                for model, expert in zip(models, experts, strict=True):
                    if path in expert.updates:
                        total += model.get_base_model().get_submodule(path)(u) - plain
            assert relative(routed, plain + total / len(experts)) < 1e-5, path


def test_every_pair_of_kinds_routes_together(make_base, tmp_path):
    base = make_base("llama")
    experts = [
        Expert.from_peft(
            save_adapter(adapted(base, make("llama"), seed), tmp_path / f"a{seed}"), name=f"e{seed}"
        )
        for seed, make in enumerate(EXACT.values())
    ]
    for one, other in itertools.combinations(experts, 2):
        assert torch.isfinite(logits(route(base, Pool([one, other]), Uniform()), batch(base))).all()


def standardised(x):
    x = x.double()
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def test_gates_of_embeddings_read_the_embeddings_output(make_base, tmp_path):
    base = make_base("llama")
    experts, g = [], torch.Generator().manual_seed(7)
    for seed in range(3):
        folder = save_adapter(
            adapted(base, lora("llama", target_modules=["embed_tokens"]), seed), tmp_path / f"a{seed}"
        )
        expert = Expert.from_peft(folder, name=f"e{seed}")
        gates = {p: torch.randn(u.gate_dim, generator=g) for p, u in expert.updates.items()}
        experts.append(expert.with_gates(gates))
    route(base, Pool(experts), PHATGOOSE(top_k=2))
    module, path = base.model.get_input_embeddings(), "model.embed_tokens"
    ids = torch.tensor([[5, 9, 5], [300, 2, 17]])
    with torch.no_grad():
        found = module(ids)
    vectors = standardised(torch.stack([e.gates[path] for e in experts]))
    for place in ids.new_tensor([[0, 0], [0, 1], [1, 2]]).tolist():
        token = ids[tuple(place)]
        w = module.weight[token].detach().double()
        scores = vectors @ standardised(w) / w.numel() ** 0.5
        top = scores.topk(2)
        for e, share in zip(top.indices, top.values.softmax(-1), strict=True):
            u = experts[e].updates[path]
            w = w + share * u.scale * u.B.double() @ u.A[:, token].double()
        assert relative(found[tuple(place)], w) < 1e-6
    unroute(base)


def test_gates_of_every_kind_train_and_nothing_else_moves(make_base, tmp_path):
    base = make_base("llama")
    rows = tuple(Example(f"say {i}", (("yes", "no")[i % 2],)) for i in range(24))
    task = Task("t", rows[:16], rows[16:20], rows[20:])
    config = GateConfig(steps=3, rows_per_step=4, rows_per_batch=4, learning_rate=0.05, validate_every=0)
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    for number, kind in enumerate(("dora", "lora_bias", "ia3", "head", "adalora", "vera from its seed")):
        folder = save_adapter(adapted(base, EXACT[kind]("llama"), number), tmp_path / f"a{number}")
        expert = Expert.from_peft(folder, name=f"e{number}")
        gated = train_gate(base, expert, task, config)
        assert gated.gates.keys() == expert.updates.keys()
        assert sum(bool(v.any()) for v in gated.gates.values()) > len(gated.gates) / 2
        assert all(torch.equal(gated.tensors[k], t) for k, t in expert.tensors.items())
    expert = Expert.from_peft(
        save_adapter(adapted(base, lora("llama", target_modules=["embed_tokens"])), tmp_path / "embedding")
    )
    assert bool(train_gate(base, expert, task, config).gates["model.embed_tokens"].any())
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())

"""Whose tokens a module sees: exactly, or refused by name. The oracle of a draw by position and token
is the same row run another way."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

from architectures import make
from encoder_fixtures import make_encoder, signed
from phatgoose.errors import RoutingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, routing_of, unroute
from phatgoose.models.base import module_names as paths
from phatgoose.models.base.base import Base
from phatgoose.models.context import streams
from phatgoose.models.trace.record import trace
from phatgoose.routers import PHATGOOSE, Random, Retrieval, Single


def expert_of(model, endings, seed):
    """Random LoRA at all linear layers whose path ends so."""
    g, tensors, gates = torch.Generator().manual_seed(seed), {}, {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and path.endswith(tuple(endings)):
            d_in, d_out = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
            key = f"base_model.model.{path}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(2, d_in, generator=g) * 0.3
            tensors[f"{key}.lora_B.weight"] = torch.randn(d_out, 2, generator=g) * 0.3
            gates[path] = torch.randn(d_in, generator=g)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(gates)}
    return Expert(f"e{seed}", config, tensors).with_gates(gates, {"kind": "random"})


def routed(model, *endings, router=None):
    """The model with three random experts at the modules whose paths end so."""
    pool = Pool([expert_of(model, endings, seed) for seed in range(3)])
    assert len(pool.modules) > 0
    return route(model, pool, router or Random(seed=1))


def ids_of(rows=2, length=9, seed=0):
    return torch.randint(3, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


@torch.no_grad()
def step_by_step(model, ids, mask, first):
    """Logits after every token, the first `first` read in one pass, the others one by one behind its cache,
    as generate() does it."""
    found, kept = [], {}
    for start, end in [(0, first), *((n, n + 1) for n in range(first, ids.shape[1]))]:
        given = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "use_cache": True, **kept}
        if kept and "cache_params" in kept:
            given["attention_mask"] = None  # as Mamba's own prepare_inputs_for_generation
        out = model(**given)
        names = ("past_key_values", "cache_params", "state")
        kept = {name: getattr(out, name) for name in names if getattr(out, name, None) is not None}
        found.append(out.logits)
    return torch.cat(found, 1)


RECURRENT = {
    "mamba": ("in_proj", "x_proj"),
    "mamba2": ("in_proj",),
    "falcon_mamba": ("in_proj", "x_proj"),
    "falcon_h1": ("q_proj", "in_proj"),
    "zamba2": ("q_proj", "in_proj"),
    "lfm2": ("q_proj", "in_proj"),
}


@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_state_counts_as_the_cache_that_it_is(family):
    model, ids, mask = make(family), ids_of(), torch.ones(2, 9, dtype=torch.long)
    base_error = float((step_by_step(model, ids, mask, 4) - logits(model, input_ids=ids)).norm())
    routed(model, *RECURRENT[family])
    whole = logits(model, input_ids=ids)
    assert float((step_by_step(model, ids, mask, 4) - whole).norm()) < max(1e-3, 20 * base_error)
    with trace(model) as t:
        step_by_step(model, ids, mask, 4)
    for c in t.choices:
        assert sorted(c.positions.tolist()) == sorted(list(range(9)) * 2)
        assert c.tokens.generated.sum() == 10
        assert torch.equal(ids[c.rows, c.positions], c.ids)


def test_padding_before_a_recurrent_state_is_remembered():
    """Mamba is given no mask once it has a state, so its rows' padding must be known from the pass that made it."""
    model, ids = make("mamba"), ids_of()
    routed(model, "in_proj")
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    mask[1, :3], padded[1, :3] = 1, 7
    with trace(model) as t:
        step_by_step(model, padded, mask, 6)
    positions = t.choices[0].positions, t.choices[0].rows
    assert sorted(positions[0][positions[1] == 0].tolist()) == list(range(9))
    assert sorted(positions[0][positions[1] == 1].tolist()) == list(range(12))


def test_rwkv_goes_on_with_its_state():
    model, ids, mask = make("rwkv"), ids_of(1), torch.ones(1, 9, dtype=torch.long)
    routed(model, "key", "value")
    assert torch.allclose(step_by_step(model, ids, mask, 4), logits(model, input_ids=ids), atol=1e-3)


def test_a_state_whose_beginning_was_not_seen_is_refused_unless_the_mask_says_its_length():
    model, ids = make("mamba"), ids_of()
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=True).cache_params
    routed(model, "in_proj")
    with pytest.raises(RoutingError, match="doesn't count its tokens, and whose earlier passes weren't seen"):
        logits(model, input_ids=ids[:, :1], cache_params=before, use_cache=True)
    route(model, routing_of(model).pool, PHATGOOSE())
    logits(model, input_ids=ids[:, :1], cache_params=before, use_cache=True)  # which asks for no tokens


def test_a_pass_that_failed_leaves_a_state_of_unknown_length():
    model, ids = make("mamba"), ids_of()
    routed(model, "in_proj")
    with torch.no_grad():
        kept = model(input_ids=ids, use_cache=True).cache_params

    def fail(*_):
        raise ValueError("stop")

    handle = model.backbone.layers[1].register_forward_hook(fail)
    with pytest.raises(ValueError, match="stop"):
        logits(model, input_ids=ids[:, :1], cache_params=kept, use_cache=True)
    handle.remove()
    with pytest.raises(RoutingError, match="weren't seen"):
        logits(model, input_ids=ids[:, :1], cache_params=kept, use_cache=True)


def test_a_prompt_is_followed_through_a_recurrent_state(tokenizer, tmp_path):
    """Retrieval took every token that Mamba reads behind its state for a prompt of its own."""
    model, encoder = make("mamba"), make_encoder(tmp_path / "encoder")
    base = Base(model, tokenizer, spec="tiny-mamba")
    experts = [signed(expert_of(model, ["in_proj"], seed), encoder, seed) for seed in range(3)]
    route(base, Pool(experts), Retrieval(encoder=str(encoder)))
    batch = tokenizer(["the quick brown", "What is 1 plus 2"], return_tensors="pt", padding=True)
    with trace(base) as t, torch.no_grad():
        model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=5,
            min_new_tokens=5,
        )
    for c in t.choices:
        for row in range(2):
            assert len(c.experts[c.rows == row].unique()) == 1


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_caches_are_found_however_they_are_passed(how):
    model, ids = make("llama"), ids_of()
    routed(model, "q_proj", "v_proj")
    whole = logits(model, input_ids=ids)
    with torch.no_grad():
        kept = model(input_ids=ids[:, :5]).past_key_values
        mask = torch.ones(2, 9, dtype=torch.long)
        if how == "positional":
            states = model.model(ids[:, 5:], mask, None, kept).last_hidden_state
        else:
            states = model.model(
                input_ids=ids[:, 5:], attention_mask=mask, past_key_values=kept
            ).last_hidden_state
        assert torch.allclose(model.lm_head(states), whole[:, 5:], atol=1e-4)


def test_caches_that_say_no_length_are_refused_by_name():
    ids = ids_of()
    config = XLMConfig(
        vocab_size=320, emb_dim=32, n_layers=2, n_heads=4, dropout=0.0, attention_dropout=0.0, pad_index=0
    )
    model = routed(XLMWithLMHeadModel(config).eval(), "q_lin")
    with pytest.raises(RoutingError, match="continues `cache`"):
        logits(model, input_ids=ids, cache=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    given = {"past_key_values": ((ids, ids),)}
    assert "a tuple" in streams.Caches().before(given, 2, 1).problem


HEADS = {"opt": ("q_proj", "fc1"), "xglm": ("q_proj", "fc1")}


@pytest.mark.parametrize("family", [*HEADS, "bart decoder"])
def test_a_head_model_may_call_a_stack_inside_of_its_base_model(family):
    if family == "bart decoder":
        config = BartConfig(
            vocab_size=320, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, dropout=0.0,
            is_encoder_decoder=False, pad_token_id=0,
        )  # fmt: skip
        model = BartForCausalLM(config).eval()
    else:
        model = make(family)
    routed(model, "q_proj", "fc1")
    ids, mask = ids_of(), torch.ones(2, 9, dtype=torch.long)
    whole = logits(model, input_ids=ids)
    assert torch.allclose(step_by_step(model, ids, mask, 4), whole, atol=1e-4)
    assert torch.allclose(logits(model, input_ids=ids[1:]), whole[1:], atol=1e-4)
    with trace(model) as t:
        logits(model, input_ids=ids)
        with torch.no_grad():
            model.base_model(input_ids=ids)  # the stack inside runs in this one, and is no pass of its own
    for c in t.choices:
        assert torch.equal(ids[c.rows, c.positions], c.ids)
        assert c.tokens.inputs.unique().tolist() == [0, 1, 2, 3]


def test_a_head_that_is_called_decoder_is_no_stack():
    model, ids = make("modernbert-decoder"), ids_of()
    routed(model, "Wo", "lm_head.dense", router=PHATGOOSE())
    with trace(model) as t:
        logits(model, input_ids=ids, logits_to_keep=2)
    assert torch.equal(t["lm_head.dense"].ids, ids[:, -2:].reshape(-1))
    for c in t.choices:
        assert torch.equal(ids[c.rows, c.positions], c.ids)


def test_what_is_beside_the_text_sees_no_tokens_even_if_it_has_their_shape():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=8, patch_size=4),
        text_config=LlamaConfig(**sizes, vocab_size=320),
        image_token_index=2, image_seq_length=4,
    )  # fmt: skip
    model, ids = LlavaForConditionalGeneration(config).eval(), ids_of(1, 5)
    ids[0, :4] = 2
    given = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}  # 4 patches and a class token
    routed(
        model,
        "language_model.layers.0.mlp.up_proj",
        "vision_tower.encoder.layers.0.mlp.fc1",
        router=PHATGOOSE(),
    )
    logits(model, **given)
    with (
        pytest.raises(
            RoutingError, match=r"vision_tower.*isn't in the part of the model that reads the text"
        ),
        trace(model),
    ):
        logits(model, **given)
    routed(model, "language_model.layers.0.mlp.up_proj")
    with trace(model) as t:
        logits(model, **given)
    assert torch.equal(t.choices[0].ids, ids[0])


def test_flattened_tokens_are_their_rows_one_after_the_other():
    model, ids = make("qwen2_moe"), ids_of(3, 7)
    routed(model, "shared_expert.gate_proj", "shared_expert.down_proj", "shared_expert_gate", "q_proj")
    whole = logits(model, input_ids=ids)
    for row in range(3):
        assert torch.allclose(logits(model, input_ids=ids[row : row + 1]), whole[row : row + 1], atol=1e-4)
    with trace(model) as t:
        logits(model, input_ids=ids)
    assert len(t.choices) == 8
    for c in t.choices:
        assert torch.equal(ids[c.rows, c.positions], c.ids)
        assert c.rows.bincount().tolist() == [7, 7, 7]


@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe"])
@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_that_a_layer_picks_for_an_expert_are_refused(family, rows):
    """Even where an expert gets as many as there are: two experts a token come in the order of their rank."""
    model, ids = make(family), ids_of(rows, 6)
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    plain = logits(model, **given)
    routed(model, ".wi", ".fc1", router=PHATGOOSE())
    assert not torch.allclose(logits(model, **given), plain)
    with pytest.raises(RoutingError, match=r"expert_\d\.\w+: .* its layer picks the tokens"), trace(model):
        logits(model, **given)
    route(model, routing_of(model).pool, Random(seed=1))
    with pytest.raises(RoutingError, match="its layer picks the tokens"):
        logits(model, **given)


CROSS = {
    "t5": ("EncDecAttention.k", "EncDecAttention.q"),
    "bart": ("encoder_attn.k_proj", "encoder_attn.q_proj"),
    "t5gemma": ("cross_attn.k_proj", "cross_attn.q_proj"),
    "nllb-moe": ("cross_attention.k_proj", "cross_attention.q_proj"),
    "led": ("encoder_attn.k_proj", "encoder_attn.q_proj"),
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("family", CROSS)
def test_keys_of_cross_attention_are_the_encoders_tokens_whatever_it_is_called(family, named, monkeypatch):
    """Also where there are as many in the decoder, and the module's name says nothing."""
    model, key = make(family), CROSS[family][0]
    if not named:
        monkeypatch.setattr(streams, "reads_encoder", lambda path: False)
        monkeypatch.setattr(paths, "_CROSS", paths.re.compile("no such name"))
    routed(model, *CROSS[family], router=PHATGOOSE())
    ids, target = ids_of(2, 6), ids_of(2, 6, seed=1)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with trace(model) as t:
        logits(model, input_ids=ids, attention_mask=mask, decoder_input_ids=target)
    for c in t.choices:
        place = t.locations[c.path]
        assert place.part == "cross-attention"
        assert place.reads == ("encoder" if c.path.endswith(key) else "decoder")
        assert torch.equal((ids if place.reads == "encoder" else target)[c.rows, c.positions], c.ids)
        assert len(c.ids) == (10 if place.reads == "encoder" else 12)


def test_encoded_states_are_those_of_the_pass_that_made_them():
    model = routed(make("t5"), "EncDecAttention.k", router=PHATGOOSE())
    texts, target = [ids_of(2, 6), ids_of(2, 6, seed=1)], ids_of(2, 3)
    with torch.no_grad():
        encoded = [model.get_encoder()(input_ids=x).last_hidden_state for x in texts]
    with trace(model) as t:
        outputs = BaseModelOutput(last_hidden_state=encoded[0])
        logits(model, encoder_outputs=outputs, decoder_input_ids=target)  # not of the last one
    assert torch.equal(t.choices[0].ids, texts[0].reshape(-1))
    outputs = BaseModelOutput(last_hidden_state=encoded[0] + 1)
    with pytest.raises(RoutingError, match="encoder didn't compute"), trace(model):
        logits(model, encoder_outputs=outputs, decoder_input_ids=target)


@pytest.mark.parametrize(
    "keep", [0, 1, 4, torch.tensor([1, 6]), torch.tensor([6, 0, 2, 1, 3, 4, 5, 8, 7]), 9]
)
def test_the_head_sees_the_tokens_it_is_asked_for(keep):
    model, ids = make("llama"), ids_of()
    routed(model, "lm_head", "q_proj", router=PHATGOOSE())
    for settings in ({}, {"histogram": True}):
        with trace(model, margins=False, **settings) as t:
            logits(model, input_ids=ids, logits_to_keep=keep)
    with trace(model) as t:
        logits(model, input_ids=ids, logits_to_keep=keep)
    wanted = ids[:, keep] if isinstance(keep, torch.Tensor) else ids[:, -keep:]
    assert torch.equal(t["lm_head"].ids, wanted.reshape(-1))
    assert torch.equal(ids[t["lm_head"].rows, t["lm_head"].positions], t["lm_head"].ids)
    with torch.no_grad(), pytest.raises(RoutingError, match="lm_head: a module saw"), trace(model):
        states = model.model(input_ids=ids).last_hidden_state
        model.lm_head(states[:, :1])  # nobody said which


@pytest.mark.parametrize(
    ("family", "ending"), [("xlnet", "layer_1"), ("led", "fc1"), ("pegasus_x", "k_proj"), ("fsmt", "k_proj")]
)
def test_stacks_with_rows_and_columns_exchanged_are_refused_even_in_a_square_batch(family, ending):
    model, ids = make(family), ids_of(4, 4)
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    plain = logits(model, **given)
    routed(model, ending, router=PHATGOOSE())
    assert not torch.allclose(logits(model, **given), plain)
    with (
        pytest.raises(RoutingError, match=f"the modules of {family}'s .*coder see tokens in another order"),
        trace(model),
    ):
        logits(model, **given)


@pytest.mark.parametrize("settings", [{}, {"margins": False}])
@pytest.mark.parametrize(
    ("family", "ending"), [("youtu", "kv_b_proj"), ("deepseek_v3", "kv_b_proj"), ("doge", "dt_proj")]
)
def test_a_module_that_sees_the_whole_cache_again_is_counted_once_a_token(family, ending, settings):
    """Random draws by the tokens themselves, which aren't known any more, and refuses."""
    model, ids = make(family), ids_of()
    routed(model, ending, router=PHATGOOSE())
    with trace(model, **settings) as whole:
        logits(model, input_ids=ids)
    with trace(model, **settings) as steps:
        step_by_step(model, ids, torch.ones_like(ids), 4)
    for c in steps.choices:
        order = (c.rows * 9 + c.positions).argsort()
        for name in ("ids", "experts", "rows", "positions"):
            assert torch.equal(getattr(c, name)[order], getattr(whole[c.path], name)), name
    route(model, routing_of(model).pool, Random(seed=1))
    batch = logits(model, input_ids=ids)
    assert torch.allclose(logits(model, input_ids=ids[:1]), batch[:1], atol=1e-4)
    with pytest.raises(RoutingError, match=f"{ending}: it sees the 4 tokens of the cache again"):
        step_by_step(model, ids, torch.ones_like(ids), 4)


def test_a_model_that_was_copied_follows_its_own_passes():
    import copy

    model, ids = make("mamba"), ids_of()
    routed(model, "in_proj")
    twin = copy.deepcopy(model)
    unroute(model)
    mask = torch.ones_like(ids)
    assert torch.allclose(step_by_step(twin, ids, mask, 4), logits(twin, input_ids=ids), atol=1e-3)


def test_experts_of_one_row_need_no_tokens():
    """Single, as PHATGOOSE, never asks: it goes on where tokens can't be known."""
    model, ids = make("switch_transformers"), ids_of()
    routed(model, ".wi", router=Single(0))
    logits(model, input_ids=ids, decoder_input_ids=ids)


def test_rejected_drafts_are_not_counted():
    """The trace of assisted decoding says of every token what that of plain greedy decoding says."""
    model, draft, prompt = make("llama"), make("llama", seed=1), ids_of(1, 6)
    with torch.no_grad():  # an assistant that is right now and then
        for mine, its in zip(draft.parameters(), model.parameters(), strict=True):
            mine.copy_(its + 0.02 * torch.randn(its.shape, generator=torch.Generator().manual_seed(0)))
    routed(model, "q_proj", "lm_head", router=PHATGOOSE())
    plain = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 20,
        "do_sample": False,
    }
    for assisted in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        for settings in ({"margins": False}, {}, {"histogram": True}):
            with trace(model, **settings) as wanted, torch.no_grad():
                text = model.generate(**plain)
            with trace(model, **settings) as found, torch.no_grad():
                assert torch.equal(model.generate(**plain, **assisted), text)
            path = "model.layers.1.self_attn.q_proj"
            assert found.loads[path].tokens.sum() == wanted.loads[path].tokens.sum() == text.shape[1] - 1
            assert torch.equal(found.loads[path].first.sum(0), wanted.loads[path].first.sum(0))
            if not found.sums_only:
                assert torch.equal(found[path].ids, text[0, :-1])
                assert torch.equal(found["lm_head"].ids, text[0, prompt.shape[1] - 1 : -1])
    with pytest.raises(RoutingError, match="assistant_early_exit"), trace(model):
        model.generate(**plain, assistant_early_exit=1)


def test_an_expert_of_switch_that_got_no_token_is_one_that_runs_sometimes(recwarn):
    model = routed(make("switch_transformers"), ".wi", router=PHATGOOSE())
    logits(model, input_ids=ids_of(1, 3), decoder_input_ids=ids_of(1, 3))
    assert not [w for w in recwarn if "didn't run" in str(w.message)]


def test_a_module_may_read_both_the_decoders_tokens_and_the_encoders():
    """As T5Gemma 2's keys do: each call draws by its own tokens, and a trace, which has one place a module, refuses."""
    model = make("t5")
    for block in model.decoder.block:
        block.layer[1].EncDecAttention.k = block.layer[0].SelfAttention.k
    ids, target = ids_of(2, 5), ids_of(2, 5, seed=1)
    routed(model, "decoder.block.0.layer.0.SelfAttention.k", "decoder.block.1.layer.0.SelfAttention.k")
    whole = logits(model, input_ids=ids, decoder_input_ids=target)
    longer = torch.cat([target, target[:, :2]], 1)  # the encoder's tokens keep their draws
    assert torch.allclose(logits(model, input_ids=ids, decoder_input_ids=longer)[:, :5], whole, atol=1e-4)
    with (
        pytest.raises(RoutingError, match="encoder's tokens in one call and the decoder's in another"),
        trace(model),
    ):
        logits(model, input_ids=ids, decoder_input_ids=target)

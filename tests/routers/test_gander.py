"""Gander against a plain reference (tests/gander_oracle.py), however the model is run."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, StaticCache

from gander_oracle import Oracle
from phatgoose.analysis.measures import expert_shares
from phatgoose.errors import RoutingError
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.rank import score_choices
from phatgoose.evaluation.rows import encode
from phatgoose.experts.data_signature import DataSignature
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, routing_of, unroute
from phatgoose.models.attach.reference_text import plain_pieces
from phatgoose.models.trace.record import trace
from phatgoose.records import Example
from phatgoose.routers import Gander
from phatgoose.routers.gander import _total, scan
from ranking_fixtures import assert_plain

LENGTHS = [5, 1, 12, 8]
# The random T5 amplifies rounding: with one expert, float32 is up to 4e-3 from float64 on one row alone. Another choice
# of experts changes its logits by more than 1.
ROUGH = {"rtol": 5e-2, "atol": 5e-2}


def ids_of(length, seed):
    return torch.randint(2, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


ROWS = [ids_of(length, seed) for seed, length in enumerate(LENGTHS)]


@pytest.fixture
def made(make_base, make_expert):
    def make(family="llama", experts=4, layers=4, targets=None, **kwargs):
        base = make_base(family, layers=layers, **kwargs)
        pool = Pool(
            [
                make_expert(base, f"e{i}", rank=1 + i, seed=i, scale=0.6, targets=targets and targets[i])
                for i in range(experts)
            ]
        )
        return base, pool

    return make


def batch_of(rows, side="left", decoder=None):
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    real = [[1] * len(row) for row in rows]
    both = zip(rows, real, pads, strict=True)
    made = [(p + r, p + k) if side == "left" else (r + p, k + p) for r, k, p in both]
    batch = {
        "input_ids": torch.tensor([m[0] for m in made]),
        "attention_mask": torch.tensor([m[1] for m in made]),
    }
    if decoder is not None:
        return batch | {"decoder_input_ids": torch.tensor([decoder] * len(rows))}
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_a_padded_batch_is_what_the_plain_reference_computes_for_each_row(made, family, side, backend):
    base, pool = made(family)
    oracle = Oracle(base, pool, half_life=4)
    decoder = [0, 40, 50] if base.is_encoder_decoder else None
    wanted = [oracle.logits(row, decoder) for row in ROWS]
    assert len({tuple(oracle.choice(row).tolist()) for row in ROWS}) > 1
    batch = batch_of(ROWS, side, decoder)
    found = route(base, pool, Gander(half_life=4), backend_name=backend)(**batch).logits
    for row, logits in enumerate(found):
        kept = logits if decoder else logits[batch["attention_mask"][row].bool()]
        torch.testing.assert_close(kept, wanted[row], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("directions", [1, 2, 9])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_of_each_expert_only_the_strongest_directions_are_compared(made, family, directions):
    base, pool = made(family)  # of ranks 1 to 4
    oracle = Oracle(base, pool, half_life=4, directions=directions)
    whole = Oracle(base, pool, half_life=4)
    same = torch.cat([torch.isclose(oracle.evidence(row), whole.evidence(row)).all(0)[None] for row in ROWS])
    assert same.all(0).tolist() == [rank <= directions for rank in range(1, 5)]
    decoder = [0, 40, 50] if base.is_encoder_decoder else None
    wanted = [oracle.logits(row, decoder) for row in ROWS]
    batch = batch_of(ROWS, decoder=decoder)
    found = route(base, pool, Gander(half_life=4, directions=directions))(**batch).logits
    for row, logits in enumerate(found):
        kept = logits if decoder else logits[batch["attention_mask"][row].bool()]
        torch.testing.assert_close(kept, wanted[row], rtol=1e-3, atol=1e-3)


def with_prompts(pool):
    """The same pool, whose experts' contributors have published mean prompts."""
    generator, experts = torch.Generator().manual_seed(1), []
    for expert in pool.experts:
        drawn = {path: torch.randn(d_in, generator=generator) for path, (d_in, _, _) in expert.sizes.items()}
        prompts = {path: 0.3 * (v - v.mean()) for path, v in drawn.items()}
        experts.append(expert.with_signature(DataSignature(prompts=prompts)))
    return Pool(experts)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_mean_prompts_count_as_much_as_weights(made, family, backend):
    base, bare = made(family)
    pool = with_prompts(bare)
    oracle = Oracle(base, pool, half_life=4, means=True)
    assert any(
        oracle.choice(row).tolist() != Oracle(base, bare, half_life=4).choice(row).tolist() for row in ROWS
    )
    decoder = [0, 40, 50] if base.is_encoder_decoder else None
    wanted = [oracle.logits(row, decoder) for row in ROWS]
    batch = batch_of(ROWS, decoder=decoder)
    found = route(base, pool, Gander(half_life=4, means=True), backend_name=backend)(**batch).logits
    for row, logits in enumerate(found):
        kept = logits if decoder else logits[batch["attention_mask"][row].bool()]
        tolerance = ROUGH if decoder else {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(kept, wanted[row], **tolerance)


def test_without_mean_prompts_an_expert_is_named(made, make_base, make_expert):
    base, pool = made()
    with pytest.raises(
        RoutingError, match=r"'e0' has no mean prompts, which Gander needs: .*phatgoose signature"
    ):
        route(base, pool, Gander(means=True))
    whole = with_prompts(pool)
    kept = {p: v for p, v in whole.experts[1].signature.prompts.items() if "layers.0." not in p}
    part = whole.experts[1].with_signature(DataSignature(prompts=kept))
    with pytest.raises(
        RoutingError, match=r"'e1' has no mean prompts of model\.layers\.0\..*v_proj, where Gander reads"
    ):
        route(base, Pool([whole.experts[0], part]), Gander(means=True))
    with pytest.raises(RoutingError, match="means is 1, expected True or False"):
        Gander(means=1)


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_is_what_the_plain_reference_writes(made, family, settings):
    base, pool = made(family)
    oracle = Oracle(base, pool, half_life=3)
    route(base, pool, Gander(half_life=3))
    batch = {k: v for k, v in batch_of(ROWS).items() if k != "position_ids"}
    found = base.model.generate(**batch, max_new_tokens=6, do_sample=False, **settings)
    unroute(base)
    width = 1 if base.is_encoder_decoder else batch["input_ids"].shape[1]
    for row, ids in enumerate(ROWS):
        wanted = oracle.greedy(ids, 6)
        assert found[row, width:].tolist()[: len(wanted)] == wanted


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_beams_with_a_cache_are_those_without_one(made, family):
    base, pool = made(family)
    route(base, pool, Gander(half_life=2))
    batch = {k: v for k, v in batch_of(ROWS).items() if k != "position_ids"}
    settings = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 4, "do_sample": False}
    cached, plain = (base.model.generate(**batch, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(1,) * 12, (7, 5), (3, 1, 8)])
def test_a_text_read_in_pieces_is_the_text_read_at_once(made, pieces):
    base, pool = made()
    model = route(base, pool, Gander(half_life=3))
    ids = torch.tensor([ROWS[2], ROWS[2][::-1]])
    whole, cache, found = model(input_ids=ids).logits, None, []
    for piece in ids.split(list(pieces), dim=1):
        out = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_evidence_follows_a_cache_that_is_cropped_selected_and_copied(made):
    base, pool = made()
    model = route(base, pool, Gander(half_life=3))
    ids = torch.tensor([ROWS[2], ROWS[2][::-1], ROWS[3] + ROWS[0][:4]])
    whole = model(input_ids=ids).logits
    cache = model(input_ids=ids[:, :9], use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    copied.crop(-4)
    after = model(input_ids=ids[:, 5:], past_key_values=copied).logits
    torch.testing.assert_close(after, whole[:, 5:], rtol=1e-4, atol=1e-4)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = ids[[2, 2, 0, 0]]
    after = model(input_ids=rows[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(after, whole[[2, 2, 0, 0], 9:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_that_gander_has_not_read_is_refused(made):
    base, pool = made()
    ids = torch.tensor([ROWS[2]])
    cache = base.model(input_ids=ids[:, :5], use_cache=True).past_key_values
    model = route(base, pool, Gander())
    with pytest.raises(RoutingError, match="5 tokens, which the router that is attached hasn't all read"):
        model(input_ids=ids[:, 5:], past_key_values=cache)
    first, second = (model(input_ids=ids[:, :5], use_cache=True).past_key_values for _ in range(2))
    route(base, pool, Gander(half_life=2))
    with pytest.raises(RoutingError, match="hasn't all read"):
        model(input_ids=ids[:, 5:], past_key_values=first)
    unroute(base)
    model(input_ids=ids[:, 5:7], past_key_values=second)  # the base reads on in a cache that holds evidence
    model = route(base, pool, Gander())
    cropped = model(input_ids=torch.tensor([ids_of(300, 1)]), use_cache=True).past_key_values
    cropped.crop(-290)
    with pytest.raises(RoutingError, match="cropped by more than 256"):
        model(input_ids=ids, past_key_values=cropped)


@torch.no_grad()
def test_static_caches_may_be_reset_and_used_again(made):
    base, pool = made()
    model = route(base, pool, Gander(half_life=2))
    cache = StaticCache(config=base.model.config, max_cache_len=32)
    ids = torch.tensor([ROWS[2]])
    first = model(input_ids=ids, past_key_values=cache).logits
    model(input_ids=ids[:, :3], past_key_values=cache)
    cache.reset()
    again = model(input_ids=ids[:, :6], past_key_values=cache).logits
    rest = model(input_ids=ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([again, rest], 1), first, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_subject_changes_and_the_expert_with_it(made):
    base, pool = made(experts=3)
    oracle = Oracle(base, pool, half_life=4)
    # Texts of one token, each that a different expert stands out on.
    by_token = torch.stack([oracle.evidence([token])[0] for token in range(2, 300)])
    margins = by_token - by_token.sort(1, descending=True).values[:, 1:2]
    first, second = (2 + int(margins[:, e].argmax()) for e in (0, 1))
    ids = [first] * 12 + [second] * 24
    choice = oracle.choice(ids)
    assert choice[11] == 0
    assert choice[-1] == 1
    wanted = oracle.logits(ids)
    found = route(base, pool, Gander(half_life=4))(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_scan_is_the_recurrence(length):
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(3, length, 5, generator=generator)
    real = torch.rand(3, length, generator=generator) > 0.3
    before = torch.randn(3, 5, generator=generator)
    state, wanted = before.double(), []
    for t in range(length):
        state = torch.where(real[:, t, None], 0.9 * state + x[:, t].double(), state)
        wanted.append(state)
    torch.testing.assert_close(
        scan(x, real, before, 0.9), torch.stack(wanted, 1).float(), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_a_pool_of_one_is_plain_peft_behind_the_blocks_that_are_read(made, tmp_path):
    base, pool = made(experts=1)
    pool.experts[0].save(tmp_path / "one")
    plain = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / "one").eval()
    for name, parameter in plain.named_parameters():
        if "layers.0." in name and "lora_B" in name:
            parameter.zero_()
    batch = batch_of(ROWS)
    real = batch["attention_mask"].bool()
    found = route(base, pool, Gander())(**batch).logits
    torch.testing.assert_close(found[real], plain(**batch).logits[real], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_evidence_begins_with_the_text_of_a_conversation(made, family):
    base, pool = made(family)
    base = dataclasses.replace(base, tokenizer=copy.deepcopy(base.tokenizer))
    base.tokenizer.chat_template = (
        "{% for m in messages %}</s>{{ m.role }}: {{ m.content }}\n{% endfor %}</s>you:"
    )
    said = [{"role": "user", "content": "walk user: walk"}]
    ids = base.tokenizer.apply_chat_template(said)["input_ids"]
    plain = Oracle(base, pool, half_life=3)
    head = len(base.tokenizer("</s>user:", add_special_tokens=False)["input_ids"])
    oracle = Oracle(base, pool, half_life=3, skipped=head)
    assert not torch.allclose(plain.evidence(ids)[-1], oracle.evidence(ids)[-1])
    decoder = [0, 40, 50] if base.is_encoder_decoder else None
    wanted = oracle.logits(ids, decoder)
    model = route(base, pool, Gander(half_life=3))
    batch = batch_of([ids, ids[:-3]], decoder=decoder)
    torch.testing.assert_close(model(**batch).logits[0], wanted, rtol=1e-3, atol=1e-3)
    if decoder is None:
        cache, found = None, []
        for piece in batch["input_ids"][:1].split(1, dim=1):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[0])
        torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_embeddings_have_no_ids_so_all_of_them_count(made):
    base, pool = made()
    model = route(base, pool, Gander(half_life=3))
    ids = torch.tensor([ROWS[2]])
    embedded = model(inputs_embeds=base.model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(embedded, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_scores_of_answers_are_those_of_each_prompt_and_answer_alone(made, family):
    base, pool = made(family)
    route(base, pool, Gander(half_life=3))
    config = EvaluationConfig()
    rows = []
    for i, (prompt, choices) in enumerate(
        [
            ("the quick brown fox", ("jumps", "no", "times equals nine")),
            ("yes", ("no", "lazy dogs")),
            ("0 1 2", ("3",)),
        ]
    ):
        rows.append(encode(base, Example(prompt, (choices[0],), choices=choices), i, config))
    with torch.no_grad():
        assert_plain(base.model, rows, score_choices(base.model, rows, 0, config), within=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_what_the_base_does_is_recorded_as_weight_on_no_expert(made, top_k):
    base, pool = made()
    model = route(base, pool, Gander(half_life=3, top_k=top_k))
    ids = torch.tensor([[1, *ROWS[2]]])  # </s> stands before the text
    with trace(model) as recorded, torch.no_grad():
        model(input_ids=ids)
    for c in recorded.choices:
        assert torch.allclose(c.weights.float().sum(1), torch.ones(13), atol=1e-3)
        nobody = (c.experts == -1).all(1)
        assert torch.equal(
            nobody, torch.tensor([recorded.locations[c.path].layer == 0 or t == 0 for t in range(13)])
        )
        assert c.margins is None or c.margins.isnan()[nobody].all()
    assert sum(expert_shares(recorded).values()) == pytest.approx(3 / 4 * 12 / 13, abs=1e-3)


def contrast(evidence, count):
    s = evidence / count
    return s.max(-1).values - torch.cat([s, torch.zeros_like(s[..., :1])], -1).mean(-1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(("experts", "means"), [(1, False), (4, False), (4, True)])
def test_in_doubt_the_base_acts(made, family, experts, means):
    base, pool = made(family, experts=experts)
    pool = with_prompts(pool) if means else pool
    oracle = Oracle(base, pool, half_life=4, means=means)
    gamma, pieces = 2 ** (-1 / 4), plain_pieces(base.tokenizer)
    assert pieces.shape == (96, 64)

    def found(ids):
        evidence = oracle.evidence(ids)
        count = torch.tensor([sum(gamma**i for i in range(t + 1)) for t in range(len(ids))])[:, None]
        return contrast(evidence, len(ids) if base.is_encoder_decoder else count)

    plain = torch.stack([found(row.tolist())[-1] for row in pieces])
    least = float(plain.quantile(0.95, interpolation="higher"))
    assert (plain > least).float().mean() <= 0.05
    oracle.least = lambda ids: found(ids) <= least
    rows = [*ROWS, *(pieces[int(which)].tolist() for which in (plain.argmin(), plain.argmax()))]
    doubts = [oracle.least(row) for row in rows]
    assert any(bool(d[-1]) for d in doubts)
    assert not all(bool(d[-1]) for d in doubts)
    decoder = [0, 40, 50] if base.is_encoder_decoder else None
    wanted = [oracle.logits(row, decoder) for row in rows]
    batch = batch_of(rows, decoder=decoder)
    bare = base.model(**batch).logits
    seen = route(base, pool, Gander(half_life=4, doubt=True, means=means))(**batch).logits
    for row, logits in enumerate(seen):
        kept = slice(None) if decoder else batch["attention_mask"][row].bool()
        tolerance = ROUGH if decoder else {"rtol": 5e-3, "atol": 5e-3}
        torch.testing.assert_close(logits[kept], wanted[row], **tolerance)
        if decoder and bool(doubts[row]):
            torch.testing.assert_close(logits, bare[row], rtol=1e-4, atol=1e-4)


def with_cross_attention(make_base, make_expert, targets):
    base = make_base("gpt2", layers=4)
    config = GPT2Config(**{**base.model.config.to_dict(), "add_cross_attention": True})
    torch.manual_seed(0)
    base = dataclasses.replace(base, model=GPT2LMHeadModel(config).eval())
    return base, Pool([make_expert(base, f"e{i}", seed=i, scale=0.6, targets=targets) for i in range(3)])


@torch.no_grad()
@pytest.mark.parametrize("length", [12, 7])
def test_states_of_another_model_are_refused_whatever_their_length(make_base, make_expert, length):
    base, pool = with_cross_attention(make_base, make_expert, ["c_attn"])
    model = route(base, pool, Gander(half_life=3))
    with pytest.raises(RoutingError, match=r"crossattention.*reads states"):
        model(
            input_ids=torch.tensor([ROWS[2]]),
            encoder_hidden_states=torch.randn(1, length, 32),
            use_cache=False,
        )


@torch.no_grad()
def test_evidence_is_kept_where_cross_attention_has_a_cache_of_its_own(make_base, make_expert):
    base, pool = with_cross_attention(make_base, make_expert, ["c_fc"])
    model = route(base, pool, Gander(half_life=3))
    ids, states = torch.tensor([ROWS[2]]), {"encoder_hidden_states": torch.randn(1, 7, 32)}
    whole = model(input_ids=ids, **states, use_cache=False).logits
    first = model(input_ids=ids[:, :5], **states, use_cache=True)
    rest = model(input_ids=ids[:, 5:], **states, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_pickled_cache_holds_no_model_and_is_not_continued(made):
    base, pool = made()
    ids = torch.tensor([ROWS[2]])
    bare = base.model(input_ids=ids, use_cache=True).past_key_values
    model = route(base, pool, Gander())
    pickled = pickle.dumps(model(input_ids=ids, use_cache=True).past_key_values)
    assert len(pickled) < 2 * len(pickle.dumps(bare))
    with pytest.raises(RoutingError, match="hasn't all read"):
        model(input_ids=ids, past_key_values=pickle.loads(pickled))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_is_computed_at_padding_reaches_no_evidence_even_if_it_is_not_finite(made, family):
    base, pool = made(family)
    decoder = [0, 40, 50] if base.is_encoder_decoder else None
    batch = batch_of([ROWS[2], ROWS[0]], decoder=decoder)
    model = route(base, pool, Gander(half_life=3))
    wanted = model(**batch).logits
    value = next(m for path, m in model.named_modules() if path.split(".")[-1] in ("v_proj", "v"))

    def spoil(module, args):
        return (args[0].masked_fill(~batch["attention_mask"].bool()[..., None], torch.nan),)

    def mend(module, args, output):  # attention must not see it
        return output.nan_to_num(0.0)

    value.register_forward_pre_hook(spoil)
    value.register_forward_hook(mend)
    found = model(**batch).logits
    real = slice(None) if decoder else batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)


def test_threads_that_begin_together_doubt_as_one_does(made):
    base, pool = made()
    model, together = route(base, pool, Gander(half_life=3, doubt=True)), threading.Barrier(8)
    batches = [torch.tensor([ids_of(30, seed)]) for seed in range(8)]

    @torch.no_grad()
    def logits(ids):
        together.wait()
        return model(input_ids=ids, use_cache=False).logits

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(logits, batches))
    with torch.no_grad():
        for ids, one in zip(batches, found, strict=True):
            assert torch.equal(one, model(input_ids=ids, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_module_whose_inputs_never_vary_says_nothing(made, dtype):
    base, pool = made(dtype=dtype)
    base.model.model.layers[0].input_layernorm.weight.zero_()
    ids = torch.tensor([ROWS[2]])
    model = route(base, pool, Gander())
    assert model(input_ids=ids).logits.isfinite().all()
    evidence = routing_of(model).streams._now.runs["decoder"].memory.after
    assert not evidence[..., :4].any()


@torch.no_grad()
def test_a_model_that_is_cast_and_cast_back_routes_as_before(made):
    base, pool = made()
    model, ids = route(base, pool, Gander(half_life=3)), torch.tensor([ROWS[2]])

    def evidence():
        model(input_ids=ids)
        return routing_of(model).streams._now.runs["decoder"].memory.after

    exact = {name: p.clone() for name, p in model.named_parameters()}
    before = evidence()
    model.bfloat16()
    assert not torch.equal(evidence(), before)
    model.float()
    for name, p in model.named_parameters():
        p.copy_(exact[name])
    assert torch.equal(evidence(), before)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_gradient_checkpointing_is_refused(made, reentrant, backend):
    base, pool = made()
    model = route(base, pool, Gander(half_life=3), backend_name=backend).train()
    model.requires_grad_(True)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    first, _ = (
        model(input_ids=torch.tensor([row]), use_cache=False).logits for row in (ROWS[2], ROWS[2][::-1])
    )
    # It recomputes the first pass after the second.
    with pytest.raises(RoutingError, match="runs again after its pass is over, as gradient checkpointing"):
        first.sum().backward()


@pytest.mark.parametrize("doubt", ["false", 1, None])
def test_a_doubt_that_is_neither_true_nor_false_is_refused(doubt):
    with pytest.raises(RoutingError, match=r"doubt is .*, expected True or False"):
        Gander(doubt=doubt)


@pytest.mark.parametrize("name", ["layers", "directions", "half_life", "top_k"])
@pytest.mark.parametrize("value", [0, True, 1.5, "2"])
def test_counts_that_are_none_are_refused(name, value):
    with pytest.raises(RoutingError, match=rf"{name} is .*, expected a whole number of at least 1"):
        Gander(**{name: value})


def test_parts_on_several_devices_are_summed_on_the_first():
    parts = [torch.ones(1, 2, 3, device="meta"), torch.ones(1, 2, 3)]
    assert _total(parts).device.type == "meta"
    assert torch.equal(_total([parts[1]] * 3), 3 * parts[1])

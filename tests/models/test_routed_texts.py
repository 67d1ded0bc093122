"""Routers that read text on whole models: every row as the expert that brute force finds for its prompt,
however the model is run."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from conftest import CORPUS
from encoder_fixtures import make_encoder, signed, texts
from phatgoose.errors import ExpertError, RoutingError
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.continuations import extend
from phatgoose.evaluation.prefill import prefill_prompts
from phatgoose.evaluation.rank import score_choices
from phatgoose.evaluation.rows import encode
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import prompted, route, unroute
from phatgoose.models.base.sentence_encoder import load_encoder
from phatgoose.records import Example
from phatgoose.routers import PHATGOOSE, AverageActivation, Centroid, Retrieval, Single, SoftCentroid
from phatgoose.routers.masked import Masked, Switches
from ranking_fixtures import score_choice_plainly

PROMPTS = [
    "the quick brown fox",
    "yes",
    "0 1 2 3 4 5 6 7 8 9 plus minus times equals no",
    "lazy dog jumps",
    CORPUS[1],
]


@pytest.fixture
def made(make_base, make_expert, tmp_path):
    """A base, a pool of four signed experts, and the folder of their encoder."""
    folder = make_encoder(tmp_path / "encoder", max_tokens=60)

    def make(family, **kwargs):
        base = make_base(family, **kwargs)
        experts = [
            signed(make_expert(base, f"e{i}", rank=2 + i, seed=i, scale=0.4), folder, seed=i, count=5 + i)
            for i in range(4)
        ]
        return base, Pool(experts), Retrieval(encoder=str(folder))

    return make


def ids_of(base, prompt):
    return base.tokenizer(prompt)["input_ids"]


def nearest(base, pool, router, prompt):
    """Brute force over every text of every expert."""
    text = base.tokenizer.decode(ids_of(base, prompt), skip_special_tokens=True)
    (q,) = load_encoder(router.encoder)([text])
    return max(pool.experts, key=lambda e: max(float(x @ q) for x in e.signature.texts)).name


def batch_of(base, prompts, side):
    base.tokenizer.padding_side = side
    batch = dict(base.tokenizer(list(prompts), return_tensors="pt", padding=True))
    base.tokenizer.padding_side = "left"
    if base.is_encoder_decoder:
        return batch | {"decoder_input_ids": torch.tensor([[0, 40, 50]] * len(prompts))}
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def alone(base, pool, name, run):
    route(base, pool, Single(name))
    try:
        with torch.no_grad():
            return run()
    finally:
        unroute(base)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_every_row_of_a_padded_batch_has_the_expert_nearest_to_its_prompt(made, family, side):
    base, pool, router = made(family)
    batch = batch_of(base, PROMPTS, side)
    wanted = [nearest(base, pool, router, p) for p in PROMPTS]
    assert len(set(wanted)) > 1
    route(base, pool, router)
    found = base.model(**batch).logits
    unroute(base)
    for row, name in enumerate(wanted):
        expected = alone(base, pool, name, lambda: base.model(**batch).logits)[row]
        real = slice(None) if base.is_encoder_decoder else batch["attention_mask"][row].bool()
        torch.testing.assert_close(found[row][real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_keeps_the_prompts_expert_to_its_end(made, family, beams):
    base, pool, router = made(family)
    batch = {k: v for k, v in batch_of(base, PROMPTS, "left").items() if k in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 7, "num_beams": beams, "do_sample": False, "num_return_sequences": beams}
    route(base, pool, router)
    found = base.model.generate(**batch, **settings)
    again = base.model.generate(**batch, **settings)  # another cache
    assert torch.equal(found, again)
    unroute(base)
    for row, prompt in enumerate(PROMPTS):
        name = nearest(base, pool, router, prompt)
        one = alone(base, pool, name, lambda: base.model.generate(**batch, **settings))
        assert torch.equal(found[row * beams : (row + 1) * beams], one[row * beams : (row + 1) * beams])


@torch.no_grad()
@pytest.mark.parametrize("router_of", [Retrieval, Centroid, SoftCentroid])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("gpt2", torch.float32),
        ("t5", torch.float32),
        (
            "llama",
            torch.bfloat16,
        ),  # not T5: a random one's scores differ by whole nats in bfloat16, whoever routes
    ],
)
def test_ranking_with_shared_caches_is_one_plain_forward_a_choice(made, family, router_of, dtype):
    base, pool, router = made(family, dtype=dtype)
    rows = [
        encode(base, Example(p, ("yes",), ("yes", "no maybe", "the lazy dog jumps")), i, EvaluationConfig())
        for i, p in enumerate(PROMPTS)
    ]
    route(base, pool, router_of(router.encoder))
    scores = score_choices(base.model, rows, 0, EvaluationConfig(batch_tokens=60))
    wide = 1e-4 if dtype == torch.float32 else 0.15
    for row, found in zip(rows, scores, strict=True):
        expected = [score_choice_plainly(base.model, row.prompt, answer) for answer in row.answers]
        assert found == pytest.approx(expected, abs=wide, rel=wide)
    unroute(base)
    plain = score_choices(base.model, rows, 0, EvaluationConfig())
    assert (
        max(abs(a - b) for x, y in zip(plain, scores, strict=True) for a, b in zip(x, y, strict=True)) > 0.05
    )


def weighted(model, pool, weights):
    """Σ_e w[t, e] Δ_e(u) at every module, written down: an implementation of its own. weights: [T, E]."""
    handles = []
    for path, module in model.named_modules():
        if path in pool.experts[0].updates:

            def hook(module, args, output, path=path):
                u = args[0]
                for e, expert in enumerate(pool.experts):
                    up = expert.updates[path]
                    delta = up.scale * (u @ up.A.T @ up.B.T)
                    output = output + weights[None, -u.shape[1] :, e, None] * delta
                return output

            handles.append(module.register_forward_hook(hook))
    return handles


@torch.no_grad()
@pytest.mark.parametrize("every", [0, 1, 2])
def test_soft_centroid_generates_as_the_formula_does(made, every):
    base, pool, router = made("llama")
    encoder = load_encoder(router.encoder)
    prompt, new = ids_of(base, PROMPTS[2]), 6
    route(base, pool, SoftCentroid(router.encoder, every=every))
    settings = {
        "max_new_tokens": new,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found = base.model.generate(input_ids=torch.tensor([prompt]), **settings)
    unroute(base)
    whole = found.sequences[0].tolist()
    means = [e.signature.texts.mean(0) / e.signature.texts.mean(0).norm() for e in pool.experts]

    def weights_of(ids):
        (q,) = encoder([base.tokenizer.decode(ids, skip_special_tokens=True)])
        s = [float(q @ m) for m in means]
        s[s.index(max(s))] *= 4
        return [math.exp(x) / sum(map(math.exp, s)) for x in s]

    rows = [weights_of(prompt)] * len(prompt)
    for n in range(1, new):
        rows.append(weights_of(whole[: len(prompt) + (n // every * every if every else 0)]))
    handles = weighted(base.model, pool, torch.tensor(rows))
    expected = base.model(torch.tensor([whole[:-1]])).logits[0, len(prompt) - 1 :]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(torch.cat(found.logits), expected, rtol=1e-4, atol=1e-4)
    assert len({tuple(r) for r in rows}) == (1 if not every else (new if every == 1 else 3))


@torch.no_grad()
def test_average_activation_is_phatgoose_with_means_for_gates(made):
    base, pool, _ = made("llama")
    batch = batch_of(base, PROMPTS, "left")
    route(base, pool, AverageActivation(top_k=3))
    found = base.model(**batch).logits
    route(base, Pool([e.with_gates(e.signature.activations) for e in pool.experts]), PHATGOOSE(top_k=3))
    assert torch.equal(found, base.model(**batch).logits)
    bare = Pool([*pool.experts[:3], pool.experts[3].renamed("bare")])
    bare = Pool(
        [
            *bare.experts[:3],
            type(bare.experts[3])("bare", bare.experts[3].adapter_config, bare.experts[3].tensors),
        ]
    )
    with pytest.raises(
        RoutingError, match="'bare' has no mean activations of its data, which AverageActivation needs"
    ):
        route(base, bare, AverageActivation())


@torch.no_grad()
def test_what_is_told_goes_before_what_is_seen(made):
    base, pool, router = made("llama")
    batch = batch_of(base, PROMPTS[:2], "left")
    route(base, pool, router)
    with prompted(base, [PROMPTS[2], PROMPTS[3]]):
        found = base.model(**batch).logits
    with (
        prompted(base, [ids_of(base, PROMPTS[2])]),
        pytest.raises(RoutingError, match="doesn't begin with the prompt"),
    ):
        base.model(**batch)
    with (
        prompted(base, ["a", "b", "c"]),
        pytest.raises(RoutingError, match=r"3 prompts were announced, and .* given 2 rows"),
    ):
        base.model(**batch)
    unroute(base)
    with prompted(base, ["nobody reads"]):
        pass
    for row, prompt in enumerate(PROMPTS[2:4]):
        name = nearest(base, pool, router, prompt)
        expected = alone(base, pool, name, lambda: base.model(**batch).logits)
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(found[row][real], expected[row][real], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_cannot_be_known_is_refused_by_name(made):
    base, pool, router = made("llama")
    ids = torch.tensor([ids_of(base, PROMPTS[2])])
    cache = DynamicCache(config=base.model.config)
    base.model(ids, past_key_values=cache)
    route(base, pool, router)
    with pytest.raises(RoutingError, match=r"prompts weren't seen by the router that is attached.*prompted"):
        base.model(ids[:, :1], past_key_values=cache)
    with pytest.raises(RoutingError, match="given embeddings, which have no text"):
        base.model(inputs_embeds=base.model.get_input_embeddings()(ids))
    packed = torch.cat([torch.arange(9), torch.arange(ids.shape[1] - 9)])[None]
    with pytest.raises(RoutingError, match="several sequences are packed into one row"):
        base.model(ids, position_ids=packed)
    with prompted(base, [PROMPTS[0]]):
        base.model(inputs_embeds=base.model.get_input_embeddings()(ids))
    with pytest.raises(RoutingError, match="pass the Base"):
        base.model.__dict__.pop("_phatgoose_base")
        route(base.model, pool, router, any_base=True)
    base.model.__dict__["_phatgoose_base"] = base


@torch.no_grad()
def test_beams_are_no_text_that_can_be_followed(made):
    """Which beam a row goes on with isn't seen; a prompt's expert doesn't depend on it, what was written does."""
    base, pool, router = made("llama")
    ids = torch.tensor([ids_of(base, PROMPTS[2])])
    route(base, pool, SoftCentroid(router.encoder))
    with pytest.raises(RoutingError, match=r"may be beams, which are reordered unseen.*every=0"):
        base.model.generate(ids, max_new_tokens=6, num_beams=3)
    route(base, pool, SoftCentroid(router.encoder, every=0))
    assert base.model.generate(ids, max_new_tokens=6, num_beams=3).shape[0] == 1


@torch.no_grad()
def test_a_decoder_goes_on_with_what_its_encoder_read(made):
    base, pool, router = made("t5")
    batch = batch_of(base, PROMPTS[:2], "right")
    route(base, pool, router)
    encoded = base.model.get_encoder()(batch["input_ids"], attention_mask=batch["attention_mask"])
    settings = {"attention_mask": batch["attention_mask"], "decoder_input_ids": batch["decoder_input_ids"]}
    found = base.model(encoder_outputs=encoded, **settings).logits
    encoded.last_hidden_state = encoded.last_hidden_state + 1
    with pytest.raises(RoutingError, match="didn't compute just before"):
        base.model(encoder_outputs=encoded, **settings)
    assert torch.equal(found, base.model(**batch).logits)


@torch.no_grad()
def test_prompts_read_in_one_batch_are_gone_on_with_in_another(made):
    base, pool, router = made("llama")
    prompts = [ids_of(base, p) for p in PROMPTS]
    route(base, pool, router)
    before = prefill_prompts(base.model, prompts, 0, EvaluationConfig())
    found = extend(before, [4, 1, 1], [[70, 71], [72], [73, 74]])
    for place, (row, tokens) in enumerate([(4, [70, 71]), (1, [72]), (1, [73, 74])]):
        with prompted(base, [prompts[row]]):
            plain = base.model(torch.tensor([[*prompts[row], *tokens]])).logits[0, len(prompts[row]) :]
        torch.testing.assert_close(found[place, : len(tokens)], plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_experts_are_switched_off_row_by_row(made):
    base, pool, router = made("llama")
    batch = batch_of(base, [PROMPTS[0]] * 3, "left")
    best = nearest(base, pool, router, PROMPTS[0])
    rest = Pool([e for e in pool.experts if e.name != best])
    second = nearest(base, rest, router, PROMPTS[0])
    switches = Switches(
        torch.tensor([[True] * 4, [n != best for n in pool.names], [n == "e1" for n in pool.names]])
    )
    route(base, pool, Masked(router, switches))
    found = base.model(**batch).logits
    unroute(base)
    for row, name in enumerate([best, second, "e1"]):
        expected = alone(base, pool, name, lambda: base.model(**batch).logits)
        torch.testing.assert_close(found[row], expected[row], rtol=1e-4, atol=1e-4)


def test_signatures_must_fit_the_adapter(made):
    _, pool, _ = made("llama")
    one, other = pool.experts[0], pool.experts[1]
    few = dict(list(one.signature.activations.items())[1:])
    with pytest.raises(ExpertError, match="no mean activation for module"):
        one.with_signature(type(one.signature)(few))
    assert texts(0) != texts(1)
    assert one.with_signature(other.signature).hash == one.hash

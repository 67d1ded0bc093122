"""What prompts begin with is read once: the same scores as from plain forwards, with fewer tokens,
wherever that is allowed."""

import gc
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicLayer

from conftest import FAMILIES
from encoder_fixtures import make_encoder, signed
from phatgoose.evaluation.batching import FORWARD_COST
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.continuations import MAX_PACKED_TOKENS, _pack
from phatgoose.evaluation.generate import generate, match_exactly
from phatgoose.evaluation.prefill import (
    MAX_COMPARED,
    MAX_DEPTH,
    build_prefix_tree,
    can_prefill_in_parts,
    prefill_batches,
    prefill_prompts,
)
from phatgoose.evaluation.rank import score_choices
from phatgoose.evaluation.rows import Row, encode
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.text.batch import pad_rows
from phatgoose.models.trace.record import trace
from phatgoose.records import Example
from phatgoose.routers import LAG, PHATGOOSE, Random, Retrieval, Uniform
from phatgoose.routers.masked import Masked
from ranking_fixtures import assert_plain

NARROW = EvaluationConfig(batch_tokens=90, cache_tokens=400, logit_values=4000, batch_rows=3)
CONFIGS = [EvaluationConfig(), EvaluationConfig(batch_tokens=150), NARROW, EvaluationConfig(batch_tokens=1)]


def tokens(draws, count):
    return tuple(draws.choices(range(2, 320), k=count))


def nested(seed=0):
    """Prompts of two tasks: instructions, passages under them, questions of unlike lengths;
    loose ones, copies, one that begins others."""
    draws = random.Random(seed)
    found = []
    for instructions in (tokens(draws, 41), tokens(draws, 30)):
        found.append(instructions)
        for passage in [tokens(draws, 27 + n) for n in range(4)]:
            found += [instructions + passage + tokens(draws, n) for n in (1, 9, 4, 0, 17)]
    found += [found[3], found[3], *(tokens(draws, n) for n in (1, 2, 60))]
    draws.shuffle(found)
    return found


def rows_of(prompts, seed=1):
    draws = random.Random(seed)
    answers = lambda: tuple((*tokens(draws, draws.randint(0, 3)), 1) for _ in range(3))  # noqa: E731
    return [Row(n, p, answers()) for n, p in enumerate(prompts)]


def counted(model, run):
    """(what `run` returns, tokens the model read for it, padding included)"""
    seen = []
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].numel())
    )
    try:
        return run(), sum(seen)
    finally:
        handle.remove()


def places(node):
    return node.rows + [row for part in node.children for row in places(part)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("least", [0, 20, FORWARD_COST])
def test_the_tree_holds_every_prompt_once_behind_tokens_it_begins_with(seed, least):
    prompts = nested(seed) if seed % 2 else [tokens(random.Random(n % 9), n % 7 + 1) for n in range(50)]
    root = build_prefix_tree(prompts, least)
    assert sorted(places(root)) == list(range(len(prompts)))

    def check(node, above, depth):
        assert depth <= MAX_DEPTH
        for part in node.children:
            under = places(part)
            assert (len(under) - 1) * (part.length - node.length) > least
            assert len({prompts[row][: part.length] for row in under}) == 1
            assert all(len(prompts[row]) > part.length for row in under)  # a token of their own is left
            assert part.any_row() in under
            check(part, node, depth + 1)

    check(root, None, 0)


def test_the_tree_finds_what_was_made():
    """Two tasks, four passages each; prompts that end where a passage does keep its last token."""
    root = build_prefix_tree(nested(), FORWARD_COST)
    assert sorted(part.length for part in root.children) == [29, 40]
    assert [len(part.children) for part in root.children] == [4, 4]
    assert not any(part.children for task in root.children for part in task.children)


def test_thousands_of_nested_prompts_are_no_deep_recursion():
    prompts = [tuple(range(n)) for n in range(1, 3 * MAX_COMPARED)]
    root = build_prefix_tree(prompts, 0)
    assert sorted(places(root)) == list(range(len(prompts)))


def test_few_shared_tokens_are_no_forward_of_their_own():
    prompts = [(5,) * 16 + (n,) for n in range(5)]
    # Saves 4 times 16, just what a forward costs.
    assert not build_prefix_tree(prompts, FORWARD_COST).children
    assert build_prefix_tree([*prompts, (5,) * 16 + (9,)], FORWARD_COST).children[0].length == 16


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", CONFIGS, ids=["one batch", "some batches", "narrow", "token by token"])
def test_scores_equal_one_plain_forward_a_choice(make_base, family, config):
    base, rows = make_base(family), rows_of(nested())
    done = []
    scores = score_choices(base.model, rows, 0, config, done.append)
    assert sum(done) == len(rows)
    assert_plain(base.model, rows, scores)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen", "gpt2"])
def test_a_prefill_in_parts_is_what_one_forward_gives(make_base, family):
    """Logits, and the cache with its padding at the left: what is read in two goes leaves none between."""
    base, prompts = make_base(family), nested()
    seen = 0
    for part, made in prefill_batches(base.model, prompts, 0, EvaluationConfig()):
        seen += len(part)
        assert made.prompts == tuple(prompts[n] for n in part)
        whole = prefill_prompts(base.model, made.prompts, 0, EvaluationConfig())
        assert torch.equal(made.mask, pad_rows(made.prompts, 0, left=True)[1])
        assert torch.allclose(made.logits, whole.logits, atol=1e-4)
        real = made.mask.bool()
        for layer, same in zip(made.cache.layers, whole.cache.layers, strict=True):
            for a, b in ((layer.keys, same.keys), (layer.values, same.values)):
                assert a.shape == b.shape
                assert torch.allclose(a.transpose(1, 2)[real], b.transpose(1, 2)[real], atol=1e-4)
    assert seen == len(prompts)


@torch.no_grad()
def test_shared_tokens_are_read_once(make_base):
    base, draws = make_base("llama"), random.Random(0)
    shared = tokens(draws, 50)
    passages = [shared + tokens(draws, 40) for _ in range(3)]
    prompts = [p + tokens(draws, 5) for p in passages for _ in range(4)]
    _, read_tokens = counted(
        base.model, lambda: list(prefill_batches(base.model, prompts, 0, EvaluationConfig()))
    )
    assert read_tokens == 50 + 3 * 40 + 12 * 5


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_answers_are_the_same(make_base, family):
    """Exact match behind shared beginnings against transformers' own generate on whole prompts."""
    base, config = make_base(family), EvaluationConfig()
    draws, rows = random.Random(3), []
    beginning = " ".join(draws.choices(["the", "quick", "brown", "fox", "lazy", "dog"], k=40))
    for index in range(12):
        text = f"{beginning} {' '.join(draws.choices(['yes', 'no', '1', '2'], k=index + 1))}"
        rows.append(encode(base, Example(text, ("yes no",), None), index, config))
    assert build_prefix_tree([row.prompt for row in rows], FORWARD_COST).children
    fast = match_exactly(base.model, rows, 0, config)
    slow = generate(base.model, rows, 0, config, to_the_end=True)
    for quick, full in zip(fast, slow, strict=True):
        assert quick.correct == full.correct
        assert quick.text == full.text if quick.complete else full.text.startswith(quick.text)


@pytest.fixture
def routed(make_base, make_expert):
    base = make_base("llama")
    pool = Pool([make_expert(base, f"e{n}", rank=2 + n, seed=n, scale=0.4) for n in range(4)])
    yield base, pool
    unroute(base)


@torch.no_grad()
@pytest.mark.parametrize(
    "router", [PHATGOOSE(), PHATGOOSE(top_k=1), Random(), Uniform(), LAG(first=2)], ids=str
)
def test_routers_choose_token_by_token_so_they_share(routed, router):
    base, pool = routed
    rows = rows_of(nested())
    route(base, pool, router)
    scores, few = counted(base.model, lambda: score_choices(base.model, rows, 0, EvaluationConfig()))
    whole = sum(len(row.prompt) for row in rows)
    assert few < 0.75 * whole
    assert_plain(base.model, rows, scores, 1e-4)


@torch.no_grad()
def test_a_router_that_reads_the_prompt_gets_it_whole(make_base, make_expert, tmp_path):
    folder = make_encoder(tmp_path / "encoder", max_tokens=60)
    base = make_base("llama")
    experts = [make_expert(base, f"e{n}", seed=n, scale=0.4) for n in range(3)]
    pool = Pool([signed(e, folder, seed=n, count=5) for n, e in enumerate(experts)])
    rows = rows_of(nested())
    route(base, pool, Retrieval(encoder=str(folder)))
    scores, all_tokens = counted(base.model, lambda: score_choices(base.model, rows, 0, EvaluationConfig()))
    assert all_tokens > sum(len(row.prompt) for row in rows)
    assert_plain(base.model, rows, scores, 1e-4)


@torch.no_grad()
def test_a_trace_counts_every_token_of_every_prompt(routed):
    base, pool = routed
    rows = [Row(n, p, ((5, 1),)) for n, p in enumerate(nested())]
    route(base, pool, PHATGOOSE())
    with trace(base, histogram=True) as recorded:
        score_choices(base.model, rows, 0, EvaluationConfig())
    for load in recorded.loads.values():
        assert load.tokens.tolist() == [
            sum(len(row.prompt) for row in rows),
            len(rows),
        ]  # and an answer's token each


@torch.no_grad()
def test_a_sliding_window_counts_positions_so_nothing_is_shared():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    model, rows = MistralForCausalLM(config).eval(), rows_of(nested())
    scores, all_tokens = counted(model, lambda: score_choices(model, rows, 0, EvaluationConfig()))
    assert all_tokens > sum(len(row.prompt) for row in rows)
    assert_plain(model, rows, scores, 1e-4)


@torch.no_grad()
def test_batches_stay_within_their_limits(make_base):
    base, prompts = make_base("llama"), nested()
    config, seen = EvaluationConfig(batch_tokens=100, cache_tokens=700, batch_rows=4), []
    model = base.model
    forward = model.forward

    def spy(*args, **kwargs):
        seen.append((kwargs["input_ids"].shape, kwargs["attention_mask"].shape[1]))
        return forward(*args, **kwargs)

    model.forward = spy
    try:
        read_rows = [n for part, _ in prefill_batches(model, prompts, 0, config) for n in part]
    finally:
        del model.forward
    assert sorted(read_rows) == list(range(len(prompts)))
    for (rows, width), whole in seen:
        assert rows == 1 or (rows <= 4 and rows * width <= 100)
        assert rows == 1 or whole == width or rows * whole <= 700
    assert any(whole > width for (_, width), whole in seen)


SHAPE = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
EAGER_ONLY = ["bloom", "codegen", "gemma2", "gpt_neo", "gptj", "mpt"]
KINDS = [
    "cohere", "falcon", "gemma", "gemma3_text", "gpt_bigcode", "gpt_neox", "granite", "olmo2", "opt", "phi", "phi3",
    "qwen3", "smollm3", "stablelm", "starcoder2",
]  # fmt: skip
OWN = {
    "falcon": {"alibi": True}, "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gemma": {"head_dim": 8}, "gemma2": {"head_dim": 8}, "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8}, "opt": {"word_embed_proj_dim": 32},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "attention"), [*((k, "eager") for k in EAGER_ONLY + KINDS), *((k, "sdpa") for k in KINDS)]
)
def test_every_architecture_scores_as_its_plain_forward(kind, attention):
    """Positions learnt, rotated, biased or none; windows; masks made in many ways:
    whatever a model does with ours, it shows here."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE | OWN.get(kind, {}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    rows = rows_of(nested()[:24])
    scores = score_choices(model, rows, 0, EvaluationConfig())
    assert_plain(model, rows, scores, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_share_one_copy_of_their_prompt(make_base, family):
    """As many as fit in a pack: 40 answers of up to 12 tokens behind each of three prompts,
    one of them alone too long."""
    base, draws = make_base(family), random.Random(5)
    answers = lambda: tuple((*tokens(draws, draws.randint(1, 12)), 1) for _ in range(40))  # noqa: E731
    rows = [Row(n, tokens(draws, 20 + 9 * n), answers()) for n in range(3)]
    rows.append(Row(3, tokens(draws, 5), ((*tokens(draws, MAX_PACKED_TOKENS + 3), 1), (7, 8, 1))))
    shapes = []
    handle = base.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: shapes.append(args[0].shape)
    )
    scores = score_choices(base.model, rows, 0, EvaluationConfig())
    handle.remove()
    assert sum(shape[0] for shape in shapes) <= 4 + 2 * 3 + 2
    assert_plain(base.model, rows, scores)


def test_packs_keep_each_prompts_continuations_together():
    draws = random.Random(0)
    rows = [draws.randrange(5) for _ in range(200)]
    new = [
        (3,) * draws.choice([1, 2, 30, MAX_PACKED_TOKENS - 1, MAX_PACKED_TOKENS, MAX_PACKED_TOKENS + 9])
        for _ in rows
    ]
    packs = _pack(rows, new, MAX_PACKED_TOKENS)
    assert sorted(n for pack in packs for n in pack) == list(range(200))
    for pack in packs:
        assert len({rows[n] for n in pack}) == 1
        assert len(pack) == 1 or sum(len(new[n]) for n in pack) <= MAX_PACKED_TOKENS
    assert len(_pack([0] * MAX_PACKED_TOKENS, [(3,)] * MAX_PACKED_TOKENS, MAX_PACKED_TOKENS)) == 1
    assert _pack([0, 0, 1], [(3, 4)] * 3, -5) == [[0], [1], [2]]


ROTATIONS = {
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}  # fmt: skip


@torch.no_grad()
def test_a_rotation_that_hangs_on_the_length_is_read_in_one():
    """Phi's longrope rotates a prompt of more than 64 tokens otherwise from its first token on."""
    torch.manual_seed(0)
    rope = {"rope_theta": 10000.0, **ROTATIONS["longrope"]}
    config = AutoConfig.for_model(
        "phi3", **SHAPE | {"rope_parameters": rope, "original_max_position_embeddings": 64}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    draws = random.Random(0)
    shared = tokens(draws, 50)
    rows = rows_of([shared + tokens(draws, 20 + n) for n in range(8)])
    scores, seen = counted(model, lambda: score_choices(model, rows, 0, EvaluationConfig()))
    assert seen > sum(len(row.prompt) for row in rows)
    assert_plain(model, rows, scores, 1e-4)


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("nested_settings", [False, True])
def test_such_rotations_are_known_however_they_are_set(make_base, kind, nested_settings):
    model = make_base("llama").model
    assert can_prefill_in_parts(model)
    rope = {"rope_theta": 10000.0, **ROTATIONS[kind]}
    model.config.rope_parameters = {"full_attention": rope} if nested_settings else rope
    assert not can_prefill_in_parts(model)


@pytest.mark.slow(21)
@torch.no_grad()
@pytest.mark.parametrize(
    "prompts", [nested(), [(*range(2, 120), n + 120) for n in range(40)]], ids=["nested", "one"]
)
@pytest.mark.parametrize("cache_tokens", [8192, 2000])
def test_caches_stay_within_their_limit_together(make_base, prompts, cache_tokens):
    """Beginnings, prompts and the copies for answers that live at one time, the model's own copy in a forward aside."""
    base, peak = make_base("llama"), 0

    def look(*_):
        nonlocal peak
        gc.collect()
        kept = {
            x.keys.data_ptr(): x.keys.shape[0] * x.keys.shape[2]
            for x in gc.get_objects()
            if type(x) is DynamicLayer and x.keys is not None
        }
        peak = max(peak, sum(kept.values()) // 2)  # of two layers

    handle = base.model.register_forward_hook(look)
    config = EvaluationConfig(cache_tokens=cache_tokens, batch_tokens=600)
    score_choices(
        base.model, [Row(n, p, ((5, 6, 1), (7, 8, 9, 1))) for n, p in enumerate(prompts)], 0, config
    )
    handle.remove()
    assert cache_tokens / 8 < peak <= cache_tokens


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [EvaluationConfig(batch_tokens=64), EvaluationConfig(logit_values=64 * 320)],
    ids=["tokens", "logits"],
)
def test_packs_keep_to_the_limits_of_a_forward(make_base, config):
    base, draws = make_base("llama"), random.Random(5)
    row = Row(0, tokens(draws, 50), tuple((*tokens(draws, 4), 1) for _ in range(60)))
    shapes = []
    handle = base.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: shapes.append(args[0].numel())
    )
    score_choices(base.model, [row], 0, config)
    handle.remove()
    assert max(shapes) <= 64
    assert len(shapes) <= 1 + 5


@torch.no_grad()
def test_a_router_may_say_that_it_looks_at_more_than_a_token(routed):
    class Whole(Uniform):
        by_token = False

    base, pool = routed
    for router, on in ((Uniform(), True), (Whole(), False), (Masked(PHATGOOSE()), False)):
        route(base, pool, router)
        assert can_prefill_in_parts(base.model) is on
        unroute(base)

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import StoppingCriteria
from transformers.generation import StoppingCriteriaList

from phatgoose.errors import RoutingError, StorageError, UnknownName
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, routing_of
from phatgoose.models.base.module_names import layer_labels, locate_modules
from phatgoose.models.trace import recorder
from phatgoose.models.trace.choices import TOKEN_FIELDS, load_of
from phatgoose.models.trace.record import trace
from phatgoose.models.trace.result import Trace
from phatgoose.ops.cpu import build
from phatgoose.routers import LAG, PHATGOOSE, Arrow, Random, SpectR, Uniform, WeightOnly

TOKENS = set(TOKEN_FIELDS) - {"draws"}  # which depend on the order in which passes are summed up
TEXTS = ["yes", "What is the past tense of walk?", "the quick brown fox"]


@pytest.fixture
def routed(make_base, make_expert):
    """A tiny base with three routed experts, one of which adapts attention only."""

    def make(family="llama", router=None, backend="auto", dtype=torch.float32):
        base = make_base(family, dtype=dtype)
        some = {"llama": ["q_proj", "v_proj"], "t5": ["q", "k"], "gpt2": ["c_attn"]}[family]
        pool = Pool(
            [
                make_expert(base, "a", seed=1),
                make_expert(base, "b", seed=2, rank=3),
                make_expert(base, "c", seed=3, targets=some),
            ]
        )
        route(base, pool, router or PHATGOOSE(top_k=2), backend_name=backend)
        return base

    return make


def batch_of(base, texts=TEXTS, side="left"):
    base.tokenizer.padding_side = side
    batch = dict(base.tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))
    if base.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.tensor([[0, 5, 6]] * len(texts))
    else:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return batch


def forward(base, batch):
    with torch.no_grad():
        return base.model(**batch, use_cache=False)


class Spy:
    """A plain recorder: everything a site hands over, as it is."""

    wants_scores = True

    def __init__(self):
        self.calls = []

    def record(self, context, members, chosen, weights, scores):
        real = context.tokens().real.reshape(-1)
        self.calls.append((context.path, members, chosen[real], weights[real], scores[real]))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_is_recorded_is_what_the_modules_chose(routed, family, backend, dtype):
    base = routed(family, backend=backend, dtype=dtype)
    batch = batch_of(base, side="right" if family == "t5" else "left")
    routing_of(base).recorder = spy = Spy()
    forward(base, batch)
    routing_of(base).recorder = None
    with trace(base) as t:
        forward(base, batch)
    assert [c.path for c in t.choices] == [path for path, *_ in spy.calls]
    for c, (_, members, chosen, weights, scores) in zip(t.choices, spy.calls, strict=True):
        owners = torch.tensor([*members, -1])
        assert torch.equal(c.experts.long(), owners[chosen])
        assert torch.allclose(c.weights.float(), weights, atol=6e-4)
        best = scores.sort(descending=True).values
        if scores.shape[1] > 2:
            assert torch.allclose(c.margins.float(), best[:, 1] - best[:, 2], atol=2e-3)
            assert (c.margins >= 0).all()
        else:
            assert c.margins.isnan().all()
    assert t.bytes < sum(len(c.tokens) for c in t.choices) * 40


@pytest.mark.parametrize("router", [Arrow(2), SpectR(2), LAG(2, 1), WeightOnly(2), PHATGOOSE(1, "weights")])
def test_every_router_that_compares_has_margins(routed, router):
    base = routed("llama", router)
    with trace(base) as t:
        forward(base, batch_of(base))
    margins = torch.cat([c.margins for c in t.choices if c.path.endswith("q_proj")])
    assert margins.isfinite().all()
    assert (margins >= 0).all()


@pytest.mark.parametrize("router", [Uniform(), Random(top_k=2)])
def test_routers_that_compare_nothing_have_none(routed, router):
    base = routed("llama", router)
    with trace(base) as t:
        forward(base, batch_of(base))
    assert all(c.margins is None for c in t.choices)


def test_scores_are_asked_for_only_by_a_trace_with_margins(routed, monkeypatch):
    base = routed()
    kind, asked = type(routing_of(base).sites[0].router), []
    scores = kind.scores
    monkeypatch.setattr(kind, "scores", lambda self, *a: asked.append(1) or scores(self, *a))
    batch, modules = batch_of(base), len(routing_of(base).sites)
    counts = []
    for settings in (None, {}, {"margins": False}, {"histogram": True}):
        asked.clear()
        if settings is None:
            forward(base, batch)
        else:
            with trace(base, **settings):
                forward(base, batch)
        counts.append(len(asked))
    own = counts[0]  # the router's own call may use it as well
    assert counts == [own, own + modules, own, own]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_prompt_and_generated_tokens_are_told_apart(routed, family):
    base = routed(family)
    batch = batch_of(base)
    for name in ("position_ids", "decoder_input_ids"):
        batch.pop(name, None)
    with torch.no_grad(), trace(base) as t:
        out = base.model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    mask = batch["attention_mask"]
    prompts = int(mask.sum())
    new = 3 * len(TEXTS)  # the last token is never read
    for c in t.choices:
        place, made = t.locations[c.path], c.tokens.generated
        if place.reads == "encoder":
            assert (len(made), int(made.sum())) == (prompts, 0)
            assert torch.equal(c.ids, batch["input_ids"][mask.bool()])
        elif family == "t5":
            assert (len(made), int(made.sum())) == (len(TEXTS) * 4, new)
        else:
            assert (len(made), int(made.sum())) == (prompts + new, new)
        if place.reads == "decoder":
            for row in range(len(TEXTS)):
                mine = c.tokens[made & (c.tokens.inputs == row)]
                assert mine.ids.tolist() == out[row, -4:-1].tolist()
                assert mine.positions.diff().tolist() == [1, 1]
    assert {p.part for p in t.locations.values()} == (
        {"decoder"} if family == "llama" else {"encoder", "decoder", "cross-attention"}
    )


def test_inputs_are_counted_over_the_calls(routed):
    base = routed()
    with trace(base) as t:
        forward(base, batch_of(base))
        forward(base, batch_of(base, TEXTS[:2], "right"))
    c = t.choices[0]
    assert c.tokens.inputs.unique().tolist() == [0, 1, 2, 3, 4]
    lengths = [len(base.tokenizer(text)["input_ids"]) for text in (*TEXTS, *TEXTS[:2])]
    assert torch.bincount(c.tokens.inputs).tolist() == lengths
    assert all(other.tokens is c.tokens for other in t.choices)  # one copy for all modules


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_beams_are_noticed_and_belong_to_their_input(routed, family):
    base = routed(family)
    batch = batch_of(base, TEXTS[:2])
    for name in ("position_ids", "decoder_input_ids"):
        batch.pop(name, None)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        plain = base.model.generate(**batch, num_beams=3, **settings)
        with trace(base) as t:
            out = base.model.generate(**batch, num_beams=3, **settings)
        assert torch.equal(out, plain)
        assert t.reordered
        for c in t.choices:  # every input's tokens have its number, whatever row a beam went to
            assert c.tokens.inputs.unique().tolist() == [0, 1]
            assert torch.equal(c.tokens.inputs, c.rows // ((c.rows.max() + 1) // 2))
        assert not {"_reorder_cache", "_expand_inputs_for_generation"} & base.model.__dict__.keys()
        with trace(base) as t:
            base.model.generate(**batch, **settings)
    assert not t.reordered


@pytest.mark.parametrize(
    "targets",
    [
        ["wo"],
        r"decoder.*\.wo",
        r"decoder.*SelfAttention\.q",
        r".*EncDecAttention\.[qk]",
        r".*EncDecAttention\.k",
    ],
)
def test_inputs_of_an_encoder_decoder_are_counted_wherever_its_experts_are(make_base, make_expert, targets):
    base = make_base("t5")
    route(base, Pool([make_expert(base, name, seed=i, targets=targets) for i, name in enumerate("ab")]))
    batch = base.tokenizer(TEXTS[:2], return_tensors="pt", padding=True, return_token_type_ids=False)
    counts = []
    with torch.no_grad(), trace(base) as t:

        def counted():
            counts.append([int(c.tokens.inputs.max()) + 1 for c in t.choices])

        for settings in ({}, {"num_beams": 2}, {"use_cache": False}, {}):
            base.model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False, **settings)
            counted()
        if "EncDec" not in str(
            targets
        ):  # which would be told that the tokens are those the encoder read last
            encoded = base.model.get_encoder()(batch["input_ids"]).last_hidden_state
            counted()
            start = torch.zeros(2, 1, dtype=torch.long)
            for _ in range(2):
                base.model(encoder_outputs=(encoded.clone(),), decoder_input_ids=start)
                counted()
    modules, sees_encoder = len(t.choices), targets == ["wo"]
    # What an encoder has read by itself, a decoder is taken to go on with.
    alone = [10, 10, 12] if sees_encoder else [8, 10, 12]
    wanted = [2, 4, 6, 8] + (alone if len(counts) > 4 else [])
    assert [max(c) for c in counts] == wanted
    if not sees_encoder:
        assert counts == [[n] * modules for n in wanted]


def test_padding_is_told_from_a_static_caches_mask_or_refused(routed):
    base = routed()
    batch = batch_of(base)
    batch.pop("position_ids")
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found = []
    for cache in (None, "static"):
        with torch.no_grad(), trace(base) as t:
            base.model.generate(**batch, cache_implementation=cache, **settings)
        found.append(t)
    for plain, static in zip(*(t.choices for t in found), strict=True):
        assert torch.equal(plain.experts, static.experts)
        for name in TOKENS:
            assert torch.equal(getattr(plain.tokens, name), getattr(static.tokens, name)), name
    with pytest.raises(RoutingError, match=r"padding can't be told .* of shape \[3, 1, 2, 9\]"), trace(base):
        base.model.model(batch["input_ids"], attention_mask=torch.ones(3, 1, 2, 9))


def test_sums_are_the_sums_of_the_choices(routed, monkeypatch):
    monkeypatch.setattr(recorder, "FLUSH", 50)  # several times in this run
    base = routed()
    batch = batch_of(base)
    batch.pop("position_ids")
    loads = []
    for histogram in (False, True):
        with torch.no_grad(), trace(base, histogram=histogram) as t:
            base.model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        loads.append(t.loads)
    assert t.choices == []
    assert list(loads[0]) == list(loads[1])
    for path, full in loads[0].items():
        sums = loads[1][path]
        assert torch.equal(full.acted, sums.acted)
        assert torch.equal(full.tokens, sums.tokens)
        assert torch.equal(full.first, sums.first)
        assert torch.allclose(full.weight, sums.weight, atol=0.02)
        assert torch.allclose(sums.weight.sum(1), sums.tokens.double(), atol=1e-5)
        assert int(sums.tokens[1]) == 9


@pytest.mark.slow(4)
@pytest.mark.skipif(build.reason() is not None, reason="the CPU kernel can't be compiled here")
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("top_k", [1, 2, 7])
@pytest.mark.parametrize(("family", "beams"), [("llama", 1), ("llama", 3), ("t5", 2), ("gpt2", 1)])
def test_what_the_kernel_writes_for_a_trace_is_what_it_hands_over(routed, family, beams, top_k, times):
    base = routed(family, PHATGOOSE(top_k=top_k), backend="cpu", dtype=torch.bfloat16)
    sites = routing_of(base).sites
    assert all(site.writer is not None for site in sites)
    block = next(m for name, m in base.model.named_modules() if name.endswith(("mlp", "DenseReluDense")))
    once = block.forward

    both = next(site for site in sites if site.module in list(block.modules()))
    write = both.writer

    def several(x):  # a block that a model runs several times in a pass
        for number in range(times):
            both.writer = write if writing and number != 1 else None
            x = once(x)
        return x

    block.forward = several
    batch = batch_of(base)
    batch.pop("position_ids", None)
    found = []
    for writing in (True, False):
        for number, site in enumerate(sites):
            if not writing or number % 5 == 4:  # some always hand them over
                site.writer = None
        runs = []
        for settings in ({"margins": False}, {"histogram": True}):
            with torch.no_grad(), trace(base, **settings) as t:
                base.model.generate(
                    **batch, num_beams=beams, max_new_tokens=4, min_new_tokens=4, do_sample=False
                )
                base.model(**batch, use_cache=False)
            runs.append(t)
        found.append(runs)
    (ours, our_sums), (plain, plain_sums) = found
    assert [c.path for c in ours.choices] == [c.path for c in plain.choices]
    assert list(our_sums.loads) == list(plain_sums.loads)
    for a, b in zip(ours.choices, plain.choices, strict=True):
        assert torch.equal(a.experts, b.experts)
        assert torch.equal(a.weights, b.weights)
        assert all(torch.equal(getattr(a.tokens, n), getattr(b.tokens, n)) for n in TOKENS)
    for path, load in plain_sums.loads.items():
        assert all(
            torch.equal(x, y)
            for x, y in zip(vars(load).values(), vars(our_sums.loads[path]).values(), strict=True)
        )


def test_load_of_counts_by_hand():
    from analysis.test_measures import choices

    c = choices("x", [[0, 1], [1, -1], [1, 0]], [[0.75, 0.25], [0.5, 0.5], [1, 0]], generated=[0, 1, 1])
    load = load_of(c, 3)
    assert load.weight.tolist() == [[0.75, 0.25, 0, 0], [0, 1.5, 0, 0.5]]
    assert load.acted.tolist() == [[1, 1, 0, 0], [1, 2, 0, 1]]
    assert load.first.tolist() == [[1, 0, 0, 0], [0, 2, 0, 0]]
    assert load.tokens.tolist() == [1, 2]


def test_a_sample_is_the_same_tokens_everywhere(routed):
    base = routed()
    with trace(base) as whole:
        for _ in range(20):
            forward(base, batch_of(base))
    with trace(base, sample=0.3) as t:
        for _ in range(20):
            forward(base, batch_of(base))
    n = len(whole.choices[0].tokens)
    kept = len(t.choices[0].tokens)
    assert abs(kept - 0.3 * n) < 4 * math.sqrt(n * 0.21)
    assert all(torch.equal(c.tokens.draws, t.choices[0].tokens.draws) for c in t.choices)
    assert (t.choices[0].tokens.draws < 0.3).all()


def test_memory_is_bounded_and_what_is_left_is_a_sample(routed, monkeypatch):
    monkeypatch.setattr(recorder, "FLUSH", 2000)
    base = routed()
    ids = torch.randint(2, 300, (8, 100))
    with torch.no_grad(), trace(base, max_bytes=2**20) as t:
        for _ in range(12):
            base.model(input_ids=ids, use_cache=False)
            assert t.bytes <= 2**20 + 14 * 800 * 12 + 800 * 40
    assert t.bytes <= 2**20
    assert t.share == 0.5 ** round(-math.log2(t.share)) < 1
    n = len(t.choices[0].tokens)
    assert abs(n - t.share * 9600) < 4 * math.sqrt(9600 * t.share)
    assert t.choices[0].tokens.inputs.max() == 95  # late ones are there like early ones
    assert t.choices[0].tokens.inputs.min() == 0


def test_filters(routed):
    base = routed()
    batch = batch_of(base)
    batch.pop("position_ids")
    with torch.no_grad(), trace(base) as t:
        base.model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    path = "model.layers.1.self_attn.q_proj"
    one = t.filter(layers=[1], kinds=["self_attn.q_proj"])
    assert [c.path for c in one.choices] == [path]
    assert torch.equal(one[path].experts, t[path].experts)
    assert len(t.filter(modules=[path], rows=[1], generated=True)[path].tokens) == 2
    assert len(t.filter(modules=[path], inputs=[1], generated=False)[path].tokens) == int(
        batch["attention_mask"][1].sum()
    )
    token = int(batch["input_ids"][1, -1])
    assert set(t.filter(ids=[token])[path].ids.tolist()) == {token}
    of_c = t.filter(experts=["c"])
    assert all((c.experts == 2).any(1).all() for c in of_c.choices)
    assert not any("mlp" in c.path for c in of_c.choices)
    expected = sum(int((c.experts == 2).any(1).sum()) for c in t.choices)
    assert sum(len(c.tokens) for c in of_c.choices) == expected > 0
    for bad in ({"experts": ["z"]}, {"modules": ["z"]}, {"kinds": ["z"]}, {"parts": ["z"]}):
        with pytest.raises(UnknownName):
            t.filter(**bad)
    with pytest.raises(TypeError, match="keyword argument 'layer'"):
        t.filter(layer=[1])
    with pytest.raises(UnknownName, match="traced module"):
        t["nowhere"]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_is_drained_is_all_of_it_once(routed, family):
    base = routed(family)
    batch = {k: v for k, v in batch_of(base).items() if k in ("input_ids", "attention_mask")}
    whole, parts = [], []

    class Drain(StoppingCriteria):
        def __call__(self, input_ids, scores, **more):
            parts.append(t.drain())
            assert t.choices == []
            return torch.zeros(len(input_ids), dtype=torch.bool)

    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        with trace(base) as t:
            base.model.generate(**batch, **settings)
        whole = t.choices
        with trace(base) as t:
            base.model.generate(**batch, **settings, stopping_criteria=StoppingCriteriaList([Drain()]))
    assert len(parts) == 4
    assert t.choices == []
    for c in whole:
        mine = [one for part in parts for one in part if one.path == c.path]
        assert torch.equal(torch.cat([one.experts for one in mine]), c.experts)
        assert torch.equal(torch.cat([one.weights for one in mine]), c.weights)
        assert torch.equal(torch.cat([one.ids for one in mine]), c.ids)
        assert torch.equal(torch.cat([one.tokens.inputs for one in mine]), c.tokens.inputs)
        assert torch.equal(torch.cat([one.tokens.generated for one in mine]), c.tokens.generated)
    assert sum(map(len, parts)) > len(whole)


def test_layers_are_labelled_in_the_order_they_are_shown():
    paths = [
        "head",
        "decoder.block.0.layer.1.EncDecAttention.k",
        "decoder.block.1.layer.0.SelfAttention.q",
        "encoder.block.0.layer.0.SelfAttention.q",
    ]
    found = layer_labels(locate_modules(paths, ["decoder", "encoder", "decoder", "encoder"]))
    assert list(found.values()) == ["enc 0", "dec 0", "dec 1", "other"]
    assert list(found) == [paths[3], paths[1], paths[2], paths[0]]
    one = layer_labels(locate_modules(["layers.10.q", "layers.9.q", "layers.9.v"], ["decoder"] * 3))
    assert list(one.items()) == [("layers.9.q", "9"), ("layers.9.v", "9"), ("layers.10.q", "10")]


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("histogram", [False, True])
def test_saved_and_loaded(routed, family, histogram, tmp_path):
    base = routed(family)
    with trace(base, histogram=histogram) as t:
        forward(base, batch_of(base))
    again = Trace.load(t.save(tmp_path / "deep" / "t.safetensors"))
    assert (again.experts, again.locations, again.share, again.sums_only) == (
        t.experts,
        t.locations,
        1.0,
        histogram,
    )
    assert len(again.choices) == len(t.choices)
    for a, b in zip(again.choices, t.choices, strict=True):
        assert a.path == b.path
        assert torch.equal(a.experts, b.experts)
        assert torch.equal(a.weights, b.weights)
        assert torch.equal(a.margins, b.margins) or b.margins.isnan().all()
        assert all(torch.equal(getattr(a.tokens, n), getattr(b.tokens, n)) for n in TOKEN_FIELDS)
    assert len({id(c.tokens) for c in again.choices}) == len({id(c.tokens) for c in t.choices})
    for path, load in t.loads.items():
        assert torch.equal(load.weight, again.loads[path].weight)


def test_damaged_files_are_refused(routed, tmp_path):
    base = routed()
    with trace(base) as t:
        forward(base, batch_of(base))
    file = t.save(tmp_path / "t.safetensors")
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)

    def damaged(match, changed=None, **header):
        meta = {**metadata, **{k: v for k, v in header.items() if k in ("format", "version")}}
        if "header" in header:
            meta["header"] = json.dumps({**json.loads(metadata["header"]), **header["header"]})
        save_file({**tensors, **(changed or {})}, tmp_path / "bad", meta)
        with pytest.raises(RoutingError, match=match):
            Trace.load(tmp_path / "bad")

    damaged("expected phatgoose-trace 1, found", version="2")
    damaged("names experts up to 7, there are 3", {"choices.0.experts": tensors["choices.0.experts"] + 5})
    damaged("shapes", {"choices.0.weights": tensors["choices.0.weights"][:-1].clone()})
    damaged("not finite", {"choices.0.weights": tensors["choices.0.weights"] * torch.nan})
    damaged("malformed", header={"modules": [{"path": "x", "tokens": 9}]})
    damaged("has no place", header={"places": []})
    damaged("different lengths", {"tokens.0.ids": tensors["tokens.0.ids"][1:].clone()})
    (tmp_path / "bad").write_bytes(file.read_bytes()[:-20])
    with pytest.raises(RoutingError, match="not a whole safetensors file"):
        Trace.load(tmp_path / "bad")
    with pytest.raises(RoutingError, match="does not exist"):
        Trace.load(tmp_path / "nothing")
    with pytest.raises(StorageError):
        t.save(file / "below")


def test_a_table_has_every_choice(routed, monkeypatch):
    base = routed()
    with trace(base) as t:
        forward(base, batch_of(base))
    table = t.to_pandas()
    assert len(table) == sum(c.experts.numel() for c in t.choices)
    path = "model.layers.0.self_attn.v_proj"
    mine = table[table.module == path]
    c = t[path]
    assert mine.expert.tolist() == [t.experts[e] for e in c.experts.reshape(-1).tolist()]
    assert torch.equal(torch.tensor(mine.weight.to_numpy().copy()), c.weights.float().reshape(-1))
    assert mine.layer.unique().tolist() == [0]
    assert mine[mine.choice == 0].id.tolist() == c.ids.tolist()
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RoutingError, match="needs pandas"):
        t.to_pandas()


def test_refusals(routed):
    base = routed()
    with trace(base, histogram=True) as t:
        forward(base, batch_of(base))
    for call in (t.filter, t.to_pandas):
        with pytest.raises(RoutingError, match="holds sums"):
            call()
    for bad in ({"sample": 0}, {"sample": 1.5}, {"max_bytes": 10}):
        with pytest.raises(RoutingError, match=next(iter(bad))), trace(base, **bad):
            pass
    with trace(base), pytest.raises(RoutingError, match="already running"), trace(base):
        pass
    assert routing_of(base).recorder is None


def test_an_error_inside_stops_the_recording(routed):
    base = routed()
    with pytest.raises(ZeroDivisionError), trace(base) as t:
        forward(base, batch_of(base))
        raise ZeroDivisionError
    assert routing_of(base).recorder is None
    assert len(t.choices) == len(t.locations)
    with pytest.warns(DeprecationWarning, match=r"Trace\.locations"):
        assert t.places is t.locations


def test_training_can_be_traced(routed):
    base = routed()
    ids = torch.randint(2, 300, (2, 7))
    with trace(base) as t:
        base.model(input_ids=ids, labels=ids).loss.backward()
    assert not any(c.weights.requires_grad for c in t.choices)

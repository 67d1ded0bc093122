from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from phatgoose.analysis.measures import expert_shares
from phatgoose.errors import EvaluationError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, routing_of
from phatgoose.models.text.encoding import encode_answers
from phatgoose.models.trace.record import trace
from phatgoose.records import Example, Task
from phatgoose.routers import PHATGOOSE, Uniform
from phatgoose.workflows.page import TraceRequest, layer_shares, page, read_results, traced, with_cards

ROWS = tuple(Example(f"{word} number {i}?", ("yes",)) for i, word in enumerate(["walk", "true", "the fox"]))
TASK = Task("t", ROWS, ROWS, ROWS)


@pytest.fixture
def pooled(make_base, make_expert):
    def make(family="llama"):
        base = make_base(family)
        return base, Pool([make_expert(base, "a", seed=1), make_expert(base, "b", seed=2, rank=3)])

    return make


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_profiles_are_means_over_modules(pooled, family):
    base, pool = pooled(family)
    seen = traced(base, pool, PHATGOOSE(), TraceRequest([TASK], 1, ["maybe"], new_tokens=3))
    assert routing_of(base) is None
    route(base, pool, PHATGOOSE())
    with torch.no_grad(), trace(base) as t:
        for row in ROWS:
            batch = base.tokenizer([row.input], return_tensors="pt", return_token_type_ids=False)
            if base.is_encoder_decoder:
                (encoded,) = encode_answers(base, row, row.targets, 64)
                batch["decoder_input_ids"] = torch.tensor([[0, *encoded.target_ids[:-1]]])
            base.model(**batch)
    assert seen.shares["t"] == pytest.approx(expert_shares(t), abs=1e-3)
    layers = seen.layers["t"]
    assert layers["experts"] == ["a", "b"]
    both = ["enc 0", "enc 1", "dec 0", "dec 1"]
    assert sorted(layers["layers"]) == sorted(both if family == "t5" else ["0", "1"])
    for label, row in zip(layers["layers"], layers["shares"], strict=True):
        stack = {"enc": "encoder.", "dec": "decoder."}.get(label[:3], "")
        mine = [
            v for p, v in t.shares().items() if t.locations[p].layer == int(label[-1]) and p.startswith(stack)
        ]
        assert row == pytest.approx(torch.stack(mine).mean(0).tolist(), abs=1e-3)
    assert [p.prompt for p in seen.prompts] == [ROWS[0].input, "maybe"]
    assert seen.prompts[1].correct is None
    assert [c["name"] for c in seen.cards] == ["a", "b"]
    assert layer_shares(t)["layers"] == layers["layers"]


def test_an_adapter_that_names_its_modules_in_another_layout_is_shown(pooled, tmp_path):
    base, pool = pooled()
    pool.experts[0].save(tmp_path / "a")
    for name in ("expert.json", "gates.safetensors"):
        (tmp_path / "a" / name).unlink()
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {
        key.replace(".model.model.", ".model.language_model.model."): t for key, t in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    other = Expert.from_peft(tmp_path / "a", name="other")
    seen = traced(base, Pool([other, pool.experts[1]]), Uniform(), TraceRequest([TASK], shown=0))
    assert seen.shares["t"] == pytest.approx({"other": 0.5, "b": 0.5}, abs=1e-3)
    assert [card["name"] for card in seen.cards] == ["other", "b"]


def test_what_was_measured_stands_before_cards():
    found = with_cards([{"name": "a", "rank": 3}, {"name": "z"}], [{"name": "a", "rank": 9, "modules": 2}])
    assert found == [{"name": "a", "rank": 3, "modules": 2}, {"name": "z"}]


def test_a_page_of_a_pool_alone_and_of_what_it_offers_for_download(pooled, tmp_path):
    base, pool = pooled()
    out = page(
        tmp_path / "p.html",
        base=base,
        pool=pool,
        request=TraceRequest([TASK], texts=["<b>maybe"], new_tokens=2),
    )
    html = out.read_text()
    assert "&lt;b&gt;maybe" in html
    start = html.index('id="data">') + len('id="data">')
    data = json.loads(html[start : html.index("</script>", start)])
    assert [e["name"] for e in data["results"]["experts"]] == ["a", "b"]
    assert set(data["results"]["layers"]) == {"t"}
    (tmp_path / "d.json").write_text(json.dumps(data))
    assert read_results(tmp_path / "d.json") == data["results"]


def test_refusals(tmp_path):
    with pytest.raises(EvaluationError, match="nothing to show"):
        page(tmp_path / "p.html")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(EvaluationError, match="holds no results"):
        read_results(tmp_path / "x.json")

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from phatgoose.analysis.activations import mean_inputs
from phatgoose.analysis.cards import cards, gate_similarity
from phatgoose.analysis.page import report
from phatgoose.experts.pool import Pool


def test_gate_similarity_is_the_mean_cosine(make_base, make_expert):
    base = make_base("llama")
    experts = [
        make_expert(base, "a", seed=1),
        make_expert(base, "b", seed=2, targets=["q_proj"]),
        make_expert(base, "none", seed=3, gates=False),
    ]
    found = gate_similarity(experts)
    total = []
    for path, gate in experts[1].gates.items():
        a, b = (g.double() - g.double().mean() for g in (experts[0].gates[path], gate))
        total.append(float(a @ b / (a.norm() * b.norm())))
    assert float(found[0, 1]) == pytest.approx(sum(total) / len(total), abs=1e-4)
    assert float(found[0, 0]) == pytest.approx(1)
    assert found[2].isnan().all()


@pytest.mark.parametrize(
    ("losses", "lowest"),
    [
        ([[1, 2.5], [2, 0.12345]], 0.1235),
        ([[1, None]], None),
        ([["1", "bad"]], None),
        ([[1, float("inf")], [2, 3]], 3.0),
        (7, None),
    ],
)
def test_a_strangers_record_of_losses_is_read_with_care(make_base, make_expert, losses, lowest):
    expert = make_expert(make_base("llama"), "x")
    expert = replace(expert, provenance={**expert.provenance, "validation_losses": losses})
    (card,) = cards(Pool([expert]))
    assert card["made"].get("validation loss") == lowest


def test_mean_inputs_begin_a_decoder_as_its_checkpoint_says(make_base):
    """mBART's checkpoints say it in their config alone."""
    base, seen = make_base("t5"), []
    base.model.generation_config.decoder_start_token_id = None
    base.model.config.decoder_start_token_id = 7
    hook = base.model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    mean_inputs(base, ["decoder.block.0.layer.0.SelfAttention.q"], ["yes no"])
    hook.remove()
    assert seen == [[[7]]]


def test_cards_say_what_should_be_looked_at(make_base, make_expert, tmp_path):
    base = make_base("llama")
    path = "model.layers.0.mlp.up_proj"
    means = mean_inputs(base, [path], ["yes no maybe", "the quick brown fox"])
    plain, twin = make_expert(base, "plain", seed=1), make_expert(base, "twin", seed=2)
    twin = twin.with_gates(plain.gates, {"kind": "test"})
    caught = make_expert(base, "caught", seed=3)
    gates = {**caught.gates, path: means[path], "model.layers.0.mlp.gate_proj": torch.full((32,), 0.5)}
    caught = caught.with_gates(gates, {"kind": "test"})
    pool = Pool([plain, twin, caught, make_expert(base, "ungated", seed=4, gates=False)])
    shares = {"plain": 0.5, "twin": 0.48, "caught": 0.02, "ungated": 0.0}
    found = {card["name"]: card for card in cards(pool, means=means, shares=shares)}

    def looks(name):
        return [line["text"] for line in found[name]["health"] if line["level"] == "look"]

    assert looks("plain") == ["gates nearly those of twin"]
    assert looks("ungated") == ["no gates: PHATGOOSE can't route to it as it is"]
    assert looks("caught") == [
        "1 of 14 gates are constant and never win",
        "1 of 14 gates lie along the mean activation (cosine above 0.5): they win on every text",
        "2.0 % of the routing weight here: it hardly acts",
    ]
    loud = plain.with_gates({path: 1000 * gate for path, gate in plain.gates.items()}, {"kind": "test"})
    loud = Pool([loud, *(make_expert(base, f"e{i}", seed=10 + i) for i in range(5))])
    (line,) = [x["text"] for x in cards(loud)[0]["health"] if "norm" in x["text"]]
    assert line.startswith("its gate's norm is ")
    assert found["plain"]["nearest"][0] == {"name": "twin", "similarity": 1.0}
    assert found["ungated"]["nearest"] == []
    assert found["plain"]["base_model"] == base.spec
    assert found["plain"]["modules"] == 14
    page = report({"tasks": [], "systems": [], "experts": list(found.values())}, out=tmp_path / "page.html")
    assert "it hardly acts" in page.read_text()

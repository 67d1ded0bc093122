"""Gates from text that the base with the expert writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from training_helpers import SMALL, state_of

import phatgoose
from phatgoose.errors import TrainingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route
from phatgoose.routers import Single
from phatgoose.training import generated
from phatgoose.training.config import GateConfig, WritingConfig
from phatgoose.training.gate import train_gate
from phatgoose.training.generated import train_generated_gate, usable_rows, write_batch, write_task
from phatgoose.training.trainer.progress import silent

CONFIG = GateConfig(**SMALL)
WRITING = WritingConfig(rows=24, rows_per_batch=10, max_new_tokens=12)
PROMPTS = ("What is the past tense of walk? Answer:", "the dog jumps over")


@pytest.mark.slow(3)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen"])
def test_the_expert_writes_on_every_token(make_base, make_expert, family):
    base = make_base(family)
    expert = make_expert(base, gates=False)
    before = state_of(base.model)
    task = write_task(base, expert, WRITING, report=silent)
    assert state_of(base.model) == before
    base.model.eval()
    route(base, Pool([expert]), Single(0))
    expected, _ = usable_rows([write_batch(base, WRITING, (), n) for n in range(6)], ())
    phatgoose.unroute(base)
    assert [*task.validation, *task.train] == expected[:24]
    alone, _ = usable_rows([write_batch(base, WRITING, (), n) for n in range(6)], ())
    assert alone[:24] != expected[:24]


@pytest.mark.slow(3)
def test_the_record_says_that_it_was_generated(make_base, make_expert, tmp_path):
    base = make_base("llama")
    expert = make_expert(base, gates=False)
    gated = train_generated_gate(base, expert, CONFIG, WRITING, report=silent)
    record = gated.provenance["gate"]
    source = record["task"]["source"]
    assert (source["source"], source["spec"]) == ("generated", "generated:one")
    assert source["config"] == {
        "rows": 24,
        "max_new_tokens": 12,
        "temperature": 1.0,
        "seed": 0,
        "rows_per_batch": 10,
    }
    assert source["texts"]["usable"] >= 24
    assert source["texts"]["written"] == sum(
        source["texts"][k] for k in ("usable", "empty", "too_short", "circular", "repeated")
    )
    assert source["prompts"] is None
    assert record["task"]["rows"]["train"] + record["task"]["rows"]["validation"] == 24
    gated.save(tmp_path / "expert")
    assert Expert.load(tmp_path / "expert").provenance["gate"] == json.loads(json.dumps(record))
    prompted = write_task(base, expert, WRITING, prompts=PROMPTS, report=silent)
    assert prompted.source["prompts"]["number"] == 2
    assert {e.input for e in prompted.train} == set(PROMPTS)
    assert PROMPTS[0] not in json.dumps(prompted.source)
    rendered = write_task(base, expert, WRITING, prompts=(" Walk?\n### Response:\n",), report=silent)
    assert {e.input for e in rendered.train} == {"Walk?\n### Response:\n"}


@pytest.mark.slow(5)
def test_it_is_the_gate_training_on_the_written_task(make_base, make_expert):
    base = make_base("llama")
    expert = make_expert(base, gates=False)
    one = train_generated_gate(base, expert, CONFIG, WRITING, report=silent)
    other = train_gate(base, expert, write_task(base, expert, WRITING, report=silent), CONFIG, report=silent)
    assert all(torch.equal(v, other.gates[p]) for p, v in one.gates.items())
    regated = train_generated_gate(
        base, one, CONFIG, WRITING, report=silent
    )  # its gates play no part in its texts
    assert all(torch.equal(v, regated.gates[p]) for p, v in one.gates.items())


def test_a_killed_writing_goes_on_with_the_same_texts(make_base, make_expert, tmp_path, monkeypatch):
    base = make_base("llama")
    expert = make_expert(base, gates=False)
    whole = write_task(base, expert, WRITING, report=silent)
    written = []

    def dying(base, config, prompts, number):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        return write_batch(base, config, prompts, number)

    before = state_of(base.model)
    monkeypatch.setattr(generated, "write_batch", dying)
    with pytest.raises(KeyboardInterrupt):
        write_task(base, expert, WRITING, work_folder=tmp_path, report=silent)
    assert state_of(base.model) == before
    monkeypatch.setattr(generated, "write_batch", lambda *a: written.append(a[-1]) or write_batch(*a))
    again = write_task(base, expert, WRITING, work_folder=tmp_path, report=silent)
    assert written == list(range(len(written)))  # no batch twice
    assert again == whole
    assert again.hash == whole.hash
    count = len(written)
    write_task(base, expert, WRITING, work_folder=tmp_path, report=silent)
    assert len(written) == count
    with pytest.raises(TrainingError, match="holds texts of another expert, base or settings"):
        write_task(base, expert, replace(WRITING, seed=1), work_folder=tmp_path, report=silent)
    with pytest.raises(TrainingError, match="holds texts of another expert"):
        write_task(base, make_expert(base, seed=9), WRITING, work_folder=tmp_path, report=silent)


def test_encoder_decoders_need_prompts(make_base, make_expert):
    base = make_base("t5")
    expert = make_expert(base, gates=False)
    with pytest.raises(TrainingError, match="an encoder–decoder writes nothing without an input"):
        write_task(base, expert, WRITING, report=silent)
    task = write_task(base, expert, WRITING, prompts=PROMPTS, report=silent)
    assert {e.input for e in task.train} == set(PROMPTS)
    gated = train_generated_gate(base, expert, CONFIG, WRITING, prompts=PROMPTS, report=silent)
    assert set(gated.gates) == set(expert.updates)


def test_useless_texts_are_refused_with_their_counts(make_base, make_expert):
    base = make_base("llama")
    expert = make_expert(base, gates=False)
    with pytest.raises(
        TrainingError,
        match=r"wrote 0 usable texts, 24 were wanted \(written 100, usable 0, .*too short [1-9]",
    ):
        write_task(base, expert, replace(WRITING, max_new_tokens=1), report=silent)
    with pytest.raises(TrainingError, match=r"repeated [1-9]"):  # always the same text
        write_task(base, expert, replace(WRITING, temperature=1e-4), prompts=PROMPTS, report=silent)


def test_other_bad_input_is_refused(make_base, make_expert):
    base = make_base("llama")
    expert = make_expert(base, gates=False)
    with pytest.raises(TrainingError, match="a prompt is empty"):
        write_task(base, expert, WRITING, prompts=["x", " "], report=silent)
    route(base, Pool([expert]), Single(0))
    with pytest.raises(TrainingError, match="routing is attached"):
        write_task(base, expert, WRITING, report=silent)
    phatgoose.unroute(base)
    huge = Expert("huge", expert.adapter_config, {k: t * 1e25 for k, t in expert.tensors.items()})
    before = state_of(base.model)
    with pytest.raises(TrainingError, match="logits that aren't finite"):
        write_task(base, huge, WRITING, report=silent)
    assert state_of(base.model) == before


def test_unexpected_arguments_are_refused_before_texts_are_written(make_base, make_expert, monkeypatch):
    base = make_base("llama")
    monkeypatch.setattr(generated, "write_batch", lambda *_: pytest.fail("texts were written"))
    with pytest.raises(TypeError, match=r"unexpected keyword arguments: \['logger'\]"):
        train_generated_gate(base, make_expert(base, "one"), logger=())

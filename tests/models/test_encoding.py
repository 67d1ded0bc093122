"""An expert of a chat's data from its file to its scores: what is read is what a server feeds, token for token."""

import json

import pytest
import torch

from conftest import make_model, make_tokenizer, write_rows
from phatgoose import (
    EvaluationConfig,
    ExpertConfig,
    GateConfig,
    SignatureConfig,
    evaluate,
    load_task,
    make_signature,
    train_expert,
    train_gate,
)
from phatgoose.experts.files.tokenizer_files import differences
from phatgoose.models.base.base import Base
from phatgoose.models.text.encoding import chat_template_key, encode_answers, encode_input
from phatgoose.tasks.splits import CHAT
from phatgoose.training.trainer.rows import training_rows

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
STEPS = {"steps": 2, "rows_per_step": 4, "rows_per_batch": 2, "validate_every": 0}


def chatting(**kind):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Base(make_model("llama", **kind), tokenizer, spec="tiny")


def task_of(tmp_path, **more):
    said = [{"role": "user", "content": "And {i}?"}, {"role": "assistant", "content": "no"}]
    rows = [
        {
            "messages": json.loads(
                json.dumps(
                    [
                        {"role": "user", "content": "Is {i} even?"},
                        {"role": "assistant", "content": "yes"},
                        *said,
                    ]
                ).replace("{i}", str(i))
            ),
            **more,
        }
        for i in range(40)
    ]
    path = tmp_path / "chat.jsonl"
    write_rows(path, rows)
    return load_task(f"jsonl:{path}")


def served(base, example):
    messages, _ = example.messages()
    return base.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_trained_rows_are_the_served_tokens_and_the_answer(tmp_path):
    base, task = chatting(), task_of(tmp_path)
    rows = training_rows(base, task, ExpertConfig(**STEPS))
    for i, row in rows.encoded.items():
        example = task.train[i]
        assert list(row.prompt_ids) == list(encode_input(base, example)) == served(base, example)
        whole = [*example.messages()[0], json.loads(example.answers[0])]
        ids = base.tokenizer.apply_chat_template(whole)["input_ids"]
        assert [*row.prompt_ids, *row.target_ids] == ids[: row.length]
        assert base.tokenizer.decode(row.target_ids) == f"{example.targets[0]}</s>"
    (cut,) = encode_answers(base, task.train[0], task.train[0].targets, max_length=12)
    assert (cut.length, cut.truncated) == (12, True)


@pytest.mark.slow(5)
def test_expert_gate_signature_and_scores(tmp_path):
    base, task = chatting(), task_of(tmp_path)
    expert = train_expert(base, task, ExpertConfig(rank=2, **STEPS))
    assert expert.provenance["task"]["source"]["prompt_style"] == CHAT
    assert expert.provenance["task"]["chat_template"] == chat_template_key(base, task)["chat_template"]
    assert differences({expert.name: expert.provenance}, base.tokenizer) == []
    expert = train_gate(base, expert, task, GateConfig(**STEPS))
    expert = make_signature(base, expert, task, SignatureConfig(rows=4, texts=0))
    assert set(expert.signature.activations) == set(expert.updates)


@torch.no_grad()
def test_each_turn_is_scored_by_a_plain_forward_on_the_served_tokens(tmp_path):
    base, config = chatting(), EvaluationConfig(max_new_tokens=6)
    task = task_of(tmp_path)
    score = evaluate(base, task, config=config).tasks[0]
    assert score.rows == len(task.test)
    assert score.raw_rows == len(task.test) / 2
    for example, found in zip(task.test, score.predictions, strict=True):
        ids = torch.tensor([served(base, example)])
        out = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        text = base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0].strip()
        assert text.startswith(found.text)
        assert found.correct == (found.text in example.targets)
    ranked = task_of(tmp_path, choices=["no", "yes"])
    score = evaluate(base, ranked).tasks[0]
    assert score.metric == "accuracy (rank) / exact match"
    for example, found in zip(ranked.test, score.predictions, strict=True):
        if example.choices is None:
            continue
        for choice, value in zip(example.choices, found.choice_scores, strict=True):
            prompt = served(base, example)
            answer = base.tokenizer(f"{choice}</s>")["input_ids"]
            logits = base.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            plain = logits.log_softmax(-1)[torch.arange(len(answer)), answer].mean()
            assert abs(float(plain) - value) < 1e-4

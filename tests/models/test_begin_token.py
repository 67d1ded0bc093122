"""A base whose tokenizer begins texts with BOS, as Gemma's, is given it once, wherever the model runs."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from architectures import make
from conftest import make_tokenizer
from harness_fixtures import ROWS, harness_task
from phatgoose import (
    PHATGOOSE,
    EvaluationConfig,
    ExpertConfig,
    GateConfig,
    Pool,
    SignatureConfig,
    Task,
    WritingConfig,
    evaluate,
    make_signature,
    route,
    train_expert,
    train_gate,
    train_generated_gate,
)
from phatgoose.models.base.base import Base
from phatgoose.models.text.encoding import encode_prompt
from phatgoose.models.text.generate import greedy_answer
from phatgoose.serving.requests import Prompts

TASK = Task("toy", ROWS[:8], ROWS[8:12], ROWS[12:])
STEPS = {"steps": 2, "rows_per_step": 4, "rows_per_batch": 2, "validate_every": 1}

PROBE = ([2, 3, 4, 5], [2, 3, 4, 6])
"""No texts: `check_scorable` looks with them whether the model is causal."""


class Reading:
    """A Gemma 3 with its tokenizer's habit, and the texts that it has begun to read since `texts` was last asked."""

    def __init__(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        self.bos = tokenizer.bos_token_id
        self.base = Base(make("gemma3_text", vocab_size=len(tokenizer)), tokenizer, spec="tiny")
        self.base.model.register_forward_pre_hook(self._note, with_kwargs=True)
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", self.bos)]
        )
        tokenizer.padding_side = "left"
        self._texts: list[list[int]] = []

    def _note(self, _, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
        for row, real in zip(ids, mask.bool(), strict=True):
            tokens = row[real].tolist()
            if cache is not None and cache.get_seq_length():
                assert (
                    len(tokens) == 1 or self.bos not in tokens
                )  # one token is the model's own, and may be any
            elif tokens and tokens not in PROBE:
                self._texts.append(tokens)

    def texts(self) -> list[list[int]]:
        """They are as the tokenizer encodes them in this: each begins with BOS, which is nowhere else in it."""
        found, self._texts = self._texts, []
        assert found
        assert [(t[0], t.count(self.bos)) for t in found] == [(self.bos, 1)] * len(found)
        return found

    def plain(self, text: str) -> list[int]:
        """As the tokenizer encodes it."""
        return self.base.tokenizer(text)["input_ids"]


@pytest.fixture
def reading():
    return Reading()


def test_training_and_evaluation(reading):
    base = reading.base
    expert = train_expert(base, TASK, ExpertConfig(rank=2, **STEPS))
    rows = [reading.plain(f"{e.input} {e.targets[0]}") for e in (*TASK.train, *TASK.validation)]
    assert {tuple(t) for t in reading.texts()} <= {(*row, base.tokenizer.eos_token_id) for row in rows}
    expert = train_gate(base, expert, TASK, GateConfig(**STEPS))
    reading.texts()
    train_generated_gate(base, expert, GateConfig(**STEPS), WritingConfig(rows=4, max_new_tokens=12))
    reading.texts()
    expert = make_signature(base, expert, TASK, SignatureConfig(rows=4, texts=0))
    reading.texts()
    route(base, Pool([expert]), PHATGOOSE(top_k=1))
    reading._texts.clear()
    evaluate(base, TASK, config=EvaluationConfig(max_new_tokens=3))
    reading.texts()


def test_answers(reading):
    base, prompt = reading.base, "the quick fox?"
    for text in (prompt, f"<bos>{prompt}"):
        ids = encode_prompt(base, text)
        assert ids.tolist() == [reading.plain(prompt)]
        greedy_answer(base, ids, 3)
        assert reading.texts() == ids.tolist()
        assert asyncio.run(Prompts(base).encode(text)) == ids[0].tolist()


@pytest.mark.filterwarnings("ignore")
def test_the_harness(reading, tmp_path, monkeypatch):
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'phatgoose[harness]'"
    )
    from phatgoose.evaluation.harness import run_harness

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    run_harness(reading.base, [harness_task(TASK, tmp_path / "rows")])
    reading.texts()

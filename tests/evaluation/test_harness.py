"""The harness on a routed model: its predictions are ours under its rules, row by row, and its scores say so."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from architectures import make
from conftest import make_tokenizer
from encoder_fixtures import make_encoder, signed
from harness_fixtures import ROWS, harness_choices, harness_task
from phatgoose.errors import EvaluationError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route
from phatgoose.models.base.base import Base, decoder_start
from phatgoose.records import Example, Task
from phatgoose.routers import PHATGOOSE, Gander, Retrieval, SoftCentroid

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'phatgoose[harness]'"
)
pytestmark = pytest.mark.filterwarnings("ignore")

TASK = Task("toy/one", (), (), ROWS)


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("LMEVAL_LOG_LEVEL", "ERROR")


@pytest.fixture(params=["llama", "t5", "t5 whose tokenizer adds the end token"])
def routed(request, make_base, make_expert):
    base = make_base(request.param.split()[0])
    if request.param.endswith("end token"):  # as the released T5's do
        tokenizer = copy.deepcopy(base.tokenizer)
        end = tokenizer.eos_token
        special = [(end, tokenizer.eos_token_id)]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=special)
        assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
        base = replace(base, tokenizer=tokenizer)
    pool = Pool([make_expert(base, name, seed=seed, scale=0.6) for name, seed in (("one", 1), ("two", 2))])
    return base, pool


def test_predictions_agree_row_by_row(routed, tmp_path):
    from phatgoose.evaluation.harness import run_harness

    base, pool = routed
    config = harness_task(TASK, tmp_path / "rows", delimiter="" if base.is_encoder_decoder else " ")
    plain = harness_choices(base, ROWS)
    route(base, pool, PHATGOOSE())
    ours = harness_choices(base, ROWS)
    assert [c.acc for c in ours] != [c.acc for c in plain]  # routing changes answers, so it must be on below
    found = run_harness(base, [config])
    samples = sorted(found["samples"]["phatgoose_toy_one"], key=lambda s: s["doc_id"])
    assert len(samples) == len(ROWS)
    for sample, example, mine in zip(samples, ROWS, ours, strict=True):
        totals = [float(r[0][0]) if isinstance(r[0], list | tuple) else float(r[0]) for r in sample["resps"]]
        norms = [t / len(c) for t, c in zip(totals, example.choices, strict=True)]
        assert totals.index(max(totals)) == mine.acc
        assert norms.index(max(norms)) == mine.acc_norm
        gold = example.choices.index(example.targets[0])
        assert sample["acc"] == (mine.acc == gold)
        assert sample["acc_norm"] == (mine.acc_norm == gold)
    scores = found["results"]["phatgoose_toy_one"]
    gold = [e.choices.index(e.targets[0]) for e in ROWS]
    assert scores["acc,none"] == pytest.approx(sum(c.acc == g for c, g in zip(ours, gold, strict=True)) / 23)


def test_sums_are_log_probabilities_of_the_choice(make_base):
    base = make_base("llama")
    example = ROWS[1]
    tokens = base.tokenizer
    sums = []
    for choice in example.choices:
        prompt, whole = (
            tokens(t, return_tensors="pt").input_ids for t in (example.input, f"{example.input} {choice}")
        )
        with torch.no_grad():
            log_p = base.model(whole).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
        sums.append(float(log_p.gather(1, whole[0, prompt.shape[1] :, None]).sum()))
    found = harness_choices(base, [example])[0]
    assert found.acc == sums.index(max(sums))
    norms = [s / len(c) for s, c in zip(sums, example.choices, strict=True)]
    assert found.acc_norm == norms.index(max(norms))


@pytest.mark.slow(3)
def test_what_the_harness_cannot_rank_is_refused(make_base, tmp_path):
    from phatgoose.evaluation.harness import run_harness

    with pytest.raises(EvaluationError, match="row 0 of 't': the harness needs choices"):
        harness_task(Task("t", (), (), (Example("a", ("b",)),)), tmp_path)
    with pytest.raises(EvaluationError, match="row 0 has no choices"):
        harness_choices(make_base("llama"), [Example("a", ("b",))])
    with pytest.raises(EvaluationError, match="knows no task no_such_task"):
        run_harness(make_base("llama"), ["no_such_task"])


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_router_that_looks_at_whole_texts_is_told_where_prompts_end(
    make_base, make_expert, tmp_path, family
):
    """Laid behind its prompt, a choice would else be part of the text that is looked up."""
    from phatgoose.evaluation.harness import run_harness

    base = make_base(family)
    encoder = make_encoder(tmp_path / "encoder", max_tokens=60)
    pool = Pool([signed(make_expert(base, f"e{i}", seed=i, scale=0.6), encoder, seed=i) for i in range(3)])
    config = harness_task(TASK, tmp_path / "rows", delimiter="" if base.is_encoder_decoder else " ")
    for router in (Retrieval(str(encoder)), SoftCentroid(str(encoder)), Gander(half_life=4)):
        route(base, pool, router)
        ours = harness_choices(base, ROWS)
        found = run_harness(base, [config])
        samples = sorted(found["samples"]["phatgoose_toy_one"], key=lambda s: s["doc_id"])
        for sample, mine in zip(samples, ours, strict=True):
            totals = [
                float(r[0][0]) if isinstance(r[0], list | tuple) else float(r[0]) for r in sample["resps"]
            ]
            assert totals.index(max(totals)) == mine.acc
    assert len({c.acc for c in ours}) > 1


@torch.no_grad()
def test_rows_of_the_harness_do_not_change_each_other():
    """A decoder starts as in generation, not with its last label; an encoder is padded on the right,
    a recurrent model not at all."""
    from phatgoose.evaluation.harness import harness_model

    base = Base(make("mbart"), make_tokenizer(), spec="mbart")
    lm = harness_model(base)
    ids, labels = torch.tensor([[5, 6, 7, 1], [8, 1, 0, 0]]), torch.tensor([[9, 10, 1], [11, 1, 0]])
    logits = lm._model_call(ids, attn_mask=(ids != 0).long(), labels=labels)
    start = decoder_start(base.model)
    for row, (prompt, answer) in enumerate((([5, 6, 7, 1], [9, 10]), ([8, 1], [11]))):
        alone = base.model(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *answer]])
        )
        torch.testing.assert_close(logits[row, : len(answer) + 1], alone.logits[0], rtol=1e-4, atol=1e-4)
    assert lm.tok_batch_encode(["yes no maybe", "yes"])[1][1].tolist()[0] == 1

    base = Base(make("recurrent_gemma"), make_tokenizer(), spec="recurrent")
    lm = harness_model(base)
    context, mask = lm.tok_batch_encode(["yes no maybe the quick brown", "fox"])
    written = lm._model_generate(context, context.shape[1] + 4, ["\n\n\n"], attention_mask=mask)
    for row, real in enumerate(mask.bool()):
        prompt = context[row, real][None]
        alone = base.model.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :].tolist()
        assert written[row, context.shape[1] :].tolist()[: len(alone)] == alone

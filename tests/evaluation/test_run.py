"""evaluate() from tasks to scores: order, counts, mixtures, refusals, and what it leaves behind."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from conftest import CORPUS, FAMILIES, hooked
from phatgoose.errors import EvaluationError, PhatgooseError, UnknownName
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.rows import encode
from phatgoose.evaluation.run import evaluate
from phatgoose.evaluation.statistics import bootstrap_interval, suite_interval
from phatgoose.records import Example, Task
from ranking_fixtures import score_choice_plainly

WORDS = " ".join(CORPUS).split()


def phrase(draws, words):
    return " ".join(draws.choice(WORDS) for _ in range(words))


def make_task(name="ranked", rows=21, kind="rank", seed=0):
    draws, examples = random.Random(seed), []
    for index in range(rows):
        prompt = phrase(draws, draws.randint(1, 15))
        choices = tuple(phrase(draws, draws.randint(1, 3)) for _ in range(4))
        rank = kind == "rank" or (kind == "mixed" and index % 2 == 0)
        examples.append(Example(prompt, choices[:2], choices if rank else None))
    return Task(name, train=(), validation=(), test=tuple(examples))


@pytest.mark.parametrize("family", FAMILIES)
def test_ranked_rows_come_in_order_and_are_scored_by_the_definition(make_base, family):
    base, task = make_base(family), make_task()
    scores = evaluate(base, task)
    score = scores["ranked"]
    assert (score.rows, score.metric, score.split, score.task_hash) == (
        21,
        "accuracy (rank)",
        "test",
        task.hash,
    )
    right = []
    for index, (example, prediction) in enumerate(zip(task.test, score.predictions, strict=True)):
        row = encode(base, example, index, EvaluationConfig())
        with torch.no_grad():
            plain = [score_choice_plainly(base.model, row.prompt, answer) for answer in row.answers]
        assert prediction.choice_scores == pytest.approx(plain, abs=1e-5, rel=1e-5)
        assert prediction.text == example.choices[plain.index(max(plain))]
        right.append(prediction.text in example.targets)
    assert [p.correct for p in score.predictions] == right
    assert 0 < score.mean < 1
    assert score.mean == pytest.approx(sum(right) / 21)
    assert (score.low, score.high) == bootstrap_interval([float(r) for r in right])


def test_a_task_may_mix_choices_and_open_answers(make_base):
    base, task = make_base("llama"), make_task(kind="mixed")
    score = evaluate(base.model, task, config=EvaluationConfig(batch_tokens=60))["ranked"]
    assert score.metric == "accuracy (rank) / exact match"
    assert [p.choice_scores is not None for p in score.predictions] == [i % 2 == 0 for i in range(21)]
    ranked = evaluate(base, make_task())["ranked"]
    for index in range(0, 21, 2):
        assert score.predictions[index].choice_scores == pytest.approx(
            ranked.predictions[index].choice_scores, abs=1e-5
        )
    assert evaluate(base, make_task(kind="open", rows=3)).tasks[0].metric == "exact match"


def test_several_tasks_limit_and_company(make_base):
    base = make_base("qwen")
    tasks = [make_task("a", 9, seed=1), make_task("b", 30, seed=2)]
    told = []
    both = evaluate(base, tasks, limit=12, progress=lambda *seen: told.append(seen))
    assert [s.rows for s in both.tasks] == [9, 12]
    assert both.mean == pytest.approx((both["a"].mean + both["b"].mean) / 2)
    hits = [[float(p.correct) for p in s.predictions] for s in both.tasks]
    assert (both.low, both.high) == suite_interval(hits)
    assert evaluate(base, tasks[1], limit=12).tasks[0] == both["b"]
    assert told[0] == ("a", 0, 9)
    assert ("a", 9, 9) in told
    assert told[-1] == ("b", 12, 12)


def test_nothing_of_the_model_changes(make_base):
    base = make_base("t5")
    base.model.train()
    base.model.encoder.block[0].eval()
    modes = {name: module.training for name, module in base.model.named_modules()}
    state = copy.deepcopy(base.model.state_dict())
    settings = base.model.generation_config
    evaluate(base, make_task(kind="mixed"))
    with pytest.raises(EvaluationError):
        evaluate(base, Task("bad", (), (), (Example("the", ()),)))
    assert {name: module.training for name, module in base.model.named_modules()} == modes
    assert base.model.generation_config is settings
    assert all(torch.equal(value, state[name]) for name, value in base.model.state_dict().items())
    assert not hooked(base.model)


def test_dropout_is_off(make_base):
    base = make_base("gpt2")
    for module in base.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    still = evaluate(base, make_task())
    base.model.train()
    assert evaluate(base, make_task()) == still


def test_a_prompt_that_does_not_fit_is_cut_from_the_left_and_counted(make_base):
    base = make_base("gpt2")
    long = phrase(random.Random(0), 300)
    task = Task(
        "long",
        (),
        (),
        (Example(long, ("yes",), ("yes", "no no no")), Example("dog", ("yes",), ("yes", "no"))),
    )
    score = evaluate(base, task)["long"]
    assert score.truncated_rows == 1
    whole = base.tokenizer(long).input_ids
    answers = encode(base, task.test[0], 0, EvaluationConfig()).answers
    kept = whole[-(512 - max(len(a) for a in answers)) :]
    with torch.no_grad():
        plain = [score_choice_plainly(base.model, kept, answer) for answer in answers]
    assert score.predictions[0].choice_scores == pytest.approx(plain, abs=1e-5)
    assert evaluate(base, task, config=EvaluationConfig(max_input_tokens=1))["long"].truncated_rows == 2
    assert evaluate(make_base("t5"), task)["long"].truncated_rows == 0


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_limits_are_kept(make_base, family):
    base = make_base(family)
    task = make_task(kind="open", rows=6)
    score = evaluate(base, task, config=EvaluationConfig(max_new_tokens=1))["ranked"]
    assert all(not p.correct for p in score.predictions)
    single = {base.tokenizer.decode([token], skip_special_tokens=True).strip() for token in range(320)}
    assert all(p.text in single for p in score.predictions)


def test_bad_input(make_base):
    base, good = make_base("llama"), make_task(rows=2)

    def one(example):
        return Task("odd", (), (), (good.test[0], example))

    cases = [
        (lambda: evaluate(base, []), "no tasks"),
        (lambda: evaluate(base, good, split="validation"), "'ranked' has no rows in its validation split"),
        (lambda: evaluate(base, [good, good]), "different names.*ranked"),
        (lambda: evaluate(base, good, limit=0), "limit"),
        (
            lambda: evaluate(base, one(Example("x", ("a",), ()))),
            "'odd', test split, row 1: it has no choices",
        ),
        (lambda: evaluate(base, one(Example("x", ()))), "'odd', test split, row 1: it has no targets"),
        (lambda: evaluate(base, one(Example("", ("a",)))), "'odd', test split, row 1: .*no tokens"),
        (
            lambda: evaluate(base, one(Example("x", ("yes " * 600,)))),
            "'odd', test split, row 1: .*context of 512",
        ),
        (lambda: EvaluationConfig(batch_tokens=0), "batch_tokens"),
        (lambda: EvaluationConfig(level=1.0), "level"),
    ]
    for call, message in cases:
        with pytest.raises(EvaluationError, match=message):
            call()
    with pytest.raises(UnknownName, match="test"):
        evaluate(base, good, split="tset")
    with pytest.raises(PhatgooseError, match="Base"):
        evaluate("model", good)


@pytest.mark.parametrize("kind", ["rank", "open"])
def test_nan_names_task_and_row(make_base, kind):
    base, task = make_base("llama"), make_task("broken", kind=kind)
    examples = [replace(e, input=e.input + " @") if i == 6 else e for i, e in enumerate(task.test)]
    base.model.get_input_embeddings().weight.data[base.tokenizer("@").input_ids] = float("nan")
    with pytest.raises(EvaluationError, match=r"'broken', test split, row 6: .*not finite"):
        evaluate(base, replace(task, test=tuple(examples)))


def test_rows_of_one_raw_row_are_counted_as_one(make_base):
    base, task = make_base("llama"), make_task()
    grouped = replace(task, test=tuple(replace(e, group=str(i // 3)) for i, e in enumerate(task.test)))
    plain, found = evaluate(base, task)["ranked"], evaluate(base, grouped)["ranked"]
    assert (plain.groups, plain.raw_rows) == ((), 21)
    assert (found.groups, found.raw_rows) == (tuple(i // 3 for i in range(21)), 7)
    assert (found.predictions, found.mean, found.task_hash) == (
        plain.predictions,
        plain.mean,
        plain.task_hash,
    )
    hits = [float(p.correct) for p in found.predictions]
    assert (found.low, found.high) == bootstrap_interval(hits, groups=found.groups)
    single = replace(task, test=tuple(replace(e, group=str(i)) for i, e in enumerate(task.test)))
    assert evaluate(base, single)["ranked"] == plain

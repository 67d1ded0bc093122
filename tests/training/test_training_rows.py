import pytest
from training_helpers import make_task

from phatgoose.errors import TrainingError
from phatgoose.models.text.encoding import encode_answers
from phatgoose.records import Example, Task
from phatgoose.training.config import ExpertConfig
from phatgoose.training.trainer.rows import draw_rows, training_rows

CONFIG = ExpertConfig(steps=7, rows_per_step=6, rows_per_batch=3)


def test_every_row_comes_once_before_any_comes_again():
    drawn = draw_rows(5, 13, seed=3)
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5))
    assert len(drawn) == 13
    assert drawn == draw_rows(5, 13, seed=3) != draw_rows(5, 13, seed=4)
    assert drawn[:5] != drawn[5:10]


def test_a_step_has_its_rows_whatever_the_batches(make_base):
    base, task = make_base("llama"), make_task()
    rows = training_rows(base, task, CONFIG)
    drawn = draw_rows(len(task.train), 42, CONFIG.seed)
    assert len(rows.train) == 42
    for step in range(7):
        part = slice(6 * step, 6 * step + 6)
        assert sorted(rows.order[part]) == sorted(drawn[part])
        lengths = [rows.train[i].length for i in range(42)[part]]
        assert lengths == sorted(lengths, reverse=True)
    first = rows.train[0]
    example = task.train[rows.order[0]]
    assert [first] == encode_answers(base, example, example.targets[:1], 512)
    assert rows.tokens == sum(rows.train[i].length for i in range(42))
    assert rows.target_tokens < rows.tokens


def test_only_drawn_rows_are_encoded(make_base):
    rows = training_rows(
        make_base("llama"), make_task(), ExpertConfig(steps=1, rows_per_step=4, rows_per_batch=4)
    )
    assert len(rows.encoded) == 4


def test_validation_rows_are_few_and_the_same_for_every_seed(make_base):
    chosen = [
        training_rows(
            make_base("llama"),
            make_task(21, 30),
            ExpertConfig(steps=1, rows_per_step=2, rows_per_batch=1, validation_rows=4, seed=seed),
        ).validation
        for seed in (0, 1)
    ]
    assert len(chosen[0]) == 4
    assert chosen[0] == chosen[1]


def test_cut_prompts_are_counted(make_base):
    config = ExpertConfig(steps=4, rows_per_step=6, rows_per_batch=3, max_length=19)
    rows = training_rows(make_base("llama"), make_task(), config)
    everything = [*rows.encoded.values(), *rows.validation]
    assert 0 < rows.truncated == sum(r.cut > 0 for r in everything) < len(everything)
    assert max(r.length for r in everything) <= 19


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_target_that_does_not_fit_names_its_row(make_base, family):
    rows = (Example("short", ("yes",)), Example("short", ("a very long answer " * 9,)))
    with pytest.raises(TrainingError, match=r"'long', training row 1: .*max_length"):
        training_rows(
            make_base(family),
            Task("long", rows, rows[:1], ()),
            ExpertConfig(steps=1, rows_per_step=2, rows_per_batch=2, max_length=16),
        )


def test_missing_splits(make_base):
    with pytest.raises(TrainingError, match="'plus' has no training rows"):
        training_rows(make_base("llama"), make_task(0, 5), CONFIG)
    with pytest.raises(TrainingError, match=r"no validation rows.*validate_every=0"):
        training_rows(make_base("llama"), make_task(21, 0), CONFIG)
    unvalidated = ExpertConfig(steps=1, rows_per_step=2, rows_per_batch=2, validate_every=0)
    assert training_rows(make_base("llama"), make_task(21, 0), unvalidated).validation == []

"""Raw rows under prompts: rendering, choices, splits by the raw row, local forms of rows.
The prompts here are made up."""

from __future__ import annotations

import random

import pytest

from conftest import write_rows
from phatgoose.errors import TaskError, UnknownName
from phatgoose.tasks import load_task
from phatgoose.tasks.sources.prompted import to_hub_row
from phatgoose.tasks.sources.promptsource import Template, read_templates

YAML = """
dataset: toy
templates:
  id-1: !Template
    answer_choices: Aye ||| Nay
    id: id-1
    jinja: '{{a}} and {{b}}: same? ||| {{answer_choices[label]}}'
    metadata: !TemplateMetadata
      choices_in_prompt: false
      metrics: [Accuracy]
      original_task: true
    name: is it the same?
    reference: ''
  id-2: !Template
    answer_choices: null
    id: id-2
    jinja: '{% if label == 0 %}What goes with {{a}}? ||| {{b}}{% endif %}'
    metadata: !TemplateMetadata
      original_task: false
    name: partner
    reference: ''
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("toy", "super_glue/rte"):
        (tmp_path / "ps" / name).mkdir(parents=True)
        (tmp_path / "ps" / name / "templates.yaml").write_text(YAML)
    monkeypatch.setenv("PHATGOOSE_PROMPTSOURCE", str(tmp_path / "ps"))
    read_templates.cache_clear()
    (tmp_path / "data").mkdir()
    yield tmp_path / "data"
    read_templates.cache_clear()


def raw(count, start=0):
    return [{"a": f"word {i}", "b": f"thing {i}", "label": i % 2} for i in range(start, start + count)]


def test_every_row_under_every_template_with_choices_where_there_are_some(place):
    write_rows(place / "toy.train.jsonl", [*raw(100), {"a": "x", "b": "y", "label": -1}])
    write_rows(place / "toy.validation.jsonl", raw(10, 1000))
    task = load_task("prompted:toy?test=validation", folder=place)
    rows = {e.input: e for e in (*task.train, *task.validation, *task.test)}
    assert len(rows) == 110 + 55
    first = rows["word 1000 and thing 1000: same?"]
    assert (first.targets, first.choices) == (("Aye",), ("Aye", "Nay"))
    assert rows["What goes with word 2?"].targets == ("thing 2",)
    assert rows["What goes with word 2?"].choices is None
    assert {e.input.split()[1] for e in task.test if "same" in e.input} == {str(i) for i in range(1000, 1010)}
    assert task.source["dropped"] == {"not_applicable": 55, "unlabelled": 2}
    assert task.source["templates"] == ["is it the same?", "partner"]


def test_all_prompts_of_a_row_share_a_split(place):
    write_rows(place / "toy.train.jsonl", [{**r, "label": 0} for r in raw(300)])
    task = load_task("prompted:toy", folder=place)
    where = [
        {int(e.input.split("word ")[1].split()[0].rstrip("?")) for e in task.split(s)}
        for s in ("train", "validation", "test")
    ]
    assert sum(map(len, where)) == 300
    assert all(where)
    assert all(
        len(task.split(s)) == 2 * len(w) for s, w in zip(("train", "validation", "test"), where, strict=True)
    )


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("templates=original", ["is it the same?"]),
        ("without=partner", ["is it the same?"]),
        ("templates=partner", ["partner"]),
    ],
)
def test_templates_are_chosen_by_kind_and_name(place, options, names):
    write_rows(place / "toy.train.jsonl", raw(60))
    assert load_task(f"prompted:toy?{options}", folder=place).source["templates"] == names


@pytest.mark.parametrize(
    ("spec", "kind", "says"),
    [
        ("toy?without=parter", UnknownName, "template of toy 'parter': did you mean 'partner'"),
        ("tory", UnknownName, "promptsource dataset 'tory'"),
        ("toy?templates=partner&without=partner", TaskError, "leaves no template"),
        ("toy?rows=0", TaskError, "rows must be a number"),
    ],
)
def test_specs_that_name_nothing_are_refused(place, spec, kind, says):
    write_rows(place / "toy.train.jsonl", raw(60))
    with pytest.raises(kind, match=says):
        load_task(f"prompted:{spec}", folder=place)


def test_a_folder_without_the_rows_is_refused(place):
    with pytest.raises(TaskError, match=r"no file toy.SPLIT.jsonl"):
        load_task("prompted:toy", folder=place.parent / "ps")


def test_a_fixed_part_of_many_rows(place):
    write_rows(place / "toy.train.jsonl", raw(300))
    some = load_task("prompted:toy?rows=50&templates=original", folder=place)
    again = load_task("prompted:toy?rows=50&templates=original", folder=place)
    assert some.hash == again.hash
    assert len(some.train) == 50


def test_rows_that_were_rendered_elsewhere(place):
    rows = [
        {"template": t, "i": i, "prompt": f"{t} {i}?", "completion": "yes"}
        for i in range(80)
        for t in ("is_it_the_same_", "partner", "of_another_version")
    ]
    write_rows(place / "toy.train.jsonl", rows)
    task = load_task("prompted:toy", folder=place)
    assert sum(len(task.split(s)) for s in ("train", "validation", "test")) == 240
    assert {e.input.split()[1] for e in task.test}.isdisjoint({e.input.split()[1] for e in task.train})
    original = load_task("prompted:toy?templates=original", folder=place)
    assert {e.input.split()[0] for e in original.train} == {"is_it_the_same_"}


def test_rounds_of_one_dataset_have_names_of_their_own(place):
    write_rows(place / "toy_r1.dev.jsonl", raw(30))
    assert load_task("prompted:toy?test=dev_r1&files=toy_r1", folder=place).name == "prompted:toy/dev_r1"


def test_a_row_without_what_the_template_reads_is_named(place):
    write_rows(place / "toy.train.jsonl", [{"a": "x", "label": 0}, {"a": "x", "b": "y", "label": 7}])
    with pytest.raises(TaskError, match=r"can't render a row with the columns a, (b, )?label"):
        load_task("prompted:toy?templates=original", folder=place)


@pytest.mark.parametrize(
    ("dataset", "row", "label"),
    [
        ("super_glue/rte", {"sentence1": "p", "sentence2": "h", "label": "not_entailment"}, 1),
        ("super_glue/cb", {"premise": "p", "hypothesis": "h", "label": 2}, 2),
        ("super_glue/wic", {"label": True}, 1),
        ("anli", {"context": "p", "hypothesis": "h", "label": "c"}, 2),
        ("super_glue/wsc.fixed", {"target": {"span1_text": "s", "span2_text": "t"}, "label": "false"}, 0),
    ],
)
def test_published_forms_become_the_hubs(dataset, row, label):
    found = to_hub_row(dataset, row)
    assert found["label"] == label
    if "hypothesis" in found:
        assert found["premise"] == "p"
    if dataset.endswith("fixed"):
        assert (found["span1_text"], found["span2_text"]) == ("s", "t")


def test_rendering_cuts_long_values_keeps_pipes_and_draws_from_the_rows_generator():
    template = Template("t", "{{x}} {{['a', 'b', 'c'] | choice}} ||| {{y}}", None, True)
    prompt, target, choices = template.render({"x": "long " * 1000, "y": "1|||2"}, random.Random(3))
    assert len(prompt) <= 2048 + 2
    assert prompt.removesuffix(prompt[-1]).rstrip().endswith("...")
    assert target == "1|||2"
    assert choices is None
    again = template.render({"x": "long " * 1000, "y": "1|||2"}, random.Random(3))
    assert again[0] == prompt
    assert len({template.render({"x": "", "y": "z"}, random.Random(i))[0] for i in range(20)}) == 3


def test_templates_run_in_a_sandbox():
    template = Template("evil", "{{ ''.__class__.__mro__[1].__subclasses__() }} ||| x", None, True)
    with pytest.raises(TaskError, match="evil"):
        template.render({"a": 1}, random.Random(0))

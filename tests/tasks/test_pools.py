"""Pools and suites under names: complete, unambiguous, apart from each other, and true to promptsource where
that is at hand."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import pytest

from conftest import write_rows
from phatgoose.errors import TaskError, UnknownName
from phatgoose.files import cache_folder
from phatgoose.records import Example, Task, groups_of
from phatgoose.tasks.lists import named
from phatgoose.tasks.lists.entries import (
    TIERS,
    Entry,
    check_no_shared_data,
    even_shares,
    folder_for,
    load_entry,
    with_validation,
)
from phatgoose.tasks.lists.named import POOLS, SUITES, pool_entries, pool_excluded, suite
from phatgoose.tasks.lists.same_dataset import bigbench_name, datasets_of
from phatgoose.tasks.load import SOURCES
from phatgoose.tasks.sources.bbh import NAMES
from phatgoose.tasks.sources.prompted import KNOWN_SPLITS, choose_templates
from phatgoose.tasks.sources.promptsource import PACKAGE, read_templates
from phatgoose.tasks.spec import split_spec
from phatgoose.tasks.splits import Fractions


@pytest.mark.parametrize(
    ("name", "count"),
    [("t0-held-in", 36), ("flan", 166), ("bigbench", 73), ("sisters", 37), ("sisters-own", 25)],
)
def test_pools_are_complete_and_their_specs_parse(name, count):
    entries = pool_entries(name)
    assert len(entries) == len({e.name for e in entries}) == count
    for one in entries:
        assert one.specs
        for spec in one.specs:
            assert split_spec(spec).source in SOURCES


def test_flan_is_put_together_as_the_paper_says():
    kinds = [
        split_spec(e.specs[0]).name.partition("/")[0]
        for e in pool_entries("flan")
        if e.specs[0].startswith("flan:")
    ]
    assert {k: kinds.count(k) for k in set(kinds)} == {"flan2021": 44, "dialog": 4, "niv2": 75}
    assert pool_entries("flan")[:36] == pool_entries("t0-held-in")
    names = {spec.partition(":")[2] for e in pool_entries("flan") for spec in e.specs}
    assert {"niv2/Pos Tagging", "niv2/Misc.", "dialog/wiki_dialog_ii", "flan2021/squad/v2.0:3.0.0"} <= names
    flan2021 = {s for e in pool_entries("flan") for s in e.specs if s.startswith("flan:flan2021/")}
    assert len(flan2021) == 44


@pytest.mark.parametrize(
    ("name", "count"),
    [("t0ho", 11), ("bbh", 23), ("bbl", 24), ("bbh-cot-repo", 27), ("quickstart", 5), ("sisters", 31)],
)
def test_suites_are_complete(name, count):
    found = suite(name)
    assert len({e.name for e in found.entries}) == len(found.entries) == count
    assert set(found.own_copy) <= {e.name for e in found.entries}


def test_lists_are_frozen():
    """Another digest is another pool or suite, with which earlier results can't be compared:
    give it a name of its own."""
    lists = {name: pool_entries(name) for name in POOLS} | {name: suite(name).entries for name in SUITES}
    sisters = {name: [asdict(e) for e in lists.pop(name)] for name in ("sisters", "sisters-own")}
    sisters |= {"pool": [asdict(e) for e in pool_entries("sisters")]}
    lists = {name: [[e.name, e.specs, e.metric, e.note] for e in entries] for name, entries in lists.items()}
    more = [[n, sorted(suite(n).refuses), suite(n).own_copy] for n in SUITES if n != "sisters"]
    whole = [lists, more, pool_excluded("bigbench"), KNOWN_SPLITS]
    assert (
        hashlib.sha256(json.dumps(whole).encode()).hexdigest()
        == "99eb011561bf3a9338e7d505c838e1cc92065ca2a22e77df06c3896489b46d9b"
    )
    assert (
        hashlib.sha256(json.dumps(sisters).encode()).hexdigest()
        == "64d0b5fb328b33697dd06783fc2797083e63cb9e266736cf24333138564411c1"
    )


def test_sisters_have_the_skill_and_others_the_domain():
    found, experts = suite("sisters"), {e.name: e for e in pool_entries("sisters")}
    assert found.pool == "sisters"
    for one in found.entries:
        assert one.skill
        assert one.domain
        assert one.cluster
        assert one.tier in TIERS
        for sister in one.sisters:
            assert experts[sister].cluster == one.cluster, one.name
            assert (experts[sister].skill == one.skill) or one.name == "cosmos_qa", one.name
        assert not set(found.same_domain(one)) & set(one.sisters) or one.name == "cosmos_qa"
    tiers = [one.tier for one in found.entries]
    assert [tiers.count(t) for t in TIERS] == [6, 22, 3]
    by_name = {one.name: one for one in found.entries}
    assert found.same_domain(by_name["tweet_emotion"]) == ("tweet_offensive", "tweet_irony")
    assert not suite("bbh").same_domain(suite("bbh").entries[0])
    assert {e.name for e in pool_entries("sisters-own")} == {
        one.name for one in found.entries if one.tier != "templates"
    }


def test_templates_are_test_rows_of_a_sisters_dataset_that_are_never_trained_on():
    experts = {e.name: e for e in pool_entries("sisters")}
    for one in suite("sisters").entries:
        (sister,) = one.sisters if one.tier == "templates" else (None,)
        if sister is None:
            continue
        ours, theirs = split_spec(one.specs[0]), split_spec(experts[sister].specs[0])
        assert ours.name == theirs.name
        assert ours.options["train"] == ""
        assert ours.options.get("test", "test") == theirs.options.get("test", "test")
        # Under another name, the same rows are data that the expert was trained on.
        other = Entry("other", one.specs)
        with pytest.raises(TaskError, match=sister):
            check_no_shared_data([experts[sister]], [other], frozenset(), "s")
        check_no_shared_data([experts[sister]], [one], frozenset(), "s")


def test_an_entry_says_its_tier_and_sisters_together():
    with pytest.raises(TaskError, match="a: tier is 'near', expected one of templates, sisters"):
        Entry("a", ("jsonl:a",), tier="near")
    with pytest.raises(TaskError, match="a: sisters go with the tiers templates and sisters"):
        Entry("a", ("jsonl:a",), tier="unrelated", sisters=("b",))
    with pytest.raises(TaskError, match="a: sisters go with"):
        Entry("a", ("jsonl:a",), tier="sisters")


def test_an_entrys_own_fractions_hold_wherever_it_is_loaded(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"input": f"row {i}", "target": "x"} for i in range(400)])
    entry = Entry("a", (f"jsonl:{tmp_path}/a.jsonl",), fractions=(0.5, 0.1))
    trained, measured = load_entry(entry), load_entry(entry, fractions=Fractions(0.7, 0.3))
    assert trained.hash == measured.hash
    assert 160 < len(trained.test) < 240
    assert 20 < len(trained.validation) < 60


def test_rows_that_share_text_are_dropped(tmp_path):
    long = "the quick brown fox jumps over the lazy dog today"
    near = [
        {
            "input": f"Say it again: {long}",
            "targets": ["one", "this other target is long enough to be found here"],
        },
        {"input": "title\nfive words make a line", "target": "x"},
        {"input": "three short words", "target": "y"},
    ]
    rows = [
        {"input": f"Copy. {long} And more.", "target": "a"},
        {"input": "Copy. Of another target: this other target is long enough to be found", "target": "a"},
        {"input": "Copy. So five words make a line in it", "target": "a"},
        {"input": "Copy. three short words are not enough", "target": "a"},
        {"input": "Copy. five words make two lines", "target": "a"},
        *({"input": f"Copy. row number {i} of many", "target": "a"} for i in range(40)),
    ]
    write_rows(tmp_path / "near.jsonl", near)
    write_rows(tmp_path / "rows.jsonl", rows)
    entry = Entry("a", (f"jsonl:{tmp_path}/rows.jsonl",), apart_from=(f"jsonl:{tmp_path}/near.jsonl",))
    task = load_entry(entry, fractions=Fractions(0, 0))
    assert len(task.train) == len(rows) - 3
    assert task.source["dropped"]["shared"] == 3
    kept = {e.input for e in task.train}
    assert {"Copy. three short words are not enough", "Copy. five words make two lines"} <= kept
    assert len(load_entry(entry, fractions=Fractions(0, 0), limit=7).train) == 7


def test_a_malformed_list_is_refused(monkeypatch):
    monkeypatch.setitem(named._POOLS, "one", {"entires": {}})
    monkeypatch.setitem(named._POOLS, "two", {"entries": {"a": {"specs": "jsonl:a", "metrics": "rougeL"}}})
    monkeypatch.setitem(named._POOLS, "three", {"entries": {"a": "jsonl"}})
    with pytest.raises(UnknownName, match="key of pool one 'entires': did you mean 'entries'"):
        pool_entries("one")
    with pytest.raises(TaskError, match=r"two, a: .*metrics"):
        pool_entries("two")
    with pytest.raises(TaskError, match="'jsonl' should read source:name"):
        pool_entries("three")


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(UnknownName, match="did you mean 't0ho'"):
        suite("t0h")
    with pytest.raises(UnknownName, match="pool 't0held-in'"):
        pool_entries("t0held-in")
    assert len(POOLS) == 5
    assert len(SUITES) == 6


def test_bbl_measures_one_translation_by_rouge():
    assert [e.name for e in suite("bbl").entries if e.metric] == ["conlang_translation"]


def test_which_pools_and_suites_are_apart():
    def apart(pool, name):
        found = suite(name)
        check_no_shared_data(pool_entries(pool), found.entries, found.refuses, name)

    for name in ("t0ho", "bbh", "bbl", "bbh-cot-repo", "quickstart"):
        apart("t0-held-in", name)
    for name in ("t0ho", "bbh", "bbl", "bbh-cot-repo"):
        apart("bigbench", name)
    for name in ("t0ho", "bbh", "bbl", "bbh-cot-repo", "sisters"):
        apart("sisters", name)
    with pytest.raises(
        TaskError, match=r"'t0ho' is for models that never saw.*wsc \(super_glue/wsc.fixed\).*copa"
    ):
        apart("flan", "t0ho")
    with pytest.raises(TaskError, match="metaphor_boolean"):
        apart("bigbench", "quickstart")
    with pytest.raises(TaskError, match=r"one \(bigbench/causal_judgment\)"):
        found = suite("bbh-cot-repo")
        check_no_shared_data(
            [Entry("one", ("bigbench:causal_judgment",))], found.entries, found.refuses, found.name
        )


def test_natural_instructions_alone_refuse_t0ho():
    one = next(e for e in pool_entries("flan") if e.name == "niv2_textual_entailment")
    with pytest.raises(TaskError, match="natural-instructions"):
        check_no_shared_data([one], suite("t0ho").entries, suite("t0ho").refuses, "t0ho")


def test_bigbench_pool_keeps_away_from_hard_lite_and_what_is_near_them():
    hard = {e.name for e in suite("bbh").entries}
    held_out = hard | {e.name for e in suite("bbl").entries}
    trained = {s.removeprefix("bigbench:") for e in pool_entries("bigbench") for s in e.specs}
    assert not {t.partition("/")[0] for t in trained} & held_out
    assert not trained & set(pool_excluded("bigbench"))
    assert {bigbench_name(n) for n in NAMES} == hard
    assert tuple(e.name for e in suite("bbh-cot-repo").entries) == NAMES


def test_bigbench_names_exist():
    """Where BIG-bench is in the cache already: nothing is fetched for this."""
    from phatgoose.tasks import list_tasks
    from phatgoose.tasks.sources import bigbench_files

    if not (cache_folder() / "bigbench" / f"1.0.0-{bigbench_files.PACKAGE.sha256[:12]}").is_dir():
        pytest.skip("BIG-bench is not in the cache (`phatgoose tasks list bigbench` fetches it)")
    known = set(list_tasks("bigbench"))
    entries = [
        *pool_entries("bigbench"),
        *suite("bbh").entries,
        *suite("bbl").entries,
        *suite("quickstart").entries,
    ]
    asked = {split_spec(s).name for e in entries for s in e.specs if s.startswith("bigbench:")}
    assert asked <= known
    assert set(pool_excluded("bigbench")) <= known


PROMPTED = [
    *(e.specs[0] for e in pool_entries("flan") if e.specs[0].startswith("prompted:")),
    *(e.specs[0] for e in suite("t0ho").entries),
]
ORIGINAL = {
    "rte": 10,
    "cb": 15,
    "anli_r1": 15,
    "copa": 8,
    "hellaswag": 4,
    "story_cloze": 5,
    "wic": 10,
    "winogrande": 5,
    "wsc": 10,
}


def test_every_prompted_dataset_has_its_templates():
    """The paper's prompt counts, against promptsource's own files where they are in the cache."""
    if not (cache_folder() / "promptsource" / f"0.2.3-{PACKAGE.sha256[:12]}").is_dir():
        pytest.skip("promptsource's prompts are not in the cache (any `prompted:` task fetches them)")
    assert len(PROMPTED) == 42 + 11
    counts = {spec: len(choose_templates(split_spec(spec))) for spec in PROMPTED}
    for one in suite("t0ho").entries:
        if one.name in ORIGINAL:
            assert counts[one.specs[0]] == ORIGINAL[one.name], one.name
    by_name = {e.name: counts[e.specs[0]] for e in pool_entries("t0-held-in") if e.specs[0] in counts}
    assert (by_name["wiki_qa"], by_name["paws"], by_name["adversarial_qa"], by_name["imdb"]) == (5, 11, 5, 11)


@pytest.mark.parametrize(
    ("spec", "dataset"),
    [
        ("bigbench:hyperbaton", "bigbench/hyperbaton"),
        ("bbh:snarks", "bigbench/snarks"),
        ("prompted:super_glue/rte?templates=original", "super_glue/rte"),
        ("prompted:winogrande/winogrande_xl", "winogrande/winogrande_xl"),
        ("hf:aps/super_glue?config=rte&input={a}", "super_glue/rte"),
        ("hf:aps/super_glue/rte", "super_glue/rte"),
        ("hf:Rowan/hellaswag", "hellaswag rowan/hellaswag"),
        ("hf:super_glue/rte", "rte super_glue/rte"),
        ("hf:tasksource/bigbench?config=hyperbaton", "bigbench/hyperbaton"),
        ("hf:hails/bigbench?config=hyperbaton_zero_shot", "bigbench/hyperbaton"),
        ("hf:lukaemon/bbh?config=causal_judgement", "bigbench/causal_judgment"),
        ("hf:lukaemon/bbh/Causal_Judgement", "bigbench/causal_judgment"),
        ("hf:bigscience/P3?config=super_glue_rte_must_be_true", "p3/super_glue_rte_must_be_true"),
        ("hf:bigscience/P3/super_glue_rte_GPT_3_style", "p3/super_glue_rte_gpt_3_style"),
        ("hf:Muennighoff/natural-instructions", "muennighoff/natural-instructions natural-instructions"),
        ("p3:super_glue_rte_must_be_true", "p3/super_glue_rte_must_be_true"),
        ("bbh:causal_judgement", "bigbench/causal_judgment"),
        ("bbh:tracking_shuffled_objects_seven_objects", "bigbench/tracking_shuffled_objects"),
        ("flan:flan2021/glue/wnli:2.0.0", "glue/wnli"),
        ("flan:niv2/Textual Entailment", "natural-instructions"),
        ("jsonl:/a/../b.jsonl", "/b.jsonl"),
        ("hf:/data/super_glue", "/data/super_glue"),
    ],
)
def test_specs_name_their_dataset(spec, dataset):
    assert sorted(map(str, datasets_of(spec))) == dataset.split()


@pytest.mark.parametrize("spec", ["hf:a\0b", "jsonl:a\0b"])
def test_what_no_file_can_be_named_is_refused(spec):
    with pytest.raises(TaskError, match="null character"):
        datasets_of(spec)


def test_relative_paths_start_at_their_folder(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    file = str(tmp_path / "rows.jsonl")
    assert sorted(map(str, datasets_of("jsonl:rows.jsonl", tmp_path))) == [file]
    assert file in map(str, datasets_of("hf:rows.jsonl", tmp_path))
    assert file not in map(str, datasets_of("hf:rows.jsonl"))
    ours = {"up": str(tmp_path), "held": str(tmp_path / "other")}
    pool, held = Entry("up", ("jsonl:rows.jsonl",)), Entry("held", ("jsonl:rows.jsonl",))
    check_no_shared_data([pool], [held], frozenset(), "unseen", ours)
    for same in ({}, {"jsonl": str(tmp_path)}, {"up": str(tmp_path), "unseen": str(tmp_path)}):
        with pytest.raises(TaskError, match="up \\("):
            check_no_shared_data([pool], [held], frozenset(), "unseen", same)


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("hf:alice/qa", "hf:bob/qa", False),
        ("hf:alice/corpus/en", "hf:bob/other/en", False),
        ("hf:alice/corpus?config=en", "hf:bob/corpus?config=en", False),
        ("hf:alice/corpus?config=en", "hf:alice/corpus?config=de", False),
        ("hf:alice/corpus?config=en", "hf:Alice/corpus", True),
        ("hf:alice/anli", "prompted:anli?test=dev_r1", True),
        ("hf:alice/super_glue?config=rte", "hf:super_glue/rte", True),
        ("hf:lukaemon/bbh?config=causal_judgement", "hf:tasksource/bigbench?config=causal_judgment", True),
        ("hf:lukaemon/bbh?config=snarks", "hf:maveriq/bigbenchhard?config=snarks", True),
        ("hf:hails/bigbench?config=hyperbaton_zero_shot", "hf:tasksource/bigbench/hyperbaton", True),
        ("hf:bigscience/P3?config=glue_mrpc_equivalent", "hf:nyu-mll/glue?config=mrpc", True),
        ("hf:a/natural-instructions", "hf:b/super_natural_instructions", True),
        ("hf:lukaemon/bbh?config=snarks", "hf:tasksource/bigbench?config=hyperbaton", False),
    ],
)
def test_owners_tell_datasets_of_one_name_apart(ours, theirs, same):
    pool, held = [Entry("one", (ours,))], [Entry("two", (theirs,))]
    if same:
        with pytest.raises(TaskError, match="'unseen' is for models that never saw its data"):
            check_no_shared_data(pool, held, frozenset(), "unseen")
    else:
        check_no_shared_data(pool, held, frozenset(), "unseen")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("bbh:causal_judgement", "bbh"),
        ("bbh:tracking_shuffled_objects_three_objects", "bbh"),
        ("bigbench:logical_deduction/three_objects", "bbh"),
        ("bigbench:logical_deduction", "bbh-cot-repo"),
        ("bbh:logical_deduction_three_objects", "bbl"),
        ("bigbench:conceptual_combinations/contradictions", "bbl"),
        ("flan:niv2/Textual Entailment", "t0ho"),
        ("flan:flan2021/glue/wnli:2.0.0", "t0ho"),
        ("p3:super_glue_rte_GPT_3_style", "t0ho"),
        ("p3:anli_GPT_3_style_r1", "t0ho"),
        ("p3:winogrande_winogrande_debiased_Replace", "t0ho"),
        ("hf:super_glue?config=rte", "t0ho"),
        ("hf:nyu-mll/glue?config=rte", "t0ho"),
        ("hf:super_glue", "t0ho"),
        ("hf:super_glue/rte", "t0ho"),
        ("hf:aps/super_glue/cb", "t0ho"),
        ("hf:nyu-mll/glue/rte", "t0ho"),
        ("hf:facebook/anli", "t0ho"),
        ("hf:facebook/anli/plain_text", "t0ho"),
        ("hf:winogrande/winogrande_xl", "t0ho"),
        ("hf:allenai/winogrande?config=winogrande_debiased", "t0ho"),
        ("hf:story_cloze/2016", "t0ho"),
        ("hf:bigscience/P3/super_glue_rte_GPT_3_style", "t0ho"),
        ("hf:Open-Orca/FLAN", "t0ho"),
        ("hf:Muennighoff/natural-instructions", "t0ho"),
        ("bigbench:natural_instructions", "t0ho"),
        ("bigbench:natural_instructions/subtask033_winogrande_answer_generation", "t0ho"),
        ("bigbench:winowhy", "t0ho"),
        ("hf:lukaemon/bbh/causal_judgement", "bbh"),
        ("hf:maveriq/bigbenchhard?config=snarks", "bbh"),
        ("hf:maveriq/bigbenchhard", "bbh"),
        ("hf:tasksource/bigbench/hyperbaton", "bbh"),
        ("hf:hails/bigbench?config=hyperbaton_zero_shot", "bbh"),
        ("hf:tals/vitaminc", "bbl"),
    ],
)
def test_a_suite_is_refused_for_its_data_whichever_source_it_comes_from(spec, name):
    found = suite(name)
    with pytest.raises(TaskError, match=f"suite '{name}' is for models that never saw its data"):
        check_no_shared_data([Entry("one", (spec,))], found.entries, found.refuses, name)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("bigbench:logical_args", "bbh"),
        ("p3:super_glue_boolq_exam", "t0ho"),
        ("p3:quail_context", "t0ho"),
        ("hf:super_glue?config=boolq", "t0ho"),
        ("hf:aps/super_glue/boolq", "t0ho"),
        ("hf:tasksource/bigbench/logical_args", "bbh"),
        ("bigbench:natural_instructions/subtask004_mctaco_answer_generation_event_duration", "t0ho"),
    ],
)
def test_neighbours_by_name_are_let_in(spec, name):
    found = suite(name)
    check_no_shared_data([Entry("one", (spec,))], found.entries, found.refuses, name)


def test_an_entry_of_several_specs_is_one_task(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"input": f"a {i}", "target": "x"} for i in range(40)])
    write_rows(tmp_path / "b.jsonl", [{"input": f"b {i}", "target": "y"} for i in range(40)])
    both = Entry("both", ("jsonl:a.jsonl", "jsonl:b.jsonl"), metric="rougeL")
    task = load_entry(both, folders={"jsonl": tmp_path})
    rows = [*task.train, *task.validation, *task.test]
    assert task.name == "both"
    assert len(rows) == len({r.input for r in rows}) == 80
    assert task.source["metric"] == "rougeL"
    parts = [load_entry(Entry(s, (s,)), folders={"jsonl": tmp_path}) for s in both.specs]
    assert {e.input for e in task.test} == {e.input for t in parts for e in t.test}
    limited = load_entry(both, folders={"jsonl": tmp_path}, limit=3)
    assert len(limited.test) <= 3
    halves = load_entry(both, folders={"jsonl": tmp_path}, limit={"train": 20})
    assert sorted(e.input[0] for e in halves.train) == ["a"] * 10 + ["b"] * 10
    assert set(halves.train) < set(task.train)
    assert (halves.validation, halves.test) == (task.validation, task.test)


def test_shares_are_even_as_far_as_there_are_rows():
    assert even_shares([5, 5, 5], 7) == [3, 2, 2]
    assert even_shares([1, 9, 9], 10) == [1, 5, 4]
    assert even_shares([2, 2], 10) == [2, 2]
    assert even_shares([10, 10, 1], 20) == [10, 9, 1]
    assert even_shares([3], 0) == [0]


def test_validation_is_taken_behind_the_test_rows(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"input": f"a {i}", "target": "x", "split": "test"} for i in range(50)])
    task = load_entry(Entry("a", ("jsonl:a.jsonl",)), folders={"jsonl": tmp_path})
    assert not task.validation
    for test_rows, validation_rows, left in [
        (20, 8, (20, 30)),
        (40, 8, (40, 10)),
        (40, 20, (35, 15)),
        (100, 8, (42, 8)),
    ]:
        found = with_validation(task, test_rows, validation_rows)
        assert (len(found.test), len(found.validation)) == left
        assert found.test + found.validation == task.test
        assert with_validation(found, 5, 5) == found


PROMPTS = """
dataset: super_glue/cb
templates:
"""
PROMPT = """  {n}: !Template
    answer_choices: null
    id: {n}
    jinja: 'Prompt {n} of {{{{a}}}}. ||| {{{{b}}}}'
    metadata: !TemplateMetadata {{original_task: true}}
    name: p{n}
    reference: ''
"""


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    folder = tmp_path / "prompts/super_glue/cb"
    folder.mkdir(parents=True)
    (folder / "templates.yaml").write_text(PROMPTS + "".join(PROMPT.format(n=n) for n in range(5)))
    monkeypatch.setenv("PHATGOOSE_PROMPTSOURCE", str(tmp_path / "prompts"))
    read_templates.cache_clear()
    yield
    read_templates.cache_clear()


@pytest.mark.parametrize("rendered", [False, True])
def test_no_raw_row_is_measured_and_chosen_on(tmp_path, prompts, rendered):
    rows = [{"a": f"row {i}", "b": "yes"} for i in range(20)]
    if rendered:
        rows = [
            {"template": f"p{n}", "i": i, "prompt": f"Prompt {n} of row {i}.", "completion": "yes"}
            for i in range(20)
            for n in range(5)
        ]
    write_rows(tmp_path / "super_glue_cb.validation.jsonl", rows)
    one = Entry("cb", ("prompted:super_glue/cb?test=validation",))
    task = load_entry(one, folders={"prompted": tmp_path})
    assert len(task.test) == 100
    assert len(set(groups_of(task.test))) == 20
    assert all(
        len({e.input.partition(" of ")[2] for e in task.test if e.group == g}) == 1
        for g in {e.group for e in task.test}
    )
    for test_rows in (5, 20, 60, 100):
        found = with_validation(task, test_rows, 16)
        shown = [{e.input.partition(" of ")[2] for e in s} for s in (found.test, found.validation)]
        assert not shown[0] & shown[1]
        assert found.validation
        if len({e.group for e in task.test[:test_rows]}) <= 18:
            assert found.test == task.test[:test_rows]  # what is measured doesn't hang on choosing
        else:
            assert len(found.test) == min(test_rows, 90)
        assert with_validation(found, 5, 5) == found


def test_a_lone_raw_row_leaves_nothing_to_choose_on(tmp_path, prompts):
    write_rows(tmp_path / "super_glue_cb.validation.jsonl", [{"a": "it", "b": "yes"}])
    task = load_entry(
        Entry("cb", ("prompted:super_glue/cb?test=validation",)), folders={"prompted": tmp_path}
    )
    assert with_validation(task, 3, 2) == task


def test_no_row_is_set_aside_where_none_is_chosen_by():
    task = Task("t", (), (), tuple(Example(f"q {i}", ("a",)) for i in range(10)), {})
    assert with_validation(task, 10, 0) == task
    assert not task.validation


def test_groups_are_no_part_of_what_a_task_is(tmp_path):
    plain, grouped = Example("x", ("y",)), Example("x", ("y",), group="1")
    assert plain == grouped
    assert Task("t", (), (), (plain,)).hash == Task("t", (), (), (grouped,)).hash
    assert groups_of([plain, grouped, plain, grouped]) == (0, 1, 2, 1)


def test_a_folder_under_a_sources_name_is_that_sources_also_for_a_suite_of_the_name():
    given = {"bbh": "rows", "t0ho": "raw", "prompted": "rendered"}
    assert folder_for("bbh:web_of_lies", ("web_of_lies", "bbh"), given) == "rows"
    assert folder_for("bigbench:navigate", ("navigate", "bbh"), given) is None
    assert folder_for("prompted:wic", ("wic", "t0ho"), given) == "raw"
    assert folder_for("prompted:paws", ("paws", "t0-held-in"), given) == "rendered"
    assert (
        folder_for("prompted:story_cloze/2016", ("story_cloze", "t0ho"), {"story_cloze": "mine", **given})
        == "mine"
    )
    assert folder_for("prompted:story_cloze/2016", ("story_cloze", "t0ho"), {"story_cloze": "mine"}) == "mine"
    assert folder_for("prompted:wic", ("wic", "t0ho"), {"story_cloze": "mine"}) is None

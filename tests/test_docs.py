"""Examples in the documentation run, and its tables say what the code says."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest

from encoder_fixtures import make_encoder

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
RUN = [p for p in (ROOT / "docs" / "python.md", ROOT / "README.md") if p.exists()]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.fixture
def example_folder(tokenizer, make_base, make_expert, tmp_path, monkeypatch):
    """A folder to run examples in: a tiny base, and a plain PEFT adapter of it in `their-lora`."""
    folder, base = tmp_path / "here", make_base("llama")
    base.model.save_pretrained(folder / "tiny-llama")
    tokenizer.save_pretrained(folder / "tiny-llama")
    make_expert(base, gates=False).save(folder / "their-lora")
    make_encoder(folder / "encoder", max_tokens=60)
    monkeypatch.chdir(folder)
    return folder


def small(code, folder):
    """The same example with a tiny base for the default one, two steps for many, and a file for each BIG-bench task."""

    def as_file(match):
        name = match[1].rpartition("/")[2]
        rows = []
        for split, count in (("train", 20), ("validation", 4), ("test", 4)):
            rows += [
                {"input": f"{split} {i}: {name} of {i}?\nAnswer:", "target": f"red {i}", "split": split}
                for i in range(count)
            ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return f'"jsonl:{name}.jsonl"'

    code = code.replace('"smollm2-135m-instruct-q4"', '"./tiny-llama"').replace(
        '"all-minilm-l6-v2"', '"encoder"'
    )
    code = re.sub(r'"bigbench:([\w/]+)"', as_file, code)
    return re.sub(r"\bsteps=\d+", "steps=2", code)


@pytest.mark.parametrize("page", RUN, ids=lambda p: p.name)
def test_examples_run_one_after_the_other(page, example_folder, capsys):
    found = blocks(page)
    assert found
    names: dict = {}
    for number, code in enumerate(found):
        exec(compile(small(code, example_folder), f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_import_on_a_page_is_there(page):
    for code in blocks(page):
        for node in ast.walk(ast.parse(code, page.name)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("phatgoose"):
                module = importlib.import_module(str(node.module))
                assert [a.name for a in node.names if not hasattr(module, a.name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_file_of_the_package_that_a_page_names_is_there(page):
    package = ROOT / "src" / "phatgoose"
    for name in re.findall(r"`([\w/]+/\w+\.py)`", page.read_text(encoding="utf-8")):
        assert (package / name).exists() or (ROOT / name).exists(), name


def test_the_table_of_peft_settings_is_what_the_code_decides():
    from phatgoose.experts import adapterhub_rules, peft_rules

    for rules in (peft_rules, adapterhub_rules):
        assert rules.main(["--check", str(ROOT / "docs" / "experts-and-pools.md")]) == 0


def test_the_page_of_pools_and_suites_is_current():
    from phatgoose.cli import docs_pools

    assert _page("pools-and-suites") == docs_pools.markdown(), "run python -m phatgoose.cli.docs"


def test_the_page_of_pools_and_suites_is_complete():
    """Every entry has a row, once, in its own section, and every dataset that is left out or refused is named there."""
    from phatgoose.tasks.pools import POOLS, pool_entries
    from phatgoose.tasks.pools_bigbench import EXCLUDED
    from phatgoose.tasks.suites import SUITES, suite

    head, *parts = _page("pools-and-suites").split("\n## ")
    sections = dict(part.split("\n", 1) for part in parts)
    assert "leave_out" in head
    assert list(sections) == [*(f"Pool {name}" for name in POOLS), *(f"Suite {name}" for name in SUITES)]
    rows = {title: re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE) for title, text in sections.items()}
    held_in = [e.name for e in pool_entries("t0-held-in")]
    assert rows["Pool t0-held-in"] == held_in
    assert "all 36 of [pool t0-held-in](#pool-t0-held-in)" in sections["Pool flan"]
    assert held_in + rows["Pool flan"] == [e.name for e in pool_entries("flan")]
    assert rows["Pool bigbench"] == [*(e.name for e in pool_entries("bigbench")), *EXCLUDED]
    for name in SUITES:
        assert rows[f"Suite {name}"] == [e.name for e in suite(name).entries]
        for dataset in suite(name).refuses:
            assert f"\n- `{dataset}`\n" in sections[f"Suite {name}"]


@pytest.mark.parametrize(
    "row",
    [
        "| `paws` | `paws` | `labeled_final` | validation | all but `paraphrase-task` |  |",
        "| `wiki_bio` | `wiki_bio` |  | val | all |  |",
        "| `trec` | `trec` |  |  |  | a prompt of ours |",
        "| `niv2_fill_in_the_blank` | `niv2/Fill in The Blank` |",
        "| `color_rgb_hex` | `color/rgb`, `color/hex` |",
        "| `misconceptions` | true or false statements, as BIG-bench Lite's misconceptions_russian |",
        "| `anli_r2` | `anli` |  | dev_r2 | original |  |",
        "| `story_cloze` | `story_cloze` | `2016` | test | original | from your own copy |",
        "| `web_of_lies` | `web_of_lies` (<code>choices=Yes&#124;No</code>) |",
        "| `conlang_translation` | `conlang_translation` | scored by rougeL |",
    ],
)
def test_rows_of_pools_and_suites_say_what_is_read(row):
    assert row in _page("pools-and-suites").splitlines()


def test_every_setting_of_peft_has_a_rule_that_holds():
    """Each field of PEFT's configs: refused settings are refused, the others pass, at values other than the default."""
    from peft import IA3Config, LoraConfig

    from phatgoose.errors import ExpertError
    from phatgoose.experts.peft_rules import RULES, check_config

    for kind, config in (("LORA", LoraConfig), ("IA3", IA3Config)):
        assert {f.name for f in dataclasses.fields(config)} <= set(RULES[kind])
        for name, rule in RULES[kind].items():
            settings = {"peft_type": kind, name: "another" if rule.default != "another" else "other"}
            if name in ("peft_type", "init_lora_weights", "target_parameters") or rule.how == "refused":
                with pytest.raises(ExpertError, match=name):
                    check_config(settings, "here")
            else:
                check_config(settings, "here")
        with pytest.raises(ExpertError, match="unknown setting 'new'"):
            check_config({"peft_type": kind, "new": 1}, "here")


def test_tables_of_files_and_records_are_complete(make_base, make_expert, tmp_path):
    """Every key that is written to disk is on the page."""
    from phatgoose import Pool

    base, page = make_base("llama"), _page("experts-and-pools")
    Pool([make_expert(base)]).save(tmp_path / "pool")
    written = [tmp_path / "pool" / "pool.json", *tmp_path.glob("pool/experts/*/expert.json")]
    assert len(written) == 2
    for path in written:
        for key in json.loads(path.read_text()):
            assert f"`{key}`" in page, key
    for path in (tmp_path / "pool" / "experts" / "one").iterdir():
        assert path.name in page


def test_every_router_and_option_has_its_word():
    from phatgoose.routers import ROUTERS
    from phatgoose.tasks import columns, load

    for name in ROUTERS:
        assert re.search(rf"`{name}\b", _page("method"), re.IGNORECASE), name
    for option in columns.OPTIONS:
        assert f"`{option}=`" in _page("tasks"), option
    for source in load.SOURCES:
        assert f"`{source}:" in _page("tasks"), source


def _page(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")

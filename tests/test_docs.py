"""Examples in the documentation run, and its tables say what the code says."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
from pathlib import Path

import adapter_tables
import file_tree
import pools_and_suites
import pytest
import router_table
import serving_parameters

import cli
from pages import BLOCK, adapters, blocks, runnable

pytest_plugins = ["pages"]

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])


SETS = "sets up an environment: fetches gigabytes of packages"
HUB = "needs the Hub"
DATA = "needs data sets that aren't ours to give"
HOURS = "takes minutes to hours"
PACKAGE = "a package to install; tests/test_extending.py does"
NOT_RUN = {
    "bases.md": {'base = load_base("google/t5-xl-lm-adapt"': HUB, "import transformers as t": HUB},
    "experiments.md": {
        "phatgoose experiment recipes/bigbench-t0.toml": DATA,
        "phatgoose eval --pool pool --router base --router phatgoose --harness": HUB,
        "import lm_eval": HUB,
    },
    "experts-and-pools.md": {"phatgoose pool create pool org/one": HUB, "phatgoose push my-expert": HUB},
    "extending.md": {
        '"""A router and a task source': PACKAGE,
        "phatgoose routers angular": PACKAGE,
    },
    "performance.md": {"make bench": HOURS},
    "results.md": {"phatgoose experiment recipes/bigbench-t0.toml": DATA, "make quickstart": HOURS},
    "serving.md": {
        "serve run phatgoose.serving.replicas:app": "needs Ray Serve; tests/serving/test_replicas.py starts it"
    },
    "vllm.md": {"pip install": SETS, "vllm serve BASE": "needs vLLM; tests/vllm starts it"},
}
"""Page → how blocks begin that aren't run here → why."""
POOLS = ("serving.md", "tracing.md")
"""Pages that send the reader to "By hand" of index.md for their pool."""
RECIPES = "The recipes lie in `recipes/` of a clone"
WITH_BLOCKS = [p for p in PAGES if p.parent.name == "docs" and runnable(p)]


@pytest.fixture
def data(reader):
    """The two data files that index.md tells the reader to have."""
    for name in ("mine", "theirs"):
        assert f"`{name}.jsonl`" in _page("index")
        rows = [{"input": f"{i}: {name} of {i}?\nAnswer:", "target": f"red {i}"} for i in range(60)]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.slow(18)
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda p: p.name)
def test_every_block_runs(page, reader, data, make_base, make_expert):
    text = page.read_text(encoding="utf-8")
    if "adapters/*" in text:
        adapters(make_base, make_expert)
    if page.name in POOLS:
        assert "`pool` is a pool's folder, which [a few commands](index.md#by-hand) make" in text
        reader.read(ROOT / "docs" / "index.md", {}, only="pool create")
    if RECIPES in text:
        Path("recipes").symlink_to(ROOT / "recipes")
    reader.read(page, NOT_RUN.get(page.name, {}))


def test_every_page_whose_blocks_are_not_run_is_there():
    assert NOT_RUN.keys() <= {p.name for p in WITH_BLOCKS}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_stand_in_blocks_that_are_run(page):
    """Neither indented nor in blocks of plain text; cli.md's are synopses."""
    if page.name in ("cli.md", "CHANGELOG.md"):
        return
    for block in blocks(page):
        if block.language not in ("sh", "python"):
            assert not re.search(r"^(phatgoose|make|python|from|import) ", block.text, re.MULTILINE), block
    assert not re.search(
        r"^    (phatgoose|make|python) ", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tables_and_headings_are_whole(page):
    """Without an empty line before it, Markdown takes a table or a heading for text; without a rule below its
    first row, it takes a table for a paragraph."""
    lines = ["", *BLOCK.sub("", page.read_text(encoding="utf-8")).split("\n"), ""]
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        if line.startswith("#") or (line.startswith("|") and not before.startswith("|")):
            assert not before or before.startswith("<!--"), line
        if line.startswith("|") and not before.startswith("|"):
            assert after.startswith(("|---", "| ---")), line
        assert line != before or not line, line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_import_on_a_page_is_there(page):
    for code in (block.text for block in blocks(page) if block.language == "python"):
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
    path = ROOT / "docs" / "experts-and-pools.md"
    assert adapter_tables.page(path) == path.read_text(encoding="utf-8"), "run python docs/generate/cli.py"


def test_the_table_of_routers_is_current():
    path = ROOT / "docs" / "method.md"
    assert router_table.page(path) == path.read_text(encoding="utf-8"), "run python docs/generate/cli.py"


def test_the_page_of_pools_and_suites_is_current():
    assert _page("pools-and-suites") == pools_and_suites.markdown(), "run python docs/generate/cli.py"


def test_the_page_of_servings_parameters_is_current_and_complete():
    from phatgoose.serving.api.schema import ChatRequest, CompletionRequest

    page = _page("serving-parameters")
    assert page == serving_parameters.markdown(), "run python docs/generate/cli.py"
    names = {
        name for kind in (ChatRequest, CompletionRequest) for name in (*kind.model_fields, *kind.unsupported)
    }
    for name in names | serving_parameters.VLLM:
        assert page.count(f"| `{name}` |") == 1, name


def test_the_tree_of_files_is_current():
    path = ROOT / "docs" / "architecture.md"
    assert file_tree.page(path) == path.read_text(encoding="utf-8"), "run python docs/generate/cli.py"


def test_the_tree_has_every_file():
    listed = {path.name for path in file_tree.SOURCE.rglob("*") if path.suffix in file_tree.LISTED}
    names = [line.split()[0] for line in file_tree.tree().splitlines() if line.split()]
    assert listed - set(names) == {"__init__.py"}
    lines = file_tree.tree().splitlines()
    assert "shape.json" in " ".join(lines)
    assert any(
        " rules.toml " in x and x.endswith("What happens with each setting of an adapter") for x in lines
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", '"""No full stop"""'),
        ("a.py", '"""Two\nlines."""'),
        ("a.py", ""),
        ("a.py", f'"""{"x" * 100}."""'),
        ("a.toml", "# " + "x" * 101),
    ],
)
def test_a_file_without_its_sentence_is_one_line_of_error(name, text, tmp_path, monkeypatch, capsys):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / name).write_text(text)
    monkeypatch.setattr(file_tree, "SOURCE", tmp_path)
    monkeypatch.setattr(file_tree, "ROOMS", ("room",))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "architecture.md").write_text(f"{file_tree.BEGIN}\n{file_tree.END}")
    assert cli.main([str(tmp_path / "docs")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'room' / name}: begin its ")
    assert len(error.splitlines()) == 1
    (tmp_path / "room" / name).write_text('"""One sentence."""' if name == "a.py" else "x = 1")
    assert name in file_tree.tree()


def test_the_page_of_pools_and_suites_is_complete():
    """Every entry has a row, once, in its own section, and every dataset that is left out or refused is named there."""
    from phatgoose.tasks.lists.named import POOLS, SUITES, pool_entries, pool_excluded, suite

    head, *parts = _page("pools-and-suites").split("\n## ")
    sections = dict(part.split("\n", 1) for part in parts)
    assert "leave_out" in head
    assert list(sections) == [*(f"Pool {name}" for name in POOLS), *(f"Suite {name}" for name in SUITES)]
    rows = {title: re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE) for title, text in sections.items()}
    held_in = [e.name for e in pool_entries("t0-held-in")]
    assert rows["Pool t0-held-in"] == held_in
    assert "all 36 of [pool t0-held-in](#pool-t0-held-in)" in sections["Pool flan"]
    assert held_in + rows["Pool flan"] == [e.name for e in pool_entries("flan")]
    assert rows["Pool bigbench"] == [*(e.name for e in pool_entries("bigbench")), *pool_excluded("bigbench")]
    assert sorted(rows["Pool sisters"]) == sorted(e.name for e in pool_entries("sisters"))
    for name in SUITES:
        # A table for each source: a suite that mixes them has another order.
        assert sorted(rows[f"Suite {name}"]) == sorted(e.name for e in suite(name).entries)
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
        "| `tweet_hate` | `cardiffnlp/tweet_eval/hate` |  | offence (tweets); sisters: tweet_offensive |",
    ],
)
def test_rows_of_pools_and_suites_say_what_is_read(row):
    assert row in _page("pools-and-suites").splitlines()


def test_every_setting_of_peft_has_a_rule_that_holds():
    """Each field of PEFT's configs: refused settings are refused, the others pass, at values other than the default."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    from phatgoose.errors import ExpertError
    from phatgoose.experts.adapters.peft_rules import RULES, check_config
    from phatgoose.experts.adapters.peft_updates import KINDS

    checked = ("peft_type", "target_parameters", "bias", "modules_to_save")
    assert RULES.keys() == KINDS.keys() >= {"LORA", "IA3", "ADALORA", "VERA"}
    for kind in RULES:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        assert {f.name for f in dataclasses.fields(config)} <= set(RULES[kind])
        for name, rule in RULES[kind].items():
            settings = {"peft_type": kind, name: "another" if rule.default != "another" else "other"}
            if name in checked or (kind, name) == ("LORA", "init_lora_weights") or rule.how == "refused":
                with pytest.raises(ExpertError, match=name):
                    check_config(settings, "here")
            else:
                check_config(settings, "here")
        bias_only = "lora_only" if kind == "ADALORA" else f"{kind.lower()}_only"  # as PEFT says it
        if "bias" in RULES[kind]:
            check_config({"peft_type": kind, "bias": bias_only}, "here")
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

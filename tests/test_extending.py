"""Another package adds a router and a task source: the one that docs/extending.md shows, installed,
and packages that are broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import write_base
from pages import blocks, commands
from phatgoose.experts.pool import Pool

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the page's package, without a network."""
    package, site = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("site")
    toml, python = (next(b.text for b in blocks(PAGE) if b.language == kind) for kind in ("toml", "python"))
    (package / "pyproject.toml").write_text(toml, encoding="utf-8")
    (package / "goose_extras.py").write_text(python, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
    subprocess.run(
        [*pip, "--no-index", "--no-deps", "--no-build-isolation", "--target", site, package], check=True
    )
    return site


@pytest.fixture
def python(tmp_path):
    """python(code, *folders) → what it prints in a process of its own, with these folders on sys.path."""

    def run(code: str, *folders: Path) -> str:
        path = os.pathsep.join([*map(str, folders), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def declare(folder: Path, name: str, entries: str, **modules: str) -> Path:
    """A package that is installed in `folder` without pip."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    return folder


RUN = """
from typer.testing import CliRunner
from phatgoose.cli.main import app

def run(*words, code=0):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, (words, result.output, result.exception)
    return " ".join(result.output.split())

def within(text, output):
    assert text in output, output
"""


def test_the_page_s_package_is_used_by_name(site, python, make_base, make_expert, tmp_path):
    base = make_base("llama")
    write_base(base, tmp_path / "base")
    Pool([make_expert(base, "one"), make_expert(base, "two", seed=1)]).save(tmp_path / "pool")
    shell = next(b.text for b in blocks(PAGE) if b.language == "sh")
    typed = [words[1:] for words in commands(shell)]
    assert [words[0] for words in typed] == ["routers", "tasks", "eval", "generate"]
    typed[2] += ["--base", "base", "--out", "scores.json"]
    typed[3] += ["--base", "base", "--max-new-tokens", "2"]
    (tmp_path / "recipe.toml").write_text(
        'base = "base"\nsystems = ["base", "angular:sharpness=4.5"]\n[pool]\ntasks = { doubles = "sums:doubles" }\n'
    )
    code = f"""{RUN}
told = [run(*words) for words in {typed!r}]
for text in ("angular:sharpness=8.0,unsigned=false,take=best", "needs: gates", "opposite to a gate"):
    assert text in told[0], told[0]
assert told[1] == "sums:doubles sums:triples", told[1]
within("goose-extras", run("routers"))
within("sums goose-extras", run("tasks", "sources"))
within("--- answer: ", run("tasks", "show", "sums:doubles"))
within("is 'x', expected a number", \
run("generate", "a", "--pool", "pool", "--base", "base", "--router", "angular:sharpness=x", code=1))
within("expected true or false", \
run("generate", "a", "--pool", "pool", "--base", "base", "--router", "angular:unsigned=yes", code=1))
within("expected one of: best, all", \
run("generate", "a", "--pool", "pool", "--base", "base", "--router", "angular:take=two", code=1))
within("'angula': did you mean 'angular'", \
run("generate", "a", "--pool", "pool", "--base", "base", "--router", "angula", code=1))

from phatgoose.workflows.experiment.recipe import ExperimentRecipe
recipe = ExperimentRecipe.read("recipe.toml")
assert recipe.all_systems == ("base", "angular:sharpness=4.5")

import json, torch, phatgoose
from phatgoose.routers.masked import Masked, Switches
assert json.load(open("scores.json"))
router = phatgoose.parse_router("angular:sharpness=4.5,unsigned=true,take=all")
assert router.describe() == {{"router": "Angular", "sharpness": 4.5, "unsigned": True, "take": "all"}}
base, pool = phatgoose.load_base("base"), phatgoose.Pool.load("pool")
model = phatgoose.route(base, pool, Masked(router, Switches(torch.tensor([[True, False]]))))
ids = torch.arange(2, 8)[None]
masked = model(input_ids=ids).logits
alone = phatgoose.route(base, phatgoose.Pool([pool["one"]]), router)(input_ids=ids).logits
assert torch.allclose(masked, alone, atol=1e-5)
assert phatgoose.load_task("sums:doubles").source["rows"]["train"] > 50

for call, misspelt, meant in \
((phatgoose.parse_router, "angula", "angular"), (phatgoose.load_task, "sum:doubles", "sums")):
    try:
        call(misspelt)
    except phatgoose.errors.UnknownName as error:
        within(f"did you mean {{meant!r}}", str(error))
    else:
        raise AssertionError(misspelt)
"""
    python(code, site)


def test_nothing_of_a_package_is_imported_before_it_is_asked_for(site, python):
    python(
        "import sys, phatgoose\n"
        "from phatgoose.routers.parse import ROUTERS\n"
        "from phatgoose.tasks.load import SOURCES\n"
        "assert 'angular' in ROUTERS and 'sums' in SOURCES and 'angular' in list(ROUTERS)\n"
        "assert ROUTERS.package('angular') == SOURCES.package('sums') == 'goose-extras'\n"
        "assert not {'goose_extras', 'torch'} & set(sys.modules)",
        site,
    )


def test_broken_packages_are_named_and_hurt_nobody_else(python, tmp_path):
    entries = """
[phatgoose.routers]
broken = nowhere_at_all:Router
no-router = strange:NUMBER
Arrow = strange:NUMBER
merged = strange:NUMBER
twice = strange:NUMBER
[phatgoose.tasks]
broken = strange:missing
no-source = strange:NUMBER
jsonl = strange:NUMBER
"""
    site = declare(tmp_path / "site", "bad-goose", entries, strange="NUMBER = 3")
    declare(site, "other-goose", "[phatgoose.routers]\ntwice = strange:NUMBER\n")
    code = f"""{RUN}
def refused(text, *says, call=None):
    from phatgoose.errors import PluginError
    try:
        (call or phatgoose.parse_router)(text)
    except PluginError as error:
        assert all(word in str(error) for word in says), error
    else:
        raise AssertionError(text)

import phatgoose
refused("broken", "'broken'", "bad-goose", "nowhere_at_all", "can't be imported")
refused("no-router", "bad-goose", "extends")
refused("arrow", "'arrow'", "phatgoose and bad-goose")
refused("twice", "bad-goose and other-goose")
refused("merged", "phatgoose and bad-goose", call=phatgoose.routers.parse.parse_system)
refused("broken:x", "bad-goose", "AttributeError", call=phatgoose.load_task)
refused("no-source:x", "bad-goose", "TaskSource", call=phatgoose.load_task)
refused("jsonl:x", "phatgoose and bad-goose", call=phatgoose.load_task)
assert phatgoose.parse_router("spectr:top_k=1") == phatgoose.SpectR(1)
listed = run("routers")
assert "broken bad-goose" in listed and "lag:first=20,top_k=1" in listed, listed
within("broken bad-goose", run("tasks", "sources"))
within("bad-goose", run("tasks", "show", "broken:x", code=1))
from phatgoose.ui.session import offered_routers
assert "spectr" in [r["name"] for r in offered_routers()]
"""
    python(code, site)


CSV = """
import csv
from phatgoose.errors import TaskError
from phatgoose.tasks.sources.local_rows import rows_source

def read(path):
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, row
    except FileNotFoundError:
        raise TaskError(f"{path} does not exist.") from None

SOURCE = rows_source(read)
"""


def test_a_package_s_local_source_keeps_its_paths_to_itself(python, tmp_path):
    site = declare(
        tmp_path / "site", "csv-goose", "[phatgoose.tasks]\ncsv = csv_goose:SOURCE\n", csv_goose=CSV
    )
    declare(site, "bad-goose", "[phatgoose.tasks]\nbad = nowhere_at_all:SOURCE\n")
    (tmp_path / "plans").mkdir()
    rows = "\n".join(f"{i},{i * i},{('train', 'test')[i % 2]}" for i in range(40))
    (tmp_path / "plans" / "x.csv").write_text(f"question,answer,split\n{rows}\n", encoding="utf-8")
    code = """
import sys
from pathlib import Path
import phatgoose
from phatgoose.tasks.lists.same_dataset import datasets_of
from phatgoose.tasks.load import check_task, is_local, without_path, without_paths

assert without_path("bigbench:a/b") == "bigbench:a/b" and without_path("unknown:a/b") == "unknown:a/b"
assert without_path("bad:a/b") == "bad:a/b" and without_path("bad: ~/b") == "bad:b"
assert without_path("csv:/home/me/x.csv") == "csv:x.csv"
assert "csv_goose" not in sys.modules  # these ask other sources, or none
spec = "csv:plans/x.csv?input=question&target=answer"
assert without_path(spec) == "csv:x.csv?input=question&target=answer"
task = phatgoose.load_task(spec)
assert (task.name, len(task.test), task.source["file"]) == ("csv:x", 20, "x.csv")
assert without_paths(task.source)["spec"] == without_path(spec)
assert {d.name for d in datasets_of(spec)} == {str(Path("plans/x.csv").resolve())}
assert check_task(spec) is None
from phatgoose.workflows.experiment.steps import _is_comparable
assert not _is_comparable("csv:x.csv") and not _is_comparable("jsonl:x.jsonl")
assert _is_comparable("hf:x.csv") and _is_comparable("bigbench:a")
for wrong, says in (("csv:plans/y.csv", "does not exist"), ("csv:plans/x.csv?input=question", "line 2"),
                    (spec.replace("answer", "question"), 'field "answer" is not read')):
    try:
        phatgoose.load_task(wrong)
    except phatgoose.errors.TaskError as error:
        assert says in str(error), error
    else:
        raise AssertionError(wrong)
"""
    python(code, site)


def test_the_page_says_what_the_contract_has():
    from phatgoose.routers.router import BoundRouter, Router

    for name in re.findall(r"\*\*`(\w+)", PAGE.read_text(encoding="utf-8")):
        assert name in ("ByScores", "BoundRouter") or hasattr(Router, name), name
    for name in ("needs", "chooses", "paper", "check", "prepared", "reads", "offers_null"):
        assert hasattr(Router, name)
        assert f"`{name}" in PAGE.read_text(encoding="utf-8")
    assert hasattr(BoundRouter, "by_gates")

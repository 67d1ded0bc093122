"""Pools and recipes that come with phatgoose are found by name, are never written to, and are in the wheel."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import files_of
from phatgoose import shipped
from phatgoose.cli.main import app
from phatgoose.errors import PoolError
from phatgoose.experts.pool import Pool
from phatgoose.workflows.experiment.recipe import ExperimentRecipe, RecipeError

ROOT = Path(__file__).parents[1]
POOL = ROOT / "pools" / "bigbench-t0"
sys.path.insert(0, str(ROOT))


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_they_are_those_of_the_repository():
    assert shipped.pools() == {p.name: p for p in (ROOT / "pools").iterdir()}
    assert shipped.recipes() == {p.stem: p for p in (ROOT / "recipes").glob("*.toml")}


def test_a_folder_of_the_user_goes_first(elsewhere, make_base, make_expert):
    assert shipped.pool_folder("bigbench-t0") == POOL
    assert shipped.own_folder("bigbench-t0") is None
    Pool([make_expert(make_base("llama"))]).save(elsewhere / "bigbench-t0")
    assert shipped.pool_folder("bigbench-t0") == shipped.own_folder("bigbench-t0") == Path("bigbench-t0")
    assert Pool.load("bigbench-t0").names == ("one",)
    assert shipped.pool_folder("bigbench-t0", near=Path("other")) == POOL
    assert shipped.pool_folder("other") == shipped.own_folder("other") == Path("other")


def test_a_pool_is_read_by_name_and_written_only_as_a_copy(elsewhere):
    before = files_of(POOL)
    assert "metaphor_boolean" in run("pool", "list", "bigbench-t0").stdout
    for change in (("remove", "bigbench-t0", "qqp"), ("pack", "bigbench-t0"), ("unpack", "bigbench-t0")):
        refused = run("pool", *change)
        assert refused.exit_code == 1
        assert "comes with phatgoose" in refused.stderr
        assert "phatgoose pool pull bigbench-t0 FOLDER" in refused.stderr
    assert not list(elsewhere.iterdir())
    assert run("pool", "pull", "bigbench-t0", "mine").exit_code == 0
    assert files_of(elsewhere / "mine") == before
    assert "mine" in run("pool", "pull", "bigbench-t0", "mine").stderr
    assert run("pool", "add", "bigbench-t0", "mine/experts/qqp", "--name", "again").exit_code == 1
    assert run("pool", "remove", "mine", "qqp").exit_code == 0
    assert files_of(POOL) == before
    for more in ({"revision": "main"}, {"subfolder": "a"}):
        with pytest.raises(PoolError, match="has no revisions or subfolders"):
            Pool.pull("bigbench-t0", **more)
    unknown = run("pool", "list", "bigbench-t1").stderr
    assert "not a folder" in unknown
    assert "bigbench-t0" in unknown


def test_a_recipe_is_read_by_name(elsewhere):
    assert ExperimentRecipe.read("smoke") == ExperimentRecipe.read(ROOT / "recipes" / "smoke.toml")
    assert run("experiment", "smoke", "--check").exit_code == 0
    with pytest.raises(RecipeError, match=r"These come with phatgoose: .*smoke"):
        ExperimentRecipe.read("smokey")
    (elsewhere / "smoke").write_text("no = recipe", encoding="utf-8")
    with pytest.raises(RecipeError, match="Invalid value"):
        ExperimentRecipe.read("smoke")


def test_a_recipe_names_a_shipped_pool(elsewhere):
    text = (ROOT / "recipes" / "bigbench-t0-gander.toml").read_text(encoding="utf-8")
    named = text.replace('"../pools/bigbench-t0"', '"bigbench-t0"')
    assert named != text
    (elsewhere / "own.toml").write_text(named, encoding="utf-8")
    assert Path(ExperimentRecipe.read("own.toml").pool.folder) == POOL
    assert Path(ExperimentRecipe.read("smoke", pool="bigbench-t0").pool.folder) == POOL


def test_vllm_takes_a_shipped_pool():
    from phatgoose.vllm.settings import Settings

    assert Settings.parse({"pool": "bigbench-t0"}).pool == str(POOL)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without an environment of its own, in two seconds."""
    pytest.importorskip("hatchling", reason="needs hatchling, which `make test` installs")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as opened:
        yield opened


def test_the_wheel_has_what_the_code_reads_and_nothing_else(wheel):
    there = {"src/phatgoose": "phatgoose", "pools": "phatgoose/pools", "recipes": "phatgoose/recipes"}
    wanted = {
        f"{inside}/{path.relative_to(ROOT / own)}"
        for own, inside in there.items()
        for path in (ROOT / own).rglob("*")
        if path.is_file() and path.name != ".lock" and "__pycache__" not in path.parts
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == wanted
    assert wheel.read("phatgoose/pools/bigbench-t0/pool.json") == (POOL / "pool.json").read_bytes()


def test_the_wheels_metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith("METADATA"))
    found = Parser().parsestr(wheel.read(name).decode())
    assert found["Description-Content-Type"] == "text/markdown"
    assert "](docs/" not in found.get_payload()
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found["Version"] == declared["version"]
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 15)} <= set(
        found.get_all("Classifier")
    )


def test_the_readme_reads_well_outside_the_repository():
    pytest.importorskip("hatchling", reason="needs hatchling, which `make test` installs")
    from hatch_build import outside

    text = "![A goose.](docs/goose.svg) [all\nnumbers](docs/results.md#all), [paper](https://x.org), [here](#use)"
    assert outside(text, "https://host/o/r", "v1") == (
        "![A goose.](https://host/o/r/raw/v1/docs/goose.svg) "
        "[all\nnumbers](https://host/o/r/blob/v1/docs/results.md#all), [paper](https://x.org), [here](#use)"
    )
    assert outside(text, "", "v1") == "*A goose.* all\nnumbers, [paper](https://x.org), [here](#use)"

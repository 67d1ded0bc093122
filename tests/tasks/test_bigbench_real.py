"""The real archive, fetched on first use; skipped where it is neither cached nor to be had."""

import pytest

from phatgoose.errors import DownloadError, StorageError
from phatgoose.tasks import list_tasks, load_task
from phatgoose.tasks.sources import bigbench_files
from phatgoose.tasks.splits import normalise

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def archive():
    try:
        return bigbench_files.root(None)
    except (DownloadError, StorageError) as cause:
        pytest.skip(f"BIG-bench can't be had here: {cause}")


def test_names(archive):
    names = list_tasks("bigbench")
    assert len(names) == 1041
    assert {"social_iqa", "linguistic_mappings", "linguistic_mappings/past_tense_json"} <= set(names)


def test_past_tense(archive):
    task = load_task("bigbench:linguistic_mappings/past_tense_json")
    by_prompt = {e.input: e for s in (task.train, task.validation, task.test) for e in s}
    assert by_prompt["Today I walk. Yesterday I\nAnswer:"].targets == ("walked",)
    assert sum(task.source["rows"].values()) == 1775
    assert task.source["scored_as"] == ["exact match"]


def test_social_iqa(archive):
    task = load_task("bigbench:social_iqa")
    assert task.source["scored_as"] == ["rank classification"]
    for e in task.test:
        assert all(f"\n  choice: {c}" in e.input for c in e.choices)
    assert not {normalise(e.input) for e in task.train} & {normalise(e.input) for e in task.test}


def test_a_container_is_its_subtasks(archive):
    whole = load_task("bigbench:linguistic_mappings")
    assert len(whole.source["subtasks"]) > 10
    assert {e.input for e in load_task("bigbench:linguistic_mappings/plural_json").test} <= {
        e.input for e in whole.test
    }

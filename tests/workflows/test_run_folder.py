"""A run's folder: whose it is, and that one run at a time works in it."""

from __future__ import annotations

import pytest

from phatgoose.errors import StorageError
from phatgoose.workflows.experiment.recipe import ExperimentRecipe
from phatgoose.workflows.experiment.run import clear, locked_folder, run_experiment
from phatgoose.workflows.quickstart import run_quickstart


def test_one_run_at_a_time(tmp_path):
    with locked_folder(tmp_path / "out", "quickstart"):
        (tmp_path / "out" / "experts").mkdir()
        with pytest.raises(StorageError, match="another run is at work"):
            run_quickstart(tmp_path / "out", fresh=True)
        assert (tmp_path / "out" / "experts").exists()
        clear(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".phatgoose-quickstart"]
    with (
        locked_folder(tmp_path / "other", "experiment"),
        pytest.raises(StorageError, match="another run is at work"),
    ):
        run_experiment(ExperimentRecipe.read("smoke"), tmp_path / "other", fresh=True)


@pytest.mark.parametrize(("mine", "other"), [("quickstart", "experiment"), ("experiment", "quickstart")])
def test_a_folder_of_something_else_is_left_alone(tmp_path, mine, other):
    with locked_folder(tmp_path / "out", other):
        pass
    with (
        pytest.raises(StorageError, match=f"is not an? {mine}'s folder"),
        locked_folder(tmp_path / "out", mine),
    ):
        pass

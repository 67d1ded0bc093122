"""`flan:` from a folder: zero-shot rows only, names as files, clear refusals."""

from __future__ import annotations

import pytest

from conftest import write_rows
from phatgoose.errors import TaskError
from phatgoose.tasks import load_task
from phatgoose.tasks.load import check_task


def test_zero_shot_rows_of_a_local_file(tmp_path):
    rows = [
        {"inputs": f"q {i}", "targets": f"a {i}", "_template_type": ("zs_opt", "fs_opt")[i % 2]}
        for i in range(100)
    ]
    write_rows(tmp_path / "flan2021_ai2_arc_ARC-Easy_1.0.0.jsonl", rows)
    task = load_task("flan:flan2021/ai2_arc/ARC-Easy:1.0.0", folder=tmp_path)
    kept = [*task.train, *task.validation, *task.test]
    assert len(kept) == 50
    assert all(int(e.input.split()[1]) % 2 == 0 and e.choices is None for e in kept)
    assert task.source["dropped"] == {"few_shot": 50}


def test_refusals(tmp_path):
    with pytest.raises(TaskError, match=r"no niv2_Pos_Tagging.jsonl"):
        load_task("flan:niv2/Pos Tagging", folder=tmp_path)
    with pytest.raises(TaskError, match="a category of Natural Instructions"):
        load_task("flan:niv2/Translation")
    with pytest.raises(TaskError, match="flan:COLLECTION/TASK"):
        load_task("flan:translation", folder=tmp_path)
    (tmp_path / "dialog_qrecc.jsonl").write_text('{"input": "x"}\n')
    with pytest.raises(TaskError, match='expected texts in "inputs"'):
        load_task("flan:dialog/qrecc", folder=tmp_path)
    (tmp_path / "dialog_qrecc.jsonl").write_text('{"inputs": "\\ud800", "targets": "x"}\n')
    with pytest.raises(TaskError, match=r"flan:dialog/qrecc, row 0: text that isn't valid Unicode"):
        load_task("flan:dialog/qrecc", folder=tmp_path)
    for rows in ("x", "0", "-1", "²"):
        for call in (load_task, check_task):
            with pytest.raises(TaskError, match="rows must be a number of at least 1"):
                call(f"flan:dialog/qrecc?rows={rows}", folder=tmp_path)

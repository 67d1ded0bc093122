"""`phatgoose eval` on several routers: differences are paired by rows, and rows of one raw row are drawn together."""

from __future__ import annotations

import numpy as np

from phatgoose.cli.measure.eval import _show_differences
from phatgoose.evaluation.statistics import paired_difference
from phatgoose.records import Prediction, Scores, TaskScore


def scores(points, groups):
    predictions = tuple(Prediction(bool(p), "x") for p in points)
    mean = float(np.mean(points))
    task = TaskScore(
        "t", "test", "exact match", mean, 0.0, 1.0, len(points), predictions=predictions, groups=groups
    )
    return Scores((task,), mean, 0.0, 1.0)


def test_differences_draw_raw_rows(capsys):
    base, routed, groups = [0] * 8 + [1] * 4, [1] * 4 + [0] * 4 + [1] * 4, (0,) * 4 + (1,) * 4 + (2,) * 4
    _show_differences({"base": scores(base, groups), "phatgoose": scores(routed, groups)})
    mean, low, high = paired_difference([routed], [base], groups=[groups])
    plain = paired_difference([routed], [base])
    assert high - low > plain[2] - plain[1]
    said = capsys.readouterr().out
    assert f"phatgoose − base: {mean:+.3f} [{low:+.3f}, {high:+.3f}], paired by rows" in said

"""A tiny base and three tasks in a folder, for experiments and quickstarts."""

from __future__ import annotations

from conftest import write_base, write_rows

COMMON = {
    "rows_per_step": 4, "rows_per_batch": 4, "max_length": 96, "validation_rows": 4, "validate_every": 2,
    "save_every": 1, "learning_rate": 1e-2,
}  # fmt: skip


def write_place(folder, base, held_choices=True):
    """Writes the base, and 60 rows each of "upper", "choice" and "held": its rows have choices if `held_choices`."""
    write_base(base, folder / "base")
    held = [{"input": f"what is {i}?", "target": str(i)} for i in range(60)]
    rows = {
        "upper": [{"input": f"upper of {i}:", "target": "yes"} for i in range(60)],
        "choice": [
            {"input": f"is {i} even?", "target": ("no", "yes")[i % 2 == 0], "choices": ["yes", "no"]}
            for i in range(60)
        ],
        "held": [{**row, "choices": [row["target"], "none"]} if held_choices else row for row in held],
    }
    for name, lines in rows.items():
        write_rows(folder / f"{name}.jsonl", lines)
    return folder


def recipe_data(place, common=COMMON, **changes):
    """A recipe of that folder's two experts and its held-out task, without systems."""
    return {
        "base": f"{place}/base",
        "dtype": "float32",
        "pool": {"tasks": {n: f"jsonl:{place}/{n}.jsonl" for n in ("upper", "choice")}, "train_rows": 20},
        "measure": {
            "suites": ["in-pool", "unseen"], "tasks": {"held": f"jsonl:{place}/held.jsonl"}, "test_rows": 6,
            "choice_rows": 3,
        },
        "expert": {"rank": 2, "alpha": 4, "steps": 4, **common},
        "gate": {"steps": 3, **common},
        **changes,
    }  # fmt: skip

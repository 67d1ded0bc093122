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

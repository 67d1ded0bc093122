"""Experiments: a recipe in TOML → experts, gates, scores of every system, a page.

Read `run.py` first; then `recipe.py` (what is asked), `steps.py` (what is done), `results.py` (what came out).
In: an `ExperimentRecipe` and a folder. Out: that folder with results.json, results.md, plot.svg and a page.
A new kind of system goes to `systems.py`, a new step to `steps.py` and `run.py`.
"""

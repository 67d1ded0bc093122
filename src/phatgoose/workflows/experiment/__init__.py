"""An experiment: a recipe in TOML → experts, gates, scores of every system on every task, a report and a page.

Read `run.py` first; then `recipe.py` (what is asked), `steps.py` (what is done) and `results.py` (what came out).
"""

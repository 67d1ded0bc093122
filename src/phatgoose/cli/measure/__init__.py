"""Commands that measure: tasks, routers, eval, experiment, quickstart, report.

In: tasks and pools, or a recipe. Out: tables, results.json, a page. `show.py` prints, for all commands.
"""

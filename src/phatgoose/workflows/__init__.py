"""What spans the rooms below: contributions, experiments, pages, explanations.

In: a base, a pool, tasks or a recipe. Out: experts, results, pages. `experiment/` runs a recipe; the quickstart is
one of its recipes (`recipes/`). A new command's work goes here if it needs two rooms below; the command itself goes
to `cli/`.
"""

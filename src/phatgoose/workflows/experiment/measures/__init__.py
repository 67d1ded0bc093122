"""What an experiment measures beside accuracy: values from stored predictions, comparisons, tables.

In: scores with their predictions, and each row's right answers. Out: `measures` of a suite in results.json, and its
sections of results.md. values.py is the arithmetic, compare.py the comparisons, tables.py the tables. A new measure
goes to `MEASURES` and `statistics_of` in values.py, and into the table in docs/experiments.md.
"""

"""Task sources: one file each, with `load(spec, folder, fractions) -> Task`.

In: what stands behind the colon of `source:name`, and a folder or the Hub. Out: a `Task` with its three splits.
A new source is a file here and a line in `SOURCES` of `tasks/load.py`.
"""

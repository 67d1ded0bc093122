"""`jsonl:PATH`: one JSON object a line, plain or gzipped.

Its fields and options are those of all files of rows, see `local_rows`:
`jsonl:rte.jsonl.gz?input={premise} Question: {hypothesis}?&choices=True|False&answer_index=label&ignore=idx`.
"""

from __future__ import annotations

from phatgoose.tasks.sources.local_files import read_lines
from phatgoose.tasks.sources.local_rows import rows_source

SOURCE = rows_source(read_lines)

"""Tasks: text data as prompts, answers and choices, in three disjoint splits.

In: a spec such as `bigbench:social_iqa` or `jsonl:my.jsonl`. Out: a `Task` of `Example`s (records.py). `load_task` goes

    spec.py, load.py   a spec → its source (sources/, one file each)
    columns.py         a row of named columns → an example; messages.py: a conversation → one for each turn
    examples.py        the rules that all rows obey, whatever their source
    splits.py          the split rule, and `build_task`, in which every source ends

lists/ holds named pools and suites of tasks. contamination.py finds held-out rows that share text with training
rows, and tokenizer_loss.py the tasks that a tokenizer can't write. A new source: see sources/; a new pool or
suite: see lists/.
"""

from phatgoose.records import Example, Task
from phatgoose.tasks.examples import make_example, read_examples
from phatgoose.tasks.load import list_tasks, load_task
from phatgoose.tasks.sources import TaskSource
from phatgoose.tasks.spec import TaskSpec, split_spec
from phatgoose.tasks.splits import Fractions, build_task

__all__ = [
    "Example",
    "Fractions",
    "Task",
    "TaskSource",
    "TaskSpec",
    "build_task",
    "list_tasks",
    "load_task",
    "make_example",
    "read_examples",
    "split_spec",
]

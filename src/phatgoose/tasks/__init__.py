"""Text in: one source, one function → Task; batch.py: examples → tensors."""

from phatgoose.records import Example, Task
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
    "split_spec",
]

"""Downstream tasks: labelled examples to fine-tune for, and the metrics that tell how well it went.

`load_task` finds a task by name: a packaged one, one of GLUE's (from a folder of its TSV or JSONL files, or the hub),
or `custom` for files of one's own. A task is examples in three splits, what is predicted, and which metrics count.
"""

from compressor.tasks.task import KINDS, Example, Task, TaskSource
from compressor.tasks.tasks import TASKS, load_task

__all__ = ["KINDS", "TASKS", "Example", "Task", "TaskSource", "load_task"]

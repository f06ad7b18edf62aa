"""What is learned: a table of kinds, each of which turns a task's files into batches and measures."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_ga.experiments.suites.cell import Cell
    from lora_ga.experiments.suites.sources import Sources
    from lora_ga.experiments.suites.spec import Task
    from lora_ga.experiments.tasks.prepared import PreparedTask

# Kind → module here, with check(task, sources) and prepare(cell, sources).
KINDS = ("text", "classes", "seq2seq", "instruct")


def check(task: Task, sources: Sources) -> list[str]:
    """Looks at a task's model and files without the network and without training.

    Args:
        task: The task.
        sources: Where things are.

    Returns:
        What was found, in words: the model's fields, the files' columns.

    Raises:
        ValueError: The kind is not known, or a file, a column or a field is not as the task says.
    """
    if task.kind not in KINDS:
        raise ValueError(f"kind is {task.kind!r}; the kinds are {', '.join(KINDS)}.")
    return importlib.import_module(f"{__name__}.{task.kind}").check(task, sources)


def prepare(cell: Cell, sources: Sources) -> PreparedTask:
    """Loads the base model and the data of a cell."""
    return importlib.import_module(f"{__name__}.{cell.task.kind}").prepare(cell, sources)

"""The kinds of task. Each kind turns the files of a task into batches and metrics."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lora_ga.experiments import judging

if TYPE_CHECKING:
    from lora_ga.experiments.suites.cells import Cell
    from lora_ga.experiments.suites.sources import Sources
    from lora_ga.experiments.suites.spec import Task
    from lora_ga.experiments.tasks.prepared import PreparedTask

# Each kind is a module of this package, with check(task, sources) and prepare(cell, sources). Kind → what its `measure`
# returns, on the tuning split and on the reported one.
KINDS = {
    "text": ("loss",),
    "classes": ("loss", "accuracy", "f1", "matthews"),
    "seq2seq": ("loss", "accuracy"),
    "instruct": ("loss",),
}
OF_TWO_CLASSES = ("f1", "matthews")


def split_metrics(task: Task) -> tuple[str, ...]:
    """The metrics of a task's tuning split and reported split."""
    return tuple(name for name in KINDS[task.kind] if task.labels == 2 or name not in OF_TWO_CLASSES)


def evaluated_metrics(task: Task) -> tuple[str, ...]:
    """The metrics that the evaluation of the trained model adds to those of the reported split."""
    return judging.metrics(task.evaluation) if task.kind == "instruct" else ()


def check(task: Task, sources: Sources) -> list[str]:
    """Checks the model and the files of a task without network access and without training.

    Args:
        task: The task.
        sources: Resolves the references to models and files.

    Returns:
        One text for each thing that was found: the model with its fields, each file with its columns.

    Raises:
        ValueError: The kind is unknown, or a file, a column or a model field differs from the task's description.
    """
    if task.kind not in KINDS:
        raise ValueError(f"kind is {task.kind!r}; the kinds are {', '.join(KINDS)}.")
    return importlib.import_module(f"{__name__}.{task.kind}").check(task, sources)


def prepare(cell: Cell, sources: Sources) -> PreparedTask:
    """Loads the base model and the data of a cell."""
    return importlib.import_module(f"{__name__}.{cell.task.kind}").prepare(cell, sources)

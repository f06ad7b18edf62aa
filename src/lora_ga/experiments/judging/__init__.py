"""Evaluation of a trained model by its answers. Each way is a module with `check`, `preflight` and `run`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ga.experiments.suites.sources import Sources
    from lora_ga.experiments.suites.spec import Task

WAYS = ("harness", "greedy", "judge")
RATINGS = ("mt_bench", "first_turn", "second_turn")  # the metrics of a judge; the others have one, with the test's name


def metrics(evaluation: Mapping[str, Any]) -> tuple[str, ...]:
    """The metrics that an evaluation returns; none without one."""
    if evaluation.get("by") == "judge":
        return RATINGS
    return (evaluation["test"],) if "test" in evaluation else ()


def check(task: Task, sources: Sources) -> list[str]:
    """Checks what an evaluation needs.

    Args:
        task: The task.
        sources: Resolves the references to models and files.

    Returns:
        One text for each thing that was found.

    Raises:
        ValueError: There is no such way, or something is missing.
    """
    if not task.evaluation:
        return []
    way = task.evaluation.get("by")
    if way not in WAYS:
        raise ValueError(f"evaluation: by is {way!r}; it must be one of {', '.join(WAYS)}.")
    return importlib.import_module(f"{__name__}.{way}").check(task, sources)


def evaluation(task: Task, sources: Sources, tokenizer: Any, seed: int) -> Callable[[Any], dict[str, float]] | None:
    """The evaluation of a task's trained model.

    Args:
        task: The task.
        sources: Resolves the references to models and files.
        tokenizer: The tokenizer of the model.
        seed: Seed of sampled answers.

    Returns:
        A function of the trained model that returns metrics; None if the task has no evaluation.
    """
    if not task.evaluation:
        return None
    module = importlib.import_module(f"{__name__}.{task.evaluation['by']}")
    module.preflight(task, sources)  # before hours of training
    return lambda model: module.run(model, tokenizer, task, sources, seed)

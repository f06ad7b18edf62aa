"""How a trained model's own answers are judged: a table of ways, each with check, preflight and run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ga.experiments.suites.sources import Sources
    from lora_ga.experiments.suites.spec import Task

WAYS = ("harness", "judge")


def check(task: Task, sources: Sources) -> list[str]:
    """Looks at what an evaluation needs.

    Args:
        task: The task.
        sources: Where things are.

    Returns:
        What was found, in words.

    Raises:
        ValueError: There is no such way, or something is not there.
    """
    if not task.evaluation:
        return []
    way = task.evaluation.get("by")
    if way not in WAYS:
        raise ValueError(f"evaluation: by is {way!r}; it must be one of {', '.join(WAYS)}.")
    return importlib.import_module(f"{__name__}.{way}").check(task, sources)


def evaluation(task: Task, sources: Sources, tokenizer: Any, seed: int) -> Callable[[Any], dict[str, float]] | None:
    """What is done with the trained model; None if its losses say all.

    Args:
        task: The task.
        sources: Where things are.
        tokenizer: Of the model.
        seed: Of what is drawn.

    Returns:
        The model → metrics.
    """
    if not task.evaluation:
        return None
    module = importlib.import_module(f"{__name__}.{task.evaluation['by']}")
    module.preflight(task, sources)  # before hours of training, and not after
    return lambda model: module.run(model, tokenizer, task, sources, seed)

"""One run of a grid: everything that decides its result, and the digest by which it is known."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_ga.experiments.methods import non_default_options
from lora_ga.experiments.suites.spec import Settings, Suite, Task


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        suite: Name, for people.
        task_name: Of the suite, for people.
        label: Of the variant, for people.
        task: The task.
        method: Name of the method.
        options: Those of the method that are not its defaults.
        settings: Those of the suite, the task and the variant together.
        learning_rate: Of everything but a new head.
        seed: Of the order of the data, the head, the adapter and dropout.
    """

    suite: str
    task_name: str
    label: str
    task: Task
    method: str
    options: Mapping[str, Any]
    settings: Settings
    learning_rate: float
    seed: int

    def identity(self) -> dict[str, Any]:
        """What decides the result, as plain values: no names for people, no guesses, nothing that is only looked at."""
        aside = {"seconds", "settings", "fields", "choose"}
        task = {key: value for key, value in changed(self.task).items() if key not in aside}
        return {
            "task": task,
            "method": self.method,
            "options": dict(self.options),
            "settings": changed_settings(self.settings),
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }

    def digest(self) -> str:
        """12 hexadecimal digits of `identity`: equal cells of any two suites have one."""
        text = json.dumps(self.identity(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def title(self) -> str:
        """The cell in words."""
        return f"{self.task_name}/{self.label} lr {self.learning_rate:g} seed {self.seed}"


def changed(settings: Any) -> dict[str, Any]:
    """The values of a dataclass that are not its defaults.

    A digest made of these stays the same when a later version has one setting more. No default may be changed, here or
    in a method.

    Args:
        settings: A dataclass.

    Returns:
        Name → value.
    """
    values = {}
    for item in dataclasses.fields(settings):
        default = item.default_factory() if callable(item.default_factory) else item.default
        value = getattr(settings, item.name)
        if value != default:
            values[item.name] = dict(value) if isinstance(value, Mapping) else value
    return values


def changed_settings(settings: Settings) -> dict[str, Any]:
    """The settings that are not the defaults, by the names that records use."""
    defaults = Settings().recorded()
    return {name: value for name, value in settings.recorded().items() if value != defaults[name]}


def rate_at(point: int) -> float:
    """The learning rate √10^point, to three digits."""
    return float(f"{10 ** (point / 2):.3g}")


def cell_of(suite: Suite, task: str, label: str, learning_rate: float, seed: int) -> Cell:
    """The cell of a suite."""
    variant = suite.methods[label]
    options = non_default_options(variant.method, variant.options)
    settings = suite.settings_of(task, label)
    return Cell(suite.name, task, label, suite.tasks[task], variant.method, options, settings, learning_rate, seed)

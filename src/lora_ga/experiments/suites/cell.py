"""One run of a suite: everything that decides its result, and the digest that identifies it."""

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
        suite: The suite's name; only for display.
        task_name: The task's name in the suite; only for display.
        label: The variant's name in the suite; only for display.
        task: The task.
        method: The method's name.
        options: The options of the method that differ from its defaults.
        settings: The settings of the suite, with the changes of the task and the variant.
        learning_rate: The learning rate of all parameters except a new head.
        seed: Seed of the data order, the head, the adapter and dropout.
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
        """Everything that decides the result, as JSON values; names for display, estimates and checks are left out."""
        ignored = {"seconds", "settings", "fields", "choose"}
        task = {key: value for key, value in changed(self.task).items() if key not in ignored}
        return {
            "task": task,
            "method": self.method,
            "options": dict(self.options),
            "settings": changed_settings(self.settings),
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }

    def digest(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of `identity`; equal cells of two suites have the same."""
        text = json.dumps(self.identity(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def title(self) -> str:
        """A readable name of the cell."""
        return f"{self.task_name}/{self.label} lr {self.learning_rate:g} seed {self.seed}"


def changed(settings: Any) -> dict[str, Any]:
    """The values of a dataclass that differ from the defaults.

    Digests are made of these, so they stay the same when a later version adds a setting. For the same reason no default
    may ever change, here or in a method.

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

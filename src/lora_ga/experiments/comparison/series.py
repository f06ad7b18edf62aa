"""The numbers that a suite varies: variants that differ in one number and in nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_ga.experiments.methods import complete
from lora_ga.experiments.suites.spec import Suite


@dataclass(frozen=True)
class Series:
    """Variants that differ in one number only.

    Attributes:
        name: Name of the option or setting that differs.
        title: The method and the options that the variants share, in words.
        labels: Value → label of the variant, values ascending.
    """

    name: str
    title: str
    labels: Mapping[float, str]


def find_series(suite: Suite) -> list[Series]:
    """Finds every number for which the suite has three values or more with all else equal."""
    by_label = {label: _values(suite, label) for label in suite.methods}
    groups: dict[tuple[Any, ...], dict[float, str]] = {}
    for label, values in by_label.items():
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest = tuple(sorted((key, str(other)) for key, other in values.items() if key != name))
                groups.setdefault((name, rest), {}).setdefault(float(value), label)
    found = []
    for (name, _), labels in groups.items():
        if len(labels) >= 3:
            ascending = dict(sorted(labels.items()))
            found.append(Series(name, _shared_title(suite, name, list(ascending.values())), ascending))
    return found


def _values(suite: Suite, label: str) -> dict[str, Any]:
    """Everything that decides what a variant does, except its learning rate."""
    variant = suite.methods[label]
    settings = {key: getattr(suite.settings, key) for key in ("rank", "samples", "alpha", "steps")}
    options = complete(variant.method, variant.options)
    return {"method": variant.method, **settings, **dict(variant.settings), **options}


def _shared_title(suite: Suite, name: str, labels: Sequence[str]) -> str:
    """The method and the options that all variants of a series name, without the one that differs."""
    first = suite.methods[labels[0]]
    shared = {
        key: value
        for key, value in {**first.options, **first.settings}.items()
        if key != name
        and all({**suite.methods[each].options, **suite.methods[each].settings}.get(key) == value for each in labels)
    }
    return ", ".join([first.method, *(f"{key} {value}" for key, value in shared.items())])

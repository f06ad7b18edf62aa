"""The fields of a run's record that its readers need, and their types."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Check = tuple[str, Callable[[Any], bool]]  # what a field must be, in words; whether a value is


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


TEXT: Check = ("a text", lambda value: isinstance(value, str))
MAPPING: Check = ("a mapping", lambda value: isinstance(value, dict))
WHOLE: Check = ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
NUMBER: Check = ("a number", _is_number)
METRICS: Check = ("a mapping of names to numbers", _are_metrics)
NULLABLE_TEXT: Check = ("a text or null", lambda value: value is None or isinstance(value, str))
LOSSES: Check = (
    "a list of numbers, with null for a loss that is not finite",
    lambda value: isinstance(value, list) and all(each is None or _is_number(each) for each in value),
)
POINTS: Check = (
    "a list of evaluations, each with its step",
    lambda value: isinstance(value, list) and all(_are_metrics(each) and "step" in each for each in value),
)

# A dot leads into a mapping.
OF_ALL: Mapping[str, Check] = {
    **dict.fromkeys(("digest", "suite", "task", "label", "device", "date"), TEXT),
    **dict.fromkeys(("attempt", "seed"), WHOLE),
    "learning_rate": NUMBER,
    "commit": NULLABLE_TEXT,
    "cell": MAPPING,
    "cell.method": TEXT,
    "versions": (
        "a mapping of packages to versions",
        lambda value: isinstance(value, dict) and all(map(TEXT[1], value.values())),
    ),
    "seconds": METRICS,
    "curves": MAPPING,
    "curves.training": LOSSES,
    "curves.report": POINTS,
}
# Status → what else a record with it has.
OF_STATUS: Mapping[str, Mapping[str, Check]] = {
    "done": {
        "metrics": MAPPING,
        **dict.fromkeys(("metrics.tune", "metrics.report"), METRICS),
        **dict.fromkeys(("metrics.tune.loss", "metrics.report.loss"), NUMBER),
        **dict.fromkeys(("seconds.start", "seconds.train", "seconds.total", "peak_memory_mib"), NUMBER),
        "trained_parameters": WHOLE,
    },
    "diverged": {"reason": TEXT},
    "failed": {"reason": TEXT},
}


def fault_of(record: Mapping[str, Any]) -> str:
    """The first field that is missing or of a wrong type, in words; empty for a record that every reader can use."""
    status = record.get("status")
    if not isinstance(status, str) or status not in OF_STATUS:
        return f"its status is {status!r}, and must be {', '.join(OF_STATUS)}"
    for name, (words, holds) in {**OF_ALL, **OF_STATUS[status]}.items():
        place: Any = record
        *outer, last = name.split(".")
        for key in outer:
            place = place[key]
        if last not in place:
            return f"it has no {name}"
        if not holds(place[last]):
            return f"its {name} is {repr(place[last])[:80]}, and must be {words}"
    return ""

"""The tables of a comparison, as text that is ready for a terminal or for a page."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lora_ga.experiments.comparison.runs import (
    Comparison,
    Group,
    final_loss,
    mean_and_error,
    options,
    smooth,
    steps_to,
)
from lora_ga.experiments.records.runs import Run

BLANK = "–"
Cell = Callable[[Group], str]


class Table(NamedTuple):
    """Rows of text under headers; the first column names the row."""

    headers: list[str]
    rows: list[list[str]]


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Returns one value in `digits` significant digits, or "mean ± standard error" with the error in two."""
    if not values:
        return BLANK
    mean, error = mean_and_error(values)
    if not math.isfinite(mean):
        return "not finite"
    if not error > 0:
        return f"{mean:.{digits}g}" + (" ± 0" if error == 0 else "")
    most = digits - (math.floor(math.log10(abs(mean))) if mean else 0)
    decimals = max(0, min(most, 1 - math.floor(math.log10(error))))
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def reached(group: Group, comparison: Comparison) -> list[int | None]:
    """Returns for each run of the group its first step at or below the target; None where it never got there."""
    if comparison.target.value is None:
        return [None] * len(group.runs)
    return [steps_to(smooth(run.curve, comparison.window), comparison.target.value) for run in group.runs]


def _steps(group: Group, comparison: Comparison) -> str:
    """Returns the steps to the target, or how many runs got there."""
    # A mean over the runs that arrived would flatter the group, so it is given only when all did.
    steps = reached(group, comparison)
    arrived = [step for step in steps if step is not None]
    if len(arrived) == len(steps):
        return spread(arrived)
    return f"{len(arrived)} of {len(steps)} got there" if arrived else "not reached"


def _speed(group: Group, comparison: Comparison) -> str:
    """Returns how many times fewer steps than the reference this group needed to the target."""
    if comparison.target.reference is None:
        return BLANK
    own, other = reached(group, comparison), reached(comparison.groups[comparison.target.reference], comparison)
    if None in own or None in other:
        return BLANK
    return f"{sum(filter(None, other)) / len(other) / (sum(filter(None, own)) / len(own)):.2f}×"


def summary_table(comparison: Comparison) -> Table:
    """Returns one row a group: the steps it took, and what came out."""
    target, columns = comparison.target, dict[str, Cell]()
    columns["run"] = lambda group: group.label
    columns["n"] = lambda group: str(len(group.runs))
    columns["learning rate"] = lambda group: f"{group.runs[0].learning_rate:g}"
    if target.value is not None:
        columns[f"steps to loss {target.value:.4g}"] = lambda group: _steps(group, comparison)
    if target.value is not None and target.reference is not None:
        columns[f"steps of {comparison.groups[target.reference].label} ÷ own"] = lambda g: _speed(g, comparison)
    columns["final training loss"] = _over_runs(lambda run: final_loss(run, comparison.window))
    for metric in dict.fromkeys(metric for run in comparison.runs for metric in run.metrics):
        columns[metric.replace("_", " ")] = _over_runs(lambda run, metric=metric: run.metrics.get(metric))  # type: ignore[misc]
    return _group_table(comparison, columns)


def cost_table(comparison: Comparison) -> Table:
    """Returns one row a group: its time and its parameters."""
    columns = dict[str, Cell]()
    columns["run"] = lambda group: group.label
    for part in ("estimate", "train", "total"):
        columns[f"seconds, {part}"] = _over_runs(lambda run, part=part: run.seconds.get(part))  # type: ignore[misc]
    columns["trained parameters"] = lambda group: f"{group.runs[0].trainable_parameters:,}"
    columns["device"] = lambda group: ", ".join(dict.fromkeys(run.device for run in group.runs))
    return _group_table(comparison, columns)


def _over_runs(value: Callable[[Run], float | None]) -> Cell:
    return lambda group: spread([found for run in group.runs if (found := value(run)) is not None])


def _group_table(comparison: Comparison, columns: dict[str, Cell]) -> Table:
    return Table(list(columns), [[cell(group) for cell in columns.values()] for group in comparison.groups])


def runs_table(comparison: Comparison) -> Table:
    """Returns one row a run: the values behind the means, and where they come from."""
    rows = []
    for group in comparison.groups:
        for run, steps in zip(group.runs, reached(group, comparison), strict=True):
            rows.append(
                [
                    group.label,
                    str(run.seed),
                    spread([final_loss(run, comparison.window)]),
                    BLANK if steps is None else str(steps),
                    run.commit or BLANK,
                    str(run.folder),
                ]
            )
    return Table(["run", "seed", "final training loss", "steps to target", "commit", "folder"], rows)


def differences_table(comparison: Comparison) -> Table:
    """Returns the options in which the groups differ, one row an option, one column a group."""
    chosen = [options(group.runs[0]) for group in comparison.groups]
    keys = dict.fromkeys(key for values in chosen for key in values)
    rows = [[key, *(values.get(key, BLANK) for values in chosen)] for key in keys]
    return Table(
        ["option", *(group.label for group in comparison.groups)], [row for row in rows if len(set(row[1:])) > 1]
    )


def versions_table(comparison: Comparison) -> Table:
    """Returns the version of each package; several only where the runs were made with several."""
    packages = dict.fromkeys(package for run in comparison.runs for package in run.versions)
    return Table(
        ["package", "version"],
        [[p, ", ".join(dict.fromkeys(run.versions.get(p, BLANK) for run in comparison.runs))] for p in packages],
    )

"""The tables of a comparison of runs."""

from __future__ import annotations

from collections.abc import Callable

from lora_ga.experiments.comparison.runs import Comparison, Group, method_options
from lora_ga.experiments.records.runs import Run
from lora_ga.experiments.tables.table import BLANK, Table, format_values

CellOf = Callable[[Group], str]


def summary_table(comparison: Comparison) -> Table:
    """One row for each group: the steps to the target loss, and the results."""
    target, columns = comparison.target, dict[str, CellOf]()
    columns["run"] = lambda group: group.label
    columns["n"] = lambda group: str(len(group.runs))
    columns["learning rate"] = lambda group: f"{group.runs[0].learning_rate:g}"
    if target.value is not None:
        columns[f"steps to loss {target.value:.4g}"] = lambda group: _steps(group, comparison)
    if target.value is not None and target.reference is not None:
        columns[f"steps of {comparison.groups[target.reference].label} ÷ own"] = lambda g: _speedup(g, comparison)
    columns["final training loss"] = _over_runs(comparison.final_loss)
    for metric in dict.fromkeys(metric for run in comparison.runs for metric in run.metrics):
        columns[metric.replace("_", " ")] = _over_runs(lambda run, metric=metric: run.metrics.get(metric))  # type: ignore[misc]
    return _group_table(comparison, columns)


def _steps(group: Group, comparison: Comparison) -> str:
    """The mean number of steps to the target, or how many runs reach it."""
    # A mean over some of the runs would flatter the group, so it is given only if all reach the target.
    steps = comparison.steps_to_target(group)
    reached = [step for step in steps if step is not None]
    if len(reached) == len(steps):
        return format_values(reached)
    return f"reached by {len(reached)} of {len(steps)}" if reached else "not reached"


def _speedup(group: Group, comparison: Comparison) -> str:
    """Steps of the reference group to the target, divided by the steps of this group."""
    if comparison.target.reference is None:
        return BLANK
    own = comparison.steps_to_target(group)
    reference = comparison.steps_to_target(comparison.groups[comparison.target.reference])
    if None in own or None in reference:
        return BLANK
    return f"{sum(filter(None, reference)) / len(reference) / (sum(filter(None, own)) / len(own)):.2f}×"


def cost_table(comparison: Comparison) -> Table:
    """One row for each group: its seconds and its number of trained parameters."""
    columns = dict[str, CellOf]()
    columns["run"] = lambda group: group.label
    for part in ("estimate", "train", "total"):
        columns[f"seconds, {part}"] = _over_runs(lambda run, part=part: run.seconds.get(part))  # type: ignore[misc]
    columns["trained parameters"] = lambda group: f"{group.runs[0].trainable_parameters:,}"
    columns["device"] = lambda group: ", ".join(dict.fromkeys(run.device for run in group.runs))
    return _group_table(comparison, columns)


def _over_runs(value: Callable[[Run], float | None]) -> CellOf:
    return lambda group: format_values([found for run in group.runs if (found := value(run)) is not None])


def _group_table(comparison: Comparison, columns: dict[str, CellOf]) -> Table:
    return Table(list(columns), [[cell(group) for cell in columns.values()] for group in comparison.groups])


def runs_table(comparison: Comparison) -> Table:
    """One row for each run: the values behind the means, and where they come from."""
    rows = []
    for group in comparison.groups:
        for run, steps in zip(group.runs, comparison.steps_to_target(group), strict=True):
            rows.append(
                [
                    group.label,
                    str(run.seed),
                    format_values([comparison.final_loss(run)]),
                    BLANK if steps is None else str(steps),
                    run.commit or BLANK,
                    str(run.folder),
                ]
            )
    headers = ["run", "seed", "final training loss", "steps to target", "commit", "folder"]
    return Table(headers, rows, left_aligned=True)


def differences_table(comparison: Comparison) -> Table:
    """One row for each option in which the groups differ, one column for each group."""
    chosen = [method_options(group.runs[0]) for group in comparison.groups]
    keys = dict.fromkeys(key for values in chosen for key in values)
    rows = [[key, *(values.get(key, BLANK) for values in chosen)] for key in keys]
    headers = ["option", *(group.label for group in comparison.groups)]
    return Table(headers, [row for row in rows if len(set(row[1:])) > 1], left_aligned=True)


def versions_table(comparison: Comparison) -> Table:
    """The version of each package, or all versions if the runs used several."""
    packages = dict.fromkeys(package for run in comparison.runs for package in run.versions)
    rows = [[p, ", ".join(dict.fromkeys(run.versions.get(p, BLANK) for run in comparison.runs))] for p in packages]
    return Table(["package", "version"], rows, left_aligned=True)

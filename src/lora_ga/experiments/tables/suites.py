"""The tables of a suite's results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lora_ga.experiments.comparison.curves import mean_and_error
from lora_ga.experiments.comparison.suites import Record, Result, StepsToLoss, smoothed_training_loss, steps_to_loss
from lora_ga.experiments.suites.cells import SMALLER_IS_BETTER
from lora_ga.experiments.suites.spec import Suite
from lora_ga.experiments.tables.table import BLANK, Table, format_values

AT_ONCE = "runs at once"


def best_label(found: Sequence[Result], metric: str) -> str | None:
    """The label with the best mean of a metric, of those without a diverged seed; None if there is none."""
    sign = -1 if metric in SMALLER_IS_BETTER else 1
    means = {
        each.label: sign * mean_and_error(each.values(metric))[0] for each in found if each.runs and not each.diverged
    }
    return max(means, key=means.__getitem__) if means else None


def reported_cell(result: Result, metric: str) -> str:
    """The reported metric. If a seed diverged, a mean of the others would hide that: none is given."""
    return result.divergence or format_values(result.values(metric))


def overview_table(suite: Suite, tasks: Sequence[str], found: Sequence[Result]) -> Table:
    """One row for each variant of the results, one column for each task: the reported metric and the learning rate."""
    by_task = {(each.task, each.label): each for each in found}
    metrics = {task: suite.tasks[task].metric for task in tasks}
    best = {task: best_label([each for each in found if each.task == task], metric) for task, metric in metrics.items()}
    rows, bold = [], set()
    labels = {each.label for each in found}
    for number, label in enumerate(label for label in suite.methods if label in labels):
        row = [label]
        for column, (task, metric) in enumerate(metrics.items(), 1):
            each = by_task.get((task, label))
            if each is None or not (each.runs or each.diverged):
                row.append(BLANK)
            else:
                row.append(f"{reported_cell(each, metric)} ({each.rate:g})")
            if best[task] == label:
                bold.add((number, column))
        rows.append(row)
    return Table(["", *(f"{task}, {metric}" for task, metric in metrics.items())], rows, bold)


def method_table(suite: Suite, found: Sequence[Result], plain: Result | None) -> Table:
    """One row for each variant on one task: its learning rate, its results, and its steps to plain LoRA's loss.

    Args:
        suite: The suite.
        found: Results on one task.
        plain: The result of plain LoRA; without it there are no steps.

    Returns:
        The table.
    """
    metric = suite.tasks[found[0].task].metric
    best = best_label(found, metric)
    chooser = suite.tasks[found[0].task].chooser
    also = suite.tasks[found[0].task].also
    headers = ["", "best rate", *(f"{name}, reported" for name in (metric, *also)), "seeds"]
    headers += [f"{chooser}, tuning split", "final training loss"]
    headers += [] if plain is None else [f"steps to {plain.label}'s loss", f"÷ {plain.label}'s steps"]
    rows = []
    for each in found:
        reported = [reported_cell(each, name) for name in (metric, *also)]
        row = [each.label, _rate_cell(each), *reported, f"{len(each.runs)} of {suite.seeds}"]
        others = [each.values(chooser, "tune"), [smoothed_training_loss(run)[-1][1] for run in each.runs.values()]]
        row += [BLANK if each.diverged else format_values(values) for values in others]
        row += [] if plain is None else steps_cells(steps_to_loss(each, plain))
        rows.append(row)
    return Table(headers, rows, {(number, 2) for number, each in enumerate(found) if each.label == best})


def unswept_table(suite: Suite, found: Mapping[float, Sequence[Result]]) -> Table:
    """One row for each variant on one task, one column for each rate that nobody has swept: the reported metric.

    Args:
        suite: The suite.
        found: Rate → results on one task, in the same order.

    Returns:
        The table; the best mean of a column is bold.
    """
    metric = suite.tasks[next(iter(found.values()))[0].task].metric
    best = {rate: best_label(some, metric) for rate, some in found.items()}
    rows = [
        [line[0].label, *(reported_cell(each, metric) for each in line)] for line in zip(*found.values(), strict=True)
    ]
    bold = {
        (number, column)
        for column, rate in enumerate(found, 1)
        for number, row in enumerate(rows)
        if row[0] == best[rate]
    }
    return Table(["", *(f"{metric} at {rate:g}" for rate in found)], rows, bold)


def _rate_cell(result: Result) -> str:
    """The learning rate, or why there is none."""
    if result.rate is None:
        return "none trains" if result.none_trains else BLANK
    return f"{result.rate:g}" + ("" if result.bracketed else " (edge)")


def steps_cells(found: StepsToLoss | None) -> list[str]:
    """The steps, and their ratio to LoRA's. If a seed never reaches the loss, a mean would hide that: none is given."""
    if found is None:
        return [BLANK, BLANK]
    if not found.reached:
        return ["never", "never"]
    if found.ratio is not None:
        return [format_values(found.reached), f"{found.ratio:.2f}"]
    return [f"never in {len(found.steps) - len(found.reached)} of {len(found.steps)} seeds", BLANK]


def device_of(run: Record) -> str:
    """The device of a run; for a run of a stack, whose times and memory are shared, also the size of the stack."""
    return run["device"] + (f", {run['stack']} {AT_ONCE}" if "stack" in run else "")


def usual_device(found: Sequence[Result]) -> str | None:
    """The device of most runs at the best rates, see `device_of`; None while there are no runs."""
    devices = Counter(device_of(run) for each in found for run in each.runs.values())
    return devices.most_common(1)[0][0] if devices else None


def cost_table(found: Sequence[Result]) -> Table:
    """One row for each variant on one task: seconds, memory and parameters of its runs on the usual device."""
    rows = []
    usual = usual_device(found)
    for whole in found:
        each = replace(whole, runs={seed: run for seed, run in whole.runs.items() if device_of(run) == usual})
        runs = list(each.runs.values())
        seconds = [format_values(each.seconds(part), 3) for part in ("start", "train", "total")]
        share = f"{sum(each.seconds('start')) / sum(each.seconds('train')):.1%}" if runs else BLANK
        memory = f"{max(run['peak_memory_mib'] for run in runs):.0f}" if runs else BLANK
        trained = f"{runs[0]['trained_parameters']:,}" if runs else BLANK
        rows.append([each.label, *seconds, share, memory, trained])
    headers = ["", "seconds, start", "seconds, training", "seconds, total", "start ÷ training", "peak memory, MiB"]
    return Table([*headers, "trained parameters"], rows)


def settings_table(suite: Suite) -> Table:
    """One row for each task: its model, its data and its settings."""
    rows = []
    for name, task in suite.tasks.items():
        settings = {**vars(suite.settings), **task.settings}
        data = "; ".join(f"{part} {place}" for part, place in task.files.items())
        rows.append([name, task.model, data, ", ".join(f"{key} {value}" for key, value in settings.items())])
    return Table(["task", "model", "data", "settings"], rows, left_aligned=True)


def records_table(runs: Sequence[Record]) -> Table:
    """The versions, devices, commits and dates of the records, all that occur."""
    packages = dict.fromkeys(package for run in runs for package in run["versions"])
    rows = [[name, ", ".join(sorted({run["versions"].get(name, BLANK) for run in runs}))] for name in packages]
    rows.append(["device", ", ".join(sorted({run["device"] for run in runs}))])
    rows.append(["commit", ", ".join(sorted({run["commit"] or BLANK for run in runs}))])
    days = [run["date"][:10] for run in runs]
    rows.append(["date", " to ".join(dict.fromkeys((min(days), max(days))))])
    return Table(["records", ""], rows, left_aligned=True)

"""A suite's results as tables of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lora_ga.experiments.comparison.runs import mean_and_error
from lora_ga.experiments.comparison.suites import Race, Record, Result, race, smoothed
from lora_ga.experiments.suites.protocol import SMALLER_IS_BETTER
from lora_ga.experiments.suites.spec import Suite
from lora_ga.experiments.tables.runs import BLANK, Table, spread


class TextTable(Table):
    """A table of words, none of its columns set to the right."""


def best_of(found: Sequence[Result], metric: str) -> str | None:
    """The label with the best mean; None while nothing has run."""
    sign = -1 if metric in SMALLER_IS_BETTER else 1
    means = {each.label: sign * mean_and_error(each.values(metric))[0] for each in found if each.runs}
    return max(means, key=means.__getitem__) if means else None


def overview_table(suite: Suite, tasks: Sequence[str], found: Sequence[Result]) -> Table:
    """One row a method, one column a task."""
    by_line = {(each.task, each.label): each for each in found}
    metrics = {task: suite.tasks[task].metric for task in tasks}
    best = {task: best_of([each for each in found if each.task == task], metric) for task, metric in metrics.items()}
    rows = []
    for label in suite.methods:
        row = [label]
        for task, metric in metrics.items():
            each = by_line.get((task, label))
            shown = BLANK if each is None or not each.runs else f"{spread(each.values(metric))} ({each.rate:g})"
            row.append(f"**{shown}**" if best[task] == label else shown)
        rows.append(row)
    return Table(["", *(f"{task}, {metric}" for task, metric in metrics.items())], rows)


def method_table(suite: Suite, found: Sequence[Result], plain: Result | None) -> Table:
    """One row a method of one task: the rate, what came out, and how soon it reached LoRA's loss."""
    metric = suite.tasks[found[0].task].metric
    best = best_of(found, metric)
    headers = ["", "best rate", f"{metric}, reported", "seeds", "tuning split", "final training loss"]
    headers += [] if plain is None else [f"steps to {plain.label}'s loss", "÷ its own"]
    rows = []
    for each in found:
        result = spread(each.values(metric))
        row = [each.label, rate_text(each), f"**{result}**" if each.label == best else result]
        row += [f"{len(each.runs)} of {suite.seeds}", spread(each.values(suite.tasks[each.task].chooser, "tune"))]
        row.append(spread([smoothed(run)[-1][1] for run in each.runs.values()]))
        row += [] if plain is None else race_text(race(each, plain))
        rows.append(row)
    return Table(headers, rows)


def rate_text(result: Result) -> str:
    """The rate, or why there is none."""
    if result.rate is None:
        return "none trains" if result.lost and not result.missing else BLANK
    return f"{result.rate:g}" + ("" if result.inside else " (edge)")


def race_text(found: Race | None) -> list[str]:
    """The steps, and their share of LoRA's; a seed that never got there is not averaged away."""
    if found is None:
        return [BLANK, BLANK]
    own = [step for step in found.steps if step is not None]
    late = len(found.steps) - len(own)
    if found.ratio is not None:
        return [spread(own), f"{found.ratio:.2f}"]
    return ["never" if not own else f"never in {late} of {len(found.steps)} seeds", "never" if not own else BLANK]


def usual_device(found: Sequence[Result]) -> str | None:
    """The device that most of a task's runs at the best rates were on; None while there is none."""
    devices = Counter(run["device"] for each in found for run in each.runs.values())
    return devices.most_common(1)[0][0] if devices else None


def cost_table(found: Sequence[Result]) -> Table:
    """One row a method of one task, of the runs on the usual device: seconds, memory, parameters."""
    rows = []
    usual = usual_device(found)
    for whole in found:
        each = replace(whole, runs={seed: run for seed, run in whole.runs.items() if run["device"] == usual})
        runs = list(each.runs.values())
        seconds = [spread(each.seconds(part), 3) for part in ("start", "train", "total")]
        memory = f"{max(run['peak_memory_mib'] for run in runs):.0f}" if runs else BLANK
        trained = f"{runs[0]['trained_parameters']:,}" if runs else BLANK
        rows.append([each.label, *seconds, start_share(each), memory, trained])
    headers = ["", "seconds, start", "seconds, training", "seconds, all", "start ÷ training", "peak memory, MiB"]
    return Table([*headers, "trained parameters"], rows)


def start_share(result: Result) -> str:
    """What the start costs, as a share of training."""
    return f"{sum(result.seconds('start')) / sum(result.seconds('train')):.1%}" if result.runs else BLANK


def settings_table(suite: Suite) -> Table:
    """One row a task: where everything comes from, and the settings."""
    rows = []
    for name, task in suite.tasks.items():
        settings = {**vars(suite.settings), **task.settings}
        data = "; ".join(f"{part} {place}" for part, place in task.files.items())
        rows.append([name, task.model, data, ", ".join(f"{key} {value}" for key, value in settings.items())])
    return TextTable(["task", "model", "data", "settings"], rows)


def records_table(runs: Sequence[Record]) -> Table:
    """Where the records come from: versions, devices, commits, all that occur."""
    packages = dict.fromkeys(package for run in runs for package in run["versions"])
    rows = [[name, ", ".join(sorted({run["versions"].get(name, BLANK) for run in runs}))] for name in packages]
    rows.append(["device", ", ".join(sorted({run["device"] for run in runs}))])
    rows.append(["commit", ", ".join(sorted({run["commit"] or BLANK for run in runs}))])
    rows.append(
        ["date", " to ".join(dict.fromkeys((min(r["date"] for r in runs)[:10], max(r["date"] for r in runs)[:10])))]
    )
    return TextTable(["records", ""], rows)

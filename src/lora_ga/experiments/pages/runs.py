"""A comparison of runs as one HTML page, with its figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_ga.experiments.comparison.curves import mean_and_error, mean_curve, smooth
from lora_ga.experiments.comparison.runs import Comparison, Group
from lora_ga.experiments.pages.document import Document, Picture, Section, html_page
from lora_ga.experiments.pages.drawing import REFERENCE_LINE, STYLE, add_legend, legend_entry, line_style, new_figure
from lora_ga.experiments.records.runs import Curve, Run
from lora_ga.experiments.tables.runs import cost_table, differences_table, runs_table, summary_table, versions_table


def page_html(comparison: Comparison) -> str:
    """Draws the whole page. Texts from the records are escaped, and the page fetches nothing."""
    return html_page(comparison_document(comparison))


def comparison_document(comparison: Comparison) -> Document:
    """Makes the document: results, costs, figures, and what the runs were."""
    runs = comparison.runs
    colours = [line_style(place)["color"] for place in range(len(comparison.groups))]
    summary = replace(summary_table(comparison), row_colours=colours)
    sections = [
        Section("Result", [summary, summary_caption(comparison)]),
        Section("Cost", [cost_table(comparison)]),
    ]
    if any(run.curve for run in runs):
        training = Picture(training_figure(comparison), training_caption(comparison))
        sections.append(Section("Training", [training]))
    # A picture of one point would say less than the table.
    if metrics := list(dict.fromkeys(name for run in runs for name, values in run.evals.items() if len(values) > 1)):
        captions = {metric: f"{metric} at the evaluations during training, not smoothed." for metric in metrics}
        pictures = [Picture(evaluation_figure(comparison, metric), captions[metric]) for metric in metrics]
        sections.append(Section("Evaluation", pictures))
    differences = differences_table(comparison)
    sections += [
        Section("Options that differ", [differences if differences.rows else "The runs differ in their seed only."]),
        Section("Runs", [runs_table(comparison)]),
        Section("Versions", [versions_table(comparison)]),
    ]
    title = f"LoRA-GA: {len(runs)} runs compared" if len(runs) > 1 else "LoRA-GA: one run"
    return Document(title, _shared_facts(comparison), comparison.notices, sections)


def _shared_facts(comparison: Comparison) -> str:
    """Task, model, dataset and number of steps, each if all runs share it."""
    found = {
        field: {str(getattr(run, field)) for run in comparison.runs} for field in ("task", "model", "dataset", "steps")
    }
    shared = {field: short_place(values.pop()) for field, values in found.items() if len(values) == 1}
    return " · ".join(f"{value} steps" if field == "steps" else value for field, value in shared.items())


def short_place(place: str) -> str:
    """The last two parts of an absolute path; other paths and names on the hub as they are."""
    return "/".join(Path(place).parts[-2:]) if Path(place).is_absolute() else place


def training_caption(comparison: Comparison) -> str:
    """Explains the training figure: what its lines are and how the values were smoothed."""
    text = f"Training loss, {comparison.smoothing}. "
    if any(len(group.runs) == 1 for group in comparison.groups):
        text += "Faint lines: the values as logged. "
    if any(len(group.runs) > 1 for group in comparison.groups):
        text += "Where there are several seeds, thin lines are seeds and the thick line is their mean. "
    if comparison.target.value is not None:
        text += f"Dashed line: the target, {comparison.target.source}; a dot marks the step that reaches it. "
    if (top := visible_top(comparison)) is not None:
        text += f"Losses above {top:.4g} are cut off. "
    return text.strip()


def summary_caption(comparison: Comparison) -> str:
    """Explains the numbers of the summary table."""
    text = f"Training losses: {comparison.smoothing}. Metrics: at the end of training. "
    if comparison.target.value is not None:
        text += f"The target, {comparison.target.value:.4g}, is {comparison.target.source}. "
    if any(len(group.runs) > 1 for group in comparison.groups):
        text += "Where n > 1: mean ± standard error over n seeds. "
    if any(len(group.runs) == 1 for group in comparison.groups):
        text += "Where n = 1 there is no standard error: another seed would give another number. "
    return text.strip()


def training_figure(comparison: Comparison) -> Figure:
    """Draws the smoothed training losses, and the target with the step at which each group reaches it.

    Args:
        comparison: The runs.

    Returns:
        The figure. For a group of one run, the logged values are faint lines behind the smoothed one.
    """
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("training", "optimiser step", "training loss")
        for place, group in enumerate(comparison.groups):
            if len(group.runs) == 1 and group.runs[0].curve:
                colour = line_style(place)["color"]
                axes.plot(*zip(*group.runs[0].curve, strict=True), color=colour, linewidth=0.7, alpha=0.25)
        entries = _draw_groups(axes, comparison.groups, lambda run: smooth(run.curve, comparison.window))
        if (target := comparison.target.value) is not None:
            axes.axhline(target, **REFERENCE_LINE, zorder=1)
            entries.append(legend_entry(f"target {target:.4g}", **REFERENCE_LINE))
            _draw_dots(axes, comparison, target)
        axes.set_xlim(left=0)
        if (top := visible_top(comparison)) is not None:
            axes.set_ylim(top=top)
        add_legend(figure, entries)
        return figure


def _draw_dots(axes: Any, comparison: Comparison, target: float) -> None:
    """Draws a dot where each group reaches the target; dots at one step are rings round each other."""
    drawn: list[tuple[float, str]] = []
    for place, group in enumerate(comparison.groups):
        reached = [step for step in comparison.steps_to_target(group) if step is not None]
        if len(reached) == len(group.runs):  # otherwise the table gives no mean either
            drawn.append((mean_and_error(reached)[0], line_style(place)["color"]))
    width = max((step for step, _ in drawn), default=0.0) / 50  # about the width of a dot
    for number, (step, colour) in enumerate(drawn):
        hidden = sum(abs(step - later) < width for later, _ in drawn[number + 1 :])
        axes.plot([step], [target], "o", color=colour, markersize=7 + 5 * hidden, zorder=5)


def visible_top(comparison: Comparison) -> float | None:
    """The upper end of the loss axis, so that a run far above every start does not flatten the others; None: no end."""
    starts = [run.curve[0][1] for run in comparison.runs if run.curve and math.isfinite(run.curve[0][1])]
    values = [value for run in comparison.runs for _, value in run.curve if math.isfinite(value)]
    return 1.5 * max(starts) if starts and max(values) > 2 * max(starts) else None


def evaluation_figure(comparison: Comparison, metric: str) -> Figure:
    """Draws one metric of the evaluations during training."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(metric, "optimiser step", metric.replace("_", " "), height=3.4)
        entries = _draw_groups(axes, comparison.groups, lambda run: run.evals.get(metric, ()), marker="o")
        axes.set_xlim(left=0)
        add_legend(figure, entries)
        return figure


def _draw_groups(
    axes: Any, groups: Sequence[Group], curve_of: Callable[[Run], Curve], marker: str | None = None
) -> list[Line2D]:
    """Draws each group's mean, and a thin line for each run of a group that has several.

    Returns:
        Legend entries of the groups that have such a curve.
    """
    entries = []
    for place, group in enumerate(groups):
        curves = [curve for run in group.runs if (curve := curve_of(run))]
        if not curves:
            continue
        style = line_style(place)
        if len(curves) > 1:
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), **style, linewidth=0.8, alpha=0.4)
        if mean := mean_curve(curves):
            axes.plot(*zip(*mean, strict=True), **style, linewidth=2, marker=marker, markersize=5)
        name = f"{group.label} (mean of {len(curves)})" if len(curves) > 1 else group.label
        entries.append(legend_entry(name, **style, linewidth=2))
    return entries

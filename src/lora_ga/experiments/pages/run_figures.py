"""The figures of a comparison of runs: training losses, and metrics of the evaluations during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_ga.experiments.comparison.curves import mean_and_error, mean_curve, smooth
from lora_ga.experiments.comparison.runs import Comparison, Group
from lora_ga.experiments.pages.drawing import REFERENCE_LINE, STYLE, add_legend, legend_entry, line_style, new_figure
from lora_ga.experiments.records.runs import Curve, Run


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
            for place, group in enumerate(comparison.groups):
                reached = [step for step in comparison.steps_to_target(group) if step is not None]
                if len(reached) == len(group.runs):  # otherwise the table gives no mean either
                    colour = line_style(place)["color"]
                    axes.plot([mean_and_error(reached)[0]], [target], "o", color=colour, markersize=7, zorder=5)
        axes.set_xlim(left=0)
        if (top := visible_top(comparison)) is not None:
            axes.set_ylim(top=top)
        add_legend(figure, entries)
        return figure


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

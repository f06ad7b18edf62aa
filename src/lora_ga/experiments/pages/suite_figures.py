"""The figures of a suite's results: losses during training, each learning rate, and numbers that the suite varies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from lora_ga.experiments.comparison.curves import mean_and_error, mean_curve
from lora_ga.experiments.comparison.suites import Result, Series, reported_curve, smoothed_training_loss
from lora_ga.experiments.pages.drawing import REFERENCE_LINE, STYLE, add_legend, legend_entry, line_style
from lora_ga.experiments.records.runs import Curve
from lora_ga.experiments.suites.cells import SMALLER_IS_BETTER

MOST_LINES = 12  # in one figure; a reader could not tell more apart
LOSSES = ("training loss", *SMALLER_IS_BETTER)
# A loss axis ends at this multiple of the smallest first loss (of the smallest loss, in the figure of learning rates).
# Without an end, one diverging run would flatten all others.
MOST_LOSS = 2.0

Placed = Sequence[tuple[int, Result]]  # results of one task, each with its place, which decides its colour


def figure_groups(results: Sequence[Result]) -> Iterator[list[tuple[int, Result]]]:
    """Splits the results of a task into groups of at most `MOST_LINES`, each result with its place."""
    placed = list(enumerate(results))
    yield from (placed[start : start + MOST_LINES] for start in range(0, len(placed), MOST_LINES))


def task_figure(name: str, chooser: str, metric: str, group: Placed) -> Figure | None:
    """Draws up to three rows of panels, below one legend: training losses, the reported metric, learning rates.

    Args:
        name: Name of the figure.
        chooser: The metric of the tuning split, which chooses the rate.
        metric: The metric of the reported split.
        group: Results of one task with their places.

    Returns:
        The figure; a row is left out where there is nothing to draw. None if that holds for all rows.
    """
    training = [(place, [smoothed_training_loss(run) for run in each.runs.values()]) for place, each in group]
    reported = [(place, reported_curves(each, metric)) for place, each in group]
    rows, heights = [], []
    for row, height, drawn in (
        (["training", "training"], 3.4, any(curves for _, curves in training)),
        (["reported", "reported"], 3.0, any(curves for _, curves in reported)),
        (["rates, tune", "rates, report"], 3.6, any(each.finished_search() for _, each in group)),
    ):
        if drawn:
            rows.append(row)
            heights.append(height)
    if not rows:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, sum(heights) + 0.8), layout="constrained", label=name)
        panels: dict[str, Any] = figure.subplot_mosaic(rows, height_ratios=heights)
        if "training" in panels:
            draw_curves(panels["training"], "training loss", training)
        if "reported" in panels:
            draw_curves(panels["reported"], f"{metric}, reported split", reported, marker="o")
        if "rates, tune" in panels:
            if chooser == metric:  # before anything is drawn, so that both panels have the limits of the second
                panels["rates, report"].sharey(panels["rates, tune"])
            draw_rates(panels["rates, tune"], "tune", chooser, group)
            draw_rates(panels["rates, report"], "report", metric, group)
        shown = [(place, each) for place, each in group if each.runs or each.finished_search()]
        add_legend(figure, [legend_entry(each.label, **line_style(place), linewidth=1.8) for place, each in shown])
        return figure


def reported_curves(result: Result, metric: str) -> list[Curve]:
    """The metric of the reported split in each run; none for runs that evaluated it only at the start and the end."""
    curves = [reported_curve(run, metric) for run in result.runs.values()]
    return [curve for curve in curves if len(curve) > 2]


def draw_curves(axes: Any, title: str, lines: Sequence[tuple[int, Sequence[Curve]]], marker: str | None = None) -> None:
    """Draws a thick line for the mean over seeds, and thin lines for the seeds.

    Args:
        axes: Where to draw.
        title: Title of the vertical axis.
        lines: Place and the curves of the seeds; at least one result has a curve.
        marker: Of the points of the mean.
    """
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(title)
    starts, highest = [], -math.inf
    for place, curves in lines:
        if not curves:
            continue
        style = line_style(place)
        if len(curves) > 1:
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), **style, linewidth=0.6, alpha=0.3)
        axes.plot(*zip(*mean_curve(curves), strict=True), **style, linewidth=1.8, marker=marker, markersize=4)
        starts += [curve[0][1] for curve in curves]
        highest = max(highest, *(value for curve in curves for _, value in curve))
    axes.set_xlim(left=0)
    if title.startswith(LOSSES) and highest > MOST_LOSS * min(starts):
        axes.set_ylim(top=MOST_LOSS * min(starts))


def draw_rates(axes: Any, split: str, metric: str, group: Placed) -> None:
    """Draws the result of every learning rate that was tried, for seed 0, with a large dot at the chosen one.

    Args:
        axes: Where to draw.
        split: "tune" or "report".
        metric: The metric of that split.
        group: Results of one task with their places; at least one searched for its rate.
    """
    searches = {place: each.finished_search() for place, each in group}
    ticks = sorted({rate for search in searches.values() for rate in search})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks], rotation=45)
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"{metric}, {'tuning' if split == 'tune' else 'reported'} split")
    values: list[float] = []
    for place, each in group:
        points = {rate: record["metrics"][split][metric] for rate, record in searches[place].items()}
        if not points:
            continue
        style = line_style(place)
        axes.plot(*zip(*points.items(), strict=True), **style, linewidth=1.6, marker="o", markersize=3)
        values += points.values()
        if each.rate in points:
            axes.plot([each.rate], [points[each.rate]], "o", color=style["color"], markersize=8)
    if metric in SMALLER_IS_BETTER and max(values) > MOST_LOSS * min(values) > 0:
        axes.set_ylim(top=MOST_LOSS * min(values))


def series_figure(
    name: str, metric: str, series: Sequence[Series], results: Sequence[Result], plain: Result | None
) -> Figure | None:
    """Draws the metric at the best learning rate against each number that the suite varies, one panel for each number.

    Args:
        name: Name of the figure.
        metric: The metric of the reported split.
        series: All series of the suite.
        results: Results of one task.
        plain: The result of plain LoRA, drawn as a horizontal line.

    Returns:
        The figure, with mean ± standard error. None if no series has two points.
    """
    by_label = {each.label: each for each in results}
    panels: dict[str, list[tuple[str, list[tuple[float, float, float]]]]] = {}
    for each in series:
        if len(points := series_points(each, by_label, metric)) > 1:
            panels.setdefault(each.name, []).append((each.title, points))
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.8 * rows), layout="constrained", label=name)
        for number, (varied, lines) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(rows, columns, number)
            axes.set_xlabel(varied.replace("_", " "))
            axes.set_ylabel(f"{metric}, reported split")
            _draw_series(
                axes,
                lines,
                None if plain is None or not plain.runs or plain.diverged else (plain.label, plain.values(metric)),
            )
        return figure


def _draw_series(
    axes: Any,
    lines: Sequence[tuple[str, Sequence[tuple[float, float, float]]]],
    plain: tuple[str, Sequence[float]] | None,
) -> None:
    """Draws (title, points) of each series with error bars, and the mean of plain LoRA's (label, values)."""
    entries = []
    for place, (title, points) in enumerate(lines):
        x, y, error = zip(*points, strict=True)
        axes.errorbar(x, y, yerr=error, **line_style(place), linewidth=1.8, marker="o", markersize=5, capsize=3)
        entries.append(legend_entry(title, **line_style(place), linewidth=1.8))
    ticks = sorted({value for _, points in lines for value, *_ in points})
    axes.set_xscale("log" if ticks[0] > 0 else "symlog", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45 if len(ticks) > 6 else 0)
    axes.minorticks_off()
    if plain is not None:
        axes.axhline(mean_and_error(plain[1])[0], **REFERENCE_LINE)
        entries.append(legend_entry(plain[0], **REFERENCE_LINE))
    axes.legend(handles=entries, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, handlelength=2.4)


def series_points(series: Series, by_label: dict[str, Result], metric: str) -> list[tuple[float, float, float]]:
    """Value, mean and standard error (0 for a single run) of each variant that has run, without a diverged seed."""
    points = []
    for value, label in series.labels.items():
        if label in by_label and by_label[label].runs and not by_label[label].diverged:
            mean, error = mean_and_error(by_label[label].values(metric))
            points.append((value, mean, 0.0 if math.isnan(error) else error))
    return points

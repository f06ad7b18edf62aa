"""The figures of a suite's results: losses during training, each learning rate, and numbers that the suite varies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from lora_ga.experiments.comparison.curves import mean_and_error, mean_curve
from lora_ga.experiments.comparison.series import Series
from lora_ga.experiments.comparison.speed import reported_curve, smoothed_training_loss
from lora_ga.experiments.comparison.suites import Result
from lora_ga.experiments.pages.drawing import REFERENCE_LINE, STYLE, add_legend, legend_entry, line_style, new_figure
from lora_ga.experiments.records.runs import Curve
from lora_ga.experiments.suites.protocol import SMALLER_IS_BETTER

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


def training_figure(name: str, group: Placed) -> Figure | None:
    """Draws the smoothed training losses at the best learning rate.

    Args:
        name: Name of the figure.
        group: Results of one task with their places.

    Returns:
        The figure, with a thick line for the mean over seeds and thin lines for the seeds. None without any run.
    """
    lines = [(place, each.label, [smoothed_training_loss(run) for run in each.runs.values()]) for place, each in group]
    return _draw_curves(name, "training loss", lines)


def report_figure(name: str, metric: str, group: Placed) -> Figure | None:
    """Draws the metric of the reported split during training; None if it was evaluated only at the start and end."""
    lines = []
    for place, each in group:
        curves = [reported_curve(run, metric) for run in each.runs.values()]
        lines.append((place, each.label, [curve for curve in curves if len(curve) > 2]))
    return _draw_curves(name, f"{metric}, reported split", lines, marker="o")


def _draw_curves(
    name: str, title: str, lines: Sequence[tuple[int, str, list[Curve]]], marker: str | None = None
) -> Figure | None:
    """Draws for each (place, label, curves of the seeds) the mean and the seeds; None if there is no curve at all."""
    lines = [line for line in lines if line[2]]
    if not lines:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(name, "optimiser step", title)
        entries, starts, highest = [], [], -math.inf
        for place, label, curves in lines:
            style = line_style(place)
            if len(curves) > 1:
                for curve in curves:
                    axes.plot(*zip(*curve, strict=True), **style, linewidth=0.6, alpha=0.3)
            axes.plot(*zip(*mean_curve(curves), strict=True), **style, linewidth=1.8, marker=marker, markersize=4)
            entries.append(legend_entry(label, **style, linewidth=1.8))
            starts += [curve[0][1] for curve in curves]
            highest = max(highest, *(value for curve in curves for _, value in curve))
        axes.set_xlim(left=0)
        if title.startswith(LOSSES) and highest > MOST_LOSS * min(starts):
            axes.set_ylim(top=MOST_LOSS * min(starts))
        add_legend(figure, entries)
        return figure


def rates_figure(name: str, chooser: str, metric: str, group: Placed) -> Figure | None:
    """Draws the result of every learning rate that was tried, for seed 0, with a large dot at the chosen one.

    Args:
        name: Name of the figure.
        chooser: The metric of the tuning split, which chooses the rate.
        metric: The metric of the reported split.
        group: Results of one task with their places.

    Returns:
        The figure, with a panel for each split. None if no rates were searched.
    """
    lines = [(place, each, each.finished_search()) for place, each in group if each.finished_search()]
    if not lines:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.4), layout="constrained", label=name)
        panels = figure.subplots(1, 2, sharey=chooser == metric)
        ticks = sorted({rate for _, _, search in lines for rate in search})
        for axes, split, shown in zip(panels, ("tune", "report"), (chooser, metric), strict=True):
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks], rotation=45)
            axes.minorticks_off()
            axes.set_xlabel("learning rate")
            axes.set_ylabel(f"{shown}, {'tuning' if split == 'tune' else 'reported'} split")
            values: list[float] = []
            for place, each, search in lines:
                points = {rate: record["metrics"][split][shown] for rate, record in search.items()}
                style = line_style(place)
                axes.plot(*zip(*points.items(), strict=True), **style, linewidth=1.6, marker="o", markersize=3)
                values += points.values()
                if each.rate in points:
                    axes.plot([each.rate], [points[each.rate]], "o", color=style["color"], markersize=8)
            if shown in SMALLER_IS_BETTER and max(values) > MOST_LOSS * min(values) > 0:
                axes.set_ylim(top=MOST_LOSS * min(values))
        add_legend(figure, [legend_entry(each.label, **line_style(place), linewidth=1.6) for place, each, _ in lines])
        return figure


def series_figure(
    name: str, metric: str, found: Sequence[Series], results: Sequence[Result], plain: Result | None
) -> Figure | None:
    """Draws the metric at the best learning rate against a number that the suite varies.

    Args:
        name: Name of the figure.
        metric: The metric of the reported split.
        found: Series of one number.
        results: Results of one task.
        plain: The result of plain LoRA, drawn as a horizontal line.

    Returns:
        The figure, with mean ± standard error. None if no series has two points.
    """
    by_label = {each.label: each for each in results}
    lines = [(each.title, series_points(each, by_label, metric)) for each in found]
    lines = [(title, points) for title, points in lines if len(points) > 1]
    if not lines:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(name, found[0].name.replace("_", " "), f"{metric}, reported split", height=3.8)
        entries = []
        for place, (title, points) in enumerate(lines):
            x, y, error = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=error, **line_style(place), linewidth=1.8, marker="o", markersize=5, capsize=3)
            entries.append(legend_entry(title, **line_style(place), linewidth=1.8))
        ticks = sorted({value for _, points in lines for value, *_ in points})
        axes.set_xscale("log" if ticks[0] > 0 else "symlog", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        if plain is not None and plain.runs:
            axes.axhline(mean_and_error(plain.values(metric))[0], **REFERENCE_LINE)
            entries.append(legend_entry(plain.label, **REFERENCE_LINE))
        add_legend(figure, entries)
        return figure


def series_points(series: Series, by_label: dict[str, Result], metric: str) -> list[tuple[float, float, float]]:
    """Value, mean and standard error (0 for a single run) of each variant of a series that has run."""
    points = []
    for value, label in series.labels.items():
        if label in by_label and by_label[label].runs:
            mean, error = mean_and_error(by_label[label].values(metric))
            points.append((value, mean, 0.0 if math.isnan(error) else error))
    return points

"""A suite's results as pictures: losses on the way, what a rate does, what a number that was varied does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_ga.experiments.comparison.runs import mean_and_error, mean_curve
from lora_ga.experiments.comparison.suites import Record, Result, Series, smoothed
from lora_ga.experiments.pages.runs import FAINT, STYLE, add_legend, line_style, new_figure
from lora_ga.experiments.records.runs import Curve
from lora_ga.experiments.suites.protocol import SMALLER_IS_BETTER

MOST_LINES = 12  # of one figure; more could not be told apart
LOSSES = ("training loss", *SMALLER_IS_BETTER)
HIGH = 2.0  # a loss so many times the smallest start, or the smallest end, is cut off: it would flatten all others


def batches(results: Sequence[Result]) -> Iterator[list[tuple[int, Result]]]:
    """The results of a task in groups that one figure can show, each with its place, which decides its colour."""
    placed = list(enumerate(results))
    yield from (placed[start : start + MOST_LINES] for start in range(0, len(placed), MOST_LINES))


def training_figure(name: str, group: Sequence[tuple[int, Result]]) -> Figure | None:
    """The smoothed training losses at the best rate; None if there are none.

    Args:
        name: Of the figure.
        group: Results of one task with their places.

    Returns:
        The figure: a thick line for the mean over seeds, thin ones for the seeds.
    """
    lines = [(place, each.label, [smoothed(run) for run in each.runs.values()]) for place, each in group]
    return _curves(name, "training loss", lines)


def report_figure(name: str, metric: str, group: Sequence[tuple[int, Result]]) -> Figure | None:
    """The metric on the reported split along the way; None where it was looked at only at the end."""
    lines = [(place, each.label, [looks(run, metric) for run in each.runs.values()]) for place, each in group]
    lines = [(place, label, [curve for curve in curves if len(curve) > 2]) for place, label, curves in lines]
    return _curves(name, f"{metric}, reported split", lines, marker="o")


def looks(run: Record, metric: str) -> Curve:
    """A run's looks at the reported split."""
    points = [point for point in run["curves"]["report"] if metric in point]
    return tuple((int(point["step"]), float(point[metric])) for point in points)


def _curves(
    name: str, what: str, lines: Sequence[tuple[int, str, list[Curve]]], marker: str | None = None
) -> Figure | None:
    drawn = [(place, label, curves) for place, label, curves in lines if curves]
    if not drawn:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(name, "optimiser step", what)
        handles, starts, highest = [], [], -math.inf
        for place, label, curves in drawn:
            style = line_style(place)
            if len(curves) > 1:
                for curve in curves:
                    axes.plot(*zip(*curve, strict=True), **style, linewidth=0.6, alpha=0.3)
            axes.plot(*zip(*mean_curve(curves), strict=True), **style, linewidth=1.8, marker=marker, markersize=4)
            handles.append(Line2D([], [], **style, linewidth=1.8, label=f" {label}"))
            starts += [curve[0][1] for curve in curves]
            highest = max(highest, *(value for curve in curves for _, value in curve))
        axes.set_xlim(left=0)
        if what.startswith(LOSSES) and highest > HIGH * min(starts):
            axes.set_ylim(top=HIGH * min(starts))
        add_legend(figure, handles)
        return figure


def rates_figure(name: str, chooser: str, metric: str, group: Sequence[tuple[int, Result]]) -> Figure | None:
    """What every rate that was tried led to, seed 0; a large dot at the one that was chosen.

    Args:
        name: Of the figure.
        chooser: The metric of the tuning split, which chooses the rate.
        metric: That of the reported split.
        group: Results of one task with their places.

    Returns:
        The figure, a panel for each split; None if nothing was searched.
    """
    drawn = [(place, each, tried(each)) for place, each in group if tried(each)]
    if not drawn:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.4), layout="constrained", label=name)
        panels = figure.subplots(1, 2, sharey=chooser == metric)
        ticks = sorted({rate for _, _, runs in drawn for rate in runs})
        for axes, split, shown in zip(panels, ("tune", "report"), (chooser, metric), strict=True):
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks], rotation=45)
            axes.minorticks_off()
            axes.set_xlabel("learning rate")
            axes.set_ylabel(f"{shown}, {'tuning' if split == 'tune' else 'reported'} split")
            values: list[float] = []
            for place, each, runs in drawn:
                found = [(rate, record["metrics"][split][shown]) for rate, record in runs.items()]
                axes.plot(*zip(*found, strict=True), **line_style(place), linewidth=1.6, marker="o", markersize=3)
                values += [value for _, value in found]
                best = [point for point in found if point[0] == each.rate]
                axes.plot(
                    [x for x, _ in best], [y for _, y in best], "o", color=line_style(place)["color"], markersize=8
                )
            if shown in SMALLER_IS_BETTER and max(values) > HIGH * min(values) > 0:
                axes.set_ylim(top=HIGH * min(values))
        add_legend(figure, [Line2D([], [], **line_style(p), linewidth=1.6, label=f" {e.label}") for p, e, _ in drawn])
        return figure


def tried(result: Result) -> dict[float, Record]:
    """The rates whose run of seed 0 ended well."""
    return {rate: record for rate, record in sorted(result.searched.items()) if record["status"] == "done"}


def series_figure(
    name: str, metric: str, found: Sequence[Series], results: Sequence[Result], plain: Result | None
) -> Figure | None:
    """The metric at the best rate against a number that the suite varies; None without two points of one series.

    Args:
        name: Of the figure.
        metric: What is reported.
        found: Series of one number.
        results: Of one task.
        plain: LoRA's result, drawn as a level to compare with.

    Returns:
        The figure, mean ± standard error.
    """
    by_label = {each.label: each for each in results}
    lines = [(each.title, series_points(each, by_label, metric)) for each in found]
    lines = [(title, points) for title, points in lines if len(points) > 1]
    if not lines:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(name, found[0].name.replace("_", " "), f"{metric}, reported split", height=3.8)
        handles = []
        for place, (title, points) in enumerate(lines):
            x, y, error = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=error, **line_style(place), linewidth=1.8, marker="o", markersize=5, capsize=3)
            handles.append(Line2D([], [], **line_style(place), linewidth=1.8, label=f" {title}"))
        smallest = min(value for _, points in lines for value, *_ in points)
        axes.set_xscale("log", base=2) if smallest > 0 else axes.set_xscale("symlog", base=2)
        ticks = sorted({value for _, points in lines for value, *_ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        if plain is not None and plain.runs:
            axes.axhline(mean_and_error(plain.values(metric))[0], color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
            handles.append(Line2D([], [], color=FAINT, linewidth=1, linestyle=(0, (4, 3)), label=f" {plain.label}"))
        add_legend(figure, handles)
        return figure


def series_points(each: Series, by_label: dict[str, Result], metric: str) -> list[tuple[float, float, float]]:
    """Value, mean and standard error (0 of a single run) of the variants of a series that have run."""
    points = []
    for value, label in each.labels.items():
        if label in by_label and by_label[label].runs:
            mean, error = mean_and_error(by_label[label].values(metric))
            points.append((value, mean, 0.0 if math.isnan(error) else error))
    return points

"""A comparison as pictures and as one HTML page that needs nothing but itself.

The figures are matplotlib's, made without pyplot: nothing global is changed and no display is needed.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_ga.experiments.comparison.runs import Comparison, Group, mean_and_error, mean_curve, smooth
from lora_ga.experiments.records.runs import Curve, Run
from lora_ga.experiments.tables.runs import (
    Table,
    cost_table,
    differences_table,
    reached,
    runs_table,
    summary_table,
    versions_table,
)

# Okabe and Ito's palette without its yellow, which is too light for lines: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("solid", "dashed", "dashdot", "dotted")
INK, FAINT = "#24292f", "#6e7781"
STYLE = {
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": "#c8ccd1",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceef0",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "text.parse_math": False,  # a run may be called "a$b$"
}


def line_style(place: int) -> dict[str, Any]:
    """Returns colour and dashes of the group at this place: 28 that differ, then again."""
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place // len(COLOURS) % len(DASHES)]}


def rendered(figure: Figure, form: str) -> bytes:
    """Returns the picture as "png" or as an "svg" element without prologue and metadata, the same bytes every time."""
    buffer = io.BytesIO()
    # The salt makes ids that neither change from run to run nor meet those of another figure on the page.
    with mpl.rc_context({**STYLE, "svg.hashsalt": figure.get_label()}):
        if form == "png":
            FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=180, metadata={"Software": None})
            return buffer.getvalue()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_figure(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    return svg[svg.index(b"<svg") :]


def new_figure(label: str, x: str, y: str, height: float = 4.2) -> tuple[Figure, Any]:
    """Returns an empty figure, whose label names it, and its axes; to be called in the context of `STYLE`."""
    figure = Figure(figsize=(8.6, height), layout="constrained", label=label)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _draw_groups(
    axes: Any, groups: Sequence[Group], curve_of: Callable[[Run], Curve], marker: str | None = None
) -> list[Line2D]:
    """Draws each group's mean, and thin lines for its runs where it has several.

    Returns:
        A handle for the legend of each group that has such a curve.
    """
    handles = []
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
        handles.append(Line2D([], [], **style, linewidth=2, label=f" {name}"))  # a leading "_" would hide it
    return handles


def add_legend(figure: Figure, handles: list[Line2D]) -> None:
    """Puts the handles above the axes, in as many columns as their names leave room for."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    columns = max(1, min(5, 112 // (longest + 7)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=2.4)


def training_figure(comparison: Comparison) -> Figure:
    """Returns the smoothed training losses, the logged values faint behind them, and the target with its crossings."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("training", "optimiser step", "training loss")
        logged = [run for group in comparison.groups if len(group.runs) == 1 for run in group.runs]
        places = {group.runs[0].folder: place for place, group in enumerate(comparison.groups)}
        for run in logged:
            if run.curve:
                axes.plot(
                    *zip(*run.curve, strict=True),
                    color=line_style(places[run.folder])["color"],
                    linewidth=0.7,
                    alpha=0.25,
                )
        handles = _draw_groups(axes, comparison.groups, lambda run: smooth(run.curve, comparison.window))
        if (target := comparison.target.value) is not None:
            axes.axhline(target, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            handles.append(
                Line2D([], [], color=FAINT, linewidth=1, linestyle=(0, (4, 3)), label=f"target {target:.4g}")
            )
            for place, group in enumerate(comparison.groups):
                arrived = [step for step in reached(group, comparison) if step is not None]
                if len(arrived) == len(group.runs):  # the place the table gives
                    step = mean_and_error(arrived)[0]
                    axes.plot([step], [target], "o", color=line_style(place)["color"], markersize=7, zorder=5)
        axes.set_xlim(left=0)
        if (top := visible_top(comparison)) is not None:
            axes.set_ylim(top=top)
        add_legend(figure, handles)
        return figure


def visible_top(comparison: Comparison) -> float | None:
    """Returns where the loss axis ends if a run went far above every start, so that it does not flatten the others."""
    starts = [run.curve[0][1] for run in comparison.runs if run.curve and math.isfinite(run.curve[0][1])]
    values = [value for run in comparison.runs for _, value in run.curve if math.isfinite(value)]
    return 1.5 * max(starts) if starts and max(values) > 2 * max(starts) else None


def evaluation_figure(comparison: Comparison, metric: str) -> Figure:
    """Returns the values of one metric at the evaluations during training."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(metric, "optimiser step", metric.replace("_", " "), height=3.4)
        handles = _draw_groups(axes, comparison.groups, lambda run: run.evals.get(metric, ()), marker="o")
        axes.set_xlim(left=0)
        add_legend(figure, handles)
        return figure


CSS = """
:root{color-scheme:light}
body{margin:0;background:#f6f7f9;color:#24292f;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .3rem}
h2{font-size:1.15rem;margin:0 0 .8rem}
.facts{color:#57606a;margin:0 0 1.6rem}
section{background:#fff;border:1px solid #e3e6ea;border-radius:10px;padding:22px 26px;margin:0 0 20px}
.note{background:#fff8e6;border-color:#edd9a3}.note p{margin:.2rem 0}
figure{margin:0 0 1.4rem}figure:last-child{margin-bottom:0}
figure svg{display:block;width:100%;height:auto}
figcaption,.caption{color:#57606a;font-size:.9rem;margin:.5rem 0 0}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:.45rem .7rem;text-align:right;border-bottom:1px solid #eceef0;white-space:nowrap}
.text td,td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:5rem}
th{white-space:normal;color:#57606a;font-weight:600;vertical-align:bottom}
th:first-child,td:first-child,.text td,.text th{text-align:left}
tbody tr:last-child td{border-bottom:0}
i{display:inline-block;width:.75em;height:.75em;border-radius:50%;margin-right:.55em}
"""


def table_html(table: Table, *, text: bool = False, coloured: bool = False) -> str:
    """Returns the table; `coloured` puts each row's line colour before its name, `text` aligns all columns left."""
    head = "".join(f"<th>{escape(header)}</th>" for header in table.headers)
    rows = []
    for place, row in enumerate(table.rows):
        dot = f'<i style="background:{line_style(place)["color"]}"></i>' if coloured else ""
        rows.append(f"<tr><td>{dot}" + "</td><td>".join(escape(cell) for cell in row) + "</td></tr>")
    kind = ' class="text"' if text else ""
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def figure_html(figure: Figure, caption: str) -> str:
    """Returns the figure as part of a page."""
    label = f'role="img" aria-label="{escape(caption)}"'
    # A fixed size in points would not follow the width of the page; the viewBox keeps the proportions.
    svg = re.sub(r'^<svg ([^>]*?)(?: (?:width|height)="[^"]*")*', rf"<svg {label} \1", rendered(figure, "svg").decode())
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def training_caption(comparison: Comparison) -> str:
    """Returns what the training figure shows and how the numbers were smoothed."""
    text = f"Training loss, {comparison.smoothing}. "
    if any(len(group.runs) == 1 for group in comparison.groups):
        text += "Faint: the values as logged. "
    if any(len(group.runs) > 1 for group in comparison.groups):
        text += "Where there are several seeds, thin: each of them; thick: their mean. "
    if comparison.target.value is not None:
        text += f"Dashed: the target, {comparison.target.source}; a dot marks the step at which it is reached. "
    if (top := visible_top(comparison)) is not None:
        text += f"Losses above {top:.4g} are cut off. "
    return text.strip()


def summary_caption(comparison: Comparison) -> str:
    """Returns how to read the numbers of the summary table."""
    text = f"Training losses: {comparison.smoothing}. Metrics: at the end. "
    if comparison.target.value is not None:
        text += f"The target, {comparison.target.value:.4g}, is {comparison.target.source}. "
    if any(len(group.runs) > 1 for group in comparison.groups):
        text += "Where n > 1: mean ± standard error over n seeds. "
    if any(len(group.runs) == 1 for group in comparison.groups):
        text += "Where n = 1 there is no measure of chance: another seed would give another number. "
    return text.strip()


def page_html(comparison: Comparison) -> str:
    """Returns the whole page. Whatever comes from a record is escaped, and nothing is fetched from anywhere."""
    runs = comparison.runs
    facts = [{str(getattr(run, field)) for run in runs} for field in ("task", "model", "dataset", "steps")]
    shared = [next(iter(found)) for found in facts if len(found) == 1]
    if len(facts[3]) == 1:
        shared[-1] += " steps"
    count = f"{len(runs)} run" + ("s" if len(runs) > 1 else "")
    sections = [f"<h2>Result</h2>{table_html(summary_table(comparison), coloured=True)}"]
    sections[0] += f'<p class="caption">{escape(summary_caption(comparison))}</p>'
    sections.append(f"<h2>Cost</h2>{table_html(cost_table(comparison))}")
    if any(run.curve for run in runs):
        sections.append("<h2>Training</h2>" + figure_html(training_figure(comparison), training_caption(comparison)))
    if metrics := list(dict.fromkeys(metric for run in runs for metric in run.evals)):
        captions = {metric: f"{metric} at the evaluations during training, not smoothed." for metric in metrics}
        figures = [figure_html(evaluation_figure(comparison, metric), captions[metric]) for metric in metrics]
        sections.append("<h2>Evaluation</h2>" + "".join(figures))
    differences = differences_table(comparison)
    sections.append(
        "<h2>Options in which the runs differ</h2>"
        + (table_html(differences, text=True) if differences.rows else '<p class="caption">None but the seed.</p>')
    )
    sections.append(f"<h2>Runs</h2>{table_html(runs_table(comparison), text=True)}")
    sections.append(f"<h2>Versions</h2>{table_html(versions_table(comparison), text=True)}")
    title = f"LoRA-GA: {count} compared" if len(runs) > 1 else "LoRA-GA: one run"
    return document_html(title, " · ".join(shared), comparison.notices, sections)


def document_html(title: str, facts: str, notices: Sequence[str], sections: Sequence[str]) -> str:
    """Returns a whole page around sections that are HTML already; the other texts are escaped."""
    notes = "".join(f"<p>{escape(notice)}</p>" for notice in notices)
    body = (f'<section class="note">{notes}</section>' if notes else "") + "".join(
        f"<section>{section}</section>" for section in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main><h1>{escape(title)}</h1>"
        f'<p class="facts">{escape(facts)}</p>{body}</main></body></html>\n'
    )

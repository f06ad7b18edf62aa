"""What all figures share: colours, line styles, empty axes, legends, and the figure as PNG or SVG.

The figures are matplotlib's, made without pyplot: nothing global changes, and no display is needed.
"""

from __future__ import annotations

import io
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

# The palette of Okabe and Ito, which readers with colour-blindness can tell apart; its yellow is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("solid", "dashed", "dashdot", "dotted")
INK, FAINT = "#24292f", "#6e7781"
DOTS_PER_INCH = 180  # of a PNG
REFERENCE_LINE: dict[str, Any] = {"color": FAINT, "linewidth": 1, "linestyle": (0, (4, 3))}
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
    """Colour and dashes of the line at this place. The first 28 differ; after that they repeat."""
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place // len(COLOURS) % len(DASHES)]}


def new_figure(label: str, x: str, y: str, height: float = 4.2) -> tuple[Figure, Any]:
    """Makes an empty figure. Call it inside `mpl.rc_context(STYLE)`.

    Args:
        label: Names the figure.
        x: Title of the horizontal axis.
        y: Title of the vertical axis.
        height: In inches.

    Returns:
        The figure and its axes.
    """
    figure = Figure(figsize=(8.6, height), layout="constrained", label=label)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def legend_entry(label: str, **style: Any) -> Line2D:
    """An entry of a legend. The label gets a leading blank, since matplotlib hides labels that begin with "_"."""
    return Line2D([], [], **style, label=f" {label}")


def add_legend(figure: Figure, entries: list[Line2D]) -> None:
    """Puts the legend above the axes, in as many columns as fit."""
    longest = max((len(str(entry.get_label())) for entry in entries), default=0)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(max(1, min(5, 112 // (longest + 7))), 0, -1):
        legend = figure.legend(handles=entries, loc="outside upper left", ncols=columns, handlelength=2.4)
        if columns == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width:
            return
        legend.remove()


def render(figure: Figure, form: Literal["png", "svg"]) -> bytes:
    """Renders a figure; the same figure gives the same bytes every time.

    Args:
        figure: Its label makes the ids in an SVG unique among the figures of a page.
        form: "png", or "svg" for an `<svg>` element without XML declaration, document type and metadata.

    Returns:
        The content of the file, or the element.
    """
    buffer = io.BytesIO()
    # Without a salt, matplotlib's ids would change from run to run.
    with mpl.rc_context({**STYLE, "svg.hashsalt": figure.get_label()}):
        if form == "png":
            FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=DOTS_PER_INCH)
            return _with_palette(buffer)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_figure(buffer, format="svg", metadata=no_metadata)
    svg = buffer.getvalue()
    return svg[svg.index(b"<svg") :]


def _with_palette(png: io.BytesIO) -> bytes:
    """The picture with a palette of 256 colours, which makes its file a third as large and changes nothing visible."""
    smaller = io.BytesIO()
    with Image.open(png) as image:
        palette = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        palette.save(smaller, "PNG", optimize=True, dpi=(DOTS_PER_INCH, DOTS_PER_INCH))
    return smaller.getvalue()

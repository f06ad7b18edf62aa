"""A table of text, its form in Markdown, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

from lora_ga.experiments.comparison.curves import mean_and_error

BLANK = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text under headers.

    Attributes:
        headers: One text for each column.
        rows: One text for each column; the first names the row.
        bold: (row, column) of the cells that are emphasised.
        left_aligned: Whether all columns are aligned left, as words are; otherwise only the first is.
        row_colours: One CSS colour for each row, shown before its name on an HTML page. Empty: none.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: Set[tuple[int, int]] = frozenset()
    left_aligned: bool = False
    row_colours: Sequence[str] = ()


def markdown_lines(table: Table) -> list[str]:
    """The lines of a table in Markdown."""
    rule = ["---", *["---" if table.left_aligned else "---:"] * (len(table.headers) - 1)]
    rows = [
        [
            f"**{_markdown_cell(cell)}**" if (row, column) in table.bold else _markdown_cell(cell)
            for column, cell in enumerate(cells)
        ]
        for row, cells in enumerate(table.rows)
    ]
    return ["| " + " | ".join(row) + " |" for row in ([_markdown_cell(cell) for cell in table.headers], rule, *rows)]


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def format_values(values: Sequence[float], digits: int = 4) -> str:
    """Formats the mean of some values.

    Args:
        values: Any number of them.
        digits: Significant digits of the mean.

    Returns:
        "mean ± standard error", the error with two digits. The mean alone for a single value, `BLANK` for none.
    """
    if not values:
        return BLANK
    mean, error = mean_and_error(values)
    if not math.isfinite(mean):
        return "not finite"
    if not error > 0:
        return f"{mean:.{digits}g}" + (" ± 0" if error == 0 else "")
    most = digits - (math.floor(math.log10(abs(mean))) if mean else 0)
    decimals = max(0, min(most, 1 - math.floor(math.log10(error))))
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"

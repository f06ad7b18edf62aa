"""A document of paragraphs, tables and pictures, and its two forms: one HTML page, or Markdown with PNG files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from lora_ga.experiments.pages.drawing import render
from lora_ga.experiments.tables.table import Table, markdown_lines

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Picture:
    """A figure with its caption; the figure's label names its file."""

    figure: Figure
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading and what is below it: paragraphs, tables, pictures."""

    title: str
    blocks: Sequence[str | Table | Picture]


@dataclass(frozen=True)
class Document:
    """A document before it has a form.

    Attributes:
        title: Its heading.
        facts: One line below the heading.
        notices: What a reader must know before reading the numbers, one paragraph each.
        sections: The rest, in order.
    """

    title: str
    facts: str
    notices: Sequence[str]
    sections: Sequence[Section]


def html_page(document: Document) -> str:
    """Renders a document as one HTML page that fetches nothing; equal documents give equal pages."""
    environment = Environment(
        loader=PackageLoader(__package__, package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = _svg_element
    environment.tests["table"] = lambda block: isinstance(block, Table)
    return environment.get_template(TEMPLATE).render(document=document)


def _svg_element(figure: Figure) -> Markup:
    """The figure as an `<svg>` element; matplotlib has escaped the texts in it."""
    svg = render(figure, "svg").decode()
    opening, rest = svg.split(">", 1)
    # A fixed size in points would not follow the width of the page; the viewBox keeps the proportions.
    opening = re.sub(r' (?:width|height)="[^"]*"', "", opening)
    return Markup(f"{opening}>{rest.rstrip()}")


def markdown_files(document: Document, name: str) -> dict[str, bytes]:
    """Renders a document as Markdown with pictures; equal documents give equal files.

    Args:
        document: What to render.
        name: Of the Markdown file.

    Returns:
        File name → content, the Markdown file first.
    """
    lines = [f"# {document.title}", "", document.facts, ""]
    if document.notices:
        lines += ["\n>\n".join(f"> {notice}" for notice in document.notices), ""]
    pictures = {}
    for section in document.sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            if isinstance(block, Table):
                lines += [*markdown_lines(block), ""]
            elif isinstance(block, Picture):
                file = f"{block.figure.get_label()}.png"
                pictures[file] = render(block.figure, "png")
                lines += [f"![{block.caption}]({file})", "", block.caption, ""]
            else:
                lines += [block, ""]
    return {name: ("\n".join(lines).rstrip() + "\n").encode(), **pictures}

"""A suite's results as one document, and the document as Markdown with pictures or as one HTML page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from matplotlib.figure import Figure

from lora_ga.experiments.comparison.suites import (
    PAPER,
    TUNED,
    Records,
    Result,
    Series,
    protocols,
    reference,
    results,
    series,
)
from lora_ga.experiments.pages.figures import batches, rates_figure, report_figure, series_figure, training_figure
from lora_ga.experiments.pages.runs import document_html, figure_html, rendered, table_html
from lora_ga.experiments.suites.spec import Suite
from lora_ga.experiments.tables.runs import Table
from lora_ga.experiments.tables.suites import (
    TextTable,
    cost_table,
    method_table,
    overview_table,
    records_table,
    settings_table,
    usual_device,
)

PAGE, TEXT = "index.html", "README.md"


@dataclass(frozen=True)
class Picture:
    """A figure; its label names its file."""

    figure: Figure
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading and what is below it: paragraphs, tables, pictures."""

    title: str
    blocks: Sequence[str | Table | Picture]


@dataclass(frozen=True)
class Document:
    """A report before it has a form."""

    title: str
    facts: str
    notices: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=list)


def report(suite: Suite, records: Records) -> Document:
    """Draws a suite, as far as it has run.

    Args:
        suite: The suite.
        records: Of a store, by digest; those of other suites are passed over.

    Returns:
        The document: equal records give an equal one.

    Raises:
        ValueError: No cell of the suite has run.
    """
    found = {protocol: results(suite, records, protocol) for protocol in protocols(suite)}
    if not any(begun(some) for some in found.values()):
        raise ValueError(
            f"{suite.name}: none of its cells is in this store. Run `lora-ga reproduce {suite.name}` first, or name "
            "another store by --store."
        )
    sections = [section for protocol, some in found.items() for section in _protocol(suite, protocol, some)]
    used = {
        id(run): run
        for some in found.values()
        for each in some
        for run in (*each.runs.values(), *each.searched.values())
    }
    runs = list(used.values())
    sections.append(Section("Settings", [settings_table(suite), records_table(runs)]))
    facts = f"{len(runs)} runs. {_protocol_words(suite)}"
    return Document(f"{suite.name}: {suite.title}", facts, notices(suite, found), sections)


def _protocol_words(suite: Suite) -> str:
    words = (
        "Tuned protocol: every method at its own best learning rate, chosen with seed 0 on a split of the training "
        f"data that is not the reported one; then {suite.seeds} seeds at that rate."
    )
    if suite.paper_rate is not None:
        words += f" The paper's protocol: {suite.paper_rate:g} for every method."
    return words


def notices(suite: Suite, found: Mapping[str, Sequence[Result]]) -> list[str]:
    """What a reader must know before believing the tables: what is missing, what diverged, what is at an edge."""
    said = []
    for protocol, some in found.items():
        of = "" if len(found) == 1 else f" ({protocol} protocol)"
        absent = [each for each in some if each.missing and each.task in begun(some)]
        if absent:
            lines = ", ".join(f"{each.task}/{each.label} ({each.missing})" for each in absent)
            said.append(f"Not complete{of}: at least {sum(e.missing for e in absent)} cells have not run: {lines}.")
        untouched = [task for task in suite.tasks if task not in begun(some)]
        if untouched:
            said.append(f"Not begun{of}: {', '.join(untouched)}.")
        edge = [f"{each.task}/{each.label}" for each in some if each.rate is not None and not each.inside]
        if edge:
            said.append(f"The best rate lies at the edge of what was tried{of}: {', '.join(edge)}.")
    lost = dict.fromkeys(title for some in found.values() for each in some for title in each.lost)
    return said + [f"{title}." for title in lost]


def begun(found: Sequence[Result]) -> list[str]:
    """The tasks of which a cell has run."""
    return list(dict.fromkeys(each.task for each in found if each.runs or each.searched or each.lost))


HEADINGS = {TUNED: "Every method at its own best rate", PAPER: "The paper's protocol: one rate for all"}


def _protocol(suite: Suite, protocol: str, found: Sequence[Result]) -> list[Section]:
    """The sections of one protocol: an overview where there are several tasks, and each task."""
    sections = []
    if len(begun(found)) > 1:
        caption = (
            "Reported split, mean ± standard error over the seeds; in brackets the learning rate. Bold: the best mean."
        )
        sections.append(Section(HEADINGS[protocol], [overview_table(suite, begun(found), found), caption]))
    for task in suite.tasks:
        if task in begun(found):
            sections.append(_task(suite, task, protocol, [each for each in found if each.task == task]))
    return sections


def _task(suite: Suite, task: str, protocol: str, found: Sequence[Result]) -> Section:
    metric, chooser = suite.tasks[task].metric, suite.tasks[task].chooser
    plain = next((each for each in found if each.label == reference(suite)), None)
    blocks: list[str | Table | Picture] = [method_table(suite, found, plain)]
    if plain is not None:
        blocks.append(
            f"Steps: to the final training loss of {plain.label} with the same seed and so the same batches, both "
            "curves smoothed by a trailing mean; ÷ its own steps to there. Below 1 is faster. In the pictures, losses "
            "above twice the smallest start, or the smallest end, are cut off."
        )
    blocks += [cost_table(found), _cost_words(found)]
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{protocol}-{task}")
    for number, group in enumerate(batches(found)):
        end = f"-{number + 1}" if number else ""
        pictures = [
            (
                training_figure(f"{name}-training{end}", group),
                "Training loss at the best rate, smoothed; thick: mean over seeds, thin: each seed.",
            ),
            (report_figure(f"{name}-report{end}", metric, group), f"{metric} on the reported split along the way."),
            (
                rates_figure(f"{name}-rates{end}", chooser, metric, group),
                "What each rate led to, seed 0. The left side chose the rate (large dot); diverged runs have no dot.",
            ),
        ]
        blocks += [Picture(figure, f"{task}. {caption}") for figure, caption in pictures if figure is not None]
    blocks += _series(name, metric, series(suite), found, plain)
    return Section(f"{task}, {metric}" + ("" if protocol == TUNED else ", the paper's protocol"), blocks)


def _cost_words(found: Sequence[Result]) -> str:
    """On what the seconds and the memory were measured."""
    usual = usual_device(found)
    where = "" if usual is None else f", on {usual}"
    if len({run["device"] for each in found for run in each.runs.values()}) > 1:
        where += "; runs elsewhere are left out"
    return (
        f"Means over the runs at the rate above, each in one process{where}. Memory is the process's on a CPU, and "
        "what was allocated on a GPU."
    )


def _series(
    name: str, metric: str, varied: Sequence[Series], found: Sequence[Result], plain: Result | None
) -> list[Picture]:
    """One picture for each number that the suite varies."""
    pictures = []
    for number in dict.fromkeys(each.name for each in varied):
        some = [each for each in varied if each.name == number]
        figure = series_figure(f"{name}-{number.replace('_', '-')}", metric, some, found, plain)
        if figure is not None:
            text = f"{metric} on the reported split against {number}, each at its best rate; mean ± standard error."
            pictures.append(Picture(figure, text))
    return pictures


def markdown(document: Document) -> dict[str, bytes]:
    """The document as files: a README and its pictures; name → content."""
    lines = [f"# {document.title}", "", document.facts, ""]
    if document.notices:
        lines += ["\n>\n".join(f"> {notice}" for notice in document.notices), ""]
    files = {}
    for section in document.sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            if isinstance(block, Table):
                lines += [*table_lines(block), ""]
            elif isinstance(block, Picture):
                file = f"{block.figure.get_label()}.png"
                files[file] = rendered(block.figure, "png")
                lines += [f"![{block.caption}]({file})", "", block.caption, ""]
            else:
                lines += [block, ""]
    return {TEXT: ("\n".join(lines).rstrip() + "\n").encode(), **files}


def table_lines(table: Table) -> list[str]:
    """A table's lines in Markdown."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (table.headers, *table.rows)]
    rule = ["---", *["---" if isinstance(table, TextTable) else "---:"] * (len(table.headers) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]


def html(document: Document) -> bytes:
    """The document as one page that fetches nothing."""
    sections = []
    for section in document.sections:
        parts = [f"<h2>{escape(section.title)}</h2>"]
        for block in section.blocks:
            if isinstance(block, Table):
                parts.append(_bold(table_html(block, text=isinstance(block, TextTable))))
            elif isinstance(block, Picture):
                parts.append(figure_html(block.figure, block.caption))
            else:
                parts.append(f'<p class="caption">{escape(block)}</p>')
        sections.append("".join(parts))
    return document_html(document.title, document.facts, document.notices, sections).encode()


def _bold(table: str) -> str:
    return re.sub(r"<td>\*\*(.*?)\*\*</td>", r"<td><b>\1</b></td>", table)


def files(document: Document) -> dict[str, bytes]:
    """All files of a report; name → content."""
    return {PAGE: html(document), **markdown(document)}

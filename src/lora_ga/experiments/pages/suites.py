"""A suite's results as a document, and the files of the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lora_ga.experiments.comparison.suites import (
    PAPER,
    TUNED,
    Record,
    Records,
    Result,
    at_rate,
    find_series,
    plain_lora,
    protocols,
    results,
)
from lora_ga.experiments.pages.document import Document, Picture, Section, html_page, markdown_files
from lora_ga.experiments.pages.suite_figures import figure_groups, series_figure, task_figure
from lora_ga.experiments.suites.spec import Suite
from lora_ga.experiments.tables.suites import (
    AT_ONCE,
    cost_table,
    device_of,
    method_table,
    overview_table,
    records_table,
    settings_table,
    unswept_table,
    usual_device,
)
from lora_ga.experiments.tables.table import Table

HTML_NAME, README_NAME = "index.html", "README.md"
HEADINGS = {
    TUNED: "Every method at its best learning rate",
    PAPER: "The paper's protocol: one learning rate for all methods",
}
OVERVIEW_CAPTION = (
    "Reported split, mean ± standard error over the seeds; in brackets the learning rate. Bold: the best mean."
)
NAMED = 12  # lines of the tables that a notice names at most
UNSWEPT_CAPTION = "Every method at the same learning rates, which no run has chosen: mean ± standard error over seeds."


def report_files(document: Document) -> dict[str, bytes]:
    """All files of a report, name → content: the HTML page, and the README with its pictures."""
    return {HTML_NAME: html_page(document).encode(), **readme_files(document)}


def readme_files(document: Document) -> dict[str, bytes]:
    """The files of a report that are published, name → content: the README and its pictures."""
    return markdown_files(document, README_NAME)


def suite_document(suite: Suite, records: Records) -> Document:
    """Makes the report of a suite, complete or not.

    Args:
        suite: The suite.
        records: Records of a store by digest. Those of other suites are ignored.

    Returns:
        The document. Equal records give equal documents.

    Raises:
        ValueError: No cell of the suite has run.
    """
    found = {protocol: results(suite, records, protocol) for protocol in protocols(suite)}
    if not any(started_tasks(some) for some in found.values()):
        raise ValueError(
            f"{suite.name}: none of its cells is in this store. Run the suite with this store (`lora-ga reproduce`, "
            "--store), or name another one by --store."
        )
    sections = [section for protocol, some in found.items() for section in _protocol_sections(suite, protocol, some)]
    unswept = [at_rate(suite, *line, rate, records) for line in suite.lines() for rate in suite.unswept_rates]
    for task in started_tasks(unswept):
        sections.append(_unswept_section(suite, task, [each for each in unswept if each.task == task]))
    runs = _used_records({**found, "unswept": unswept})
    sections.append(Section("Settings", [settings_table(suite), records_table(runs)]))
    facts = f"{len(runs)} runs. {_protocol_text(suite)}"
    return Document(f"{suite.name}: {suite.title}", facts, notices(suite, found), sections)


def _used_records(found: Mapping[str, Sequence[Result]]) -> list[Record]:
    """The records behind the results, each once."""
    every = [each for some in found.values() for each in some]
    used = [record for each in every for record in (*each.runs.values(), *each.search.values())]
    return list({id(record): record for record in used}.values())


def _protocol_text(suite: Suite) -> str:
    text = (
        "Tuned protocol: seed 0 chooses the best learning rate of each method on the tuning split, which is part of "
        f"the training data; {suite.seeds} seeds at that rate give the results on the reported split."
    )
    if suite.paper_rate is not None:
        text += f" The paper's protocol: learning rate {suite.paper_rate:g} for every method."
    return text


def notices(suite: Suite, found: Mapping[str, Sequence[Result]]) -> list[str]:
    """What a reader must know before reading the tables: what is missing, what failed, which rates are at an edge.

    Args:
        suite: The suite.
        found: Protocol → its results.

    Returns:
        One sentence for each notice.
    """
    texts = []
    for protocol, some in found.items():
        of = "" if len(found) == 1 else f" ({protocol} protocol)"
        started = started_tasks(some)
        incomplete = [each for each in some if each.missing and each.task in started]
        if incomplete:
            lines = [f"{each.task}/{each.label} ({each.missing})" for each in incomplete]
            if len(lines) > NAMED:
                lines[NAMED:] = [f"and {len(lines) - NAMED} more lines"]
            count = sum(each.missing for each in incomplete)
            texts.append(f"Not complete{of}: at least {count} cells have not run: {', '.join(lines)}.")
        not_started = [task for task in suite.tasks if task not in started]
        if not_started:
            texts.append(f"Not started{of}: {', '.join(not_started)}.")
        edge = [f"{each.task}/{each.label}" for each in some if each.rate is not None and not each.bracketed]
        if edge:
            texts.append(f"The best learning rate is at the edge of the rates tried{of}: {', '.join(edge)}.")
    failures = dict.fromkeys(title for some in found.values() for each in some for title in each.failures)
    return texts + [f"{title}." for title in failures]


def started_tasks(found: Sequence[Result]) -> list[str]:
    """The tasks for which at least one cell has run."""
    return list(dict.fromkeys(each.task for each in found if has_started(each)))


def has_started(each: Result) -> bool:
    """Whether a cell of a line has run. The tables leave other lines out; a notice lists their cells."""
    return bool(each.runs or each.search or each.failures)


def _protocol_sections(suite: Suite, protocol: str, found: Sequence[Result]) -> list[Section]:
    """The sections of one protocol: an overview if several tasks have started, and a section for each of them."""
    sections = []
    started, found = started_tasks(found), [each for each in found if has_started(each)]
    if len(started) > 1:
        sections.append(Section(HEADINGS[protocol], [overview_table(suite, started, found), OVERVIEW_CAPTION]))
    for task in suite.tasks:
        if task in started:
            sections.append(_task_section(suite, task, protocol, [each for each in found if each.task == task]))
    return sections


def _unswept_section(suite: Suite, task: str, found: Sequence[Result]) -> Section:
    """The table of one task at the rates that nobody has swept."""
    by_rate = {rate: [each for each in found if each.rate == rate] for rate in suite.unswept_rates}
    heading = f"{task}, {suite.tasks[task].metric}, without a sweep"
    return Section(heading, [unswept_table(suite, by_rate), UNSWEPT_CAPTION])


def _task_section(suite: Suite, task: str, protocol: str, found: Sequence[Result]) -> Section:
    """The tables and pictures of one task under one protocol."""
    metric, chooser = suite.tasks[task].metric, suite.tasks[task].chooser
    plain = next((each for each in found if each.label == plain_lora(suite)), None)
    blocks: list[str | Table | Picture] = [method_table(suite, found, plain)]
    if plain is not None:
        blocks.append(_steps_text(plain.label))
    blocks += [cost_table(found), _cost_text(found)]
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{protocol}-{task}")
    blocks += _task_pictures(name, task, metric, chooser, found)
    figure = series_figure(f"{name}-series", metric, find_series(suite), found, plain)
    if figure is not None:
        caption = f"{task}. {metric} on the reported split against numbers that vary, each at its best rate; "
        blocks.append(Picture(figure, caption + "mean ± standard error."))
    return Section(f"{task}, {metric}" + ("" if protocol == TUNED else ", the paper's protocol"), blocks)


def _steps_text(plain: str) -> str:
    """Explains the columns of steps in the table of methods, for plain LoRA's label."""
    return (
        f"Steps to {plain}'s loss: the first step at which the training loss is at or below the final training loss "
        f"of {plain} with the same seed, which saw the same batches. Both losses are smoothed by a trailing mean. The "
        f"last column divides these steps by the steps of {plain} itself; below 1 is faster. In the figures, losses "
        "above twice the smallest first loss are cut off; in those of learning rates, above twice the smallest loss."
    )


def _cost_text(found: Sequence[Result]) -> str:
    """Explains the table of costs, and names the device on which they were measured."""
    usual = usual_device(found)
    where = "each in one process" + ("" if usual is None else f", on {usual}")
    if usual is not None and usual.endswith(AT_ONCE):
        where = f"on {usual}, which have equal shares of their times and one peak memory"
    if len({device_of(run) for each in found for run in each.runs.values()}) > 1:
        where += "; runs on other devices are left out"
    return (
        f"Means over the runs at the rate above, {where}. Peak memory is the largest of these runs: "
        "on a CPU the memory of the process, on a GPU the memory allocated there."
    )


def _task_pictures(name: str, task: str, metric: str, chooser: str, found: Sequence[Result]) -> list[Picture]:
    """One picture for each group of results that fits a figure; its caption explains the panels that it has."""
    sentences = {
        "training": "Training loss at the best rate, smoothed: thick lines are means over seeds, thin lines are seeds.",
        "reported": f"{metric} on the reported split during training.",
        "rates, tune": "Result of each learning rate, seed 0: the left panel chose the rate (large dot); diverged runs "
        "have no dot.",
    }
    pictures = []
    for number, group in enumerate(figure_groups(found), 1):
        figure = task_figure(name if number == 1 else f"{name}-{number}", chooser, metric, group)
        if figure is not None:
            panels = {axes.get_label() for axes in figure.axes}
            caption = " ".join(sentence for panel, sentence in sentences.items() if panel in panels)
            pictures.append(Picture(figure, f"{task}. {caption}"))
    return pictures

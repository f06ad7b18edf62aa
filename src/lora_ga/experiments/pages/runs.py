"""A comparison of runs as one HTML page."""

from __future__ import annotations

from dataclasses import replace

from lora_ga.experiments.comparison.runs import Comparison
from lora_ga.experiments.pages.document import Document, Picture, Section, html_page
from lora_ga.experiments.pages.drawing import line_style
from lora_ga.experiments.pages.run_figures import evaluation_figure, training_figure, visible_top
from lora_ga.experiments.tables.runs import cost_table, differences_table, runs_table, summary_table, versions_table


def page_html(comparison: Comparison) -> str:
    """Draws the whole page. Texts from the records are escaped, and the page fetches nothing."""
    return html_page(comparison_document(comparison))


def comparison_document(comparison: Comparison) -> Document:
    """Makes the document: results, costs, figures, and what the runs were."""
    runs = comparison.runs
    colours = [line_style(place)["color"] for place in range(len(comparison.groups))]
    summary = replace(summary_table(comparison), row_colours=colours)
    sections = [
        Section("Result", [summary, summary_caption(comparison)]),
        Section("Cost", [cost_table(comparison)]),
    ]
    if any(run.curve for run in runs):
        training = Picture(training_figure(comparison), training_caption(comparison))
        sections.append(Section("Training", [training]))
    if metrics := list(dict.fromkeys(metric for run in runs for metric in run.evals)):
        captions = {metric: f"{metric} at the evaluations during training, not smoothed." for metric in metrics}
        pictures = [Picture(evaluation_figure(comparison, metric), captions[metric]) for metric in metrics]
        sections.append(Section("Evaluation", pictures))
    differences = differences_table(comparison)
    sections += [
        Section("Options that differ", [differences if differences.rows else "The runs differ in their seed only."]),
        Section("Runs", [runs_table(comparison)]),
        Section("Versions", [versions_table(comparison)]),
    ]
    title = f"LoRA-GA: {len(runs)} runs compared" if len(runs) > 1 else "LoRA-GA: one run"
    return Document(title, _shared_facts(comparison), comparison.notices, sections)


def _shared_facts(comparison: Comparison) -> str:
    """Task, model, dataset and number of steps, each if all runs share it."""
    found = {
        field: {str(getattr(run, field)) for run in comparison.runs} for field in ("task", "model", "dataset", "steps")
    }
    shared = {field: values.pop() for field, values in found.items() if len(values) == 1}
    return " · ".join(f"{value} steps" if field == "steps" else value for field, value in shared.items())


def training_caption(comparison: Comparison) -> str:
    """Explains the training figure: what its lines are and how the values were smoothed."""
    text = f"Training loss, {comparison.smoothing}. "
    if any(len(group.runs) == 1 for group in comparison.groups):
        text += "Faint lines: the values as logged. "
    if any(len(group.runs) > 1 for group in comparison.groups):
        text += "Where there are several seeds, thin lines are seeds and the thick line is their mean. "
    if comparison.target.value is not None:
        text += f"Dashed line: the target, {comparison.target.source}; a dot marks the step that reaches it. "
    if (top := visible_top(comparison)) is not None:
        text += f"Losses above {top:.4g} are cut off. "
    return text.strip()


def summary_caption(comparison: Comparison) -> str:
    """Explains the numbers of the summary table."""
    text = f"Training losses: {comparison.smoothing}. Metrics: at the end of training. "
    if comparison.target.value is not None:
        text += f"The target, {comparison.target.value:.4g}, is {comparison.target.source}. "
    if any(len(group.runs) > 1 for group in comparison.groups):
        text += "Where n > 1: mean ± standard error over n seeds. "
    if any(len(group.runs) == 1 for group in comparison.groups):
        text += "Where n = 1 there is no standard error: another seed would give another number. "
    return text.strip()

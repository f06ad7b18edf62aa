"""The tables that say by how much a line is better than plain LoRA: seed by seed, and in standard errors.

The runs of one seed share the order of the data, the head and the dropout. So each difference has two standard errors:
one of the difference of both means, as if the runs were independent, and a paired one, of the mean of the differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_ga.experiments.comparison.curves import mean_and_error
from lora_ga.experiments.comparison.suites import Result, steps_to_loss
from lora_ga.experiments.suites.cells import SMALLER_IS_BETTER
from lora_ga.experiments.suites.spec import load_suite
from lora_ga.experiments.tables.suites import steps_cells
from lora_ga.experiments.tables.table import BLANK
from published import complete_results, published_results, short_mean

DEFAULT = "lora-ga reach=0.35"  # in the suites with rates half a decade apart
FINER = "reach=0.35"  # the same, in the suite `reach`, with rates a quarter of a decade apart
IN_ERRORS = "s.e. (paired)"


@dataclass(frozen=True)
class Lead:
    """By how much a line is better than another; above 0 is better.

    Attributes:
        seeds: The difference of each seed that both have.
        alone: The mean difference in standard errors of the difference of both means.
        paired: The same in standard errors of the mean of the differences; infinite where all are equal.
    """

    seeds: Sequence[float]
    alone: float
    paired: float

    def in_errors(self) -> str:
        """Both numbers of standard errors, as +3.0 (+4.7)."""
        return f"{self.alone:+.1f} ({self.paired:+.1f})"


def lead(result: Result, plain: Result, metric: str) -> Lead:
    """By how much a line is better than plain LoRA on the reported split."""
    sign = -1 if metric in SMALLER_IS_BETTER else 1
    mine, its = (
        {seed: run["metrics"]["report"][metric] for seed, run in each.runs.items()} for each in (result, plain)
    )
    seeds = [round(sign * (mine[seed] - its[seed]), 9) for seed in sorted(set(mine) & set(its))]
    (mean, error), (other, other_error) = (mean_and_error(each.values(metric)) for each in (result, plain))
    alone = in_errors(sign * (mean - other) + 0.0, math.hypot(error, other_error))  # no -0.0
    return Lead(seeds, alone, in_errors(*mean_and_error(seeds)))


def in_errors(difference: float, error: float) -> float:
    """A difference in standard errors; infinite if there is no error, and 0 if there is no difference either."""
    if error == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / error


def better_by(result: Result, plain: Result, metric: str) -> str:
    """By how many standard errors, alone and paired, a line is better than LoRA; blank for LoRA, or if one diverged."""
    return BLANK if result is plain or result.diverged or plain.diverged else lead(result, plain, metric).in_errors()


def against_lora_table() -> str:
    """LoRA-GA's default start against plain LoRA: both searches of the rate, seed by seed, in Markdown."""
    finer = complete_results("reach")
    heads = [f"rates {step} apart | {IN_ERRORS}" for step in ("half a decade", "a quarter of a decade")]
    lines = [f"| better than LoRA by | {' | '.join(heads)} |", "|---" * 5 + "|"]
    for name in ("stories-shakespeare", "glue-minilm"):
        coarse, suite = complete_results(name), load_suite(name)
        for task, spec in suite.tasks.items():
            pair = coarse[task, DEFAULT], coarse[task, "lora"]
            cells = lead_cells(*pair, spec.metric)
            if (task, FINER) not in finer:
                cells += [BLANK, BLANK]
            elif [finer[task, label].rate for label in (FINER, "lora")] == [each.rate for each in pair]:
                cells += ["the same runs", cells[1]]
            else:
                cells += lead_cells(finer[task, FINER], finer[task, "lora"], spec.metric)
            lines.append(f"| {task}, {spec.metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lead_cells(result: Result, plain: Result, metric: str) -> list[str]:
    """By how much a line is better than plain LoRA in each seed, and in standard errors."""
    found = lead(result, plain, metric)
    return [", ".join(f"{each:+.3f}" for each in found.seeds), found.in_errors()]


def steps_table(tasks: Sequence[str]) -> str:
    """The lines of the suite `steps` that are complete on some tasks, beside LoRA with AdamW, in Markdown."""
    found = complete_results("steps")
    heads = [f"{task}, loss ↓ (rate) | better than LoRA by, {IN_ERRORS} | steps ÷ LoRA's" for task in tasks]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|---|---|" * len(tasks)]
    for label in load_suite("steps").methods:
        if all((task, label) in found for task in tasks):
            cells = [cell for task in tasks for cell in steps_row(found[task, label], found[task, "lora AdamW"])]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def steps_row(result: Result, plain: Result) -> list[str]:
    """The loss of a line, by how many standard errors it is better than plain LoRA, and its steps to LoRA's loss."""
    steps = steps_cells(steps_to_loss(result, plain))[1]
    shown = result.divergence or short_mean(result.values("loss"))
    return [f"{shown} ({result.rate:g})", better_by(result, plain, "loss"), steps]


def classifier_steps_table(tasks: Sequence[str]) -> str:
    """The lines of the suite `steps` that are complete on any of some classifiers, in Markdown."""
    suite, found = load_suite("steps"), complete_results("steps")
    columns = [(task, metric) for task in tasks for metric in ("loss", suite.tasks[task].metric)]
    heads = [
        f"{task}, {metric}{' (rate)' * (metric == 'loss')} | better than LoRA by, {IN_ERRORS}"
        for task, metric in columns
    ]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|---|" * len(columns)]
    for label in suite.methods:
        cells = [cell for task, metric in columns for cell in classifier_cells(found, task, label, metric)]
        if set(cells) != {BLANK}:
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def classifier_cells(found: Mapping[tuple[str, str], Result], task: str, label: str, metric: str) -> list[str]:
    """A metric of a line, and by how many standard errors it is better than plain LoRA; blanks where it has not run."""
    if (task, label) not in found:
        return [BLANK, BLANK]
    result = found[task, label]
    rate = f" ({result.rate:g})" * (metric == "loss")
    shown = result.divergence or short_mean(result.values(metric))
    return [shown + rate, better_by(result, found[task, "lora AdamW"], metric)]


def complete_table(name: str) -> str:
    """How many lines of a suite are complete on each of its tasks, in Markdown."""
    suite, found = load_suite(name), published_results(name)
    counts = {
        task: [not each.missing and bool(each.runs) for each in found if each.task == task] for task in suite.tasks
    }
    lines = ["| | " + " | ".join(counts) + " |", "|---" * (len(counts) + 1) + "|"]
    cells = [f"{sum(complete)} of {len(complete)}" for complete in counts.values()]
    return "\n".join([*lines, f"| lines of the suite `{name}` that are complete | {' | '.join(cells)} |"])

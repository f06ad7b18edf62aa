"""What a suite's records show: the result of each variant, the numbers that it varies, and steps to LoRA's loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_ga.experiments.comparison.curves import smooth, steps_to
from lora_ga.experiments.methods import complete
from lora_ga.experiments.records.runs import Curve
from lora_ga.experiments.suites.cells import Cell, best_rate, cell_of, rate_at, sweep_of, wanted
from lora_ga.experiments.suites.spec import Suite

Record = Mapping[str, Any]
Records = Mapping[str, Record]
TUNED, PAPER = "tuned", "paper"
AGAIN = " (`lora-ga reproduce --retry` runs it again)"


@dataclass(frozen=True)
class Result:
    """A variant of a method on a task, under one protocol.

    Attributes:
        task: Name of the task.
        label: Label of the variant.
        rate: The learning rate; None while the search goes on, or if every rate diverged.
        bracketed: Whether the search tried a worse rate on both sides. True if the protocol searches nothing.
        runs: Seed → record, of the runs at that rate that finished.
        failures: Title and reason of each run that diverged or failed.
        missing: Number of cells that are known to be needed and have not run.
        search: Learning rate → record of seed 0, for all rates that were tried.
        diverged: The seeds that diverged at that rate.
        none_trains: Whether the search is over, and no rate has a score (most or all of them diverged).
    """

    task: str
    label: str
    rate: float | None
    bracketed: bool
    runs: Mapping[int, Record]
    failures: Sequence[str]
    missing: int
    search: Mapping[float, Record]
    diverged: Sequence[int] = ()
    none_trains: bool = False

    @property
    def divergence(self) -> str:
        """How many seeds diverged at the rate, in words; empty if none did."""
        count = len(self.diverged)
        return f"{count} of {count + len(self.runs)} diverged" if count else ""

    def values(self, metric: str, split: str = "report") -> list[float]:
        """A metric of each run, on the split "report" or "tune"."""
        return [run["metrics"][split][metric] for run in self.runs.values()]

    def seconds(self, part: str) -> list[float]:
        """Seconds of each run: of its "load", "start", "train" or "total"."""
        return [run["seconds"][part] for run in self.runs.values()]

    def finished_search(self) -> dict[float, Record]:
        """Learning rate → record of seed 0, ascending, for the rates that neither diverged nor failed."""
        return {rate: record for rate, record in sorted(self.search.items()) if record["status"] == "done"}


def protocols(suite: Suite) -> list[str]:
    """The protocols of a suite: `TUNED`, and `PAPER` if the suite names the paper's learning rate."""
    return [TUNED] if suite.paper_rate is None else [TUNED, PAPER]


def results(suite: Suite, records: Records, protocol: str = TUNED) -> list[Result]:
    """Collects the results of a suite.

    Args:
        suite: The suite.
        records: Records by digest. Those of other suites are ignored.
        protocol: `TUNED` or `PAPER`.

    Returns:
        One result for each task and variant, in the suite's order, also where nothing has run.
    """
    collect = {TUNED: _tuned, PAPER: _paper}[protocol]
    return [collect(suite, task, label, records) for task, label in suite.lines()]


def plain_lora(suite: Suite) -> str | None:
    """The label of the variant that is plain LoRA with the suite's settings; None if the suite has none."""
    labels = (
        label
        for label, each in suite.methods.items()
        if each.method == "lora" and not each.options and not each.settings
    )
    return next(labels, None)


def _tuned(suite: Suite, task: str, label: str, records: Records) -> Result:
    searched_label = suite.methods[label].rate_of or label
    sweep = sweep_of(suite, task, searched_label, records)
    cells = [cell for cell in wanted(suite, task, label, records) if cell.label == label]
    search = {}
    if searched_label == label:
        for point in sweep.scores:
            search[rate_at(point)] = records[cell_of(suite, task, label, rate_at(point), 0).digest()]
    rate = best_rate(suite, task, label, records)
    none_trains = not sweep.needed and sweep.best is None
    # While the rate is unknown, its seeds have no cells yet. They will be needed, so they count as missing.
    unknown = suite.seeds - (searched_label == label) if rate is None and not none_trains else 0
    result = _result(task, label, rate, sweep.inside, cells, records, search, unknown)
    return replace(result, none_trains=none_trains)


def _paper(suite: Suite, task: str, label: str, records: Records) -> Result:
    assert suite.paper_rate is not None, "asked for only where there is one"
    return at_rate(suite, task, label, suite.paper_rate, records)


def at_rate(suite: Suite, task: str, label: str, rate: float, records: Records) -> Result:
    """The result of a variant on a task at a rate that no search has chosen."""
    cells = [cell_of(suite, task, label, rate, seed) for seed in range(suite.seeds)]
    return _result(task, label, rate, True, cells, records, {}, 0)


def _result(
    task: str,
    label: str,
    rate: float | None,
    bracketed: bool,
    cells: Sequence[Cell],
    records: Records,
    search: Mapping[float, Record],
    unknown: int,
) -> Result:
    by_digest = {cell.digest(): cell for cell in cells}
    found = [(cell, records[digest]) for digest, cell in by_digest.items() if digest in records]
    at_rate = {cell.seed: record for cell, record in sorted(found, key=_seed) if cell.learning_rate == rate}
    runs = {seed: record for seed, record in at_rate.items() if record["status"] == "done"}
    diverged = [seed for seed, record in at_rate.items() if record["status"] == "diverged"]
    failures = [
        f"{cell.title()} {record['status']}: {record['reason']}" + AGAIN * (record["status"] == "failed")
        for cell, record in found
        if record["status"] != "done"
    ]
    missing = len(by_digest) - len(found) + unknown
    return Result(task, label, rate, bracketed, runs, failures, missing, search, diverged)


def _seed(found: tuple[Cell, Record]) -> int:
    return found[0].seed


@dataclass(frozen=True)
class Series:
    """Variants that differ in one number only.

    Attributes:
        name: Name of the option or setting that differs.
        title: The method and the options that the variants share, in words.
        labels: Value → label of the variant, values ascending.
    """

    name: str
    title: str
    labels: Mapping[float, str]


def find_series(suite: Suite) -> list[Series]:
    """Finds every number for which the suite has three values or more with all else equal."""
    by_label = {label: _values(suite, label) for label in suite.methods}
    groups: dict[tuple[Any, ...], dict[float, str]] = {}
    for label, values in by_label.items():
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest = tuple(sorted((key, str(other)) for key, other in values.items() if key != name))
                groups.setdefault((name, rest), {}).setdefault(float(value), label)
    found = []
    for (name, _), labels in groups.items():
        if len(labels) >= 3:
            ascending = dict(sorted(labels.items()))
            found.append(Series(name, _shared_title(suite, name, list(ascending.values())), ascending))
    return found


def _values(suite: Suite, label: str) -> dict[str, Any]:
    """Everything that decides what a variant does, except its learning rate."""
    variant = suite.methods[label]
    settings = {key: getattr(suite.settings, key) for key in ("rank", "samples", "alpha", "steps")}
    options = complete(variant.method, variant.options)
    return {"method": variant.method, **settings, **dict(variant.settings), **options}


def _shared_title(suite: Suite, name: str, labels: Sequence[str]) -> str:
    """The method and the options that all variants of a series name, without the one that differs."""
    first = suite.methods[labels[0]]
    shared = {
        key: value
        for key, value in {**first.options, **first.settings}.items()
        if key != name
        and all({**suite.methods[each].options, **suite.methods[each].settings}.get(key) == value for each in labels)
    }
    return ", ".join([first.method, *(f"{key} {value}" for key, value in shared.items())])


LEAST_WINDOW = 10  # optimiser steps


def smoothed_training_loss(record: Record) -> Curve:
    """The trailing mean of a run's training loss, over a twentieth of its steps but at least `LEAST_WINDOW`."""
    training = record["curves"]["training"]
    points = tuple((step, math.nan if loss is None else loss) for step, loss in enumerate(training, 1))
    window = min(len(training), max(LEAST_WINDOW, len(training) // 20))
    return smooth(points, window)


def reported_curve(record: Record, metric: str) -> Curve:
    """A metric of the reported split at each evaluation of a run."""
    points = [point for point in record["curves"]["report"] if metric in point]
    return tuple((int(point["step"]), float(point[metric])) for point in points)


@dataclass(frozen=True)
class StepsToLoss:
    """Steps to the final training loss of plain LoRA, seed by seed.

    Attributes:
        steps: The method's steps; None for a seed that never reaches that loss.
        reference: LoRA's steps for the same seeds.
    """

    steps: Sequence[int | None]
    reference: Sequence[int]

    @property
    def reached(self) -> list[int]:
        """The method's steps for the seeds that reach the loss."""
        return [step for step in self.steps if step is not None]

    @property
    def ratio(self) -> float | None:
        """The method's mean steps divided by LoRA's; None unless every seed reaches the loss."""
        if not self.reached or len(self.reached) < len(self.steps):
            return None
        return statistics.fmean(self.reached) / statistics.fmean(self.reference)


def steps_to_loss(result: Result, plain: Result) -> StepsToLoss | None:
    """Counts the steps of a method to the final training loss of plain LoRA.

    Each seed is compared with LoRA's run with the same seed. The two saw the same batches, so they share that noise. A
    seed of the method that diverged never reaches the loss.

    Args:
        result: Of the method.
        plain: Of plain LoRA on the same task.

    Returns:
        The steps; None if the two have no seed in common, or if a seed of plain LoRA diverged, so that its loss would
        be that of its better seeds.
    """
    steps: list[int | None] = []
    reference = []
    for seed in sorted({*result.runs, *result.diverged} & set(plain.runs)) if not plain.diverged else ():
        plain_curve = smoothed_training_loss(plain.runs[seed])
        final_loss = plain_curve[-1][1]
        plain_steps = steps_to(plain_curve, final_loss)
        assert plain_steps is not None, "a curve reaches its last value"
        run = result.runs.get(seed)
        steps.append(None if run is None else steps_to(smoothed_training_loss(run), final_loss))
        reference.append(plain_steps)
    return StepsToLoss(steps, reference) if steps else None

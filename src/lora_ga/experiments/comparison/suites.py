"""What a store says about a suite: for each task and method the best rate, its runs, the steps to LoRA's loss. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_ga.experiments.comparison.runs import smooth, steps_to
from lora_ga.experiments.methods import complete
from lora_ga.experiments.records.runs import Curve
from lora_ga.experiments.suites.cell import cell_of, rate_at
from lora_ga.experiments.suites.protocol import best_rate, sweep_of, wanted
from lora_ga.experiments.suites.spec import Suite

Record = Mapping[str, Any]
Records = Mapping[str, Record]
TUNED, PAPER = "tuned", "paper"
LEAST_WINDOW = 10  # steps that a training loss is averaged over; a twentieth of the run if that is more


@dataclass(frozen=True)
class Result:
    """A method on a task under one protocol.

    Attributes:
        task: Its name.
        label: The variant's.
        rate: The learning rate; None while it is searched, or if every rate diverged.
        inside: Whether the search has seen a worse rate on both sides; true where nothing is searched.
        runs: Seed → record, of the runs at that rate that ended well.
        lost: Titles of its cells that diverged or failed, with the reason.
        missing: Number of its cells that are known to be needed and have not run.
        searched: Rate → record of seed 0, of the rates that were tried.
    """

    task: str
    label: str
    rate: float | None
    inside: bool
    runs: Mapping[int, Record]
    lost: Sequence[str]
    missing: int
    searched: Mapping[float, Record]

    def values(self, metric: str, split: str = "report") -> list[float]:
        """A metric of each run."""
        return [run["metrics"][split][metric] for run in self.runs.values()]

    def seconds(self, part: str) -> list[float]:
        """Seconds of each run."""
        return [run["seconds"][part] for run in self.runs.values()]


@dataclass(frozen=True)
class Race:
    """How soon a method reaches LoRA's final training loss, seed by seed on the same batches.

    Attributes:
        steps: Its own steps; None for a seed that never got there.
        reference: LoRA's steps for the same seeds.
    """

    steps: Sequence[int | None]
    reference: Sequence[int]

    @property
    def ratio(self) -> float | None:
        """Own steps ÷ LoRA's; None unless every seed got there."""
        own = [step for step in self.steps if step is not None]
        return statistics.fmean(own) / statistics.fmean(self.reference) if own and len(own) == len(self.steps) else None


def protocols(suite: Suite) -> list[str]:
    """The protocols that a suite has."""
    return [TUNED] if suite.paper_rate is None else [TUNED, PAPER]


def results(suite: Suite, records: Records, protocol: str = TUNED) -> list[Result]:
    """Every line of the suite, in its order, whether it has run or not.

    Args:
        suite: The suite.
        records: Of its store, by digest; those of other suites do no harm.
        protocol: `TUNED` or `PAPER`.

    Returns:
        One result a line.
    """
    make = {TUNED: _tuned, PAPER: _paper}[protocol]
    return [make(suite, task, label, records) for task, label in suite.lines()]


def _tuned(suite: Suite, task: str, label: str, records: Records) -> Result:
    source = suite.methods[label].rate_of or label
    state = sweep_of(suite, task, source, records)
    cells = {cell.digest(): cell for cell in wanted(suite, task, label, records) if cell.label == label}
    searched = (
        {}
        if source != label
        else {rate_at(p): _record(suite, task, label, rate_at(p), 0, records) for p in state.scores}
    )
    rate = best_rate(suite, task, label, records)
    # Seeds of a rate that is not known yet cannot be told apart by digests, but they will be needed.
    unknown = suite.seeds - (source == label) if rate is None and not _hopeless(state.needed, state.best) else 0
    return _result(suite, task, label, rate, state.inside, cells, records, searched, unknown)


def _hopeless(needed: Sequence[int], best: int | None) -> bool:
    """Whether the search has ended without a rate that trains."""
    return not needed and best is None


def _paper(suite: Suite, task: str, label: str, records: Records) -> Result:
    assert suite.paper_rate is not None, "asked for only where there is one"
    cells = [cell_of(suite, task, label, suite.paper_rate, seed) for seed in range(suite.seeds)]
    by_digest = {cell.digest(): cell for cell in cells}
    return _result(suite, task, label, suite.paper_rate, True, by_digest, records, {}, 0)


def _record(suite: Suite, task: str, label: str, rate: float, seed: int, records: Records) -> Record:
    return records[cell_of(suite, task, label, rate, seed).digest()]


def _result(
    suite: Suite,
    task: str,
    label: str,
    rate: float | None,
    inside: bool,
    cells: Mapping[str, Any],
    records: Records,
    searched: Mapping[float, Record],
    unknown: int,
) -> Result:
    found = [(cell, records[digest]) for digest, cell in cells.items() if digest in records]
    runs = {cell.seed: record for cell, record in found if cell.learning_rate == rate and record["status"] == "done"}
    lost = [
        f"{cell.title()} {record['status']}: {record['reason']}" for cell, record in found if record["status"] != "done"
    ]
    missing = len(cells) - len(found) + unknown
    return Result(task, label, rate, inside, dict(sorted(runs.items())), lost, missing, searched)


def reference(suite: Suite) -> str | None:
    """The variant that is plain LoRA with the suite's own settings."""
    plain = (
        label
        for label, each in suite.methods.items()
        if each.method == "lora" and not each.options and not each.settings
    )
    return next(plain, None)


def window(curve: Sequence[float]) -> int:
    """Steps that a training loss is averaged over; never more than there are."""
    return min(len(curve), max(LEAST_WINDOW, len(curve) // 20))


def smoothed(record: Record) -> Curve:
    """The training loss as a trailing mean."""
    training = record["curves"]["training"]
    points = tuple((step, math.nan if loss is None else loss) for step, loss in enumerate(training, 1))
    return smooth(points, window(training))


def race(own: Result, plain: Result) -> Race | None:
    """The steps to LoRA's final training loss.

    Each seed is compared with LoRA's run of the same seed: they saw the same batches, so their noise is the same.

    Args:
        own: The method's result.
        plain: LoRA's, on the same task.

    Returns:
        The race; None while they have no seed in common.
    """
    steps, others = [], []
    for seed in sorted(set(own.runs) & set(plain.runs)):
        other = smoothed(plain.runs[seed])
        final = other[-1][1]
        mine = smoothed(own.runs[seed])
        first = steps_to(other, final)
        assert first is not None, "a curve reaches its own end"
        steps.append(steps_to(mine, final))
        others.append(first)
    return Race(steps, others) if steps else None


@dataclass(frozen=True)
class Series:
    """Variants that differ in one number only.

    Attributes:
        name: The option or setting.
        title: What they have in common, in words.
        labels: Value → label, values ascending.
    """

    name: str
    title: str
    labels: Mapping[float, str]


def series(suite: Suite) -> list[Series]:
    """Finds what the suite varies: every number of which it has three values or more, all else being equal."""
    full = {label: _values(suite, label) for label in suite.methods}
    groups: dict[tuple[Any, ...], dict[float, str]] = {}
    for label, values in full.items():
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest = tuple(sorted((key, str(other)) for key, other in values.items() if key != name))
                groups.setdefault((name, rest), {}).setdefault(float(value), label)
    found = []
    for (name, _), labels in groups.items():
        if len(labels) >= 3:
            ordered = dict(sorted(labels.items()))
            found.append(Series(name, _common(suite, name, list(ordered.values())), ordered))
    return found


def _values(suite: Suite, label: str) -> dict[str, Any]:
    """Everything that decides what a variant does, but for its rates."""
    variant = suite.methods[label]
    settings = {key: getattr(suite.settings, key) for key in ("rank", "samples", "alpha", "steps")}
    options = complete(variant.method, variant.options)
    return {"method": variant.method, **settings, **dict(variant.settings), **options}


def _common(suite: Suite, name: str, labels: Sequence[str]) -> str:
    """The method and the options that all variants of a series name, without the one that varies."""
    first = suite.methods[labels[0]]
    shared = {
        key: value
        for key, value in {**first.options, **first.settings}.items()
        if key != name
        and all({**suite.methods[each].options, **suite.methods[each].settings}.get(key) == value for each in labels)
    }
    return ", ".join([first.method, *(f"{key} {value}" for key, value in shared.items())])

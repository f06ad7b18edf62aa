"""The results of a suite: for each task and method, the best learning rate and its runs. Pure functions of records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_ga.experiments.suites.cells import Cell, best_rate, cell_of, rate_at, sweep_of, wanted
from lora_ga.experiments.suites.spec import Suite

Record = Mapping[str, Any]
Records = Mapping[str, Record]
TUNED, PAPER = "tuned", "paper"


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
    """

    task: str
    label: str
    rate: float | None
    bracketed: bool
    runs: Mapping[int, Record]
    failures: Sequence[str]
    missing: int
    search: Mapping[float, Record]

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
    no_rate_trains = not sweep.needed and sweep.best is None
    # While the rate is unknown, its seeds have no cells yet. They will be needed, so they count as missing.
    unknown = suite.seeds - (searched_label == label) if rate is None and not no_rate_trains else 0
    return _result(task, label, rate, sweep.inside, cells, records, search, unknown)


def _paper(suite: Suite, task: str, label: str, records: Records) -> Result:
    assert suite.paper_rate is not None, "asked for only where there is one"
    cells = [cell_of(suite, task, label, suite.paper_rate, seed) for seed in range(suite.seeds)]
    return _result(task, label, suite.paper_rate, True, cells, records, {}, 0)


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
    runs = {cell.seed: record for cell, record in found if cell.learning_rate == rate and record["status"] == "done"}
    failures = [
        f"{cell.title()} {record['status']}: {record['reason']}" for cell, record in found if record["status"] != "done"
    ]
    missing = len(by_digest) - len(found) + unknown
    return Result(task, label, rate, bracketed, dict(sorted(runs.items())), failures, missing, search)

"""Which cells a suite still needs, by the paper's protocol (one rate for all) and the tuned one (a grid of rates).

The functions are pure: the same suite and the same records give the same cells. An interrupted run therefore continues
when it is started again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_ga.experiments.suites.cell import Cell, cell_of, rate_at
from lora_ga.experiments.suites.spec import Suite

MOST_RATES = 9  # four decades; a larger grid would not help
SMALLER_IS_BETTER = {"loss"}
Score = tuple[float, ...]
Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Sweep:
    """The state of a search for the best rate.

    Attributes:
        scores: Exponent → score, larger is better; None where the run diverged or failed.
        needed: Exponents to run next; empty when the search is over.
        best: The best exponent so far.
    """

    scores: Mapping[int, Score | None]
    needed: Sequence[int]
    best: int | None

    @property
    def inside(self) -> bool:
        """Whether the best has a worse neighbour on both sides."""
        return self.best is not None and not self.needed and min(self.scores) < self.best < max(self.scores)


def sweep(first: Sequence[int], look: Callable[[int], tuple[bool, Score | None]]) -> Sweep:
    """Searches the best rate: the points of `first`, then one more at an edge as long as the best lies there.

    Args:
        first: The first exponents.
        look: Exponent → whether it has run, and its score (None if it diverged).

    Returns:
        The state of the search.
    """
    found = {point: look(point) for point in first}
    while True:
        needed = sorted(point for point, (ran, _) in found.items() if not ran)
        scores = {point: score for point, (ran, score) in sorted(found.items()) if ran}
        good = {point: score for point, score in scores.items() if score is not None}
        best = max(good, key=good.__getitem__) if good else None
        if needed or len(found) >= MOST_RATES:
            return Sweep(scores, needed, best)
        low, high = min(found), max(found)
        if best is None or best == low:  # also if all rates diverged
            found[low - 1] = look(low - 1)
        elif best == high:
            found[high + 1] = look(high + 1)
        else:
            return Sweep(scores, [], best)


def score(record: Mapping[str, Any], metric: str) -> Score | None:
    """The score of a run on the tuning split, larger is better; the loss decides between equal metrics."""
    if record["status"] != "done":
        return None
    tune = record["metrics"]["tune"]
    return (-tune[metric] if metric in SMALLER_IS_BETTER else tune[metric], -tune["loss"])


def sweep_of(suite: Suite, task: str, label: str, records: Records) -> Sweep:
    """The search of the tuned protocol for a variant on a task, with seed 0 and the tuning split."""

    def look(point: int) -> tuple[bool, Score | None]:
        record = records.get(cell_of(suite, task, label, rate_at(point), 0).digest())
        return record is not None, None if record is None else score(record, suite.tasks[task].chooser)

    return sweep(suite.methods[label].rates, look)


def best_rate(suite: Suite, task: str, label: str, records: Records) -> float | None:
    """The best rate of the tuned protocol; None during the search, or if every rate diverged."""
    state = sweep_of(suite, task, suite.methods[label].rate_of or label, records)
    return None if state.needed or state.best is None else rate_at(state.best)


def wanted(suite: Suite, task: str, label: str, records: Records) -> list[Cell]:
    """The cells of a line that are needed so far, each once, whether they have run or not."""
    cells = []
    if suite.paper_rate is not None:
        cells += [cell_of(suite, task, label, suite.paper_rate, seed) for seed in range(suite.seeds)]
    source = suite.methods[label].rate_of
    if source is None:
        state = sweep_of(suite, task, label, records)
        points = sorted({*state.scores, *state.needed})
        cells += [cell_of(suite, task, label, rate_at(point), 0) for point in points]
    else:
        cells += wanted(suite, task, source, records)
    rate = best_rate(suite, task, label, records)
    if rate is not None:
        cells += [cell_of(suite, task, label, rate, seed) for seed in range(suite.seeds)]
    return list({cell.digest(): cell for cell in cells}.values())


def missing(suite: Suite, lines: Sequence[tuple[str, str]], records: Records) -> list[Cell]:
    """The cells of these lines that have not run, each once; none when the suite is complete."""
    cells = (cell for task, label in lines for cell in wanted(suite, task, label, records))
    return list({cell.digest(): cell for cell in cells if cell.digest() not in records}.values())

"""The cells of a suite: what decides a run's result, its digest, and which cells are still needed.

Cells are needed by the tuned protocol (a grid of rates), by the paper's (one rate for all), or by the table of rates
that nobody has swept. The functions are pure: the same suite and the same records give the same cells. An interrupted
run therefore continues when it is started again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_ga.experiments.methods import complete, load_method, non_default_options
from lora_ga.experiments.suites.spec import Settings, Suite, Task

MOST_RATES = 9  # four decades; a larger grid would not help
# A run that ends with more than so many times the loss of its first batch has diverged too, if slowly. If all first
# rates are too high, the best of them can have worse neighbours on both sides, and the search would end there.
WORSE = 1.1
SMALLER_IS_BETTER = {"loss"}
STACKED_KINDS = ("text", "classes", "instruct")  # a sequence-to-sequence model makes inputs of its labels
Score = tuple[float, ...]
Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        suite: The suite's name; only for display.
        task_name: The task's name in the suite; only for display.
        label: The variant's name in the suite; only for display.
        task: The task.
        method: The method's name.
        options: The options of the method that differ from its defaults.
        settings: The settings of the suite, with the changes of the task and the variant.
        learning_rate: The learning rate of all parameters except a new head.
        seed: Seed of the data order, the head, the adapter and dropout.
    """

    suite: str
    task_name: str
    label: str
    task: Task
    method: str
    options: Mapping[str, Any]
    settings: Settings
    learning_rate: float
    seed: int

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values; names for display, estimates and checks are left out."""
        ignored = {"seconds", "settings", "fields", "choose", "also"}
        task = {key: value for key, value in changed(self.task).items() if key not in ignored}
        return {
            "task": task,
            "method": self.method,
            "options": dict(self.options),
            "settings": changed_settings(self.settings),
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }

    def digest(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of `identity`; equal cells of two suites have the same."""
        text = json.dumps(self.identity(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def title(self) -> str:
        """A readable name of the cell."""
        return f"{self.task_name}/{self.label} lr {self.learning_rate:g} seed {self.seed}"


def changed(settings: Any) -> dict[str, Any]:
    """The values of a dataclass that differ from the defaults.

    Digests are made of these, so they stay the same when a later version adds a setting. For the same reason no default
    may ever change, here or in a method.

    Args:
        settings: A dataclass.

    Returns:
        Name → value.
    """
    values = {}
    for item in dataclasses.fields(settings):
        default = item.default_factory() if callable(item.default_factory) else item.default
        value = getattr(settings, item.name)
        if value != default:
            values[item.name] = dict(value) if isinstance(value, Mapping) else value
    return values


def changed_settings(settings: Settings) -> dict[str, Any]:
    """The settings that are not the defaults, by the names that records use."""
    defaults = Settings().recorded()
    return {name: value for name, value in settings.recorded().items() if value != defaults[name]}


def rate_at(point: float) -> float:
    """The learning rate √10^point, to three digits."""
    return float(f"{10 ** (point / 2):.3g}")


def cell_of(suite: Suite, task: str, label: str, learning_rate: float, seed: int) -> Cell:
    """The cell of a suite."""
    variant = suite.methods[label]
    options = non_default_options(variant.method, variant.options)
    settings = suite.settings_of(task, label)
    return Cell(suite.name, task, label, suite.tasks[task], variant.method, options, settings, learning_rate, seed)


@dataclass(frozen=True)
class Sweep:
    """The state of a search for the best rate.

    Attributes:
        scores: Exponent → score, larger is better; None where the run has none (see `score`).
        needed: Exponents to run next; empty when the search is over.
        best: The best exponent so far.
    """

    scores: Mapping[float, Score | None]
    needed: Sequence[float]
    best: float | None

    @property
    def inside(self) -> bool:
        """Whether the best has a worse neighbour on both sides."""
        return self.best is not None and not self.needed and min(self.scores) < self.best < max(self.scores)


@dataclass(frozen=True)
class Look:
    """What is known of a rate.

    Attributes:
        ran: Whether the run has ended.
        score: Its score, None if it has none (see `score`).
        diverged: Whether it has none because its loss rose, so that larger rates are of no use.
        guess: The loss of predicting the shares of the classes for every row, if the run shows it.
    """

    ran: bool
    score: Score | None = None
    diverged: bool = False
    guess: float = math.inf

    def better_than(self, guess: float) -> Score | None:
        """The score, None if the loss is not below a guess's."""
        return None if self.score is None or -self.score[-1] >= guess else self.score


def sweep(first: Sequence[int], look: Callable[[float], Look], quarter_decades: bool = False) -> Sweep:
    """Searches the best rate: the points of `first`, then one more at an edge as long as the best lies there.

    Where a run shows the loss of a guess, those that are no better have no score either. If no run has one, the search
    goes down and up in turn, but not up from a run that diverged: a run that learned nothing may have had a rate too
    low or too high.

    Args:
        first: The first exponents.
        look: Exponent → what is known of it.
        quarter_decades: Whether the points half a step beside the best are searched at the end.

    Returns:
        The state of the search.
    """
    found = {float(point): look(point) for point in first}
    while True:
        needed = sorted(point for point, each in found.items() if not each.ran)
        guess = min(each.guess for each in found.values())
        scores = {point: each.better_than(guess) for point, each in sorted(found.items()) if each.ran}
        good = {point: score for point, score in scores.items() if score is not None}
        best = max(good, key=good.__getitem__) if good else None
        if needed or len(found) >= MOST_RATES:
            return Sweep(scores, needed, best)
        low, high = min(found), max(found)
        turn_up = min(first) - low > high - max(first) and not found[high].diverged
        if best == high or (best is None and turn_up):
            found[high + 1] = look(high + 1)
        elif best is None or best == low:
            found[low - 1] = look(low - 1)
        else:
            between = {best - 0.5, best + 0.5} - set(found) if quarter_decades else set()
            if not between:
                return Sweep(scores, [], best)
            found |= {point: look(point) for point in between}


def score(record: Mapping[str, Any], metric: str) -> Score | None:
    """The score of a run on the tuning split, larger is better; the loss decides between equal metrics.

    Args:
        record: The record of the run.
        metric: The metric that chooses.

    Returns:
        The score; None for a run that failed or diverged. If the loss chooses, also for one that ended well above the
        loss of its first batch, and for one that has learned nothing but the shares of two classes. (A classifier that
        is too sure of itself can have a high loss and a high accuracy.)
    """
    if record["status"] != "done":
        return None
    tune = record["metrics"]["tune"]
    if metric == "loss" and (_rose(record) or _is_constant(tune)):
        return None
    return (-tune[metric] if metric in SMALLER_IS_BETTER else tune[metric], -tune["loss"])


def _rose(record: Mapping[str, Any]) -> bool:
    # Whether a run has ended well above the loss of its first batch.
    training = record["curves"]["training"]
    return bool(training) and record["metrics"]["tune"]["loss"] > WORSE * training[0]


def _is_constant(measured: Mapping[str, float]) -> bool:
    # Whether a classifier of two classes gives one of them for every row, with at least the loss of the shares of the
    # classes. All runs at rates that are too high can end so. Their losses then differ by chance, and one of them has
    # worse neighbours on both sides.
    return measured["loss"] >= _guess(measured)


def _guess(measured: Mapping[str, float]) -> float:
    # The loss of predicting the shares of two classes for every row, if a classifier gives one class for every row.
    share = measured["accuracy"] if measured.get("matthews") == 0.0 else 0.0
    return -sum(each * math.log(each) for each in (share, 1.0 - share)) if 0.0 < share < 1.0 else math.inf


def sweep_of(suite: Suite, task: str, label: str, records: Records) -> Sweep:
    """The search of the tuned protocol for a variant on a task, with seed 0 and the tuning split."""
    metric = suite.tasks[task].chooser

    def look(point: float) -> Look:
        record = records.get(cell_of(suite, task, label, rate_at(point), 0).digest())
        # A run that failed says nothing about its rate: the search waits until it is run again.
        if record is None or record["status"] == "failed":
            return Look(ran=False)
        guess = _guess(record["metrics"]["tune"]) if record["status"] == "done" and metric == "loss" else math.inf
        return Look(True, score(record, metric), record["status"] != "done" or _rose(record), guess)

    return sweep(suite.methods[label].rates, look, suite.quarter_decades)


def best_rate(suite: Suite, task: str, label: str, records: Records) -> float | None:
    """The best rate of the tuned protocol; None during the search, or if every rate diverged."""
    state = sweep_of(suite, task, suite.methods[label].rate_of or label, records)
    return None if state.needed or state.best is None else rate_at(state.best)


def wanted(suite: Suite, task: str, label: str, records: Records) -> list[Cell]:
    """The cells of a line that are needed so far, each once, whether they have run or not."""
    fixed = [*([] if suite.paper_rate is None else [suite.paper_rate]), *suite.unswept_rates]
    cells = [cell_of(suite, task, label, rate, seed) for rate in fixed for seed in range(suite.seeds)]
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


def stack_key(cell: Cell) -> str:
    """The same text for all cells that may share a stack (see `stack.py`).

    Returns:
        The text; its own digest for a cell of which the task, the settings or the method say that it must run alone.
    """
    alone = load_method(cell.method).runs_alone(complete(cell.method, cell.options))
    if alone or cell.task.kind not in STACKED_KINDS or cell.settings.gradient_accumulation_steps > 1:
        return cell.digest()
    identity = cell.identity()
    return json.dumps([identity["task"], identity["settings"]], sort_keys=True)


def stacks(cells: Sequence[Cell], size: int) -> list[list[Cell]]:
    """Divides cells into stacks of at most `size`, in the order of their first cells; 1: every cell runs alone."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(stack_key(cell) if size > 1 else cell.digest(), []).append(cell)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]

"""Numbers that compare finished runs: smoothed losses, steps to a common loss, means over seeds."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import numpy as np

from lora_ga.experiments.records.runs import Curve, Run

# Options that say where and how often a run was done, not what was done: runs that differ by these alone are one group.
NOT_PART_OF_THE_METHOD = {"seed", "output_dir", "name", "run_name", "resume", "overwrite", "config", "report_to"}


class Group(NamedTuple):
    """Runs that differ by their seed only; most often a single one."""

    label: str
    runs: tuple[Run, ...]


class Target(NamedTuple):
    """The training loss to be reached; `value` is None where no run has a finite one.

    `reference` is the place of the group whose steps the others are measured against, None where there is none.
    """

    value: float | None
    source: str
    reference: int | None


@dataclass(frozen=True)
class Comparison:
    """What the tables and the page are made of; `window` is the width of the trailing mean in optimiser steps."""

    groups: tuple[Group, ...]
    window: int
    target: Target
    notices: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """All runs, group by group."""
        return [run for group in self.groups for run in group.runs]

    @property
    def smoothing(self) -> str:
        """How the training losses were smoothed, and how finely they are known."""
        gaps = {after - before for run in self.runs for (before, _), (after, _) in pairwise(run.curve)}
        logged = f", logged every {min(gaps)} to {max(gaps)} steps" if len(gaps) > 1 else ""
        logged = f", logged every {min(gaps)} steps" if len(gaps) == 1 and gaps != {1} else logged
        return f"trailing mean over {self.window} optimiser steps{logged}"


def smooth(curve: Curve, window: int) -> Curve:
    """Returns the trailing mean: at step t, the mean of the values logged in the last `window` steps, t included.

    A step before `window` has no value, since a mean of fewer would be noisier and could cross a target by chance. A
    window in steps, and not in logged values, treats runs alike that log at different intervals.
    """
    if not curve:
        return ()
    steps = np.array([step for step, _ in curve])
    values = np.array([value for _, value in curve], dtype=np.float64)
    finite = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    broken = np.concatenate(([0], np.cumsum(~finite)))
    ends = np.arange(1, len(steps) + 1)
    starts = np.searchsorted(steps, steps - window, side="right")
    means = (sums[ends] - sums[starts]) / (ends - starts)
    means[broken[ends] > broken[starts]] = math.nan
    return tuple((int(step), float(mean)) for step, mean in zip(steps, means, strict=True) if step >= window)


def steps_to(curve: Curve, loss: float) -> int | None:
    """Returns the first step at which a (smoothed) curve is at or below `loss`; None if it never is."""
    return next((step for step, value in curve if value <= loss), None)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Returns the mean over curves, at the steps they all have."""
    tables = [dict(curve) for curve in curves]
    common = sorted(set(tables[0]).intersection(*tables[1:]))
    return tuple((step, math.fsum(table[step] for table in tables) / len(tables)) for step in common)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error (n - 1 in the variance); the error of a single value is NaN."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def final_loss(run: Run, window: int) -> float:
    """Returns the last value of the smoothed training loss; NaN if there is none."""
    smoothed = smooth(run.curve, window)
    return smoothed[-1][1] if smoothed else math.nan


def options(run: Run) -> dict[str, str]:
    """Returns everything that was chosen for a run and is part of the method, as text; nested options get dots."""
    chosen: dict[str, str] = {}

    def add(prefix: str, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            elif key not in NOT_PART_OF_THE_METHOD:
                chosen[f"{prefix}{key}"] = "–" if value is None else _exactly(value)

    own = ("method", "task", "model", "dataset", "learning_rate", "rank", "alpha", "steps")
    add("", {key: getattr(run, key) for key in own} | run.config)
    return chosen


def _exactly(value: object) -> str:
    """Returns a text that differs where values differ: 0.001 for 1e-3, but every digit where six are not enough."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def group_runs(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Returns the runs, those together that differ by their seed only, in the order given.

    A second run of the same seed is not a second sample: it opens a group of its own.
    """
    members: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    seen: dict[tuple[Any, ...], int] = defaultdict(int)
    for run in runs:
        chosen = tuple(sorted(options(run).items()))
        members[chosen, seen[chosen, run.seed]].append(run)
        seen[chosen, run.seed] += 1
    groups = list(members.values())
    labels = [_common_name(group) for group in groups]
    for describe in (_differing_options, _folder_name, _folder):
        labels = _distinct(labels, groups, describe)
    return tuple(Group(label, tuple(group)) for label, group in zip(labels, groups, strict=True))


def _common_name(group: Sequence[Run]) -> str:
    """Returns the name without what tells the seeds apart."""
    names = [run.name for run in group]
    if len(set(names)) == 1:
        return names[0]
    common = "".join(
        letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    )
    return re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", common) or names[0]


Describe = Callable[[list[Run], list[list[Run]]], str]


def _distinct(labels: list[str], groups: list[list[Run]], describe: Describe) -> list[str]:
    """Returns the labels, with a description added to each that several groups have."""
    result = []
    for label, group in zip(labels, groups, strict=True):
        rivals = [other for other, taken in zip(groups, labels, strict=True) if taken == label]
        more = describe(group, rivals) if len(rivals) > 1 else ""
        result.append(f"{label} ({more})" if more else label)
    return result


def _differing_options(group: list[Run], rivals: list[list[Run]]) -> str:
    """Returns the first three options in which groups of the same name differ."""
    own, others = options(group[0]), [options(rival[0]) for rival in rivals]
    keys = [key for key in own if len({other.get(key) for other in others}) > 1]
    return ", ".join(f"{key}={own[key]}" for key in keys[:3])


def _folder_name(group: list[Run], _: list[list[Run]]) -> str:
    return group[0].folder.name


def _folder(group: list[Run], _: list[list[Run]]) -> str:
    return str(group[0].folder)


def compare_runs(runs: Sequence[Run], *, target_loss: float | None = None, window: int | None = None) -> Comparison:
    """Groups the runs and fixes the target loss and the width of the trailing mean, the same for all of them.

    Args:
        runs: at least one.
        target_loss: by default the final loss of plain LoRA, or the largest final loss where there is no such run.
        window: in optimiser steps; by default a twentieth of the longest run, but at least ten steps. Never longer
            than the shortest run.

    Returns:
        What `tables` and `page` need.

    Raises:
        ValueError: no run; a target or a window that is not a positive number.
    """
    if not runs:
        raise ValueError("0 runs: there is nothing to compare. Give the folders of finished runs.")
    if target_loss is not None and not math.isfinite(target_loss):
        raise ValueError(f"target_loss: {target_loss} is not a finite number. Give a loss that a run could reach.")
    if window is not None and window < 1:
        raise ValueError(f"smooth: {window} steps, but the width of the mean must be at least 1.")
    lengths = [run.curve[-1][0] for run in runs if run.curve]
    wanted = max(10, max(lengths, default=1) // 20) if window is None else window
    window = min(wanted, min(lengths, default=1))
    groups = group_runs(runs)
    return Comparison(groups, window, _target(groups, window, target_loss), _notices(groups, window))


def _target(groups: tuple[Group, ...], window: int, wanted: float | None) -> Target:
    """Returns the common loss, and the group of plain LoRA with the lowest mean final loss as reference.

    With several seeds the target is the largest of the reference's final losses, which each of its runs has reached.
    """
    finals = [[final_loss(run, window) for run in group.runs] for group in groups]
    sound = [i for i, losses in enumerate(finals) if all(map(math.isfinite, losses))]
    plain = [i for i in sound if groups[i].runs[0].method == "lora"]
    reference = min(plain, key=lambda i: math.fsum(finals[i]) / len(finals[i])) if plain else None
    if wanted is not None:
        return Target(wanted, "as asked for", reference)
    if reference is not None:
        several = "largest " if len(finals[reference]) > 1 else ""
        return Target(max(finals[reference]), f"the {several}final loss of “{groups[reference].label}”", reference)
    losses = [loss for group in finals for loss in group if math.isfinite(loss)]
    return Target(max(losses, default=None), "the largest final loss of all runs", None)


def _notices(groups: tuple[Group, ...], window: int) -> tuple[str, ...]:
    """Returns what a reader must know before believing the table."""
    runs = [run for group in groups for run in group.runs]
    notices = []
    for field in ("task", "model", "dataset"):
        found = list(dict.fromkeys(str(getattr(run, field)) for run in runs))
        if len(found) > 1:
            notices.append(f"The runs differ in their {field} ({', '.join(found)}): their losses cannot be compared.")
    if len({run.steps for run in runs}) > 1:
        notices.append("The runs differ in their number of steps, and so in their learning rate at the same step.")
    for run in runs:
        broken = next((step for step, value in run.curve if not math.isfinite(value)), None)
        if broken is not None:
            notices.append(f"{run.folder}: the training loss was not finite at step {broken}.")
        if not smooth(run.curve, window):
            notices.append(f"{run.folder}: no training loss was logged.")
    return tuple(notices)

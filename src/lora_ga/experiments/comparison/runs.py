"""Compares finished runs: groups those that differ in their seed only, and fixes the loss that all should reach."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

from lora_ga.experiments.comparison.curves import smooth, steps_to
from lora_ga.experiments.records.runs import Run

# Options that do not change what a run computes, but for the seed. Runs that differ in these alone form one group.
NOT_PART_OF_THE_METHOD = {"seed", "output_dir", "name", "run_name", "resume", "overwrite", "config", "report_to"}


class Group(NamedTuple):
    """Runs that differ in their seed only; most often there is one."""

    label: str
    runs: tuple[Run, ...]


class Target(NamedTuple):
    """The training loss whose first step is sought in every run.

    Attributes:
        value: The loss; None if no run has a finite one.
        source: Where the value comes from, in words.
        reference: Index of the group that the others are compared with; None if there is no such group.
    """

    value: float | None
    source: str
    reference: int | None


@dataclass(frozen=True)
class Comparison:
    """Runs in groups, with what is the same for all of them.

    Attributes:
        groups: The runs.
        window: Width of the trailing mean of training losses, in optimiser steps.
        target: The training loss that all should reach.
        notices: What a reader must know before reading the numbers.
    """

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
        """How the training losses were smoothed and how often they were logged, in words."""
        gaps = {after - before for run in self.runs for (before, _), (after, _) in pairwise(run.curve)}
        logged = f", logged every {min(gaps)} to {max(gaps)} steps" if len(gaps) > 1 else ""
        logged = f", logged every {min(gaps)} steps" if len(gaps) == 1 and gaps != {1} else logged
        return f"trailing mean over {self.window} optimiser steps{logged}"

    def final_loss(self, run: Run) -> float:
        """The last value of a run's smoothed training loss; NaN if there is none."""
        return final_loss(run, self.window)

    def steps_to_target(self, group: Group) -> list[int | None]:
        """For each run of a group, its first step at or below the target loss; None if it never gets there."""
        if self.target.value is None:
            return [None] * len(group.runs)
        return [steps_to(smooth(run.curve, self.window), self.target.value) for run in group.runs]


def final_loss(run: Run, window: int) -> float:
    """The last value of a run's training loss, smoothed over `window` steps; NaN if there is none."""
    smoothed = smooth(run.curve, window)
    return smoothed[-1][1] if smoothed else math.nan


def compare_runs(runs: Sequence[Run], *, target_loss: float | None = None, window: int | None = None) -> Comparison:
    """Groups runs, and chooses one target loss and one width of the trailing mean for all of them.

    Args:
        runs: At least one.
        target_loss: By default the final loss of plain LoRA, or the largest final loss if no run is plain LoRA.
        window: In optimiser steps. By default a twentieth of the longest run, but at least ten steps. It is never
            longer than the shortest run.

    Returns:
        What the tables and the page are made from.

    Raises:
        ValueError: There is no run, the target is not finite, or the window is below 1.
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
    return Comparison(groups, window, _choose_target(groups, window, target_loss), _notices(groups, window))


def _choose_target(groups: tuple[Group, ...], window: int, target_loss: float | None) -> Target:
    """Chooses the common loss, and as reference the group of plain LoRA with the lowest mean final loss.

    Args:
        groups: All groups.
        window: Width of the trailing mean, in optimiser steps.
        target_loss: The loss that the user chose, if any.

    Returns:
        The target. If the reference has several seeds, it is the largest of their final losses, which all reach.
    """
    finals = [[final_loss(run, window) for run in group.runs] for group in groups]
    finite = [i for i, losses in enumerate(finals) if all(map(math.isfinite, losses))]
    plain = [i for i in finite if groups[i].runs[0].method == "lora"]
    reference = min(plain, key=lambda i: math.fsum(finals[i]) / len(finals[i])) if plain else None
    if target_loss is not None:
        return Target(target_loss, "the given target_loss", reference)
    if reference is not None:
        several = "largest " if len(finals[reference]) > 1 else ""
        return Target(max(finals[reference]), f"the {several}final loss of “{groups[reference].label}”", reference)
    losses = [loss for group in finals for loss in group if math.isfinite(loss)]
    return Target(max(losses, default=None), "the largest final loss of all runs", None)


def _notices(groups: tuple[Group, ...], window: int) -> tuple[str, ...]:
    """What a reader must know before reading the numbers."""
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


def method_options(run: Run) -> dict[str, str]:
    """All options of a run that belong to its method, as text. The key of a nested option has dots."""
    chosen: dict[str, str] = {}

    def add(prefix: str, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            elif key not in NOT_PART_OF_THE_METHOD:
                chosen[f"{prefix}{key}"] = "–" if value is None else _exact_text(value)

    fields = ("method", "task", "model", "dataset", "learning_rate", "rank", "alpha", "steps")
    add("", {key: getattr(run, key) for key in fields} | run.config)
    return chosen


def _exact_text(value: object) -> str:
    """A text that differs wherever values differ: 0.001 for 1e-3, and all digits where six are not enough."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def group_runs(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Groups the runs that differ in their seed only, in the order given.

    A second run with the same seed is not a second sample, so it goes into another group.

    Args:
        runs: The runs.

    Returns:
        The groups, each with a label of its own.
    """
    members: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    seen: dict[tuple[Any, ...], int] = defaultdict(int)
    for run in runs:
        chosen = tuple(sorted(method_options(run).items()))
        members[chosen, seen[chosen, run.seed]].append(run)
        seen[chosen, run.seed] += 1
    groups = list(members.values())
    labels = [_common_name(group) for group in groups]
    for describe in (_differing_options, _folder_name, _folder):
        labels = _make_distinct(labels, groups, describe)
    return tuple(Group(label, tuple(group)) for label, group in zip(labels, groups, strict=True))


def _common_name(group: Sequence[Run]) -> str:
    """The part of the runs' names before the seed."""
    names = [run.name for run in group]
    if len(set(names)) == 1:
        return names[0]
    common = "".join(
        letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    )
    return re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", common) or names[0]


Describe = Callable[[list[Run], list[list[Run]]], str]


def _make_distinct(labels: list[str], groups: list[list[Run]], describe: Describe) -> list[str]:
    """Adds a description to each label that several groups have."""
    result = []
    for label, group in zip(labels, groups, strict=True):
        same_label = [other for other, taken in zip(groups, labels, strict=True) if taken == label]
        more = describe(group, same_label) if len(same_label) > 1 else ""
        result.append(f"{label} ({more})" if more else label)
    return result


def _differing_options(group: list[Run], same_label: list[list[Run]]) -> str:
    """The first three options in which groups of the same label differ."""
    own, others = method_options(group[0]), [method_options(other[0]) for other in same_label]
    keys = [key for key in own if len({other.get(key) for other in others}) > 1]
    return ", ".join(f"{key}={own[key]}" for key in keys[:3])


def _folder_name(group: list[Run], _: list[list[Run]]) -> str:
    return group[0].folder.name


def _folder(group: list[Run], _: list[list[Run]]) -> str:
    return str(group[0].folder)

"""The curves in a suite's records, and how soon a method reaches the final training loss of plain LoRA."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lora_ga.experiments.comparison.curves import smooth, steps_to
from lora_ga.experiments.comparison.suites import Record, Result
from lora_ga.experiments.records.runs import Curve

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

    Each seed is compared with LoRA's run with the same seed. The two saw the same batches, so they share that noise.

    Args:
        result: Of the method.
        plain: Of plain LoRA on the same task.

    Returns:
        The steps; None if the two have no seed in common.
    """
    steps, reference = [], []
    for seed in sorted(set(result.runs) & set(plain.runs)):
        plain_curve = smoothed_training_loss(plain.runs[seed])
        final_loss = plain_curve[-1][1]
        plain_steps = steps_to(plain_curve, final_loss)
        assert plain_steps is not None, "a curve reaches its last value"
        steps.append(steps_to(smoothed_training_loss(result.runs[seed]), final_loss))
        reference.append(plain_steps)
    return StepsToLoss(steps, reference) if steps else None

"""Curves of values over optimiser steps: smoothing, means over seeds, the first step at a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_ga.experiments.records.runs import Curve


def smooth(curve: Curve, window: int) -> Curve:
    """Computes the trailing mean: at step t, the mean of the values logged in the last `window` steps, t included.

    The window counts steps, not logged values, so that runs which log at different intervals are treated alike.

    Args:
        curve: The values as logged.
        window: In optimiser steps.

    Returns:
        The means. A step before `window` has none: a mean of fewer values would be noisier, and could cross a target
        by chance. A mean over a value that is not finite is NaN.
    """
    if not curve:
        return ()
    import numpy as np  # so that `lora-ga compare` refuses wrong folders without waiting for it

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
    """The first step at which a curve is at or below `loss`; None if it never is."""
    return next((step for step, value in curve if value <= loss), None)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over one or more curves, at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    common = sorted(set(tables[0]).intersection(*tables[1:]))
    return tuple((step, math.fsum(table[step] for table in tables) / len(tables)) for step in common)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of one or more values and its standard error (with n - 1 in the variance), NaN for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))

"""What all processes have found together: their sums added up, as one estimate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from lora_ga.distributed.agreement import warn_idle
from lora_ga.gradients.checkpoint import Progress
from lora_ga.gradients.coverage import (
    missing,
    parts_without_gradient,
    report_missing,
    unused_blocks,
    warn_few_directions,
    warn_unused_blocks,
)
from lora_ga.gradients.isolation import without_autocast
from lora_ga.gradients.recorder import Recorder
from lora_ga.gradients.result import GradientEstimate
from lora_ga.gradients.setup import Setup
from lora_ga.linalg.accumulator import Accumulator
from lora_ga.linalg.low_rank import LowRank, packed, unpacked


def merged_estimate(setup: Setup, recorder: Recorder, probed: Mapping[str, LowRank]) -> GradientEstimate:
    """The estimate of all processes, the same numbers in each of them.

    Args:
        setup: What the estimate works on.
        recorder: What this process has recorded.
        probed: Layer → its gradient, for the layers that were probed in its place.

    Returns:
        The estimate.

    Raises:
        ValueError: There was no batch, or layers cannot be aligned.
    """
    progress, factors = _merged(setup, recorder)
    factors |= probed
    if progress.batches == 0:
        raise ValueError("The data holds no batch; the gradient needs at least one. An iterator may be used up.")
    reasons = missing(setup.targets, progress, factors)
    unused = unused_blocks(setup.model, setup.targets, progress.got_gradient)
    report_missing({n: r for n, r in reasons.items() if n not in unused}, setup.targets, setup.config.on_missing)
    warn_unused_blocks(unused)
    reasons |= unused
    aligned = {name: target for name, target in setup.targets.items() if name not in reasons}
    empty = parts_without_gradient(aligned, factors)
    by_key = {key: target for target in aligned.values() for key in target.keys}
    layers = {
        key: factors[key].scaled(1 / progress.settled_weight.get(key, progress.weight))
        for target in setup.fitting.values()
        for key in target.keys
        if key in factors and key in by_key and key not in empty
    }
    warn_few_directions(layers, by_key)
    return GradientEstimate(
        layers,
        setup.config,
        setup.fingerprint,
        progress.weight,
        progress.batches,
        reasons | empty,
        settled=progress.settled,
        settled_weight=progress.settled_weight,
    )


def _merged(setup: Setup, recorder: Recorder) -> tuple[Progress, dict[str, LowRank]]:
    """The progress of all processes, and the sums of their gradients by part."""
    processes, devices, accumulator = setup.processes, setup.devices, recorder.accumulator
    parts = processes.gather(recorder.progress)
    warn_idle([part.batches for part in parts])
    with torch.no_grad(), without_autocast():
        mine = processes.merge(devices, accumulator.state, accumulator.absorb)
        shared = processes.share(packed(_factors(accumulator, mine, setup.directions)))
    return Progress.sum(parts[:1] if setup.tensor_parallel else parts), unpacked(shared, devices)


def _factors(accumulator: Accumulator, keys: Iterable[str], directions: Mapping[str, int]) -> dict[str, LowRank]:
    """The factors of the parts that got tokens, with as many directions as the estimate keeps."""
    factors = {}
    for key, factor in accumulator.factors(keys).items():
        kept = directions[key]
        u, s, v = factor.U[:, :kept], factor.S[:kept], factor.V[:, :kept]
        factors[key] = dataclasses.replace(factor, U=u, S=s, V=v)
    return factors

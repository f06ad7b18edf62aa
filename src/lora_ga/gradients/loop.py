"""The loop over batches: each process passes its share through the model, in step with the others.

The processes go in rounds of one batch each. Where a pass communicates (sharded parameters), a process that has no
batch left takes part with its last one, or with one lent by another process, and records nothing.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from lora_ga.distributed.agreement import check_same_data, warn_same_data
from lora_ga.distributed.processes import DeferredError
from lora_ga.distributed.sharding import in_step
from lora_ga.gradients.batch import BatchPass, batch_in_errors
from lora_ga.gradients.checkpoint import digest_of
from lora_ga.gradients.loss import counted_labels
from lora_ga.gradients.probe import Probes, ReadBatches, uncalled
from lora_ga.gradients.reader import NO_BATCH, BatchReader
from lora_ga.gradients.recorder import Recorder
from lora_ga.gradients.setup import Setup


def record_batches(setup: Setup, recorder: Recorder, reader: BatchReader, passes: BatchPass) -> None:
    """Pass this process's share of the batches through the model, and record the gradients.

    Args:
        setup: What the estimate works on; the model is isolated.
        recorder: Records the gradients; it starts where its progress stands.
        reader: Reads the batches.
        passes: Makes the passes.
    """
    processes, held = setup.processes, DeferredError()
    sharded = processes.size > 1 and in_step(setup.network)
    batches = reader.batches(keep=lambda: bool(uncalled(setup, recorder.progress.ran)), finished=recorder.all_converged)
    with recorder.hooks():
        for number in itertools.count():
            batch = NO_BATCH
            if processes.size > 1 or not recorder.all_converged:
                with held, batch_in_errors(recorder.progress.batches + 1):
                    batch = _next(batches, setup, passes)
            has_batch = batch is not NO_BATCH
            recorded = has_batch and not recorder.all_converged
            compared = setup.tensor_parallel or (number == 0 and processes.size > 1)
            digest = digest_of(batch) if compared and has_batch else ""
            reports = processes.exchange(held, (recorded, reader.last is not NO_BATCH, digest))
            if not any(wanted for wanted, _, _ in reports):
                break
            (check_same_data if setup.tensor_parallel else warn_same_data)([each for _, _, each in reports])
            if sharded:
                reader.lend(processes, [has for _, has, _ in reports])
            if sharded or recorded:
                _pass(setup, recorder, passes, held, reader.last, recorded=recorded, sharded=sharded)


def _next(batches: Iterator[Any], setup: Setup, passes: BatchPass) -> Any:
    """The next batch, or `NO_BATCH`. One without labels is refused before other processes wait for its pass."""
    batch = next(batches, NO_BATCH)
    if batch is not NO_BATCH:
        counted_labels(setup.network, batch, passes.loss_fn)
    return batch


def _pass(
    setup: Setup,
    recorder: Recorder,
    passes: BatchPass,
    held: DeferredError,
    batch: Any,
    *,
    recorded: bool,
    sharded: bool,
) -> None:
    """One batch forward and backward. An error is kept until the processes next exchange values.

    Args:
        setup: What the estimate works on.
        recorder: Records the gradients.
        passes: Makes the pass.
        held: Keeps an error.
        batch: The batch.
        recorded: Whether the batch counts; otherwise this process only takes part in the pass.
        sharded: Whether all processes make the pass together.
    """
    number = recorder.progress.batches + 1
    with held, batch_in_errors(number):
        loss, weight = passes.forward(batch)
    if sharded:  # so that no process begins the backward pass without the others
        setup.processes.exchange(held)
    if held.error is not None:
        return
    with held, batch_in_errors(number):
        recorder.scale = passes.scale(weight) if recorded else 0.0
        passes.backward(loss, weight, recorder.starts)
        if recorded:
            recorder.finish_batch(weight)
            if setup.checkpoint is not None and number % setup.checkpoint.every == 0:
                setup.checkpoint.save(recorder.progress, recorder.accumulator.state())


def keep_batches(setup: Setup, reader: BatchReader) -> None:
    """Read this process's share of the batches for a probe, without passing them through the model."""
    held, digest = DeferredError(), ""
    with held:
        reader.keep_all()
        digest = digest_of(reader.kept[0]) if reader.kept and setup.processes.size > 1 else ""
    warn_same_data(setup.processes.exchange(held, digest))


def probe_reads(passes: BatchPass, batches: Sequence[Any]) -> ReadBatches:
    """How probes read batches that were kept.

    Args:
        passes: Makes the passes.
        batches: The batches.

    Returns:
        A function that passes all batches through the model, and returns the sum of their weights.
    """

    def read(probes: Probes) -> float:
        total = 0.0
        for number, batch in enumerate(batches, start=1):
            probes.activate()
            with batch_in_errors(number):
                # A copy, since a loss may take the labels out of the batch, which is read once more.
                loss, weight = passes.forward(copy.copy(batch))
                probes.scale = passes.scale(weight)
                passes.backward(loss, weight, probes.starts)
                del loss  # the backward pass frees only the part of the graph that it has been through
                probes.check_finite()
            total += weight
        return total

    return read

"""The loop over batches: each process passes its share through the model, in step with the others.

The processes go in rounds of one batch each. Where a pass communicates (sharded parameters, or a loss that gathers
values), a process that has no batch left takes part with its last one, or with one lent by another process, and records
nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from lora_ga.distributed.agreement import check_same_data, warn_same_data
from lora_ga.distributed.processes import DeferredError, Processes
from lora_ga.gradients.batch import BatchPass, batch_in_errors
from lora_ga.gradients.checkpoint import digest_of
from lora_ga.gradients.loss import refuse_infinite_loss
from lora_ga.gradients.probe import Probes, ReadBatches, read_uncalled, uncalled
from lora_ga.gradients.reader import ALL_IGNORED, NO_BATCH, SKIPPED, BatchReader
from lora_ga.gradients.recorder import Recorder
from lora_ga.gradients.setup import Setup
from lora_ga.warn import warn


def record_batches(setup: Setup, recorder: Recorder, reader: BatchReader, passes: BatchPass) -> bool:
    """Pass this process's share of the batches through the model, and record the gradients.

    Args:
        setup: What the estimate works on; the model is isolated.
        recorder: Records the gradients; it starts where its progress stands.
        reader: Reads the batches. It keeps them as long as a probe may need them.
        passes: Makes the passes.

    Returns:
        Whether a process has, or may have, layers that the loss reads without calling them (see `read_uncalled`).
    """
    processes, held = setup.processes, DeferredError()
    traffic = Traffic(processes)
    # Whether the loss reads layers without calling them: here, as far as is known, and in any process. The first batch
    # decides it. With a tensor-parallel plan a process cannot try a batch alone.
    read_here = read = True
    tried = setup.tensor_parallel
    batches = reader.batches(
        keep=lambda: read and bool(uncalled(setup, recorder.progress.ran)), finished=recorder.all_converged
    )
    more = any(processes.gather(not recorder.all_converged))
    first = processes.size > 1  # whether the first batches are still to be compared
    with recorder.hooks():
        while True:
            batch = NO_BATCH
            # All processes read in the same rounds, since reading may communicate as well.
            if more and (processes.size > 1 or not recorder.all_converged):
                with held, batch_in_errors(recorder.progress.batches + 1):
                    batch = next(batches, NO_BATCH)
            has_batch = batch is not NO_BATCH and batch is not SKIPPED
            recorded = has_batch and not recorder.all_converged
            compared = setup.tensor_parallel or first
            digest = digest_of(batch) if compared and has_batch else ""
            wants_more = reader.open and not recorder.all_converged
            own = (recorded, wants_more, reader.last is not NO_BATCH, traffic.seen, read_here, digest)
            reports = processes.exchange(held, own)
            more, read = any(wants for _, wants, *_ in reports), any(reads for *_, reads, _ in reports)
            # A process that has not read a batch does not know yet whether the loss gathers.
            gathers = any(seen or not has for _, _, has, seen, *_ in reports)
            together = processes.size > 1 and (setup.in_step or gathers)
            if not read:
                reader.kept.clear()
            digests = [each for *_, each in reports]
            (check_same_data if setup.tensor_parallel else warn_same_data)(digests)
            first = first and not any(digests)
            if any(records for records, *_ in reports):
                if together:
                    reader.lend(processes, [has for _, _, has, *_ in reports])
                if together or recorded:
                    _pass(setup, recorder, passes, held, traffic, reader.last, recorded=recorded, together=together)
                if recorded and not tried and held.error is None:
                    tried, read_here = True, _try(setup, recorder, passes, held, reader)
            elif not more:
                break
    return read


def _try(setup: Setup, recorder: Recorder, passes: BatchPass, held: DeferredError, reader: BatchReader) -> bool:
    """Whether the loss of the batch that was passed last reads layers without calling them."""
    recorder.scale = 0.0
    with held, batch_in_errors(recorder.progress.batches):
        return read_uncalled(setup, recorder.progress.ran, probe_reads(passes, reader.kept[-1:]))
    return True


def report_unlabelled(setup: Setup, reader: BatchReader) -> None:
    """Report the batches of all processes that were left out because they have no label.

    Args:
        setup: What the estimate works on.
        reader: Has read the batches of this process.

    Raises:
        ValueError: No batch has a label.
    """
    counts = setup.processes.gather((reader.unlabelled, reader.labelled))
    if setup.tensor_parallel:  # all processes have read the same batches
        counts = counts[:1]
    left_out, used = (sum(each) for each in zip(*counts, strict=True))
    if left_out and not used:
        raise ValueError(f"None of the {left_out} batches has a label. {ALL_IGNORED}")
    if left_out:
        warn(
            f"{left_out} of {left_out + used} batches have no label (every label is -100), so they have no loss. The "
            "estimate leaves them out."
        )


class Traffic:
    """What the forward and the backward passes of a process communicate: in shards, or by a loss that gathers values.

    Attributes:
        seen: Whether a pass has communicated.
        broken_off: Whether the last pass failed after another number of communications than the pass before had.
    """

    def __init__(self, processes: Processes) -> None:
        """Count the communications of this process."""
        self.seen = self.broken_off = False
        self._processes = processes
        self._counts: dict[str, int] = {}

    @contextlib.contextmanager
    def counted(self, part: str) -> Iterator[None]:
        """Count the communications of a block.

        Args:
            part: "forward" or "backward".

        Yields:
            Nothing.
        """
        before, finished = self._processes.communications, False
        try:
            yield
            finished = True
        finally:
            count = self._processes.communications - before
            self.seen = self.seen or count > 0
            self.broken_off = not finished and self._counts.get(part, count) != count
            if finished:
                self._counts[part] = count


def _pass(
    setup: Setup,
    recorder: Recorder,
    passes: BatchPass,
    held: DeferredError,
    traffic: Traffic,
    batch: Any,
    *,
    recorded: bool,
    together: bool,
) -> None:
    """One batch forward and backward. An error is kept until the processes next exchange values.

    If the passes communicate, an error inside of one is raised at once, since the others wait in the same pass.

    Args:
        setup: What the estimate works on.
        recorder: Records the gradients.
        passes: Makes the pass.
        held: Keeps an error.
        traffic: Counts the communications of the passes.
        batch: The batch.
        recorded: Whether the batch counts; otherwise this process only takes part in the pass.
        together: Whether all processes make the pass together.

    Raises:
        Exception: The error of this process in a pass that communicates, or what another process has found.
    """
    number, done = recorder.progress.batches + 1, not setup.in_step

    def forward_done(*_: Any) -> None:
        nonlocal done
        done = True

    with contextlib.ExitStack() as stack:
        if together:
            stack.callback(setup.network.register_forward_hook(forward_done).remove)
        with held, batch_in_errors(number), traffic.counted("forward"):
            loss, weight = passes.forward(batch)
    if together:
        if held.error is not None and (not done or traffic.broken_off):
            raise held.error
        setup.processes.exchange(held)  # so that no process begins the backward pass without the others
    if held.error is not None:
        return
    done = not setup.in_step
    with held, batch_in_errors(number):
        recorder.scale = passes.scale(weight) if recorded else 0.0
        with _loss_in_errors(loss), traffic.counted("backward"):
            passes.backward(loss, weight, recorder.starts)
        done = True
        with _loss_in_errors(loss):
            if recorded:
                recorder.finish_batch(weight, loss)
        if recorded and setup.checkpoint is not None and number % setup.checkpoint.every == 0:
            state = recorder.accumulator.state()
            setup.checkpoint.save(recorder.progress, state)
            # The run that goes on from the file starts from this state, layer by layer. So does this one, since
            # products of stacks may round differently.
            recorder.accumulator.restore(state, setup.devices)
    if together and held.error is not None and (not done or traffic.broken_off):
        raise held.error


@contextlib.contextmanager
def _loss_in_errors(loss: Tensor) -> Iterator[None]:
    """Where a gradient is not finite because the loss is not, refuse the loss."""
    try:
        yield
    except FloatingPointError:
        refuse_infinite_loss(loss)
        raise


def keep_batches(setup: Setup, reader: BatchReader) -> None:
    """Read this process's share of the batches for a probe, without passing them through the model."""
    held, digest = DeferredError(), ""
    while any(setup.processes.exchange(held, reader.open)):
        with held:
            reader.keep_next()
    with held:
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
                refuse_infinite_loss(loss)
                del loss  # the backward pass frees only the part of the graph that it has been through
                probes.check_finite()
            total += weight
        return total

    return read

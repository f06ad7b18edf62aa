"""Gradients recorded during passes that the caller makes, in place of a loop over batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peft import PeftModel

from lora_ga.config import LoraGAConfig
from lora_ga.distributed.processes import DeferredError
from lora_ga.gradients.batch import batch_in_errors
from lora_ga.gradients.merge import merged_estimate
from lora_ga.gradients.probe import Probes, probe_uncalled
from lora_ga.gradients.recorder import Recorder
from lora_ga.gradients.result import GradientEstimate
from lora_ga.gradients.setup import Setup, prepare
from lora_ga.linalg.low_rank import LowRank


class Recording:
    """What was recorded in the block of `recording`."""

    def __init__(self, setup: Setup, recorder: Recorder) -> None:
        """Record with `recorder`; nothing is recorded before `start`."""
        self._setup, self._recorder = setup, recorder
        self._hooks = contextlib.ExitStack()
        self._probed: Mapping[str, LowRank] = {}

    def start(self) -> None:
        """Put the hooks on the layers; with `estimator="probe"` there are none."""
        if self._setup.config.estimator != "probe":
            self._hooks.enter_context(self._recorder.hooks())

    def finish(self) -> None:
        """Remove the hooks. All backward passes since `start` count as one batch of weight 1.

        Raises:
            ValueError: A gradient was not finite.
        """
        if self._setup.config.estimator != "probe" and self._recorder.progress.batches == 0:
            self._hooks.close()
            with batch_in_errors(1):
                self._recorder.finish_batch(1.0)

    def stop(self) -> None:
        """Remove the hooks, if they are still there."""
        self._hooks.close()

    def probe(self, step: Callable[[], Any]) -> None:
        """Record the layers that were not called, as under fused kernels, through probes in the adapter's place.

        Call it in the block of `recording`, after the passes. Nothing happens where every layer was called.

        Args:
            step: Makes the same passes again; called twice.
        """

        def read(probes: Probes) -> float:
            probes.activate()
            step()
            with batch_in_errors(1):
                probes.check_finite()
            return 1.0

        self.finish()
        self._probed = probe_uncalled(self._setup, self._recorder, read, batches=1)

    def estimate(self) -> GradientEstimate:
        """The estimate of the sum of the recorded gradients, after the block.

        Returns:
            The estimate of all processes.

        Raises:
            ValueError: Nothing was recorded, or layers cannot be aligned.
        """
        if self._recorder.progress.batches == 0:
            raise ValueError(
                'Nothing was recorded: with estimator="probe" gradients are recorded by `probe(step)` alone. Call it '
                'in the block of `recording`, or use estimator="streaming".'
            )
        return merged_estimate(self._setup, self._recorder, self._probed)


@contextlib.contextmanager
def recording(
    model: PeftModel,
    config: LoraGAConfig = LoraGAConfig(),  # noqa: B008 (frozen)
    *,
    adapter_name: str = "default",
    process_group: Any = None,
) -> Iterator[Recording]:
    """Record the gradients of the backward passes in the block.

        with recording(model) as recorded:
            loss(model).backward()
        estimate = recorded.estimate()

    In the block the model is as `isolated` makes it: nothing trains, and there is no dropout. Afterwards it is as it
    was. The gradients of all backward passes are added up as they are, and count as one batch of weight 1. So
    `max_batches` and `tolerance` have no effect.

    Args:
        model: A `PeftModel` with a fresh LoRA adapter.
        config: The settings; `estimator`, `oversample`, `power_steps`, `on_missing`, `seed` count here.
        adapter_name: The adapter to align.
        process_group: The processes that make the estimate together, each with its own passes; None for all of the
            default group, if there is one.

    Yields:
        The recording; its `estimate` is for after the block.

    Raises:
        ValueError: The adapter cannot be aligned, or a gradient is not finite.
    """
    setup, recorder = prepare(model, config, adapter_name, process_group=process_group)
    held, recorded = DeferredError(), Recording(setup, recorder)
    with held, setup.isolated():
        try:
            recorded.start()
            yield recorded
            recorded.finish()
        finally:
            recorded.stop()
    setup.processes.exchange(held)

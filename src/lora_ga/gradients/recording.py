"""Gradients recorded during passes that the caller makes, in place of a loop over batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from lora_ga.base import base_model
from lora_ga.config import LoraGAConfig
from lora_ga.distributed.processes import DeferredError
from lora_ga.gradients.batch import batch_in_errors
from lora_ga.gradients.merge import merged_estimate
from lora_ga.gradients.noise import NoiseOff
from lora_ga.gradients.probe import Probes, ReadBatches, probe_uncalled
from lora_ga.gradients.recorder import Recorder
from lora_ga.gradients.result import GradientEstimate
from lora_ga.gradients.setup import Setup, prepare
from lora_ga.linalg.low_rank import LowRank


class Recording:
    """What was recorded in a block of `recording`."""

    def __init__(self, setup: Setup, recorder: Recorder) -> None:
        """Start with what `recorder` holds."""
        self.setup, self.recorder = setup, recorder
        self.probed: Mapping[str, LowRank] = {}

    def estimate(self) -> GradientEstimate:
        """The estimate of the sum of the recorded gradients. Call it after the block.

        Returns:
            The estimate of all processes.

        Raises:
            ValueError: Layers cannot be aligned.
        """
        return merged_estimate(self.setup, self.recorder, self.probed)


@contextlib.contextmanager
def recording(
    model: nn.Module,
    config: LoraGAConfig = LoraGAConfig(),  # noqa: B008 (frozen)
    *,
    adapter_name: str = "default",
    repeat: Callable[[], Any] | None = None,
    process_group: Any = None,
) -> Iterator[Recording]:
    """Record the gradients of the backward passes in the block.

        with recording(model) as recorded:
            loss(model).backward()
        estimate = recorded.estimate()

    In the block the model is as `isolated` makes it: nothing trains, the model is in training mode (see
    `LoraGAConfig.training_mode`), and there is no dropout. Afterwards it is as it was. The gradients of all backward
    passes are added up as they are, and count as one batch of weight 1. So `max_batches` and `tolerance` have no
    effect.

    Args:
        model: A model with a fresh LoRA adapter, or a network that contains one (see `estimate_gradients`).
        config: The settings; `estimator`, `oversample`, `power_steps`, `on_missing`, `training_mode`, `seed` count
            here. With `estimator="probe"` the passes in the block are not recorded, only those of `repeat`.
        adapter_name: The adapter to align.
        repeat: Makes the passes of the block again. It is called twice, after the block, if layers ran without being
            called, as under fused kernels: then probes show their gradients. None to leave such layers out.
        process_group: The processes that make the estimate together, each with its own passes; None for all of the
            default group, if there is one.

    Yields:
        The recording; its `estimate` is for after the block.

    Raises:
        TypeError: `config` is no `LoraGAConfig`.
        ValueError: The adapter cannot be aligned, a gradient is not finite, or `estimator="probe"` has no `repeat`.
        RuntimeError: Another process failed, or can no longer be reached.
    """
    LoraGAConfig.check(config)
    if config.estimator == "probe" and repeat is None:
        raise ValueError(
            'estimator="probe" needs `repeat`, a function that makes the passes again. Pass one, or use '
            'estimator="streaming".'
        )
    setup, recorder = prepare(model, config, adapter_name, process_group)
    noise = NoiseOff(base_model(setup.model))
    recorded, held = Recording(setup, recorder), DeferredError()
    with setup.isolated():
        with held:
            with noise, contextlib.nullcontext() if config.estimator == "probe" else recorder.hooks():
                yield recorded
            if config.estimator != "probe":
                with batch_in_errors(1):
                    recorder.finish_batch(1.0)
        setup.processes.exchange(held)
        if repeat is not None:
            with noise:
                recorded.probed = probe_uncalled(setup, recorder, _repeated(repeat), batches=1)
    noise.report()


def _repeated(passes: Callable[[], Any]) -> ReadBatches:
    """How probes read passes that the caller makes, as one batch of weight 1."""

    def read(probes: Probes) -> float:
        probes.activate()
        passes()
        with batch_in_errors(1):
            probes.check_finite()
        return 1.0

    return read

"""What an estimate says while it runs: a line before it and one after by the logger `lora_ga`, and a bar on a terminal.

`logging.getLogger("lora_ga").setLevel(logging.WARNING)` silences both.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

from transformers.utils.logging import tqdm

from lora_ga.config import BATCHES, LoraGAConfig
from lora_ga.gradients.reader import known_length
from lora_ga.gradients.result import GradientEstimate
from lora_ga.gradients.setup import Setup

LOGGER = logging.getLogger("lora_ga")


class _Lines(logging.Handler):
    """Prints messages on stderr. In a program that has set up logging, its own handlers print them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message.

        Args:
            record: The message.
        """
        others = [*logging.getLogger().handlers, *(each for each in LOGGER.handlers if each is not self)]
        if not others:
            print(self.format(record), file=sys.stderr, flush=True)


LOGGER.addHandler(_Lines())
if LOGGER.level == logging.NOTSET:
    LOGGER.setLevel(logging.INFO)


class Report:
    """Says that an estimate begins and how it ended, and shows its passes on a bar; in the first process alone.

    The bar is that of Transformers: `transformers.logging.disable_progress_bar()` turns it off.
    """

    def __init__(self, setup: Setup, data: Iterable[Any]) -> None:
        """Say that the estimate begins.

        Args:
            setup: What the estimate works on.
            data: The batches of this process.
        """
        self._ranks = {key: target.rank for target in setup.fitting.values() for key in target.keys}
        self._began, self._says = time.monotonic(), setup.processes.rank == 0 and LOGGER.isEnabledFor(logging.INFO)
        length, most = known_length(data), setup.config.max_batches
        assert most != "auto", "resolved by `prepare`"
        if length is not None:
            known = length * (1 if setup.tensor_parallel else setup.processes.size)
            most = known if most is None else min(known, most)
        count = "all" if most is None else f"{most}" if length is not None else f"up to {most}"
        self._say(
            f"LoRA-GA: estimating the gradients of {_counted(len(setup.targets), 'layer')} on {count} "
            f"batch{'es' * (most != 1)}"
        )
        here = None if most is None else math.ceil(most / (1 if setup.tensor_parallel else setup.processes.size))
        passes = 2 if setup.config.estimator == "probe" else 1
        self._bar = tqdm(
            total=None if here is None else here * passes,
            desc="Estimating gradients",
            unit="batch",
            leave=False,
            disable=None if self._says else True,  # None: shown on a terminal or in a notebook only
        )

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def passed(self) -> None:
        """Show that a batch went through the model."""
        self._bar.update()

    def done(self, estimate: GradientEstimate) -> None:
        """Say how the estimate ended.

        Args:
            estimate: The estimate.
        """
        limits = [estimate[key].limit(self._ranks[key]) for key in estimate]
        limits = [limit for limit in limits if not math.isnan(limit)]
        reached = f", alignment limit {statistics.median(limits):.2f} (median)" if limits else ""
        plain = len(estimate.missing)
        left = f"; {plain} start as plain LoRA" if plain else ""
        self._say(
            f"LoRA-GA: done in {time.monotonic() - self._began:.0f} s: {_counted(len(estimate), 'gradient')} from "
            f"{_counted(estimate.batches, 'batch', 'es')}{reached}{left}"
        )

    def _say(self, line: str) -> None:
        if self._says:
            LOGGER.info(line)


def _counted(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}{ending * (number != 1)}"


# The runs at the best rate in docs/evidence.md have a product of steps and learning rate of at least 0.063.
LEAST_MOVE = 0.02


def note_short_run(config: LoraGAConfig, steps: int, rate: float) -> None:
    """Note that a run can hardly learn anything, because its steps and its learning rate are too few and too small.

    Under Adam a step moves a weight by about the learning rate. The bound is for the default size of the start, with
    which LoRA-GA has the learning rates of LoRA.

    Args:
        config: The settings of the start.
        steps: The optimizer steps of the run.
        rate: The peak learning rate.
    """
    if config.stable_gamma is None and config.scale == "stable" and 0 < steps * rate < LEAST_MOVE:
        LOGGER.info(
            f"LoRA-GA: {_counted(steps, 'step')} at a learning rate of {rate:g} move a weight of the adapter by at "
            f"most about {steps * rate:.2g}, often too little to learn anything (steps x rate was 0.06 or more in our "
            "best runs). Train longer, or raise the learning rate."
        )


def note_fewer_batches(config: LoraGAConfig, training_batches: int | None) -> LoraGAConfig:
    """The settings with the number of batches for a run, and a line if it is fewer than in a long run.

    Args:
        config: The settings.
        training_batches: How many batches training will read in all processes; None if that is not known.

    Returns:
        The settings, their `max_batches` resolved.
    """
    chosen = config.resolved(training_batches)
    if chosen.max_batches != config.resolved().max_batches:
        LOGGER.info(
            f"LoRA-GA: the run is short: training reads {_counted(training_batches or 0, 'batch', 'es')}. So the "
            f"estimate reads at most {chosen.max_batches} batches, not {BATCHES}, and each of them once. max_batches "
            "(--estimate_batches) sets another number"
        )
    return chosen

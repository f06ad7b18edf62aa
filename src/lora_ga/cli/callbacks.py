"""The callbacks that `lora-ga train` adds to Transformers' trainer."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lora_ga.adapter.optimizer_state import check_optimizer_state
from lora_ga.experiments.records.runs import write_json_atomically
from lora_ga.files import LABELS

# What a log entry says of a step → its name in messages.
MEASURED = {"loss": "training loss", "grad_norm": "norm of the gradient"}


def logged_seconds(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The seconds that estimate and training took up to the end of a history that `LossAndTimeLogger` wrote.

    Args:
        history: The log entries of a trainer.

    Returns:
        The seconds of "estimate" and "train"; empty if no entry has them.
    """
    entries = [entry["seconds"] for entry in history if "seconds" in entry]
    return dict(entries[-1]) if entries else {}


def diverged_at(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first log entry whose loss or gradient is not finite; None without one."""
    # A step's loss is that before its update: a gradient that is not finite is seen in the loss one step later.
    return next((entry for entry in history if not all(math.isfinite(entry.get(key, 0.0)) for key in MEASURED)), None)


class LossAndTimeLogger(TrainerCallback):
    """Logs the loss at every checkpoint and at the last step too, and adds the elapsed seconds to every log entry.

    A resumed trainer has lost the losses since the last log entry. With an entry at each checkpoint the loss curve of a
    resumed run is that of a run without interruption. The seconds let a resumed run report the time of both parts.
    A loss or gradient that is not finite ends the training, and no checkpoint of it is written.
    """

    def __init__(self, estimate_seconds: float) -> None:
        self._seconds = {"estimate": estimate_seconds, "train": 0.0}
        self._started = time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Reads the seconds of the part before an interruption."""
        self._seconds = logged_seconds(state.log_history) or self._seconds
        self._started = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks the trainer for a log entry at a checkpoint and at the last step."""
        if control.should_save or control.should_training_stop:
            control.should_log = True

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the seconds to the newest log entry, which every checkpoint holds, and ends a run that has diverged."""
        train = self._seconds["train"] + time.monotonic() - self._started
        state.log_history[-1]["seconds"] = {**self._seconds, "train": train}
        if diverged_at(state.log_history) is not None:
            control.should_training_stop = True
            control.should_save = control.should_evaluate = False  # each checkpoint is logged before it is written


class OptimizerGuard(TrainerCallback):
    """Refuses an optimizer state of another adapter, before the first step uses it."""

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Checks the state that the trainer has loaded."""
        check_optimizer_state(getattr(optimizer, "optimizer", optimizer))


def write_labels(adapter: Path, names: Sequence[str]) -> None:
    """Writes the names of the classes beside the adapter of a classifier.

    Not into a config.json: Transformers takes a folder with that file for a full model.

    Args:
        adapter: The adapter's folder.
        names: The names, in the order of the classes.
    """
    write_json_atomically(adapter / LABELS, dict(enumerate(names)))


class LabelsInCheckpoints(TrainerCallback):
    """Writes the names of the classes into each checkpoint, whose adapter has lost its classes without them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes them beside what the trainer has written."""
        write_labels(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", self._names)

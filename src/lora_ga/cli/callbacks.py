"""What the commands add to Transformers' training loop."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from lora_ga.adapter.load import check_optimizer_state


def spent(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of the estimate and of training up to the end of a history that `WholeCurve` has stamped; else empty."""
    stamps = [entry["seconds"] for entry in history if "seconds" in entry]
    return dict(stamps[-1]) if stamps else {}


class WholeCurve(TrainerCallback):
    """Logs the loss at every checkpoint and at the last step too, and the time it took.

    Trainer forgets the losses since the last log when it resumes: with a log at each checkpoint the curve of a broken
    run is that of an unbroken one. The times let a resumed run say what both parts took together.
    """

    def __init__(self, estimate_seconds: float) -> None:
        self._spent = {"estimate": estimate_seconds, "train": 0.0}
        self._began = time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes over the times of the part before a break."""
        self._spent = spent(state.log_history) or self._spent
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for a log where one is needed."""
        if control.should_save or control.should_training_stop:
            control.should_log = True

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stamps the newest entry of the history, which every checkpoint holds."""
        train = self._spent["train"] + time.monotonic() - self._began
        state.log_history[-1]["seconds"] = {**self._spent, "train": train}


class OptimizerGuard(TrainerCallback):
    """Refuses an optimizer state that belongs to another adapter, before the first step uses it."""

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Checks the state that Trainer has loaded."""
        check_optimizer_state(getattr(optimizer, "optimizer", optimizer))

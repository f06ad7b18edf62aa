"""The peak learning rate of a trainer's run: what its optimizer and its schedule have, and how they get another one."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lora_ga.adapter.rate import check_batches
from lora_ga.adapter.trials import is_of_adam
from lora_ga.gradients.progress import LOGGER
from lora_ga.gradients.reader import known_length
from lora_ga.integrations.trainer_data import restarts


class PeakRate:
    """The peak learning rate of a trainer, before its first step.

    Every group of the optimizer's parameters has a peak. The rate is the one that the optimizer was made with, and the
    peaks of the groups are multiples of it; if no group has it, the rate is the highest peak.
    """

    def __init__(self, trainer: Any, optimizer: Any, schedule: Any) -> None:
        """Read and set the rate of `trainer`, with the optimizer and the schedule that its events have."""
        self.trainer = trainer
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.schedule = getattr(schedule, "scheduler", schedule)

    @property
    def of_groups(self) -> list[float]:
        """The peak of each group."""
        return [float(group.get("initial_lr", group["lr"])) for group in self.optimizer.param_groups]

    @property
    def rate(self) -> float:
        """The rate; that of the trainer's arguments where the optimizer is not of the Adam family."""
        if not is_of_adam(self.optimizer):
            return float(self.trainer.args.learning_rate)
        peaks = [peak for _, peak in self._filled_groups()]
        own = float(self.optimizer.defaults["lr"])
        return own if own in peaks else max(peaks, default=own)

    def check(self) -> None:
        """Refuse an optimizer for which `find_rate` is not made, and a schedule whose rate cannot be changed.

        Raises:
            ValueError: The optimizer is not one of the Adam family, the schedule is no `LambdaLR`, or the rate is 0.
        """
        if not is_of_adam(self.optimizer):
            raise ValueError(
                f'LoraGACallback(learning_rate="auto") is for AdamW and its relatives, but the optimizer is '
                f"{type(self.optimizer).__name__}. Leave it out and give the trainer a learning_rate."
            )
        if not self.rate > 0:
            raise ValueError(
                f'LoraGACallback(learning_rate="auto") keeps the ratios of the rates of parameter groups, but the '
                f"learning_rate of the optimizer is {self.rate}. Give the trainer, or the optimizer that you made for "
                "it, one above 0."
            )
        if not isinstance(self.schedule, LambdaLR):
            raise ValueError(
                f'LoraGACallback(learning_rate="auto") cannot change the rate of a {type(self.schedule).__name__}. Use '
                "linear, cosine or another schedule of Transformers, or call lora_ga.find_rate and give its rate to "
                "the trainer."
            )

    def optimizer_of_trials(self, model: nn.Module) -> Callable[[float], Optimizer] | None:
        """What makes the optimizers of a search, so that it tries the rates that the groups will have in training.

        Args:
            model: The model that trains.

        Returns:
            A function from a rate to a new optimizer of the same class, settings and groups. None where one rate is
            for all that trains: `find_rate` has an optimizer for that.

        Raises:
            ValueError: The class needs more than its groups and settings to make another optimizer.
        """
        groups, rate, kind = self._filled_groups(), self.rate, type(self.optimizer)
        held = {id(parameter) for group, _ in groups for parameter in group["params"]}
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        if trained <= held and all(peak == rate for _, peak in groups):
            return None
        accepted = inspect.signature(kind).parameters
        settings = {name: value for name, value in self.optimizer.defaults.items() if name in accepted}

        def made(tried: float) -> Optimizer:
            return kind([{**group, "lr": tried * (peak / rate)} for group, peak in groups], **settings | {"lr": tried})

        try:
            made(rate)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f'LoraGACallback(learning_rate="auto") cannot make a second {kind.__name__} with the groups of the '
                f"trainer's, whose learning rates differ ({error}). Call lora_ga.find_rate(..., optimizer=lambda rate: "
                "...) before the trainer is made, and give its rate to the trainer's optimizer."
            ) from error
        return made

    def of_groups_at(self, rate: float) -> list[float]:
        """The peak of each group at another rate: the ratios between the groups stay.

        Args:
            rate: The rate.

        Returns:
            The peaks.
        """
        own = self.rate
        return [rate * (peak / own) for peak in self.of_groups]

    def set(self, rate: float, of_groups: Sequence[float], steps: int) -> dict[str, Any]:
        """Give the optimizer, the schedule and the trainer's arguments a rate.

        Args:
            rate: The rate.
            of_groups: The peak of each group.
            steps: The optimizer steps of the run.

        Returns:
            What `restore` needs.

        Raises:
            ValueError: The schedule cannot begin at the rate.
        """
        factors = self._schedule_at(rate, of_groups, steps)
        self.trainer.args.learning_rate = rate
        self.optimizer.defaults["lr"] = rate
        for group, peak, factor in zip(self.optimizer.param_groups, of_groups, factors, strict=True):
            group["initial_lr"] = peak
            group["lr"] = _like(group["lr"], peak * factor(self.schedule.last_epoch))
        self.schedule.base_lrs = list(of_groups)
        self.schedule.lr_lambdas = factors
        self.schedule._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        return {"rate": rate, "of_groups": list(of_groups)}

    def restore(self, found: dict[str, Any], steps: int) -> None:
        """Give a resumed run the rate that was found, also where the checkpoint has no state of the optimizer.

        Args:
            found: What `set` has returned.
            steps: The optimizer steps of the run.

        Raises:
            ValueError: The optimizer has other groups than in the run that is resumed, or as `check` and `set`.
        """
        if len(found["of_groups"]) != len(self.of_groups):
            raise ValueError(
                f"The checkpoint has learning rates for {len(found['of_groups'])} groups of parameters, but the "
                f"optimizer has {len(self.of_groups)}. Give the trainer the optimizer of the first run, or resume with "
                f"LoraGACallback() and a learning rate of your own; {found['rate']:g} was found."
            )
        self.check()
        self.set(found["rate"], found["of_groups"], steps)

    def _filled_groups(self) -> list[tuple[dict[str, Any], float]]:
        """The groups that hold parameters, each with its peak."""
        groups = zip(self.optimizer.param_groups, self.of_groups, strict=True)
        return [(group, peak) for group, peak in groups if group["params"]]

    def _schedule_at(self, rate: float, of_groups: Sequence[float], steps: int) -> list[Callable[[int], float]]:
        """For each group what the schedule makes of its peak: step → factor.

        Some schedules have a last rate as a number, which is another part of another peak. So the trainer makes its
        schedule again, for a stand-in of its optimizer. One that the trainer was given keeps its shape.

        Returns:
            The functions.

        Raises:
            ValueError: The schedule cannot begin at the rate.
        """
        if not self.trainer._created_lr_scheduler:
            return self.schedule.lr_lambdas
        twin: Any = copy.copy(self.trainer)
        twin.args = copy.copy(self.trainer.args)
        twin.args.learning_rate = rate
        twin.optimizer = SGD([{"params": [torch.zeros(1)], "lr": peak} for peak in of_groups], rate)
        twin.lr_scheduler = None
        try:
            made = twin.create_scheduler(num_training_steps=steps, optimizer=twin.optimizer)
        except ValueError as error:
            raise ValueError(
                f"The search found the learning rate {rate:g}, but the schedule cannot begin at it ({error}). Change "
                "TrainingArguments(lr_scheduler_kwargs=...), or use another lr_scheduler_type."
            ) from error
        return made.lr_lambdas

    def note_given_schedule(self, rate: float) -> None:
        """Say that a schedule which the trainer was given keeps its shape at another rate.

        Args:
            rate: The rate that was found.
        """
        if not self.trainer._created_lr_scheduler:
            LOGGER.info(
                f"LoRA-GA: the trainer was given its schedule, which now begins at {rate:g} instead of {self.rate:g}. "
                "All its rates are multiplied alike, also a last rate that was given as a number"
            )


def _like(old: Any, value: float) -> Any:
    """A number, as a tensor where the old one is a tensor."""
    return torch.full_like(old, value) if isinstance(old, torch.Tensor) else value


def check_data_of_search(loader: Any, batches: Any, accumulation: int) -> None:
    """Refuse batches that a search cannot read again after the estimate, or that are too few for it.

    Args:
        loader: The loader of training.
        batches: The batches that the callback was given in its place, or None.
        accumulation: Batches in one optimizer step.

    Raises:
        ValueError: They are.
    """
    if batches is not None and not (restarts(batches) and restarts(getattr(batches, "dataset", None))):
        raise ValueError(
            f'LoraGACallback(batches=..., learning_rate="auto"): the batches are a {type(batches).__name__}, which may '
            "not restart since it is or holds an iterator. The estimate and the search for a learning rate both read "
            "them from the beginning. Give a list of batches, or an iterable whose __iter__ begins anew."
        )
    count = known_length(loader if batches is None else batches)
    if count is not None:
        check_batches(count, accumulation)


def found_rate(state: Any, callback: Any) -> dict[str, Any] | None:
    """What a checkpoint says of the rate that its run has found.

    Args:
        state: The trainer's state, read from the checkpoint.
        callback: The callback that has found it, or one like it: of its class and for its adapter.

    Returns:
        What `PeakRate.set` has returned; None if the run has found no rate, or is of an earlier version.
    """
    saved = state.stateful_callbacks.get(type(callback).__name__, [])
    for entry in saved if isinstance(saved, list) else [saved]:
        if entry["args"]["adapter_name"] == callback.adapter_name and entry["attributes"]["_found"] is not None:
            return dict(entry["attributes"]["_found"])
    return None

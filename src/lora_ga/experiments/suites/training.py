"""The training loop of all methods: linear warm-up, cosine decay, the same data order. Most methods use AdamW."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import get_cosine_schedule_with_warmup

from lora_ga.experiments.methods.base import Batch, BuildInputs, Method
from lora_ga.experiments.suites.spec import Settings
from lora_ga.experiments.tasks.prepared import HEADS, PreparedTask
from lora_ga.gradients.loss import label_tokens

WINDOW, EXPLODED = 10, 10.0  # diverged: the mean of the last WINDOW losses exceeds EXPLODED times the first


class DivergedError(Exception):
    """The training loss is not finite, or many times what it was at the start."""


@dataclass
class Curves:
    """The curves of a run.

    Attributes:
        training: The task's loss on each step's batch, before the step.
        report: Step and metrics on the reported split.
    """

    training: list[float] = field(default_factory=list)
    report: list[dict[str, float]] = field(default_factory=list)


def to_device(device: str, batch: Batch) -> Batch:
    """Moves a batch to the device, without waiting for what a CUDA device was given to do before."""
    return {name: tensor.to(device, non_blocking=device.startswith("cuda")) for name, tensor in batch.items()}


def measured(prepared: PreparedTask, model: Any, split: str, device: str) -> dict[str, float]:
    """Computes the metrics on a split, in evaluation mode.

    Returns:
        Name → value.

    Raises:
        DivergedError: A metric is not finite.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        batches = (to_device(device, batch) for batch in prepared.splits[split])
        with autocast(model, device):
            values = prepared.measure((model(**batch).logits, batch) for batch in batches)
    model.train(was_training)
    if not all(math.isfinite(value) for value in values.values()):
        raise DivergedError(f"the {split} split's metrics are not finite")
    return {name: round(value, 6) for name, value in values.items()}


def autocast(model: Any, device: str) -> Any:
    """The context of every forward pass: bfloat16 arithmetic if the model is in bfloat16."""
    half = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    half = half or getattr(model.config, "dtype", None) == torch.bfloat16
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half)


def keep_in_float32(model: Any) -> None:
    """Casts the trained parameters to float32, as bfloat16 would round most optimizer steps away."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def micro_batches(model: Any, batch: Batch, batch_size: int) -> list[tuple[Batch, float]]:
    """The batch of an optimizer step in parts of `batch_size` rows.

    Args:
        model: Decides which labels the loss counts.
        batch: The rows of an optimizer step.
        batch_size: Rows of one forward pass.

    Returns:
        Each part with its share of the labels over which the batch's loss is the mean.
    """
    rows = len(next(iter(batch.values())))
    if rows <= batch_size:
        return [(batch, 1.0)]
    cuts = [part.tolist() for part in torch.arange(rows).split(batch_size)]
    pieces = [{name: tensor[cut] for name, tensor in batch.items()} for cut in cuts]
    terms = [label_tokens(model, piece) or 0.0 for piece in pieces]
    return [(piece, count / sum(terms)) for piece, count in zip(pieces, terms, strict=True) if count]


def accumulate_gradients(prepared: PreparedTask, model: Any, batch: Batch, settings: Settings, device: str) -> float:
    """Accumulates the gradient of a batch; returns the task's loss on it."""
    total = 0.0
    for part, share in micro_batches(model, batch, settings.batch_size):
        with autocast(model, device):
            output = model(**part)
        with torch.no_grad():
            total += share * prepared.loss(output.logits, part).item()
        if math.isfinite(total):
            (share * output.loss if share != 1.0 else output.loss).backward()
    return total


def parameter_groups(method: Method, model: Any, inputs: BuildInputs, head_rate: float) -> list[dict[str, Any]]:
    """The method's parameter groups, and a group for the new head with its own learning rate."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in named if HEADS & set(name.split("."))]
    apart = {id(p) for p in head}
    groups = [
        group | {"params": [p for p in group["params"] if id(p) not in apart]} for group in method.groups(model, inputs)
    ]
    groups.append({"params": head, "lr": head_rate})
    return [group for group in groups if group["params"]]


def check_loss(losses: Sequence[float]) -> None:
    """Ends a run that has diverged.

    Raises:
        DivergedError: The last loss is not finite, or the losses have exploded.
    """
    if not math.isfinite(losses[-1]):
        raise DivergedError(f"the training loss is {losses[-1]} at step {len(losses)}")
    recent = statistics.fmean(losses[-WINDOW:])
    if len(losses) >= WINDOW and recent > EXPLODED * losses[0]:
        raise DivergedError(f"the training loss is {recent:.4g} at step {len(losses)}, it began at {losses[0]:.4g}")


class Loop:
    """What a training loop does for one run beside the forward and the backward pass."""

    def __init__(
        self,
        prepared: PreparedTask,
        method: Method,
        model: Any,
        inputs: BuildInputs,
        settings: Settings,
        device: str,
        curves: Curves,
    ) -> None:
        """Keeps what trains in float32, and makes the optimizer and the schedule.

        Args:
            prepared: The data and the loss.
            method: Gives the parameter groups, the optimizer, and a function to call after each step.
            model: The model that the method built.
            inputs: What the method built it from.
            settings: The settings of the run.
            device: A torch device.
            curves: Filled during training, so that a run that diverges leaves its first losses.
        """
        self.prepared, self.method, self.model, self.curves = prepared, method, model, curves
        self.settings, self.device = settings, device
        keep_in_float32(model)
        self.optimizer = method.optimizer(parameter_groups(method, model, inputs, settings.head_rate), inputs)
        warmup = round(settings.warmup * settings.steps)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, warmup, settings.steps)

    def begin(self) -> None:
        """Puts the model into training mode, and evaluates it if its curve is wanted."""
        self.model.train()
        if self.settings.eval_steps < self.settings.steps:  # otherwise only the end is evaluated
            self._evaluate(0)

    def batch(self) -> Batch:
        """The next training batch, on the device."""
        return to_device(self.device, next(self.prepared.train_batches))

    def note(self, loss: float) -> None:
        """Records the loss of a step.

        Raises:
            DivergedError: The run has diverged.
        """
        self.curves.training.append(round(loss, 5))
        check_loss(self.curves.training)

    def update(self, step: int) -> None:
        """Takes the optimizer's step with the number `step`, from 1.

        Raises:
            DivergedError: The optimizer refuses a gradient that is not finite.
        """
        try:
            self.optimizer.step()
        except FloatingPointError as error:
            raise DivergedError(f"a gradient is not finite at step {step}") from error
        self.method.after_step(self.model, step)
        self.schedule.step()

    def evaluate_if_due(self, step: int) -> None:
        """Evaluates the model on the report split, every `eval_steps` and at the end."""
        if step % self.settings.eval_steps == 0 or step == self.settings.steps:
            self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        self.curves.report.append({"step": step, **measured(self.prepared, self.model, "report", self.device)})


def train(loop: Loop) -> None:
    """Trains the model of one run."""
    loop.begin()
    for step in range(1, loop.settings.steps + 1):
        loop.note(accumulate_gradients(loop.prepared, loop.model, loop.batch(), loop.settings, loop.device))
        loop.update(step)
        loop.optimizer.zero_grad()
        loop.evaluate_if_due(step)

"""What a method is given, and what it has to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class BuildInputs:
    """What a method makes its model of.

    Attributes:
        base: A fresh base model, in which no parameter has been changed.
        batches: Rows put aside for starts that look at data.
        targets: Names of the layers that adapters adapt, the same for all methods.
        task_type: PEFT's; decides that a classification head is trained.
        rank: r.
        alpha: α.
        steps: Steps of the whole run.
        rate: The learning rate.
        seed: Of every draw.
        options: Of the method, complete.
    """

    base: nn.Module
    batches: Sequence[Batch]
    targets: Sequence[str]
    task_type: str
    rank: int
    alpha: float
    steps: int
    rate: float
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def lora(self, **changes: Any) -> LoraConfig:
        """The configuration of plain LoRA, with what the method changes."""
        settings = {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.targets),
            "task_type": self.task_type,
        }
        return LoraConfig(**(settings | changes))


def no_action(model: Any, step: int) -> None:
    """Most methods do nothing between the steps."""


def one_rate(model: Any, inputs: BuildInputs) -> list[dict[str, Any]]:
    """All that is trained, at one rate."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": inputs.rate}]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        build: Makes the model that is trained.
        options: Name → default; a suite file may change these and no others.
        groups: Parameter groups for AdamW. A new head is taken out of them: it has a rate of its own.
        after_step: Called with the model and the number of steps done after each step, while gradients are there.
    """

    build: Callable[[BuildInputs], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: Callable[[Any, BuildInputs], list[dict[str, Any]]] = one_rate
    after_step: Callable[[Any, int], None] = no_action

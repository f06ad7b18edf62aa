"""The interface of a method: what it gets, and what it defines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class BuildInputs:
    """What a method builds its model from.

    Attributes:
        base: The base model, unchanged.
        batches: Batches for initialisations that read data.
        targets: Names of the adapted layers, the same for all methods.
        task_type: PEFT's name for the kind of task; with "SEQ_CLS" PEFT trains the new head.
        rank: The rank r.
        alpha: LoRA's α.
        steps: Optimizer steps of the run.
        rate: The learning rate.
        seed: Seed of everything that the method draws.
        options: All options of the method.
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
        """PEFT's configuration of plain LoRA, with the changes of the method."""
        settings = {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.targets),
            "task_type": self.task_type,
        }
        return LoraConfig(**(settings | changes))


def no_action(model: Any, step: int) -> None:
    """The default of `after_step`: does nothing."""


def never(options: Mapping[str, Any]) -> bool:
    """The default of `alone`: a stack can train the method's models."""
    return False


def always(options: Mapping[str, Any]) -> bool:
    """For `alone`: a stack can train none of the method's models."""
    return True


def one_rate(model: Any, inputs: BuildInputs) -> list[dict[str, Any]]:
    """The default of `groups`: one group with all trainable parameters."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": inputs.rate}]


def adamw(groups: list[dict[str, Any]], inputs: BuildInputs) -> torch.optim.Optimizer:
    """The default of `optimizer`: AdamW without weight decay."""
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    Attributes:
        build: Builds the model to train.
        options: Name → default, of every option that a suite file may set.
        groups: Returns the parameter groups for the optimizer. The training loop moves a new head into another group.
        optimizer: Makes the optimizer of the parameter groups.
        after_step: Called after each optimizer step, before the gradients are reset, with the model and the number of
            steps done.
        alone: Whether a stack cannot train the method's models (`check_member` of `suites/stack.py`), as far as all
            options of the method decide it.
    """

    build: Callable[[BuildInputs], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: Callable[[Any, BuildInputs], list[dict[str, Any]]] = one_rate
    optimizer: Callable[[list[dict[str, Any]], BuildInputs], torch.optim.Optimizer] = adamw
    after_step: Callable[[Any, int], None] = no_action
    alone: Callable[[Mapping[str, Any]], bool] = never

    def runs_alone(self, options: Mapping[str, Any]) -> bool:
        """Whether it is known before a model is built that no stack can train it.

        Args:
            options: All options of the method.

        Returns:
            True if none can; False if only the built model tells.
        """
        return self.after_step is not no_action or self.alone(options)

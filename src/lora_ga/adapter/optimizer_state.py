"""Whether the state of an optimizer fits the parameters of a loaded adapter."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lora_ga.adapter.save import FILE
from lora_ga.layers.kinds import entries, weight_of

# The parts of an optimizer's state that have the shape of the parameter, in Adam, AdamW, SGD and similar optimizers.
SAME_SHAPE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def check_saved_optimizer(folder: Path, trained: Iterable[Tensor]) -> None:
    """Refuse a checkpoint without a sidecar whose optimizer state is that of LoRA-GA's structure.

    Args:
        folder: The checkpoint; nothing happens if it holds no optimizer state.
        trained: The parameters that are to train.

    Raises:
        ValueError: The state has other shapes than the parameters.
    """
    if not (folder / "optimizer.pt").is_file():
        return
    states = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")["state"].values()
    shapes = {tuple(state[key].shape) for state in states for key in SAME_SHAPE if key in state}
    if others := shapes - {tuple(parameter.shape) for parameter in trained}:
        raise ValueError(
            f"{folder}: {FILE} is missing, so the adapter would train as a plain LoRA, every row of its full rank; "
            f"but the optimizer state beside it has other shapes ({min(others)}): it belongs to "
            "LoRA-GA's structure. Put the sidecar back, or remove optimizer.pt to train as plain LoRA."
        )


def check_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose loaded state has other shapes than its parameters.

    Some optimizers end the process without an error message when they step with such a state.

    Args:
        optimizer: An optimizer (or Accelerate's wrapper of one) after its state has been loaded.

    Raises:
        ValueError: A state does not have its parameter's shape.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _check_state(optimizer.state.get(parameter, {}), parameter)


def _check_state(state: Mapping[str, Any], parameter: Tensor) -> None:
    """Refuse an optimizer state whose tensors have other shapes than the parameter.

    Raises:
        ValueError: There is such a tensor.
    """
    for key in SAME_SHAPE:
        if key in state and state[key].shape != parameter.shape:
            raise ValueError(
                f"The optimizer's {key} is {tuple(state[key].shape)}, its parameter {tuple(parameter.shape)}: the "
                f"state of a LoRA-GA run (rank r) does not fit a plain rank-2r adapter. With {FILE} in the checkpoint "
                "lora_ga.load(base, checkpoint, is_trainable=True) restores the structure; without it, begin with a "
                "new optimizer state."
            )


def check_first_steps(model: nn.Module, adapter_name: str) -> None:
    """Check the optimizer states of a plain adapter's A and B at the first step of each optimizer that has them.

    An optimizer's state may be loaded after the adapter, and torch calls the hooks of all optimizers. This hook holds
    the model weakly, looks at the states of its A and B alone, and is removed with the model.
    """
    checked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
    reference = weakref.ref(model)

    def check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        loaded = reference()
        if loaded is None or optimizer in checked:
            return
        layers = [module for module in loaded.modules() if isinstance(module, LoraLayer) and adapter_name in module.r]
        for parameter in (weight_of(entry) for layer in layers for entry in entries(layer, adapter_name)):
            _check_state(optimizer.state.get(parameter, {}), parameter)
        checked.add(optimizer)

    weakref.finalize(model, register_optimizer_step_pre_hook(check).remove)

"""`initialize`: estimate the gradients and apply the estimate, in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lora_ga.adapter.undo import base_kept
from lora_ga.adapter.write import write_starts
from lora_ga.config import LoraGAConfig
from lora_ga.gradients.estimate import estimate_gradients
from lora_ga.gradients.loss import LossFunction
from lora_ga.gradients.result import GradientEstimate


def initialize(
    model: nn.Module,
    data: Iterable[Any] | GradientEstimate,
    config: LoraGAConfig = LoraGAConfig(),  # noqa: B008 (frozen)
    *,
    loss_fn: LossFunction | None = None,
    adapter_name: str = "default",
    process_group: Any = None,
) -> GradientEstimate:
    """Initialise a LoRA adapter from the gradient of the weights it adapts.

    Implements "LoRA-GA: Low-Rank Adaptation with Gradient Approximation" (Wang, Yu, Li, NeurIPS 2024, arXiv
    2407.05000): the first step of the product s·B A is the best rank-2r approximation of full fine-tuning's step
    (Theorem 3.1). The model's function does not change.

    With torch.distributed all processes of the group have to call this, each with its share of the batches. All get the
    same adapter, bit for bit.

    Args:
        model: A model with a fresh LoRA adapter (a `PeftModel`, or one with an injected adapter, as `model.add_adapter`
            makes it), or a network that contains one; plain, in DistributedDataParallel, or sharded by FSDP2.
            Optimizers that hold its parameters stay valid.
        data: Batches (see `estimate_gradients`), or an estimate made before.
        config: The settings.
        loss_fn: `(model, batch) → loss` or `→ (loss, weight)`; by default `model(**batch).loss`.
        adapter_name: The adapter.
        process_group: As in `estimate_gradients`.

    Returns:
        The estimate that was applied.

    Raises:
        TypeError: There are no LoRA layers, the model is wrapped by FSDP 1, or `data` or `config` is of another type.
        RuntimeError: Another process failed, or can no longer be reached.
        ValueError: What `estimate_gradients` and `apply_estimate` refuse. The model is then unchanged.
    """
    if isinstance(data, GradientEstimate):
        write_starts(model, data, config, adapter_name, process_group, already_warned=())
        return data
    estimate = estimate_gradients(
        model, data, config, loss_fn=loss_fn, adapter_name=adapter_name, process_group=process_group
    )
    write_starts(model, estimate, config, adapter_name, process_group, already_warned=estimate.missing)
    return estimate


def get_lora_ga_model(
    base: nn.Module,
    peft_config: LoraConfig,
    data: Iterable[Any] | GradientEstimate,
    config: LoraGAConfig = LoraGAConfig(),  # noqa: B008 (frozen)
    *,
    loss_fn: LossFunction | None = None,
    process_group: Any = None,
) -> PeftModel:
    """`peft.get_peft_model` and `initialize` in one.

    Args:
        base: The pretrained model.
        peft_config: The adapter's settings.
        data: Batches, or an estimate made before.
        config: The settings of the start.
        loss_fn: As in `initialize`.
        process_group: As in `estimate_gradients`.

    Returns:
        The adapted model.

    Raises:
        ValueError: What `initialize` refuses. The base model then has no LoRA layers, as before.
    """
    with base_kept(base):
        model = get_peft_model(base, peft_config)
        initialize(model, data, config, loss_fn=loss_fn, process_group=process_group)
    return model

"""LoRA+ (Hayou, Ghosh, Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024): B learns faster than A."""

from typing import Any

import torch
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer

from lora_ga.experiments.methods.base import BuildInputs, Method


def groups(model: Any, inputs: BuildInputs) -> list[dict[str, Any]]:
    """PEFT's parameter groups; the default ratio is the one that the authors recommend."""
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=inputs.rate, loraplus_lr_ratio=inputs.options["ratio"]
    )
    return [{"params": group["params"], "lr": group["lr"]} for group in optimizer.param_groups]


METHODS = {
    "lora_plus": Method(
        lambda inputs: get_peft_model(inputs.base, inputs.lora()), options={"ratio": 16.0}, groups=groups
    )
}

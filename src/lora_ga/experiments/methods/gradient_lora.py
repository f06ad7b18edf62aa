"""The ablation "+GA" of LoRA-GA (Wang, Yu, Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", 2024).

This is plain LoRA with B = 0, whose A has the gradient's leading input directions as rows. Their length is 1/√3, the
mean length of the rows of LoRA's random A.
"""

from typing import Any

import torch
from peft import get_peft_model

import lora_ga
from lora_ga.config import LoraGAConfig
from lora_ga.experiments.methods.base import BuildInputs, Method


def build(inputs: BuildInputs) -> Any:
    """Builds plain LoRA and replaces its A."""
    model = get_peft_model(inputs.base, inputs.lora(use_rslora=inputs.options["use_rslora"]))
    estimate = lora_ga.estimate_gradients(model, inputs.batches, LoraGAConfig(max_batches=None, seed=inputs.seed))
    modules = dict(model.get_base_model().named_modules())
    with torch.no_grad():
        for name, layer in estimate.items():
            weight = modules[name].lora_A["default"].weight
            weight.copy_(layer.V[:, : inputs.rank].mT / 3**0.5)
    return model


METHODS = {"gradient_lora": Method(build, options={"use_rslora": False})}

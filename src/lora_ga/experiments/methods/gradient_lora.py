"""The ablation "+GA": plain LoRA whose A points along the gradient's leading input directions, and B is zero.

The rows of A keep the length that LoRA's own have on average, 1/√3; only their directions differ.
"""

from typing import Any

import torch
from peft import get_peft_model

import lora_ga
from lora_ga.config import LoraGAConfig
from lora_ga.experiments.methods.base import BuildInputs, Method


def build(inputs: BuildInputs) -> Any:
    """Plain LoRA, its A written over."""
    model = get_peft_model(inputs.base, inputs.lora(use_rslora=inputs.options["use_rslora"]))
    estimate = lora_ga.estimate_gradients(model, inputs.batches, LoraGAConfig(max_batches=None, seed=inputs.seed))
    modules = dict(model.get_base_model().named_modules())
    with torch.no_grad():
        for name, layer in estimate.items():
            weight = modules[name].lora_A["default"].weight
            weight.copy_(layer.V[:, : inputs.rank].mT / 3**0.5)
    return model


METHOD = Method(build, options={"use_rslora": False})

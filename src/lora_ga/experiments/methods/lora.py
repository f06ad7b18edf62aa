"""LoRA (Hu and others, "LoRA: Low-Rank Adaptation of Large Language Models", 2021), PEFT's default.

`init_scale` multiplies the random A; it is a control for initialisations that are smaller than LoRA's.
"""

from typing import Any

import torch
from peft import get_peft_model

from lora_ga.experiments.methods.base import BuildInputs, Method


def build(inputs: BuildInputs, **changes: Any) -> Any:
    """Builds PEFT's adapters and multiplies A by `init_scale`."""
    model = get_peft_model(inputs.base, inputs.lora(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.mul_(inputs.options["init_scale"])
    return model


METHOD = Method(build, options={"init_scale": 1.0})

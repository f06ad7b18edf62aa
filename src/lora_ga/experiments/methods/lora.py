"""LoRA and the methods that PEFT makes of it by one setting."""

from typing import Any

import torch
from peft import get_peft_model

from lora_ga.experiments.methods.base import BuildInputs, Method, always


def build(inputs: BuildInputs, **changes: Any) -> Any:
    """Builds PEFT's adapters and multiplies A by `init_scale`, a control for initialisations smaller than LoRA's."""
    model = get_peft_model(inputs.base, inputs.lora(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.mul_(inputs.options["init_scale"])
    return model


SCALED = {"init_scale": 1.0}
METHODS = {
    # Hu and others, "LoRA: Low-Rank Adaptation of Large Language Models", 2021; PEFT's default.
    "lora": Method(build, options=SCALED),
    # Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023: s = α/√r.
    "rslora": Method(lambda inputs: build(inputs, use_rslora=True), options=SCALED),
    # Liu and others, "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.
    "dora": Method(lambda inputs: get_peft_model(inputs.base, inputs.lora(use_dora=True)), alone=always),
    # Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    # 2024: A and B are initialised with the leading singular directions of the weight.
    "pissa": Method(lambda inputs: get_peft_model(inputs.base, inputs.lora(init_lora_weights="pissa"))),
    # Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024: QR of the weight.
    "olora": Method(lambda inputs: get_peft_model(inputs.base, inputs.lora(init_lora_weights="olora"))),
}

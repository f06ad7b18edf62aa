"""LoRA-GA, this package's, with s = α/√r as in the paper.

`scale="reach"` has the library choose γ, for `reach`. `directions="random"` is the ablation "+SO": LoRA-GA's sizes of A
and B, but random orthonormal directions.
"""

from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model

import lora_ga
from lora_ga.config import LoraGAConfig
from lora_ga.experiments.methods.base import BuildInputs, Method
from lora_ga.gradients.result import GradientEstimate

# Written out, and not the library's defaults: a record must keep its meaning when those change.
SETTINGS = {
    "direction": "ArB2r",
    "scale": "stable",
    "stable_gamma": 16.0,
    "reach": 0.35,
    "estimator": "streaming",
    "oversample": 16,
    "power_steps": 0,
}


def configuration(inputs: BuildInputs) -> LoraGAConfig:
    """The library's settings from the options; all the rows that were put aside are read."""
    chosen = {name: inputs.options[name] for name in SETTINGS}
    if chosen["scale"] == "reach":
        chosen |= {"scale": "stable", "stable_gamma": None}
    return LoraGAConfig(**chosen, max_batches=None, seed=inputs.seed)


def random_directions(estimate: GradientEstimate, seed: int) -> GradientEstimate:
    """The estimate with its directions replaced by random orthonormal ones."""
    draws = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in estimate.items():
        u, v = (torch.linalg.qr(torch.randn(m.shape, generator=draws)).Q.to(m) for m in (layer.U, layer.V))
        layers[name] = replace(layer, U=u, V=v)
    return replace(estimate, layers=layers)


def build(inputs: BuildInputs) -> Any:
    """A rank-stabilised adapter, started."""
    model = get_peft_model(inputs.base, inputs.lora(use_rslora=inputs.options["use_rslora"]))
    config = configuration(inputs)
    estimate = lora_ga.estimate_gradients(model, inputs.batches, config)
    if inputs.options["directions"] == "random":
        estimate = random_directions(estimate, inputs.seed)
    lora_ga.apply_estimate(model, estimate, config)
    return model


METHOD = Method(build, options=SETTINGS | {"use_rslora": True, "directions": "gradient"})

"""LoRA-GA by this package (Wang, Yu, Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", 2024), s = α/√r.

With `scale="reach"` the library chooses γ by `reach`. `directions="random"` is the ablation "+SO": A and B have
LoRA-GA's sizes, but random orthonormal directions.
"""

from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model

import lora_ga
from lora_ga.config import LoraGAConfig
from lora_ga.experiments.methods.base import BuildInputs, Method
from lora_ga.gradients.result import GradientEstimate

# Fixed values instead of the library's defaults, so that records keep their meaning when those change.
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
    """The library's configuration from the options; it reads all batches."""
    chosen = {name: inputs.options[name] for name in SETTINGS}
    if chosen["scale"] == "reach":
        chosen |= {"scale": "stable", "stable_gamma": None}
    return LoraGAConfig(**chosen, max_batches=None, seed=inputs.seed)


def random_directions(estimate: GradientEstimate, seed: int) -> GradientEstimate:
    """Replaces the directions of an estimate by random orthonormal ones."""
    draws = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in estimate.items():
        u, v = (torch.linalg.qr(torch.randn(m.shape, generator=draws)).Q.to(m) for m in (layer.U, layer.V))
        layers[name] = replace(layer, U=u, V=v)
    return replace(estimate, layers=layers)


def build(inputs: BuildInputs) -> Any:
    """Builds a rank-stabilised adapter and initialises it."""
    model = get_peft_model(inputs.base, inputs.lora(use_rslora=inputs.options["use_rslora"]))
    config = configuration(inputs)
    estimate = lora_ga.estimate_gradients(model, inputs.batches, config)
    if inputs.options["directions"] == "random":
        estimate = random_directions(estimate, inputs.seed)
    lora_ga.apply_estimate(model, estimate, config)
    return model


METHODS = {"lora_ga": Method(build, options=SETTINGS | {"use_rslora": True, "directions": "gradient"})}

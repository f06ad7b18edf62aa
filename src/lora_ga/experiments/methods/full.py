"""Full fine-tuning: every weight is trained."""

from torch import nn

from lora_ga.experiments.methods.base import BuildInputs, Method


def build(inputs: BuildInputs) -> nn.Module:
    """The base model itself."""
    return inputs.base.requires_grad_(True)


METHOD = Method(build)

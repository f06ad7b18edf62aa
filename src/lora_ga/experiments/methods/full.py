"""Full fine-tuning of every weight."""

from torch import nn

from lora_ga.experiments.methods.base import BuildInputs, Method, always


def build(inputs: BuildInputs) -> nn.Module:
    """Returns the base model with all parameters trainable."""
    return inputs.base.requires_grad_(True)


METHODS = {"full": Method(build, alone=always)}

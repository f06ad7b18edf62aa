"""Full fine-tuning: every weight is trained."""

from torch import nn

from lora_ga.experiments.methods.base import Method, Work


def build(work: Work) -> nn.Module:
    """The base model itself."""
    return work.base.requires_grad_(True)


METHOD = Method(build)

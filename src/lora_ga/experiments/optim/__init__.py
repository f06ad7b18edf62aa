"""Optimizers that step the product B A of a LoRA layer, for LoRA-GA and for plain LoRA. For experiments alone.

LoRA-GA aligns the first step with full fine-tuning's; under AdamW that is forgotten in some ten steps. These rules read
the values of A and B and both gradients, so that every step is one of the product. In the comparison that
`recipes/steps.yaml` makes none of them is better than AdamW so far. So they are no part of the public library, and may
change or go.

    optimizer = PoLoRA(param_groups(model), lr=0.03)
    trainer = Trainer(model=model, optimizers=(optimizer, None), ...)
"""

from lora_ga.experiments.optim.pairs import PairOptimizer, param_groups
from lora_ga.experiments.optim.rules import LoRAMuon, LoRATSD, PoLoRA, ScaledAdamW, ScaledSGD

__all__ = ["LoRAMuon", "LoRATSD", "PairOptimizer", "PoLoRA", "ScaledAdamW", "ScaledSGD", "param_groups"]

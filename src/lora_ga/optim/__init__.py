"""Optimizers that step the product B A of a LoRA layer, for LoRA-GA and for plain LoRA. Experimental.

LoRA-GA aligns the first step with full fine-tuning's; under AdamW that is forgotten in some ten steps. These rules read
the values of A and B and both gradients, so that every step is one of the product. They stay in the package if they win
the comparison that `recipes/steps.yaml` makes; until that is complete, they may change or go.

    optimizer = lora_ga.optim.PoLoRA(lora_ga.optim.param_groups(model), lr=0.03)
    trainer = Trainer(model=model, optimizers=(optimizer, None), ...)
"""

from lora_ga.optim.pairs import PairOptimizer, param_groups
from lora_ga.optim.rules import LoRAMuon, LoRATSD, PoLoRA, ScaledAdamW, ScaledSGD

__all__ = ["LoRAMuon", "LoRATSD", "PairOptimizer", "PoLoRA", "ScaledAdamW", "ScaledSGD", "param_groups"]

"""DoRA (Liu and others, "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024)."""

from peft import get_peft_model

from lora_ga.experiments.methods.base import Method

METHOD = Method(lambda inputs: get_peft_model(inputs.base, inputs.lora(use_dora=True)))
